#include "fabric/wait.h"

#include <sched.h>

#include <thread>

#include "base/error.h"

namespace flashmoe::fabric {
namespace {

constexpr int kSpinTurns = 64;
constexpr int kYieldTurns = 256;
constexpr std::chrono::microseconds kSleep{50};

// Time that this thread has spent in waits that did not end at once.
thread_local double waited = 0;

}  // namespace

double Waiter::waited_seconds() { return waited; }

void Waiter::Backoff::finish() const { waited += seconds(); }

void Waiter::Backoff::pause() {
  if (turns_ < kYieldTurns) ++turns_;
  if (turns_ < kSpinTurns) return;
  if (turns_ < kYieldTurns) {
    sched_yield();
    return;
  }
  std::this_thread::sleep_for(kSleep);
}

double Waiter::Backoff::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Waiter::check_abort() const {
  const auto state = control_->abort.load(std::memory_order_acquire);
  if (state == static_cast<uint32_t>(AbortState::kSet)) {
    fail(FM_ABORTED, "the group was aborted: ", control_->abort_text,
         "; make a new group to go on");
  }
}

void Waiter::check(const Backoff& backoff, uint32_t expected, uint32_t seen,
                   const WaitTag& tag) const {
  if (stopped()) throw Stopped{};
  check_abort();
  if (timeout_seconds_ <= 0) return;
  // A thread of this rank may itself wait for a peer: it names that peer when its bound runs out
  // first.
  const double bound = tag.peer >= 0 ? timeout_seconds_ : 2 * timeout_seconds_ + 1;
  if (backoff.seconds() < bound) return;
  std::ostringstream peer;
  if (tag.peer >= 0) {
    peer << "rank " << tag.peer;
  } else {
    peer << "a thread of this rank";
  }
  fail(FM_TIMEOUT, "rank ", rank_, " waited ", bound, " s in phase ", tag.phase, " for ", tag.what,
       " of ", peer.str(), ": epoch ", tag.epoch, ", expected ", expected, ", seen ", seen,
       ". Is that rank alive and in the same call? FLASHMOE_TIMEOUT_S sets the bound");
}

}  // namespace flashmoe::fabric
