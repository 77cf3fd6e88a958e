// What the sanitizers have to be told. AddressSanitizer: on which stack a thread runs, and which
// memory is nobody's. ThreadSanitizer: which thread runs, and which of their accesses are ordered;
// it learns nothing from the fact that fibers take turns. Nothing of it is there in a program
// without.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // as GCC has it
#endif
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
extern "C" void __tsan_read_range(void* memory, unsigned long bytes);
extern "C" void __tsan_write_range(void* memory, unsigned long bytes);
#endif

// A function that leaves its stack: neither followed by a sanitizer nor part of another function.
#define FM_SWITCHES_STACK __attribute__((noinline, no_sanitize("address"), no_sanitize("thread")))

namespace flashmoe::emulator {

#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kChecksAddresses = true;
#else
inline constexpr bool kChecksAddresses = false;
#endif

#ifdef __SANITIZE_THREAD__
inline constexpr bool kSeesRaces = true;
#else
inline constexpr bool kSeesRaces = false;
#endif

// --- threads and their order --------------------------------------------------------------------

// What ThreadSanitizer takes for a thread. One that is made knows all that its maker has done; from
// then on it is ordered with others only by release_at() and acquire_at().
class Actor {
 public:
  Actor() = default;
  Actor(const Actor&) = delete;
  Actor& operator=(const Actor&) = delete;
  ~Actor() {
#ifdef __SANITIZE_THREAD__
    if (is_own_) __tsan_destroy_fiber(fiber_);
#endif
  }

  bool exists() const { return fiber_ != nullptr; }
  void make() {
#ifdef __SANITIZE_THREAD__
    if (exists()) return;
    fiber_ = __tsan_create_fiber(0);
    is_own_ = true;
#endif
  }
  // The one that runs.
  void be_current() {
#ifdef __SANITIZE_THREAD__
    fiber_ = __tsan_get_current_fiber();
#endif
  }
  // What follows is done by this one.
  void run() const {
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(fiber_, __tsan_switch_to_fiber_no_sync);
#endif
  }

 private:
  void* fiber_ = nullptr;
  bool is_own_ = false;
};

// All that happened before a release_at() happened before what follows an acquire_at() of the same
// address.
inline void release_at([[maybe_unused]] const void* place) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(const_cast<void*>(place));
#endif
}
inline void acquire_at([[maybe_unused]] const void* place) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(const_cast<void*>(place));
#endif
}

// Accesses that somebody else makes on behalf of the one that runs.
inline void see_read([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_THREAD__
  __tsan_read_range(const_cast<void*>(memory), bytes);
#endif
}
inline void see_write([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_THREAD__
  __tsan_write_range(memory, bytes);
#endif
}

// While it lives, accesses of the running actor are not seen: those of the emulator to its own
// state, which no CUDA thread knows.
class Unseen {
 public:
#ifdef __SANITIZE_THREAD__
  Unseen() { __tsan_ignore_thread_begin(); }
  ~Unseen() { __tsan_ignore_thread_end(); }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// --- stacks and memory --------------------------------------------------------------------------

struct Stack {
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  void* frames = nullptr;  // AddressSanitizer's, while another stack runs
  Actor actor;
};

// Just before `to` runs. `from` is null where the running one has ended.
inline void leave_stack([[maybe_unused]] Stack* from, const Stack& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from != nullptr ? &from->frames : nullptr, to.bottom, to.bytes);
#endif
  to.actor.run();
}

// First on `own`. `before`, if any, learns where the stack is that ran until now.
inline void enter_stack([[maybe_unused]] const Stack& own,
                        [[maybe_unused]] Stack* before = nullptr) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own.frames, before != nullptr ? &before->bottom : nullptr,
                                  before != nullptr ? &before->bytes : nullptr);
#endif
}

// An access to these bytes is an error, from now on or no more.
inline void forbid([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, bytes);
#endif
}
inline void allow([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace flashmoe::emulator
