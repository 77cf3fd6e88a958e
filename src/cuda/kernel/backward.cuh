// The backward as one persistent cooperative kernel, with the roles of the forward (forward.cuh):
// routing that is given becomes rows as it did there, and the ticket warps walk through
// tile/backward_walk.h.
//
//   tickets, weights, tokens  as in pipeline.cuh; of a sum over rows, its M and its N side
//   math  (two warpgroups of each CTA)  take tiles in turn, or (sums over rows) share them
//   comm  (a warpgroup of each CTA)     sends grad y and tokens to the other ranks that need
//                                       them, and copies what came into expert order ahead of the
//                                       tiles; then gradients of slots, then biases, when the
//                                       hidden gradients are there
//   both, then                          the router's share of grad x, where it is not tiles; the
//                                       combine of the input gradients onto it; the gradients of
//                                       the router. All by tickets, so that those who are free take
//                                       them
//
// Counters: kernel/backward.h. Every tile of a gradient has one owner, and every sum one order.
#pragma once

#include "cuda/kernel/backward_job.cuh"
#include "cuda/kernel/forward.cuh"
#include "cuda/stage/bias_grad.cuh"
#include "cuda/stage/copy_operands.cuh"
#include "cuda/stage/router_grad.cuh"
#include "cuda/stage/slot_exchange.cuh"

namespace flashmoe::cuda::kernel {

// Plan of the rows, from routing that is given. All threads of all CTAs; false if a CTA did not
// come in time.
template <class Config>
FM_DEVICE bool plan_rows(const BackwardParams& params, BackwardShared<Config>& smem) {
  constexpr int32_t kArenaBytes = sizeof(smem.stages);
  static_assert(stage::kRouteBytes <= kArenaBytes && stage::kPlanBytes <= kArenaBytes);
  const ForwardParams& forward = params.forward;
  auto* arena = reinterpret_cast<uint8_t*>(smem.stages);
  sync::GridBarrier* barrier = &forward.memory.state->barrier;
  const int32_t thread = ptx::block_idx() * config::kForwardThreads + ptx::thread_idx();
  for (int32_t i = thread; i < params.counters.count;
       i += static_cast<int32_t>(gridDim.x) * config::kForwardThreads) {
    params.counters.first[i] = 0;
  }
  stage::route(forward, arena, kArenaBytes);
  if (ptx::thread_idx() == 0) set_mark_of_first(forward, Mark::kRouted);
  if (!sync::meet_all(barrier, forward.waits)) return false;
  if (!forward.sizes.has_few_tiles) {
    stage::scan_histograms(forward);
    if (!sync::meet_all(barrier, forward.waits)) return false;
  }
  const int32_t num_blocks =
      stage::is_alone(forward)
          ? stage::place_rows<config::kBackwardBlockRows>(forward, arena, forward.memory.experts)
          : stage::plan_ranks<config::kBackwardBlockRows>(forward, arena, forward.memory.experts,
                                                          smem.extra.ranks);
  if (num_blocks < 0) return false;
  if (ptx::thread_idx() == 0) smem.extra.num_blocks = num_blocks;
  // The arena becomes operand stages, which the copy engine fills.
  ptx::fence_proxy_async(ptx::space_shared);
  return forward.sizes.has_few_slots || sync::meet_all(barrier, forward.waits);
}

// Communication warps of the launch.
FM_DEVICE int32_t num_comm_warps() { return ptx::num_blocks() * config::kCommWarps; }

// Returns when all that the slots' gradients are made of is there: all hidden gradients, or with
// the weight on the input all input gradients. False in all lanes if it did not come in time.
template <class Config>
FM_DEVICE bool wait_for_slots(const BackwardParams& params, const BackwardShared<Config>& smem,
                              sync::Waiter& waiter) {
  const bool on_input = params.sizes.weight_on_input;
  const int32_t pairs = on_input ? params.forward.sizes.down_pairs : params.sizes.hidden_pairs;
  waiter.wait_word(on_input ? params.forward.memory.down_done : params.counters.hidden_of_all,
                   smem.extra.num_blocks * pairs * config::kClusterSize, sync::WaitTag::kGradDone);
  return __all_sync(stage::kAllLanes, waiter.alive());
}

// Gradients of the slots' weights; of several ranks by the ranks of their experts, which send them
// home. Whole warp.
template <class Config, class Index>
FM_DEVICE void differentiate_routing(const BackwardParams& params, BackwardShared<Config>& smem,
                                     const Index& worker_idx, sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  const bool is_alone = stage::is_alone(params.forward);
  if (is_alone && !params.routing.any_slot()) return;
  if (!wait_for_slots(params, smem, waiter)) return;
  if (is_alone) {
    stage::differentiate_slots<Element>(params, worker_idx(), num_comm_warps());
  } else {
    stage::send_slots<Element>(params, smem.extra.ranks, worker_idx, num_comm_warps, waiter);
    stage::take_slots<Element>(params, smem.extra.ranks, worker_idx, num_comm_warps, waiter);
  }
}

// Gradients of the experts' biases, behind those of the logits, which tiles wait for. Whole warp.
template <class Config, class Index>
FM_DEVICE void sum_biases(const BackwardParams& params, const BackwardShared<Config>& smem,
                          const Index& worker_idx, sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  if (!params.routing.any_bias() || !wait_for_slots(params, smem, waiter)) return;
  stage::sum_biases<Element>(params, table_of(params), worker_idx, num_comm_warps);
}

// Counts `count` for the warp, whose stores are then visible to whom sees the count. Whole warp.
FM_DEVICE void publish_count(uint32_t* counter, uint32_t count) {
  __syncwarp();
  if (ptx::lane_idx() == 0) ptx::add_release_gpu(counter, count);
}

// The gradients of the logits of one communication warp are there. Whole warp.
FM_DEVICE void finish_logits(const BackwardParams& params) {
  if (params.routing.w_router == nullptr) return;
  if (params.sizes.share_tokens == 0 && ptx::block_idx() == 0 &&
      ptx::thread_idx() / 32 % config::kCommWarps == 0) {
    stage::clear_logit_padding(params);
  }
  ptx::fence_proxy_async(ptx::space_global);  // their parts are read by the copy engine of any SM
  publish_count(params.counters.logits_done, 1);
}

// The next run that `taken` counts. Whole warp.
FM_DEVICE int32_t take_router_run(uint32_t* taken) {
  int32_t idx = 0;
  if (ptx::lane_idx() == 0) idx = static_cast<int32_t>(atomicAdd(taken, 1u));
  return __shfl_sync(stage::kAllLanes, idx, 0);
}

// Waits for the gradients of all logits. Whole warp; false in all lanes if they did not come in
// time.
FM_DEVICE bool wait_for_logits(const BackwardParams& params, sync::Waiter& waiter) {
  waiter.wait_word(params.counters.logits_done, num_comm_warps(), sync::WaitTag::kLogitsDone);
  return __all_sync(stage::kAllLanes, waiter.alive());
}

// Takes runs, which read the gradients of the logits, until none is left. Whole warp.
template <class Make>
FM_DEVICE void make_router_runs(const BackwardParams& params, uint32_t* taken, uint32_t* done,
                                int32_t num_runs, sync::Waiter& waiter, const Make& make) {
  if (num_runs == 0) return;
  if (!wait_for_logits(params, waiter)) return;
  __builtin_assume(waiter.alive());  // no register holds it meanwhile
  uint32_t num_done = 0;
#pragma unroll 1
  while (true) {
    const int32_t idx = take_router_run(taken);
    if (idx >= num_runs) break;
    make(idx);
    ++num_done;
  }
  if (num_done > 0) publish_count(done, num_done);
}

// How often BackwardCounters::shares_done is counted: CTAs' tiles, or runs.
FM_DEVICE uint32_t num_shares(const BackwardParams& params) {
  const int32_t tokens = params.sizes.share_tokens;
  if (tokens == 0) return params.router_runs.num_shares();
  const tile::TileGrid grid{config::kBackwardBlockRows, params.forward.sizes.down_pairs};
  return grid.num_tiles(tokens) * config::kClusterSize;
}

// Makes runs of the router's share of grad x, where it is not tiles, and waits for all of it:
// before the combine, which adds to it. Whole warp.
template <class Config, config::RouterStages kStages>
FM_DEVICE void share_router(const BackwardParams& params, sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  if (params.routing.w_router == nullptr) return;
  make_router_runs(params, params.counters.shares_taken, params.counters.shares_done,
                   params.router_runs.num_shares(), waiter,
                   [&](int32_t idx) { stage::make_router_share<Element, kStages>(params, idx); });
  waiter.wait_word(params.counters.shares_done, num_shares(params), sync::WaitTag::kRouterDone);
}

// Makes runs of the sums over tokens that the gradients of the router's weight and bias are. Whole
// warp.
template <class Config, config::RouterStages kStages>
FM_DEVICE void sum_router(const BackwardParams& params, sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  make_router_runs(params, params.counters.sums_taken, params.counters.sums_done,
                   params.router_runs.num_sums(), waiter,
                   [&](int32_t idx) { stage::make_router_sum<Element, kStages>(params, idx); });
}

// How often BackwardCounters::sums_done is counted: runs, and warpgroups' halves of tiles.
FM_DEVICE uint32_t num_sums(const BackwardParams& params) {
  const int32_t tiles =
      params.sizes.logit_segments * params.sizes.weight_grads[tile::kRouterGradIdx].num_tiles();
  return params.router_runs.num_sums() + tiles * config::kClusterSize * kGradWarpgroups;
}

// The gradients of the router's weight and bias, after the combine. Whole warp.
template <class Config, config::RouterStages kStages>
FM_DEVICE void finish_router(const BackwardParams& params, sync::Waiter& waiter) {
  const tile::RouterRuns& runs = params.router_runs;
  if (runs.num_reductions() == 0) return;
  sum_router<Config, kStages>(params, waiter);
  waiter.wait_word(params.counters.sums_done, num_sums(params), sync::WaitTag::kRouterDone);
  if (!__all_sync(stage::kAllLanes, waiter.alive())) return;
#pragma unroll 1
  while (true) {
    const int32_t idx = take_router_run(params.counters.reductions_taken);
    if (idx >= runs.num_reductions()) return;
    stage::reduce_router(params, idx);
  }
}

// Combines until no unit is left, onto the router's share. Whole warp.
template <class Config, int kPieces, int kRows>
FM_DEVICE void combine_inputs(const BackwardParams& params, BackwardShared<Config>& smem,
                              sync::Waiter& waiter) {
  const auto adds = [&] {
    return params.routing.w_router != nullptr;
  };
  if (stage::combine<Config, kPieces, kRows>(params.forward, smem.extra.ranks,
                                             smem.extra.num_blocks, waiter, adds)) {
    set_mark(params.forward, Mark::kEnd);
  }
}

// A warp of the communication warpgroup.
template <class Config>
FM_DEVICE void backward_comm(const BackwardParams& params, BackwardShared<Config>& smem,
                             sync::Waiter& waiter) {
  const auto worker_idx = [] {  // read where it is used: no register holds it in between
    return ptx::thread_idx() / 32 % config::kCommWarps * ptx::num_blocks() + ptx::block_idx();
  };
  if (stage::is_alone(params.forward)) {
    stage::copy_operands<Config>(params, table_of(params), worker_idx(), num_comm_warps());
  } else {
    stage::exchange_operands<Config>(params, smem.extra.ranks, table_of(params), worker_idx,
                                     num_comm_warps, waiter);
    if (ptx::lane_idx() == 0) set_mark_of_first(params.forward, Mark::kRowsIn);
  }
  differentiate_routing<Config>(params, smem, worker_idx, waiter);
  finish_logits(params);
  sum_biases<Config>(params, smem, worker_idx, waiter);
  // What warps sum where the rest is tiles is little.
  if (params.sizes.share_tokens > 0) sum_router<Config, config::kCommRouterStages>(params, waiter);
  share_router<Config, config::kCommRouterStages>(params, waiter);
  combine_inputs<Config, 1, 4>(params, smem, waiter);
  finish_router<Config, config::kCommRouterStages>(params, waiter);
}

// The roles, after the plan.
template <class Config>
FM_DEVICE void run_backward_roles(const BackwardParams& params, BackwardShared<Config>& smem) {
  using Job = BackwardJob<Config>;
  sync::Waiter waiter(params.forward.waits);
  // The same in all lanes, as the compiler must see it for setmaxnreg.
  const int warpgroup_idx = __shfl_sync(0xFFFFFFFF, threadIdx.x / config::kWarpgroup, 0);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Job::kShape.load_registers>();
    const auto cta_rank = [] {  // read where it is used
      return static_cast<int32_t>(ptx::get_sreg_cluster_ctarank());
    };
    const auto role = [&] {
      return role_of(cta_rank());
    };
    if (role() == Role::kWeights) weights_role<Job>(params, smem, waiter, cta_rank());
    if (role() == Role::kTokens) tokens_role<Job>(params, smem, waiter, cta_rank());
    if (role() == Role::kTickets) {
      tickets_role<Job>(params, smem, waiter);
      if (ptx::lane_idx() == 0) set_mark_of_first(params.forward, Mark::kLastTile);
    }
    if (role() == Role::kPost && !stage::is_alone(params.forward))
      stage::post_flags(params.forward, smem.extra.ranks);
  } else if (warpgroup_idx == 3) {
    ptx::setmaxnreg_dec<config::kBackwardCommRegisters>();
    backward_comm<Config>(params, smem, waiter);
  } else {
    ptx::setmaxnreg_inc<Job::kShape.math_registers>();
    shared_math_role<Job>(params, smem, waiter, warpgroup_idx - 1);
    share_router<Config, config::kMathRouterStages>(params, waiter);
    combine_inputs<Config, 2, 8>(params, smem, waiter);
    finish_router<Config, config::kMathRouterStages>(params, waiter);
  }
}

// One thread of each CTA, when all of it has done; the last one gives the scratch free.
FM_DEVICE void leave_backward(const BackwardParams& params) {
  if (ptx::add_acq_rel_gpu(params.counters.left, 1) != ptx::num_blocks() - 1u) return;
  set_mark(params.forward, Mark::kDone);
  stage::release_scratch(params.forward);
}

template <config::BackwardConfig Config>
__global__ void __launch_bounds__(config::kForwardThreads, 1)
    backward(const __grid_constant__ BackwardParams params) {
  FM_DYNAMIC_SHARED(raw);
  auto& smem = *reinterpret_cast<BackwardShared<Config>*>(raw);
  if (ptx::thread_idx() == 0) {
    smem.init();
    smem.extra.ranks.post.init();
  }
  ptx::barrier_cluster_arrive();  // as in the forward
  if (!take_scratch(params.forward, smem.extra.has_scratch)) return;
  if (ptx::thread_idx() == 0) set_mark_of_first(params.forward, Mark::kStart);
  const bool is_planned = plan_rows<Config>(params, smem);
  ptx::barrier_cluster_wait();  // the other CTA has started
  tell_pair(smem.extra.here, is_planned);
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (ptx::thread_idx() == 0) set_mark_of_first(params.forward, Mark::kPlanned);
  if (is_pair_here(smem.extra.here)) run_backward_roles<Config>(params, smem);
  // Nobody leaves while the other CTA may still write or arrive here.
  __syncwarp();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (ptx::thread_idx() == 0) leave_backward(params);
  if (ptx::thread_idx() == 0) stage::stop_peers(params.forward);
}

template <config::BackwardConfig Config>
BackwardEntry backward_entry_of() {
  static_assert(sizeof(BackwardShared<Config>) <= config::kSharedLimit);
  return {ptx::kernel_address(&backward<Config>), sizeof(BackwardShared<Config>), Config::value};
}

}  // namespace flashmoe::cuda::kernel
