// The only place of the kernels that spins. Every wait is bounded: when its time is over, the first
// thread writes down which wait it was, all later waits of that thread return at once, and the
// roles run out. Nothing traps (a trap in the loop makes ptxas ignore setmaxnreg).
#pragma once

#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/word.cuh"
#include "cuda/sync/report.h"

namespace flashmoe::cuda::sync {

// Fills the report unless it holds something already. Any thread; the report may be host memory.
FM_DEVICE void write_report(WaitReport* report, WaitTag tag, uint32_t block_idx, uint32_t parity) {
  if (atomicCAS_system(&report->tag, 0u, static_cast<uint32_t>(tag)) != 0u) return;
  report->block_idx = block_idx;
  report->thread_idx = ptx::thread_idx();
  report->parity = parity;
}

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

  // Returns when the word of global memory equals `expected` (what was written before it was set is
  // then visible to this thread), or the time is over.
  FM_DEVICE void wait_word(uint32_t* word, uint32_t expected, WaitTag tag) {
    if (ptx::ld_acquire_gpu(word) == expected || !alive_) return;
    const uint64_t start = ptx::get_sreg_globaltimer();
    while (ptx::ld_acquire_gpu(word) != expected) {
      __nanosleep(kPollPause);
      if (ptx::get_sreg_globaltimer() - start > timeout_ns_) {
        give_up(expected, tag);
        return;
      }
    }
  }

  FM_DEVICE WaitReport* report() const { return report_; }

 private:
  static constexpr uint32_t kPollPause = 20;  // ns between two looks at a word

  FM_DEVICE void give_up(uint32_t parity, WaitTag tag) {
    alive_ = false;
    write_report(ptx::opaque(report_), tag, ptx::block_idx(), parity);
  }

  WaitReport* report_;
  uint64_t timeout_ns_;
  bool alive_ = true;
};

}  // namespace flashmoe::cuda::sync
