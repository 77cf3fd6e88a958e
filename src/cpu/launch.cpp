#include "cpu/launch.h"

#include <sched.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <exception>
#include <mutex>
#include <thread>

#include "base/env.h"
#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

using Clock = std::chrono::steady_clock;
using PhaseSeconds = std::array<double, 8>;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

constexpr fm_phase phase_of(plan::TaskKind kind) {
  switch (kind) {
    case plan::TaskKind::kPlan:
      return FM_PHASE_PLAN;
    case plan::TaskKind::kPush:
      return FM_PHASE_PUSH;
    case plan::TaskKind::kUp:
      return FM_PHASE_UP;
    case plan::TaskKind::kDown:
      return FM_PHASE_DOWN;
    case plan::TaskKind::kWeight:
      return FM_PHASE_WEIGHT;
    case plan::TaskKind::kReturn:
      return FM_PHASE_RETURN;
    case plan::TaskKind::kCombine:
      return FM_PHASE_COMBINE;
    default:
      return FM_PHASE_ROUTE;
  }
}

// A delay that differs from task to task and run to run; results must not (tests).
void delay(double most_us, int64_t ticket) {
  const auto now = static_cast<uint64_t>(Clock::now().time_since_epoch().count());
  uint64_t hash = (now ^ (static_cast<uint64_t>(ticket) << 32)) * 0x9e3779b97f4a7c15ull;
  hash ^= hash >> 29;
  const double chosen = most_us * static_cast<double>(hash % 1024) / 1024.0;
  std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(chosen));
}

// The walk of one launch over its threads: tickets, failures, times.
template <class T>
class Walk {
 public:
  explicit Walk(Launch<T>& launch)
      : launch_(launch), seconds_(static_cast<size_t>(launch.num_threads), PhaseSeconds{}) {}

  void run(ThreadPool& pool) {
    pool.run(launch_.num_threads, [this](int thread_idx) { run_thread(thread_idx); });
    if (stopped_once_) launch_.group.options().stop_in_phase = 0;
    if (failure_) std::rethrow_exception(failure_);
  }

  PhaseSeconds busy_seconds() const {
    PhaseSeconds sum{};
    for (const auto& thread : seconds_) {
      for (size_t phase = 0; phase < sum.size(); ++phase) sum[phase] += thread[phase];
    }
    return sum;
  }

 private:
  void run_thread(int thread_idx) {
    try {
      const GemmThread products;
      while (run_next(thread_idx)) {
      }
    } catch (const fabric::Waiter::Stopped&) {
      return;  // another thread holds the failure
    } catch (...) {
      const std::lock_guard lock(failure_mutex_);
      if (!failure_) failure_ = std::current_exception();
      launch_.waiter.stop();
    }
  }

  bool run_next(int thread_idx) {
    if (launch_.waiter.stopped()) return false;
    const int64_t ticket = launch_.next_ticket.fetch_add(1, std::memory_order_relaxed);
    // The tasks behind the plan exist only once it stands.
    if (ticket > launch_.space.plan_ticket()) {
      launch_.waiter.until_equal(launch_.planned, 1, {"the plan", "walk", -1, launch_.epoch});
    }
    const plan::Task task = plan::task_at(launch_.space, ticket);
    if (task.kind == plan::TaskKind::kEnd) return false;
    if (launch_.group.options().disturbed()) disturb(phase_of(task.kind), ticket);
    const auto start = Clock::now();
    const double waited = fabric::Waiter::waited_seconds();
    run_task(task, launch_.panel_of(thread_idx));
    seconds_[static_cast<size_t>(thread_idx)][phase_of(task.kind)] +=
        seconds_since(start) - (fabric::Waiter::waited_seconds() - waited);
    return true;
  }

  // What tests ask for (GroupOptions): a delay, or to be stopped here by a signal.
  void disturb(fm_phase phase, int64_t ticket) {
    const fabric::GroupOptions& options = launch_.group.options();
    if (options.jitter_us > 0) delay(options.jitter_us, ticket);
    if (options.stop_in_phase != phase + 1 || stopped_once_.exchange(true)) return;
    std::raise(SIGSTOP);
  }

  void run_task(const plan::Task& task, void* panel) {
    switch (task.kind) {
      case plan::TaskKind::kRoute:
        return route_tile(launch_, task.major, panel);
      case plan::TaskKind::kPlan:
        return make_plan(launch_);
      case plan::TaskKind::kPush:
        return push_chunk(launch_, task.major);
      case plan::TaskKind::kUp:
        if (launch_.call.backward) return grad_up_tile(launch_, task.major, task.minor, panel);
        return up_tile(launch_, task.major, task.minor, panel);
      case plan::TaskKind::kDown:
        return down_tile(launch_, task.major, task.minor, panel);
      case plan::TaskKind::kReturn:
        return return_chunk(launch_, task.major, task.minor, panel);
      case plan::TaskKind::kWeight:
        return weight_tile(launch_, task.major, panel);
      case plan::TaskKind::kCombine:
        return combine_chunk(launch_, task.major, panel);
      default:
        return router_tile(launch_, task.major, panel);
    }
  }

  Launch<T>& launch_;
  std::atomic<bool> stopped_once_{false};
  std::mutex failure_mutex_;
  std::exception_ptr failure_;
  std::vector<PhaseSeconds> seconds_;
};

int cores_of_process() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

int choose_threads(const fabric::Group& group, const fabric::GroupOptions& options) {
  if (options.num_threads > 0) return options.num_threads;
  if (const int asked = env_num_threads(); asked > 0) return asked;
  const int sharing = std::max(group.world(), env_local_world_size());
  return std::max(1, cores_of_process() / sharing);
}

// Useful FLOP of each phase of this launch on this rank.
template <class T>
void count_flops(const Launch<T>& launch, fm_stats& stats) {
  const auto& p = launch.problem;
  const double rows = static_cast<double>(launch.routed_rows);
  const double down = 2.0 * rows * static_cast<double>(p.hidden * p.intermediate);
  const double up = 2.0 * rows * static_cast<double>(p.hidden * p.up_rows());
  const double router = launch.call.fused_router()
                            ? 2.0 * static_cast<double>(p.tokens * p.hidden * p.num_experts)
                            : 0.0;
  stats.phase_flops[FM_PHASE_ROUTE] = router;
  if (!launch.call.backward) {
    stats.phase_flops[FM_PHASE_UP] = up;
    stats.phase_flops[FM_PHASE_DOWN] = down;
    return;
  }
  stats.phase_flops[FM_PHASE_UP] = down + (present(launch.call.operands.z) ? 0.0 : up);
  stats.phase_flops[FM_PHASE_DOWN] = up;
  stats.phase_flops[FM_PHASE_WEIGHT] = launch.space.weight_tiles > 0 ? up + down : 0.0;
  stats.phase_flops[FM_PHASE_COMBINE] = router;
}

template <class T>
void report(const Launch<T>& launch, const PhaseSeconds& busy, double seconds, fm_stats& stats) {
  const int64_t row_bytes = launch.problem.hidden * static_cast<int64_t>(sizeof(T));
  const int64_t directions = launch.call.backward ? 2 : 1;
  const int64_t slot_gradients =
      launch.call.backward ? launch.slots_received * static_cast<int64_t>(sizeof(Acc<T>)) : 0;
  const int64_t fixed = launch.metadata_bytes + slot_gradients;
  stats = {};
  stats.struct_size = sizeof(fm_stats);
  stats.epoch = launch.epoch;
  stats.rows = launch.routed_rows;
  stats.rows_sent = launch.rows_sent;
  stats.rows_sent_plain = launch.slots_sent;
  stats.bytes_sent = fixed + launch.rows_sent * row_bytes * directions +
                     launch.returned_elements * static_cast<int64_t>(sizeof(T));
  stats.bytes_sent_plain =
      fixed + (launch.slots_sent * directions + launch.slots_received) * row_bytes;
  stats.scratch_bytes = launch.route.total + launch.rows.total;
  stats.allocated_bytes = launch.workspace.route.bytes() + launch.workspace.rows.bytes();
  stats.symmetric_bytes = launch.problem.world > 1 ? launch.group.capacity().bytes : 0;
  stats.num_tasks = launch.space.total();
  stats.num_threads = launch.num_threads;
  std::copy(busy.begin(), busy.end(), stats.phase_seconds);
  stats.seconds = seconds;
  count_flops(launch, stats);
}

// A rank that fails before it has told its peers anything says so in place of its metadata.
void refuse_launch(fabric::Group& group, plan::Epoch epoch, const std::string& reason,
                   const fabric::Waiter& waiter) {
  fabric::CallHeader header{};
  header.status = static_cast<uint32_t>(fabric::CallStatus::kRefused);
  fabric::set_text(header.text, reason);
  group.wait_for_credit(epoch, waiter);
  group.write_header(epoch, header);
  group.publish_metadata(epoch);
}

// What the peers learn of a failure, so that none of them waits for this rank.
void tell_peers(fabric::Group& group, plan::Epoch epoch, bool published, const Error& error) {
  if (group.world() == 1) return;
  if (error.status() == FM_ABORTED) return;
  if (error.status() != FM_MISMATCH && (published || error.status() == FM_TIMEOUT)) {
    group.abort(error.status(), error.what());
    return;
  }
  if (!published) {
    refuse_launch(group, epoch, error.what(), group.waiter());
  }
  group.finish_epoch(epoch);
}

template <class T>
[[noreturn]] void fail_launch(const Launch<T>& launch, const Error& error) {
  try {
    tell_peers(launch.group, launch.epoch, launch.published, error);
  } catch (const Error&) {
    launch.group.abort(error.status(), error.what());  // the peers could not be told in order
  }
  throw Error(error);
}

// One try; false when the symmetric memory had to grow and the call must be launched again.
template <class T>
bool try_launch(const Call& call, fabric::Group& group, Workspace& workspace, ThreadPool& pool,
                fm_stats& stats) {
  const auto start = Clock::now();
  fabric::Waiter waiter = group.waiter();
  waiter.check_abort();
  group.connect(waiter);
  Launch<T> launch(call, group, workspace, choose_threads(group, group.options()), waiter);
  try {
    launch.route_base = workspace.route.reserve(launch.route.total);
    launch.widen_router_weight();
    Walk<T> walk(launch);
    walk.run(pool);
    waiter.check_abort();  // a rank that had no need to wait fails in the same call as its peers
    group.finish_epoch(launch.epoch);
    report(launch, walk.busy_seconds(), seconds_since(start), stats);
    return true;
  } catch (const NeedMemory& need) {
    group.finish_epoch(launch.epoch);
    group.grow(need.capacity, group.waiter());
    return false;
  } catch (const Error& error) {
    fail_launch(launch, error);
  } catch (const std::bad_alloc&) {
    fail_launch(launch, Error(FM_OUT_OF_MEMORY,
                              "no memory for the scratch of the launch; use fewer tokens"));
  } catch (const std::exception& error) {
    fail_launch(launch, Error(FM_INTERNAL, std::string("internal error: ") + error.what()));
  }
}

}  // namespace

template <class T>
void Launch<T>::widen_router_weight() const {
  const auto& weight = call.operands.w_router;
  if (route[plan::RouteScratch::kRouterWeight].bytes == 0) return;
  for (int64_t e = 0; e < problem.num_experts; ++e) {
    const int64_t at = e * problem.hidden;
    if (call.backward) {
      auto* to = route_at<A>(plan::RouteScratch::kRouterWeight) + at;
      convert(row_of<const T>(weight, e), to, problem.hidden);
      continue;
    }
    auto* to = route_at<double>(plan::RouteScratch::kRouterWeight) + at;
    if (weight.dtype == DtypeOf<T>::value) {
      convert(row_of<const T>(weight, e), to, problem.hidden);
    } else {
      convert(row_of<const A>(weight, e), to, problem.hidden);
    }
  }
}

template <class T>
Launch<T>::Launch(const Call& call_in, fabric::Group& group_in, Workspace& workspace_in,
                  int threads, fabric::Waiter& waiter_in)
    : call(call_in),
      group(group_in),
      workspace(workspace_in),
      waiter(waiter_in),
      problem(call_in.problem),
      tiles(choose_tiles(call_in.problem)),
      num_threads(threads),
      epoch(group_in.begin_epoch()),
      column_blocks(plan::ceil_div(problem.hidden, tiles.column_width)),
      up_tiles(plan::ceil_div(problem.intermediate, tiles.up_width)),
      weight_parts(call.layer.weight_on_input != 0 ? column_blocks : up_tiles),
      down_done(static_cast<size_t>(column_blocks)),
      return_done(static_cast<size_t>(column_blocks)) {
  symmetric_shape = {.world = problem.world,
                     .token_cap = group.capacity().tokens,
                     .flag_words = group.capacity().flag_words,
                     .bank_experts = group.capacity().bank_experts,
                     .bank_slots = group.capacity().bank_slots,
                     .hidden = problem.hidden,
                     .top_k = problem.top_k,
                     .local_experts = problem.local_experts(),
                     .column_blocks = column_blocks,
                     .element_bytes = sizeof(T),
                     .acc_bytes = sizeof(A),
                     .backward = call.backward};
  if (problem.world > 1) symmetric = plan::symmetric_table(symmetric_shape);
  route =
      plan::route_table(problem, {.fused_router = call.fused_router(),
                                  .backward = call.backward,
                                  .router_weight_bytes = widened_router_bytes(call),
                                  .acc_bytes = sizeof(A),
                                  .num_threads = threads,
                                  .panel_bytes = panel_bytes(call, tiles, sizeof(T), sizeof(A))});
  space.route_tiles = plan::num_chunks(problem.tokens);
}

int32_t widened_router_bytes(const Call& call) {
  if (!call.fused_router()) return 0;
  const int32_t dtype = call.operands.w_router.dtype;
  if (dtype == FM_F64) return 0;
  if (!call.backward) return sizeof(double);
  return dtype == FM_F32 ? 0 : sizeof(float);
}

int64_t panel_bytes(const Call& call, const TileConfig& tiles, int64_t element_bytes,
                    int64_t acc_bytes) {
  const auto& p = call.problem;
  const int64_t m = tiles.block.max_rows;
  const int64_t up =
      m * p.hidden * element_bytes + (m * (p.gates + 1) + 1) * tiles.up_width * acc_bytes;
  const int64_t down = m * tiles.column_width * acc_bytes;
  const int64_t weight = tiles.weight_depth * tiles.weight_hidden * element_bytes +
                         tiles.weight_hidden * tiles.weight_other * acc_bytes;
  const int64_t bias = (p.hidden + p.up_rows()) * 8;
  const int64_t chunk = (plan::kTileTokens + 1) * p.hidden * acc_bytes;
  const int64_t logits = plan::kTileTokens * (p.hidden + p.num_experts) * 8;
  const int64_t router = (3 * p.num_experts + p.top_k) * acc_bytes;
  const int64_t router_gradient = (tiles.router_experts + plan::kTileTokens) * p.hidden * acc_bytes;
  constexpr int64_t kRounding = 8 * 64;  // a cache line for each array taken
  return std::max({up, down, weight, bias, chunk + router, logits, router_gradient}) + kRounding;
}

void run_call(const Call& call, fabric::Group& group, Workspace& workspace, ThreadPool& pool,
              fm_stats& stats) {
  with_dtype(call.layer.dtype, [&](auto zero) {
    while (!try_launch<decltype(zero)>(call, group, workspace, pool, stats)) {
    }
  });
}

void refuse_call(fabric::Group& group, const std::string& reason) {
  if (group.world() == 1) return;
  const fabric::Waiter waiter = group.waiter();
  waiter.check_abort();
  group.connect(waiter);
  const plan::Epoch epoch = group.begin_epoch();
  refuse_launch(group, epoch, reason, waiter);
  group.finish_epoch(epoch);
}

}  // namespace flashmoe::cpu
