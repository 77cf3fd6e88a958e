// The only place of the kernels that spins. Every wait is bounded: when its time is over, the first
// thread writes down which wait it was, all later waits of that thread return at once, and the
// roles run out. Nothing traps (a trap in the loop makes ptxas ignore setmaxnreg).
#pragma once

#include "cuda/ptx/ptx.cuh"
#include "cuda/sync/report.h"

namespace flashmoe::cuda::sync {

// What one thread (or one warp, each lane its own copy) waits with.
class Waiter {
 public:
  FM_DEVICE Waiter(WaitReport* report, uint64_t timeout_ns)
      : report_(report), timeout_ns_(timeout_ns) {}

  // False once a wait of this thread has run out of time: what it would have read is undefined.
  FM_DEVICE bool alive() const { return alive_; }

  // Returns when the phase of `barrier` with this parity is complete, or the time is over.
  FM_DEVICE void wait(uint64_t* barrier, uint32_t parity, WaitTag tag) {
    if (ptx::mbarrier_try_wait_parity(barrier, parity) || !alive_) return;
    const uint64_t start = ptx::get_sreg_globaltimer();
    while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
      if (ptx::get_sreg_globaltimer() - start > timeout_ns_) {
        give_up(parity, tag);
        return;
      }
    }
  }

 private:
  FM_DEVICE void give_up(uint32_t parity, WaitTag tag) {
    alive_ = false;
    if (atomicCAS(&report_->tag, 0u, static_cast<uint32_t>(tag)) == 0u) {
      report_->block_idx = blockIdx.x;
      report_->thread_idx = threadIdx.x;
      report_->parity = parity;
    }
  }

  WaitReport* report_;
  uint64_t timeout_ns_;
  bool alive_ = true;
};

}  // namespace flashmoe::cuda::sync
