// The only spin loop: every wait of the engine is bounded here, and ends early when the group is
// aborted or when another thread of this launch has failed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "fabric/control.h"

namespace flashmoe::fabric {

// What a wait is for, for the error it may end in.
struct WaitTag {
  const char* what;   // "metadata", "rows", ...
  const char* phase;  // "plan", "up", ...
  int32_t peer;       // rank waited for, -1: this rank's own threads
  plan::Epoch epoch;
};

class Waiter {
 public:
  // control: of this rank. timeout_seconds 0: no bound.
  Waiter(const ControlBlock* control, int32_t rank, double timeout_seconds)
      : control_(control), rank_(rank), timeout_seconds_(timeout_seconds) {}

  // Ends the waits of all threads of this launch; the first failure is the one that is reported.
  void stop() { stopped_.store(true, std::memory_order_release); }
  bool stopped() const { return stopped_.load(std::memory_order_acquire); }

  // Returns when ready(word) holds; the load has acquire order. Throws Error FM_TIMEOUT or
  // FM_ABORTED, or Stopped when another thread of the launch has failed.
  template <class Ready>
  void until(const std::atomic<uint32_t>& word, Ready ready, uint32_t expected,
             const WaitTag& tag) const {
    uint32_t seen = word.load(std::memory_order_acquire);
    if (ready(seen)) return;
    Backoff backoff;
    while (!ready(seen = word.load(std::memory_order_acquire))) {
      backoff.pause();
      check(backoff, expected, seen, tag);
    }
    backoff.finish();
  }

  void until_equal(const std::atomic<uint32_t>& word, uint32_t expected, const WaitTag& tag) const {
    until(
        word, [expected](uint32_t seen) { return seen == expected; }, expected, tag);
  }

  // What the calling thread has waited so far, in all waits.
  static double waited_seconds();

  // Throws FM_ABORTED when the group has been aborted.
  void check_abort() const;

  // Thrown in threads that stop because another one failed. Carries nothing: never leaves a launch.
  struct Stopped {};

 private:
  // Spins, then yields, then sleeps up to 50 us a turn: ranks may share cores.
  class Backoff {
   public:
    void pause();
    double seconds() const;
    void finish() const;  // adds to waited_seconds()

   private:
    int turns_ = 0;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  };

  void check(const Backoff& backoff, uint32_t expected, uint32_t seen, const WaitTag& tag) const;

  const ControlBlock* control_;
  int32_t rank_;
  double timeout_seconds_;
  std::atomic<bool> stopped_{false};
};

}  // namespace flashmoe::fabric
