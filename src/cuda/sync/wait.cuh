// Where the kernels spin (besides the post office, which waits for its own CTA). Every wait is
// bounded: when its time is over, the first thread writes down which wait it was, all later waits
// of that thread return at once, and the roles run out. Nothing traps (a trap in the loop makes
// ptxas ignore setmaxnreg).
#pragma once

#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/word.cuh"
#include "cuda/sync/report.h"

namespace flashmoe::cuda::sync {

// Fills the report unless it holds something already. Any thread; the report may be host memory.
FM_DEVICE void write_report(WaitReport* report, WaitTag tag, uint32_t block_idx, uint32_t expected,
                            const PeerReport& peer = {}) {
  if (atomicCAS_system(&report->claimed, 0u, 1u) != 0u) return;
  report->block_idx = block_idx;
  report->thread_idx = ptx::thread_idx();
  report->expected = expected;
  report->peer = peer;
  ptx::st_release_sys(&report->tag, static_cast<uint32_t>(tag));
}

// What one thread (or one warp, each lane its own copy) waits with.
class Waiter {
 public:
  FM_DEVICE explicit Waiter(const WaitBounds& bounds) : bounds_(bounds) {}

  // False once a wait of this thread has run out of time: what it would have read is undefined.
  FM_DEVICE bool alive() const { return alive_; }

  // Returns when the phase of `barrier` with this parity is complete, or the time is over. It does
  // not end when the group is stopped: what roles of a CTA wait for comes from each other, and
  // those that wait for other ranks then go on without.
  FM_DEVICE void wait(uint64_t* barrier, uint32_t parity, WaitTag tag) {
    if (ptx::mbarrier_try_wait_parity(barrier, parity) || !alive_) return;
    const uint32_t start = now();
    while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
      if (now() - start > bounds_.local_timeout_us) {
        alive_ = false;
        write_report(bounds_.report, tag, ptx::block_idx(), parity);
        return;
      }
    }
  }

  // Returns when the word of global memory equals `expected` (what was written before it was set is
  // then visible to this thread), or the time is over, or the group was stopped.
  FM_DEVICE void wait_word(uint32_t* word, uint32_t expected, WaitTag tag) {
    if (!has_come(word, expected, tag)) alive_ = false;
  }
  // The same, but that a stopped group leaves the waiter alive: its role goes on with what there
  // is, so that nobody waits for it.
  FM_DEVICE void wait_rows(uint32_t* word, uint32_t expected, WaitTag tag) {
    if (!has_come(word, expected, tag) && !is_stopped()) alive_ = false;
  }

  // The same for a flag of this launch that rank `peer` raises. When it does not come, all waits of
  // this rank end.
  FM_DEVICE void wait_flag(uint32_t* flag, uint32_t epoch, WaitTag tag, int32_t peer) {
    if (ptx::ld_acquire_sys(flag) == epoch || !alive_) return;
    const uint32_t start = now();
    while (ptx::ld_acquire_sys(flag) != epoch) {
      if (is_over(start, bounds_.timeout_us)) {
        alive_ = false;
        const uint32_t seen = ptx::ld_relaxed_sys(flag);
        say_why(epoch, tag, {peer, epoch, seen});
        atomicCAS_system(bounds_.abort, 0u, bounds_.own_mark);
        return;
      }
    }
  }

 private:
  static constexpr uint32_t kPollPause = 20;  // ns between two looks at a word
  static constexpr uint32_t kPatience = 10;  // us before a wait looks whether the group was stopped

  // In 1024 ns: a word, of which mainloops have one to spare.
  FM_DEVICE static uint32_t now() {
    return static_cast<uint32_t>(ptx::get_sreg_globaltimer() >> 10);
  }
  FM_DEVICE bool is_stopped() const {
    return bounds_.abort != nullptr && ptx::ld_relaxed_sys(bounds_.abort) != 0;
  }
  FM_DEVICE bool is_over(uint32_t start, uint32_t bound) const {
    const uint32_t waited = now() - start;
    return waited > bound || (waited > kPatience && is_stopped());
  }
  // False when the wait ended without the word.
  FM_DEVICE bool has_come(uint32_t* word, uint32_t expected, WaitTag tag) {
    if (ptx::ld_acquire_gpu(word) == expected || !alive_) return true;
    const uint32_t start = now();
    while (ptx::ld_acquire_gpu(word) != expected) {
      __nanosleep(kPollPause);
      if (!is_over(start, bounds_.local_timeout_us)) continue;
      say_why(expected, tag);
      return false;
    }
    return true;
  }
  FM_DEVICE void say_why(uint32_t expected, WaitTag tag, const PeerReport& peer = {}) {
    const uint32_t by = bounds_.abort != nullptr ? ptx::ld_relaxed_sys(bounds_.abort) : 0;
    write_report(bounds_.report, by != 0 ? WaitTag::kAborted : tag, ptx::block_idx(),
                 by != 0 ? by : expected, peer);
  }

  const WaitBounds& bounds_;
  bool alive_ = true;
};

}  // namespace flashmoe::cuda::sync
