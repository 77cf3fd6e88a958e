#include "fabric/wait.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <thread>

#include "base/error.h"

namespace flashmoe::fabric {
namespace {

constexpr int kSpinTurns = 64;
constexpr int kYieldTurns = 256;
constexpr double kLongestTurn = 0.1;    // seconds
constexpr double kSecondsToLook = 0.1;  // between two looks at whether the peer is alive

// Time that this thread has spent in waits that did not end at once.
thread_local double waited = 0;

}  // namespace

double Waiter::waited_seconds() { return waited; }

void Backoff::finish() const {
  waited += std::chrono::duration<double>(Clock::now() - start_).count();
}

void Backoff::pause() {
  if (turns_ < kYieldTurns) ++turns_;
  if (turns_ >= kYieldTurns) {
    std::this_thread::sleep_for(sleep_);
  } else if (turns_ >= kSpinTurns) {
    sched_yield();
  }
  const auto now = Clock::now();
  seconds_ += std::min(std::chrono::duration<double>(now - last_).count(), kLongestTurn);
  last_ = now;
  looks_ = seconds_ >= next_look_;
  if (looks_) next_look_ = seconds_ + kSecondsToLook;
}

// A thread that waits for another one of its rank outlasts all waits of that one for peers (credit
// and metadata of each): the one that waits for a peer is to speak first, because it can name it.
double Waiter::bound_of(const WaitTag& tag) const {
  return tag.peer >= 0 ? timeout_seconds_ : 2 * control_.world * timeout_seconds_ + 1;
}

// "rank 1", or "rank 1, which itself waits for rank 2" when the peer is held up by somebody else.
std::string Waiter::culprit_of(const WaitTag& tag) const {
  if (tag.peer < 0) return "a thread of this rank";
  std::string text = "rank " + std::to_string(tag.peer);
  int32_t at = tag.peer;
  for (int32_t hop = 0; hop < control_.world; ++hop) {
    const uint32_t next = fabric_.control(at)->waits_for.load(std::memory_order_relaxed);
    if (next == 0 || static_cast<int32_t>(next) - 1 == rank_) break;
    at = static_cast<int32_t>(next) - 1;
    text += ", which itself waits for rank " + std::to_string(at);
  }
  return text;
}

void Waiter::clear_hint(const WaitTag& tag) const {
  if (tag.peer >= 0) control_.waits_for.store(0, std::memory_order_relaxed);
}

bool Waiter::check(const Backoff& backoff, uint32_t expected, uint32_t seen,
                   const WaitTag& tag) const {
  if (stopped()) throw Stopped{};
  check_abort();
  if (tag.peer >= 0) {
    control_.waits_for.store(static_cast<uint32_t>(tag.peer) + 1, std::memory_order_relaxed);
    if (backoff.is_time_to_look() && !fabric_.is_alive(tag.peer)) return true;
  }
  const double bound = bound_of(tag);
  if (timeout_seconds_ <= 0 || backoff.seconds() < bound) return false;
  fail(FM_TIMEOUT, "rank ", rank_, " waited ", bound, " s in phase ", tag.phase, " for ", tag.what,
       " of ", culprit_of(tag), ": epoch ", tag.epoch, ", expected ", expected, ", seen ", seen,
       ". Is that rank alive and in the same call? FLASHMOE_TIMEOUT_S sets the bound");
}

void Waiter::fail_gone(const Backoff& backoff, uint32_t expected, uint32_t seen,
                       const WaitTag& tag) const {
  const double seconds = std::round(backoff.seconds() * 100) / 100;
  fail(FM_TIMEOUT, "rank ", tag.peer, " is gone: its process has ended. Rank ", rank_, " waited ",
       seconds, " s in phase ", tag.phase, " for ", tag.what, " of rank ", tag.peer, ": epoch ",
       tag.epoch, ", expected ", expected, ", seen ", seen);
}

}  // namespace flashmoe::fabric
