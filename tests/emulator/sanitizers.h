// What AddressSanitizer has to be told: on which stack a thread runs, and which memory is nobody's.
// Nothing of it is there in a program without.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // as GCC has it
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// A function that leaves its stack: neither followed by a sanitizer nor part of another function.
#define FM_SWITCHES_STACK __attribute__((noinline, no_sanitize("address")))

namespace flashmoe::emulator {

#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kChecksAddresses = true;
#else
inline constexpr bool kChecksAddresses = false;
#endif

struct Stack {
  const void* bottom = nullptr;
  std::size_t bytes = 0;
  void* frames = nullptr;  // the sanitizer's, while another stack runs
};

// Just before `to` runs. `from` is null where the running one has ended.
inline void leave_stack([[maybe_unused]] Stack* from, [[maybe_unused]] const Stack& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from != nullptr ? &from->frames : nullptr, to.bottom, to.bytes);
#endif
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
