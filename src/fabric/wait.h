// The only spin loop: every wait is bounded here, and ends early when the group is aborted, when
// the rank waited for is gone, or when another thread of this launch has failed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "fabric/fabric.h"

namespace flashmoe::fabric {

// What a wait is for, for the error it may end in.
struct WaitTag {
  const char* what;   // "metadata", "rows", ...
  const char* phase;  // "plan", "up", ...
  int32_t peer;       // rank waited for, -1: this rank's own threads
  plan::Epoch epoch;
};

// Spins, then yields, then sleeps: ranks may share cores.
class Backoff {
 public:
  explicit Backoff(std::chrono::microseconds sleep) : sleep_(sleep) {}
  void pause();
  // What the caller has waited so far. A turn counts for at most a tenth of a second: a process
  // that was itself stopped or starved must not blame its peers for that time.
  double seconds() const { return seconds_; }
  // True once every tenth of a second or so: time for what costs a system call.
  bool is_time_to_look() const { return looks_; }
  void finish() const;  // adds the wall time to waited_seconds()

 private:
  using Clock = std::chrono::steady_clock;
  std::chrono::microseconds sleep_;
  int turns_ = 0;
  double seconds_ = 0, next_look_ = 0.1;
  bool looks_ = false;
  Clock::time_point start_ = Clock::now(), last_ = start_;
};

inline constexpr std::chrono::microseconds kFlagSleep{50};

// Returns when ready() holds. check(backoff) is called after every turn and ends the wait by
// throwing.
template <class Ready, class Check>
void spin_until(Ready&& ready, Check&& check, std::chrono::microseconds sleep = kFlagSleep) {
  if (ready()) return;
  Backoff backoff(sleep);
  do {
    backoff.pause();
    check(backoff);
  } while (!ready());
  backoff.finish();
}

class Waiter {
 public:
  // rank: this one. timeout_seconds 0: no bound.
  Waiter(const Fabric& fabric, int32_t rank, double timeout_seconds)
      : fabric_(fabric),
        control_(*fabric.control(rank)),
        rank_(rank),
        timeout_seconds_(timeout_seconds) {}

  // Ends the waits of all threads of this launch; the first failure is the one that is reported.
  void stop() { stopped_.store(true, std::memory_order_release); }
  bool stopped() const { return stopped_.load(std::memory_order_acquire); }

  // Returns when ready(word) holds; the load has acquire order. Throws Error FM_TIMEOUT (the bound
  // ran out, or the rank waited for is gone) or FM_ABORTED, or Stopped when another thread of the
  // launch has failed.
  template <class Ready>
  void until(const std::atomic<uint32_t>& word, Ready ready, uint32_t expected,
             const WaitTag& tag) const {
    uint32_t seen = 0;
    bool gone = false;  // the peer; it may have raised the flag before it went
    bool waited = false;
    spin_until([&] { return ready(seen = word.load(std::memory_order_acquire)); },
               [&](const Backoff& backoff) {
                 if (gone) fail_gone(backoff, expected, seen, tag);
                 gone = check(backoff, expected, seen, tag);
                 waited = true;
               });
    if (waited) clear_hint(tag);
  }

  void until_equal(const std::atomic<uint32_t>& word, uint32_t expected, const WaitTag& tag) const {
    until(
        word, [expected](uint32_t seen) { return seen == expected; }, expected, tag);
  }

  // What the calling thread has waited so far, in all waits.
  static double waited_seconds();

  // Throws FM_ABORTED when the group has been aborted.
  void check_abort() const { check_stopped(control_); }

  // Thrown in threads that stop because another one failed. Carries nothing: never leaves a launch.
  struct Stopped {};

 private:
  // True when the peer is found gone.
  bool check(const Backoff& backoff, uint32_t expected, uint32_t seen, const WaitTag& tag) const;
  double bound_of(const WaitTag& tag) const;
  void clear_hint(const WaitTag& tag) const;
  std::string culprit_of(const WaitTag& tag) const;
  [[noreturn]] void fail_gone(const Backoff& backoff, uint32_t expected, uint32_t seen,
                              const WaitTag& tag) const;

  const Fabric& fabric_;
  ControlBlock& control_;  // of this rank
  int32_t rank_;
  double timeout_seconds_;
  std::atomic<bool> stopped_{false};
};

}  // namespace flashmoe::fabric
