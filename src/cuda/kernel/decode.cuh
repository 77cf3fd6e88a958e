// The forward of few tokens (config::Decode) on one rank, as one persistent cooperative kernel:
//
//   logits  parts of them are dealt to the warps of all CTAs, which then meet
//   plan    every CTA chooses the experts of all tokens for itself
//   up      (decode_load.cuh, decode_math.cuh) a warp of the CTA loads weights, the others multiply
//           them, each a stage by itself: 16 gate rows of a chosen expert and their up rows at a
//           time (ungated: 32 rows), which makes hidden values of all tokens
//   meet    all hidden values are there; the load warp is at w_down already
//   down    8 rows of all chosen experts at a time, which makes y of all tokens: the sum over
//           experts takes no other CTA
//
// Units of both products are given out by tickets: memory serves some CTAs faster than others. The
// bits depend on the sizes and on which experts are chosen, not on the number of CTAs or on time.
#pragma once

#include "cuda/kernel/decode_math.cuh"
#include "cuda/kernel/start.cuh"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/stage/exchange.cuh"
#include "cuda/stage/few_logits.cuh"

namespace flashmoe::cuda::kernel {

template <class Element>
FM_DEVICE bool route_few(const ForwardParams& params, DecodeShared& smem) {
  static_assert(
      4 * Decode::kTokens *
          stage::TeamMemory<stage::kWarpLanes>::words(config::kMaxExperts, config::kMaxExperts) <=
      static_cast<int32_t>(sizeof(smem.stages)));
  if (params.router.weight != nullptr) {
    stage::check_selection_bias(params);
    stage::compute_few_logits<Element>(params);
    if (!sync::meet_all(&params.memory.state->barrier, params.waits)) return false;
  }
  stage::plan_few(params, smem.stages[0], smem.plan);
  // The arena becomes stages, which the copy engine fills.
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  return true;
}

template <class Element>
__global__ void __launch_bounds__(config::kForwardThreads, 1)
    decode(const __grid_constant__ DecodeParams params) {
  FM_DYNAMIC_SHARED(raw);
  auto& smem = *reinterpret_cast<DecodeShared*>(raw);
  const ForwardParams& forward = params.forward;
  if (ptx::thread_idx() == 0) {
    smem.barriers.init(1);
    smem.ticket_barriers.init(Decode::kMathWarps);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    ptx::prefetch_tensormap(&forward.up_weights[0]);
    ptx::prefetch_tensormap(&forward.up_weights[1]);
    ptx::prefetch_tensormap(&forward.down_weights);
  }
  if (!take_scratch(forward, smem.has_scratch)) return;
  if (ptx::thread_idx() == 0) set_mark_of_first(forward, Mark::kStart);
  if (!route_few<Element>(forward, smem)) return;
  if (ptx::thread_idx() == 0) {
    set_mark_of_first(forward, Mark::kRouted);
    set_mark_of_first(forward, Mark::kPlanned);
    set_mark_of_first(forward, Mark::kUp);
  }
  const DecodeWalk walk(params, smem.plan.num_chosen);
  if (ptx::thread_idx() < 32) {
    decode_load(params, smem, walk);
  } else {
    DecodeMath<Element>(params, smem, walk).run();
  }
  __syncthreads();
  if (ptx::thread_idx() != 0) return;
  set_mark_of_first(forward, Mark::kLastTile);
  if (!finish_tickets(*forward.memory.combine, ptx::num_blocks())) return;
  set_mark(forward, Mark::kEnd);
  stage::release_scratch(forward);
}

template <class Element>
DecodeEntry decode_entry() {
  static_assert(sizeof(DecodeShared) <= config::kSharedLimit);
  return {ptx::kernel_address(&decode<Element>), sizeof(DecodeShared)};
}

}  // namespace flashmoe::cuda::kernel
