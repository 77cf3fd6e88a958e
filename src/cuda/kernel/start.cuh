// The start of a launch: whether the scratch is its own (sync/holder.h).
#pragma once

#include "cuda/kernel/forward.h"
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

}  // namespace flashmoe::cuda::kernel
