// The start of a forward: whether the scratch is this launch's (sync/holder.h), and the router's
// logits.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/stage/logits.cuh"
#include "cuda/stage/route.cuh"
#include "cuda/stage/wide_logits.cuh"
#include "cuda/sync/grid_barrier.cuh"
#include "cuda/sync/holder.h"
#include "cuda/sync/wait.cuh"

namespace flashmoe::cuda::kernel {

// The same in all threads of all CTAs, which all call. has_scratch: a word of shared memory.
FM_DEVICE bool take_scratch(const ForwardParams& params, bool& has_scratch) {
  uint32_t* holder = &params.memory.state->holder;
  if (!params.may_run_beside) {
    if (ptx::block_idx() == 0 && ptx::thread_idx() == 0)
      ptx::st_release_gpu(holder, params.launch_id);
    return true;
  }
  if (ptx::thread_idx() == 0) {
    has_scratch = sync::claim(params.launch_id, [&](uint32_t expected, uint32_t desired) {
      return ptx::cas_acq_rel_gpu(holder, expected, desired);
    });
    if (!has_scratch) {
      sync::write_report(params.waits.report, sync::WaitTag::kHeld, ptx::block_idx(),
                         params.launch_id);
    }
  }
  __syncthreads();
  return has_scratch;
}

// One thread of the CTA, before its barriers are published.
FM_DEVICE void prepare_logits(const ForwardParams& params, stage::LogitBarriers& stages) {
  stages.init(stage::logit_readers(params.sizes));
  if (!params.has_logit_maps()) return;
  ptx::prefetch_tensormap(&params.logit_tokens);
  ptx::prefetch_tensormap(&params.logit_weights);
}

// Logits of the fused router. False if a CTA, or a copy, did not come in time.
template <class Element>
FM_DEVICE bool compute_logits(const ForwardParams& params, uint8_t* arena,
                              stage::LogitBarriers& stages) {
  if (params.router.weight == nullptr) return true;
  stage::check_selection_bias(params);
  if (params.router.weight_is_wide) {
    stage::compute_wide_logits<Element>(params, arena);
  } else if (!stage::compute_logits<Element>(params, arena, stages)) {
    return false;
  }
  return !params.sizes.has_few_tiles || sync::meet_all(&params.memory.state->barrier, params.waits);
}

}  // namespace flashmoe::cuda::kernel
