// The C ABI: nothing but translation. Exceptions become statuses and the calling thread's error
// text.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "base/env.h"
#include "cpu/gemm.h"
#include "cpu/launch.h"
#include "cuda/engine/engine.h"
#include "cuda/launch/device_info.h"
#include "cuda/launch/link.h"
#include "engine/check.h"
#include "engine/cuda_call.h"
#include "engine/cuda_peers.h"
#include "fabric/group.h"

#if !defined(FLASHMOE_VERSION)
#define FLASHMOE_VERSION "0.1.0"
#endif

using flashmoe::Error;
using flashmoe::fail;

// One rank of a group with everything it owns.
struct fm_group_s {
  fm_group_s(std::unique_ptr<flashmoe::fabric::Fabric> fabric, int32_t rank, int32_t world,
             const flashmoe::fabric::GroupOptions& options,
             const std::shared_ptr<flashmoe::cuda::RankGroup>& local_ranks)
      : group(std::move(fabric), rank, world, options), cuda(rank, ranks_of(group, local_ranks)) {
    if (world > 1) group.on_abort([this] { cuda.ranks().stop(group.rank()); });
  }

  // local_ranks: those of this process; null: the ranks are processes.
  static std::shared_ptr<flashmoe::cuda::RankGroup> ranks_of(
      flashmoe::fabric::Group& group,
      const std::shared_ptr<flashmoe::cuda::RankGroup>& local_ranks) {
    if (group.world() == 1) return nullptr;
    if (local_ranks != nullptr) return local_ranks;
    return flashmoe::cuda::make_process_ranks(flashmoe::engine::make_cuda_peers(group));
  }

  flashmoe::fabric::Group group;
  flashmoe::cpu::Workspace workspace;
  flashmoe::cpu::ThreadPool pool;
  flashmoe::cuda::Engine cuda;
  // Until a launch has ended well `stats` is of none.
  void forget_launch() {
    stats = {};
    last_on_cuda = false;
  }

  fm_stats stats{};
  // Where the operands of the last call were: how peers learn of a refusal.
  std::atomic<bool> is_on_cuda{false};
  bool last_on_cuda = false;  // the launch that `stats` is of
};

namespace {

thread_local std::string last_error;

// Runs `body` and turns what it throws into a status.
template <class Body>
fm_status guarded(Body&& body) {
  try {
    body();
    return FM_OK;
  } catch (const Error& error) {
    last_error = error.what();
    return error.status();
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return FM_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error = std::string("internal error: ") + error.what();
    return FM_INTERNAL;
  } catch (...) {
    last_error = "internal error";
    return FM_INTERNAL;
  }
}

// A struct of the caller's version as one of ours: missing fields are zero. A size that is no
// multiple of the alignment would end inside a field.
template <class Struct>
Struct take_versioned(const Struct* given, const char* name) {
  if (given == nullptr) fail(FM_INVALID_VALUE, name, " is null");
  const uint32_t size = given->struct_size;
  if (size == 0 || size > sizeof(Struct) || size % alignof(Struct) != 0) {
    fail(FM_VERSION_MISMATCH, name, ".struct_size is ", size, ", flashmoe ", FLASHMOE_VERSION,
         " knows ", sizeof(Struct), "; set it to sizeof(", name,
         ") and build with the header of the library that is loaded");
  }
  Struct taken{};
  std::memcpy(static_cast<void*>(&taken), given, given->struct_size);
  return taken;
}

// Where a result goes.
template <class Out>
Out& take_out(Out* given, const char* name) {
  if (given == nullptr) fail(FM_INVALID_VALUE, name, " is null: the result needs a place");
  return *given;
}

fm_group_s& take_group(fm_group group) {
  if (group == nullptr) fail(FM_INVALID_VALUE, "group is null");
  return *group;
}

flashmoe::fabric::GroupOptions default_options() {
  return {.timeout_seconds = flashmoe::env_timeout_seconds()};
}

void check_world(int32_t world) {
  if (world < 1 || world > flashmoe::plan::kMaxWorld) {
    fail(FM_INVALID_VALUE, "world is ", world, ", expected 1..", flashmoe::plan::kMaxWorld);
  }
}

// Peers' launches on CUDA wait on the device, where nobody reads a reason: they are ended.
void refuse_on_cuda(flashmoe::fabric::Group& group, const std::string& reason) {
  if (group.world() == 1) return;
  group.abort(FM_MISMATCH, "rank " + std::to_string(group.rank()) + " refused the call: " + reason);
}

// This rank's part in the launch that its peers are in.
void refuse_on_cpu(fm_group_s& g, const char* reason) {
  if (g.group.world() > 1) g.forget_launch();
  flashmoe::cpu::refuse_call(g.group, reason);
}

// The caller must see its own error, whatever becomes of telling the peers.
void tell_refusal(fm_group_s& g, const char* reason) {
  if (g.is_on_cuda) {
    refuse_on_cuda(g.group, reason);
    return;
  }
  try {
    refuse_on_cpu(g, reason);
  } catch (const Error&) {
    g.group.abort(FM_MISMATCH, reason);  // the peers are not in reach of an orderly refusal
  }
}

// What `check` gives; a call that it refuses is announced to the peers.
template <class Check>
auto checked(fm_group_s& g, Check&& check) {
  try {
    return check();
  } catch (const Error& error) {
    tell_refusal(g, error.what());
    throw;
  }
}

// What `body` gives; what it throws names the layer, if that has a number.
template <class Body>
auto naming(const fm_layer& layer, Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    if (layer.layer_id == 0) throw;
    fail(error.status(), error.what(), " (layer ", layer.layer_id, ")");
  }
}

void launch_on_cpu(fm_group_s& g, const flashmoe::cpu::Call& call) {
  g.forget_launch();
  naming(call.layer, [&] { flashmoe::cpu::run_call(call, g.group, g.workspace, g.pool, g.stats); });
}

flashmoe::cuda::LaunchOptions cuda_options(flashmoe::fabric::Group& group) {
  return {.timeout_seconds = group.options().timeout_seconds, .max_sms = group.options().max_sms};
}

// Whoever stopped the group may have left a better reason than the launch knows, which may have
// more to say itself.
void raise_reason(fm_group_s& g, const Error& of_launch) {
  try {
    g.group.waiter().check_abort();
  } catch (const Error& reason) {
    if (std::strcmp(reason.what(), of_launch.what()) == 0) throw;
    fail(reason.status(), reason.what(), "; on this rank: ", of_launch.what());
  }
}

// Runs `body`, which may raise what launches of this rank have left. An error that leaves peers'
// launches without this rank stops the group.
template <class Body>
void on_cuda(fm_group_s& g, Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    if (g.group.world() == 1 || !g.cuda.breaks_group()) throw;
    if (error.status() == FM_ABORTED) {
      raise_reason(g, error);
      flashmoe::fabric::stop_owner(g.group.own_control(), error.status(), error.what());
    } else {
      g.group.abort(error.status(), "rank " + std::to_string(g.group.rank()) + ": " + error.what());
    }
    throw;
  }
}

// launch: of the CUDA engine.
template <class Launch>
void launch_on_cuda(fm_group_s& g, const Launch& launch) {
  g.forget_launch();
  g.group.waiter().check_abort();
  on_cuda(g, [&] { launch(cuda_options(g.group)); });
  g.last_on_cuda = true;
  g.stats.epoch = g.group.world() == 1 ? g.group.begin_epoch() : g.cuda.epoch();
  g.stats.scratch_bytes = g.stats.allocated_bytes = g.cuda.scratch_bytes();
  g.stats.symmetric_bytes = g.cuda.symmetric_bytes();
}

// Before a group goes: what its launches have still to report. That it was stopped is no news.
void finish_for_good(fm_group_s& g) {
  try {
    on_cuda(g, [&] { g.cuda.finish(); });
  } catch (const Error& error) {
    if (error.status() != FM_ABORTED) throw;
  }
}

// One forward, on the device where its operands are.
void run_forward(fm_group_s& g, const fm_layer* layer, const fm_forward_args* args) {
  const flashmoe::fabric::LaunchTurn turn(g.group);
  const auto known = checked(g, [&] { return take_versioned(layer, "fm_layer"); });
  const auto given = checked(g, [&] { return take_versioned(args, "fm_forward_args"); });
  g.is_on_cuda = checked(g, [&] { return flashmoe::engine::is_on_cuda(given.device_type); });
  if (g.is_on_cuda) {
    const auto call = checked(g, [&] {
      return naming(known,
                    [&] { return flashmoe::engine::make_cuda_forward(g.group, known, given); });
    });
    launch_on_cuda(g, [&](const auto& options) { g.cuda.forward(known, call, options); });
  } else {
    launch_on_cpu(g, checked(g, [&] {
                    return naming(known, [&] {
                      return flashmoe::engine::make_forward_call(g.group, known, given);
                    });
                  }));
  }
}

void run_backward(fm_group_s& g, const fm_layer* layer, const fm_backward_args* args) {
  const flashmoe::fabric::LaunchTurn turn(g.group);
  const auto known = checked(g, [&] { return take_versioned(layer, "fm_layer"); });
  const auto given = checked(g, [&] { return take_versioned(args, "fm_backward_args"); });
  g.is_on_cuda = checked(g, [&] { return flashmoe::engine::is_on_cuda(given.device_type); });
  if (g.is_on_cuda) {
    const auto call = checked(g, [&] {
      return naming(known,
                    [&] { return flashmoe::engine::make_cuda_backward(g.group, known, given); });
    });
    launch_on_cuda(g, [&](const auto& options) { g.cuda.backward(known, call, options); });
  } else {
    launch_on_cpu(g, checked(g, [&] {
                    return naming(known, [&] {
                      return flashmoe::engine::make_backward_call(g.group, known, given);
                    });
                  }));
  }
}

std::string explain(fm_group_s& g, const fm_layer& layer, const fm_forward_args& args) {
  const flashmoe::fabric::LaunchTurn turn(g.group);
  if (flashmoe::engine::is_on_cuda(args.device_type)) {
    const auto checked = flashmoe::engine::make_cuda_forward(g.group, layer, args);
    return g.cuda.explain(layer, checked, cuda_options(g.group));
  }
  const auto call = flashmoe::engine::make_forward_call(g.group, layer, args);
  const auto tiles = flashmoe::cpu::choose_tiles(call.problem);
  std::string text = "block: at most " + std::to_string(tiles.block.max_rows) + " rows";
  text += "\nup tile: " + std::to_string(tiles.up_width) + " intermediate columns";
  return text + "\ncolumn block: " + std::to_string(tiles.column_width) + " hidden columns";
}

void set_device(fm_group_s& g, double value) {
  if (g.group.world() == 1) {
    fail(FM_INVALID_VALUE, "device: a rank alone launches where its operands are");
  }
  g.cuda.ranks().set_device(g.group.rank(), static_cast<int32_t>(value));
}

void set_option(fm_group_s& g, const std::string& key, double value) {
  auto& group = g.group;
  auto& options = group.options();
  const bool few = key == "num_threads" || key == "max_sms" || key == "device";
  const bool whole = few || key == "epoch" || key == "stop_in_phase";
  const double most = few                      ? 1024.0
                      : key == "stop_in_phase" ? static_cast<double>(FM_PHASE_COMBINE) + 1
                                               : 4294967295.0;
  if (!(value >= 0 && value <= most) || (whole && value != std::floor(value))) {
    fail(FM_INVALID_VALUE, key, " is ", value, ", expected a ", whole ? "whole " : "",
         "number of 0..", static_cast<int64_t>(most));
  }
  if (key == "timeout_s") {
    options.timeout_seconds = value;
  } else if (key == "num_threads") {
    options.num_threads = static_cast<int>(value);
  } else if (key == "jitter_us") {
    options.jitter_us = value;
  } else if (key == "max_sms") {
    options.max_sms = static_cast<int>(value);
  } else if (key == "device") {
    set_device(g, value);
  } else if (key == "stop_in_phase") {
    options.stop_in_phase = static_cast<int>(value);
  } else if (key == "epoch") {
    const auto epoch = static_cast<flashmoe::plan::Epoch>(value);
    if (group.world() > 1) g.cuda.set_epoch(epoch);
    group.set_epoch(epoch);
  } else {
    fail(FM_INVALID_VALUE, "option '", key,
         "' is unknown; known are timeout_s, num_threads, max_sms, device, epoch, jitter_us, "
         "stop_in_phase");
  }
}

void reserve(fm_group_s& g, const fm_capacity& wanted) {
  constexpr int64_t kMost = int64_t{1} << 40;
  for (const auto& [name, value] :
       {std::pair{"max_tokens", wanted.max_tokens}, std::pair{"hidden", wanted.hidden},
        std::pair{"top_k", wanted.top_k}, std::pair{"num_experts", wanted.num_experts}}) {
    if (value < 0 || value > kMost) {
      fail(FM_INVALID_VALUE, name, " is ", value, ", expected 0 (as it is) to ", kMost);
    }
  }
  const int32_t world = g.group.world();
  if (world == 1) return;  // a rank alone has no symmetric memory
  g.group.waiter().check_abort();
  on_cuda(g, [&] {
    g.cuda.reserve({.tokens = wanted.max_tokens,
                    .hidden = wanted.hidden,
                    .top_k = wanted.top_k,
                    .local_experts = flashmoe::plan::ceil_div(wanted.num_experts, world)});
  });
}

}  // namespace

extern "C" {

fm_status fm_group_create_self(fm_group* out) { return fm_group_create_local(1, out); }

fm_status fm_group_create_local(int32_t world, fm_group* out) {
  return guarded([&] {
    check_world(world);
    take_out(out, "out");
    const auto options = default_options();
    auto fabrics = flashmoe::fabric::make_thread_fabrics(world);
    const auto ranks = flashmoe::cuda::make_local_ranks(world);
    std::vector<std::unique_ptr<fm_group_s>> made;
    for (int32_t rank = 0; rank < world; ++rank) {
      auto& fabric = fabrics[static_cast<size_t>(rank)];
      made.push_back(std::make_unique<fm_group_s>(std::move(fabric), rank, world, options, ranks));
    }
    for (auto& group : made) *out++ = group.release();
  });
}

fm_status fm_group_create_shm(const char* token, int32_t rank, int32_t world, fm_group* out) {
  return guarded([&] {
    check_world(world);
    take_out(out, "out");
    if (rank < 0 || rank >= world) {
      fail(FM_INVALID_VALUE, "rank is ", rank, ", expected 0..", world - 1);
    }
    const std::string name = token == nullptr ? "" : token;
    if (name.empty() || name.size() > 200 || name.find('/') != std::string::npos) {
      fail(FM_INVALID_VALUE, "token is '", name, "', expected 1..200 characters without '/'");
    }
    const auto options = default_options();
    auto fabric = flashmoe::fabric::make_shm_fabric(name, rank, world, options.timeout_seconds);
    auto made = std::make_unique<fm_group_s>(std::move(fabric), rank, world, options, nullptr);
    made->group.connect(made->group.waiter());
    *out = made.release();
  });
}

fm_status fm_group_destroy(fm_group group) {
  const std::unique_ptr<fm_group_s> last(group);
  return guarded([&] {
    if (last != nullptr) finish_for_good(*last);
  });
}

fm_status fm_group_rank(fm_group group, int32_t* rank, int32_t* world) {
  return guarded([&] {
    const auto& g = take_group(group).group;
    take_out(rank, "rank") = g.rank();
    take_out(world, "world") = g.world();
  });
}

fm_status fm_group_abort(fm_group group, const char* reason) {
  return guarded([&] {
    auto& g = take_group(group).group;
    g.abort(FM_ABORTED, "rank " + std::to_string(g.rank()) + ": " +
                            (reason == nullptr ? "abort() was called" : reason));
  });
}

fm_status fm_group_refuse(fm_group group, const char* reason) {
  return guarded([&] {
    auto& g = take_group(group);
    const flashmoe::fabric::LaunchTurn turn(g.group);
    const char* given = reason == nullptr ? "no reason given" : reason;
    if (g.is_on_cuda) {
      refuse_on_cuda(g.group, given);
    } else {
      refuse_on_cpu(g, given);
    }
  });
}

fm_status fm_group_set(fm_group group, const char* key, double value) {
  return guarded([&] {
    auto& g = take_group(group);
    const std::lock_guard lock(g.group.launch_mutex());
    set_option(g, key == nullptr ? "" : key, value);
  });
}

fm_status fm_group_reserve(fm_group group, const fm_capacity* capacity) {
  return guarded([&] {
    auto& g = take_group(group);
    const auto wanted = take_versioned(capacity, "fm_capacity");
    const flashmoe::fabric::LaunchTurn turn(g.group);
    reserve(g, wanted);
  });
}

fm_status fm_group_stats(fm_group group, fm_stats* out) {
  return guarded([&] {
    auto& g = take_group(group);
    const uint32_t size = take_versioned(out, "fm_stats").struct_size;
    const std::lock_guard lock(g.group.launch_mutex());
    on_cuda(g, [&] { g.cuda.finish(); });
    if (g.last_on_cuda) {
      g.cuda.time_last(g.stats);
      g.stats.symmetric_bytes = g.cuda.symmetric_bytes();
    }
    std::memcpy(static_cast<void*>(out), &g.stats, size);
    out->struct_size = size;
  });
}

fm_status fm_forward(fm_group group, const fm_layer* layer, const fm_forward_args* args) {
  return guarded([&] { run_forward(take_group(group), layer, args); });
}

fm_status fm_backward(fm_group group, const fm_layer* layer, const fm_backward_args* args) {
  return guarded([&] { run_backward(take_group(group), layer, args); });
}

fm_status fm_explain(fm_group group, const fm_layer* layer, const fm_forward_args* args,
                     const char** text) {
  return guarded([&] {
    take_out(text, "text");
    static thread_local std::string last;
    last = explain(take_group(group), take_versioned(layer, "fm_layer"),
                   take_versioned(args, "fm_forward_args"));
    *text = last.c_str();
  });
}

fm_status fm_z_rows(fm_group group, const fm_layer* layer, int64_t tokens, int64_t* rows) {
  return guarded([&] {
    const auto& g = take_group(group).group;
    const fm_layer known = take_versioned(layer, "fm_layer");
    flashmoe::engine::check_layer(known, g.world());
    flashmoe::plan::Problem problem;
    flashmoe::engine::check_tokens(tokens, known.top_k);
    problem.tokens = tokens;
    problem.hidden = known.hidden;
    problem.intermediate = known.intermediate;
    problem.num_experts = known.num_experts;
    problem.top_k = known.top_k;
    const auto rows_for =
        g.world() == 1 ? flashmoe::plan::max_z_rows : flashmoe::plan::ample_z_rows;
    take_out(rows, "rows") = rows_for(problem.slots(), problem.num_experts);
  });
}

fm_status fm_measure_link(int32_t device, int32_t peer, double* bytes_per_second,
                          double* flag_seconds) {
  return guarded([&] {
    const auto found = flashmoe::cuda::measure_link(device, peer);
    take_out(bytes_per_second, "bytes_per_second") = found.bytes_per_second;
    take_out(flag_seconds, "flag_seconds") = found.flag_seconds;
  });
}

const char* fm_last_error(void) { return last_error.c_str(); }

const char* fm_version(void) { return FLASHMOE_VERSION; }

const char* fm_build_info(void) {
  static const std::string text = [] {
    std::array<char, 512> cuda{};
    flashmoe::cuda::device_info(cuda.data(), cuda.size());
    return std::string("cpu: ") + flashmoe::cpu::gemm_library() + " | cuda: " + cuda.data();
  }();
  return text.c_str();
}

}  // extern "C"
