// All CTAs of a cooperative launch meet, a few times.
#pragma once

#include "cuda/sync/grid_barrier.h"
#include "cuda/sync/wait.cuh"

namespace flashmoe::cuda::sync {

// One thread of every CTA calls. The time of its wait may be over when it returns.
FM_DEVICE void meet(GridBarrier* barrier, Waiter& waiter) {
  const uint32_t generation = ptx::ld_relaxed_gpu(&barrier->generation);
  if (ptx::add_acq_rel_gpu(&barrier->arrived, 1) == gridDim.x - 1) {
    barrier->arrived = 0;
    ptx::st_release_gpu(&barrier->generation, generation + 1);
  } else {
    waiter.wait_word(&barrier->generation, generation + 1, WaitTag::kGrid);
  }
}

// Every thread of every CTA calls; what any of them wrote before is visible to all after. Returns
// false in all threads of a CTA whose wait ran out of time.
FM_DEVICE bool meet_all(GridBarrier* barrier, const WaitBounds& bounds) {
  Waiter waiter(bounds);
  __syncthreads();
  if (ptx::thread_idx() == 0) meet(barrier, waiter);
  return __syncthreads_and(waiter.alive());
}

}  // namespace flashmoe::cuda::sync
