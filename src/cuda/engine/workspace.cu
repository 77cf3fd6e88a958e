#include "cuda/engine/workspace.h"

#include <algorithm>
#include <atomic>

#include "cuda/engine/agreement.h"
#include "cuda/fabric/rank_memory.h"
#include "cuda/launch/backward.h"
#include "cuda/launch/check.h"
#include "cuda/launch/device.h"
#include "cuda/launch/device_guard.h"
#include "cuda/sync/holder.h"

namespace flashmoe::cuda {
namespace {

using launch::check;
using launch::DeviceGuard;

[[noreturn]] void refuse_to_grow() {
  fail(
      FM_INVALID_VALUE,
      "the stream is being captured, and scratch for this layer has still to be allocated: run the "
      "layer once at this size before capturing it");
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusInvalidated) {
    fail(FM_INVALID_VALUE, "stream is in a graph capture that has failed; end it first");
  }
  return status == cudaStreamCaptureStatusActive;
}

// Looks at all that may refuse a workspace before it is made.
int checked_sms_of(int32_t device, cudaStream_t stream) {
  launch::check_device(device);
  const DeviceGuard guard(device);
  if (is_capturing(stream)) refuse_to_grow();
  return launch::attribute_of(device, cudaDevAttrMultiProcessorCount);
}

unsigned long long id_of(cudaStream_t stream) {
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
  return id;
}

uint64_t nanoseconds(double seconds) {
  constexpr double kMost = 1e18;  // 30 years
  return seconds > 0 ? static_cast<uint64_t>(std::min(seconds * 1e9, kMost)) : ~uint64_t{0};
}

template <class Args>
RankNeeds needs_of(const fm_layer& layer, const Args& args, int32_t world) {
  return {.tokens = args.x.shape[0],
          .hidden = layer.hidden,
          .top_k = layer.top_k,
          .local_experts = layer.num_experts / world};
}

// Whether the report is there, and then as a whole.
bool has_come(sync::WaitReport& report) {
  return std::atomic_ref(report.tag).load(std::memory_order_acquire) != 0;
}
sync::WaitReport read(sync::WaitReport& report) {
  return has_come(report) ? report : sync::WaitReport{};
}

bool has_ended(cudaEvent_t event) {
  const cudaError_t status = cudaEventQuery(event);
  if (status == cudaErrorNotReady) {
    cudaGetLastError();  // it is remembered as an error
    return false;
  }
  check(status, "cudaEventQuery of the last launch");
  return true;
}

}  // namespace

Workspace::Workspace(int32_t device, cudaStream_t stream)
    : device_(device), num_sms_(checked_sms_of(device, stream)), reports_(device), pool_(device) {
  const DeviceGuard guard(device_);
  try {
    check(cudaStreamCreateWithFlags(&own_stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreateWithFlags(&last_, cudaEventDisableTiming), "cudaEventCreate");
  } catch (const Error&) {
    release();
    throw;
  }
}

Workspace::~Workspace() { release(); }

// At the end of a process the driver may be gone before us: nothing here is checked.
void Workspace::release() noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  if (last_ != nullptr) cudaEventSynchronize(last_);
  pool_.give(scratch_.memory, own_stream_);
  for (const Scratch& one : retired_) pool_.give(one.memory, own_stream_);
  if (own_stream_ != nullptr) {
    cudaStreamSynchronize(own_stream_);  // then nothing of the pool is left
    cudaStreamDestroy(own_stream_);
  }
  if (last_ != nullptr) cudaEventDestroy(last_);
  cudaSetDevice(before);
  cudaGetLastError();
}

std::optional<Error> Workspace::raise_earlier(const RankView& view, bool capturing) {
  if (!is_time_to_raise(view, capturing)) return std::nullopt;
  const Verdict found = take_reports(view, capturing);
  if (found.failed) throw found.error;
  if (view.world() == 1) throw HarmlessError(found.error);
  return found.error;
}

template <class Args>
Workspace::Ranks Workspace::join(const fm_layer& layer, const Args& args,
                                 const LaunchOptions& options, const RankView& view,
                                 bool capturing) {
  Ranks ranks;
  launch::RankArguments& known = ranks.arguments;
  known.rank = view.rank;
  known.world = view.world();
  if (view.ranks == nullptr) {
    launch::check_supported(layer, args);
    return ranks;
  }
  // Before memory is made for it; as of a rank alone, whose z has as many rows as there can be.
  Args without_z = args;
  without_z.z = {};
  launch::check_supported(layer, without_z);
  ranks.memory = view.ranks->memory({view.rank, device_, options.max_sms, capturing},
                                    needs_of(layer, args, known.world));
  known.capacity = ranks.memory->capacity();
  known.regions = ranks.memory->regions();
  launch::check_supported(layer, args, known);
  // Not in the first backward: this rank's launches before it may wait for a rank that this thread
  // has still to call.
  if (!has_joined_) launch::load_backward();
  has_joined_ = true;
  return ranks;
}

template <class Arguments, class Args, class Bytes, class Launch>
Workspace::Launched Workspace::run(const fm_layer& layer, const Args& args,
                                   const LaunchOptions& options, const RankView& view,
                                   const Bytes& scratch_bytes, const Launch& launch) {
  const DeviceGuard guard(device_);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const bool capturing = is_capturing(stream);
  const std::optional<Error> notice = raise_earlier(view, capturing);
  const Ranks ranks = join(layer, args, options, view, capturing);
  begin_launch(scratch_bytes(layer, args, ranks.arguments), stream, options, capturing,
               view.world() == 1);
  Arguments arguments{.layer = layer, .operands = args};
  arguments.scratch = scratch_.memory;
  arguments.reports = &reports();
  arguments.timeout_ns = nanoseconds(options.timeout_seconds);
  arguments.max_sms = options.max_sms;
  arguments.ranks = ranks.arguments;
  arguments.launch_id = launch_id_;
  arguments.stream = stream;
  launch(arguments);
  if (capturing && ranks.memory != nullptr) ranks.memory->keep();
  end_launch(stream, capturing);
  return {capturing, notice};
}

Workspace::Launched Workspace::forward(const fm_layer& layer, const fm_forward_args& args,
                                       const LaunchOptions& options, const RankView& view) {
  const Launched made = run<launch::ForwardArguments>(
      layer, args, options, view, launch::forward_scratch_bytes, launch::launch_forward);
  last_kind_ = {.is_backward = false, .world = view.world()};
  return made;
}

Workspace::Launched Workspace::backward(const fm_layer& layer, const fm_backward_args& args,
                                        const LaunchOptions& options, const RankView& view) {
  const Launched made = run<launch::BackwardArguments>(
      layer, args, options, view, launch::backward_scratch_bytes, launch::launch_backward);
  last_kind_ = {.is_backward = true, .world = view.world()};
  return made;
}

void Workspace::begin_launch(int64_t scratch_bytes, cudaStream_t stream,
                             const LaunchOptions& options, bool capturing, bool is_alone) {
  reserve(scratch_bytes, stream, capturing, is_alone);
  if (!capturing) follow_last(stream);
  timeout_seconds_ = options.timeout_seconds;
  launch_id_ = sync::next_holder(launch_id_);
}
void Workspace::end_launch(cudaStream_t stream, bool capturing) {
  if (capturing) {
    scratch_.captured = true;
  } else {
    record_last(stream);
  }
}

void Workspace::record_last(cudaStream_t stream) {
  check(cudaEventRecord(last_, stream), "cudaEventRecord");
  last_stream_ = id_of(stream);
  has_last_ = true;
}

// The scratch belongs to one launch at a time. Inside a capture there is nothing to wait for: a
// graph must not depend on what ran before it was made.
void Workspace::follow_last(cudaStream_t stream) const {
  if (!has_last_ || id_of(stream) == last_stream_) return;
  check(cudaStreamWaitEvent(stream, last_), "cudaStreamWaitEvent");
}

// A rank alone may wait for its own launches, where memory is short; one of several may not: they
// may wait for a rank that this thread has still to call.
void Workspace::reserve(int64_t bytes, cudaStream_t stream, bool capturing, bool is_alone) {
  if (bytes <= scratch_.bytes) return;
  if (capturing) refuse_to_grow();
  follow_last(stream);
  if (scratch_.captured) {
    retired_.push_back(scratch_);
  } else {
    pool_.give(scratch_.memory, stream);
  }
  scratch_ = {};
  void* memory = pool_.take(bytes, stream);
  if (memory == nullptr && is_alone) {
    check(cudaStreamSynchronize(stream), "cudaStreamSynchronize to get memory back");
    memory = pool_.take(bytes, stream);
  }
  if (memory == nullptr) {
    fail(FM_OUT_OF_MEMORY, "device ", device_, " has no ", bytes,
         " bytes for scratch: use fewer tokens, or give memory back (torch.cuda.empty_cache())");
  }
  scratch_.memory = memory;
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
  // Known to be zero, also to a launch on another stream if this one's comes to nothing.
  record_last(stream);
  scratch_.bytes = bytes;
}

void Workspace::finish(const RankView& view) {
  const DeviceGuard guard(device_);
  const bool is_stopped = view.world() > 1 && has_come(reports().failure);
  if (has_last_ && !is_stopped) {
    check(cudaEventSynchronize(last_), "cudaEventSynchronize of the last launch");
  }
  if (!is_time_to_raise(view, false)) return;
  const Verdict found = take_reports(view, false);
  if (found.failed) throw found.error;
  throw HarmlessError(found.error);
}

bool Workspace::is_time_to_raise(const RankView& view, bool capturing) const {
  if (has_failed_) return false;
  if (has_come(reports().failure)) return true;
  if (!has_come(reports().notice)) return false;
  // Else the same launch may have more to say: another token's notice, or a failure.
  return capturing || view.world() == 1 || !has_last_ || has_ended(last_);
}

Workspace::Verdict Workspace::take_reports(const RankView& view, bool capturing) {
  const bool is_alone = view.world() == 1;
  if (is_alone && !capturing) wait_for_end();
  const sync::LaunchReports found{.failure = read(reports().failure),
                                  .notice = read(reports().notice)};
  const bool failed = found.failure.tag != 0;
  if (failed && !is_alone) {
    has_failed_ = true;
  } else if (!capturing) {
    if (failed) clean_scratch();
    reports() = {};
  }
  const ReportPlace place{device_, view.rank, view.world(), timeout_seconds_};
  return {failed, error_of(found, place)};
}

// Of a rank alone: its launches wait for nobody, and those that failed run out.
void Workspace::wait_for_end() const {
  if (has_last_) check(cudaEventSynchronize(last_), "cudaEventSynchronize after a failed launch");
  // Replays have no event.
  if (is_captured()) check(cudaDeviceSynchronize(), "cudaDeviceSynchronize after a failed launch");
}

void Workspace::clean_scratch() {
  const auto clean = [&](const Scratch& one) {
    if (one.memory == nullptr) return;
    check(cudaMemsetAsync(one.memory, 0, static_cast<size_t>(one.bytes), own_stream_),
          "cudaMemsetAsync of ", one.bytes, " bytes of scratch");
  };
  for (const Scratch& one : retired_) clean(one);
  clean(scratch_);
  check(cudaStreamSynchronize(own_stream_), "cudaStreamSynchronize after cudaMemsetAsync");
}

bool Workspace::is_captured() const { return scratch_.captured || !retired_.empty(); }

void Workspace::time_last(fm_stats& stats) const {
  if (scratch_.memory == nullptr) return;
  const DeviceGuard guard(device_);
  launch::time_launch(scratch_.memory, last_kind_, stats);
}

std::string Workspace::explain(const fm_layer& layer, const fm_forward_args& args,
                               const LaunchOptions& options, const RankView& view) const {
  const int32_t num_sms = options.max_sms > 0 ? std::min(options.max_sms, num_sms_) : num_sms_;
  launch::RankArguments ranks;
  ranks.rank = view.rank;
  ranks.world = view.world();
  if (view.ranks != nullptr) {
    const RankNeeds planned = view.ranks->planned(needs_of(layer, args, ranks.world));
    check_limits(ranks.world, planned);
    ranks.capacity = config::needed_capacity(sizes_of(ranks.world, planned));
  }
  return launch::describe_forward(layer, args, num_sms, ranks);
}

int64_t Workspace::scratch_bytes() const {
  int64_t bytes = scratch_.bytes;
  for (const Scratch& one : retired_) bytes += one.bytes;
  return bytes;
}

}  // namespace flashmoe::cuda
