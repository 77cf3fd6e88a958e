// What g++ calls before a volatile access (--param=tsan-distinguish-volatile=1), told to
// ThreadSanitizer as what it is on a GPU: a relaxed atomic access. It races with plain ones only.
#include <atomic>
#include <cstdint>

#include "sanitizers.h"

#ifdef __SANITIZE_THREAD__

namespace {

template <class T>
void see_volatile_read(void* memory) {
  std::atomic_ref(*static_cast<T*>(memory)).load(std::memory_order_relaxed);
}
template <class T>
void see_volatile_write(void* memory) {
  std::atomic_ref(*static_cast<T*>(memory)).fetch_add(0, std::memory_order_relaxed);
}

}  // namespace

extern "C" {

// The last 32 K accesses of each thread are remembered, not 128 K: two ranks have 4096 threads.
__attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "history_size=0";
}

// All CTAs write the same values to the same places, and each reads them when it has: few slots'
// rows, and the table of experts that is in global memory.
__attribute__((visibility("default"))) const char* __tsan_default_suppressions() {
  return "race:flashmoe::cuda::stage::place_few_slots\n"
         "race:flashmoe::cuda::stage::keep_table\n";
}

void __tsan_volatile_read1(void* memory) { see_volatile_read<uint8_t>(memory); }
void __tsan_volatile_read2(void* memory) { see_volatile_read<uint16_t>(memory); }
void __tsan_volatile_read4(void* memory) { see_volatile_read<uint32_t>(memory); }
void __tsan_volatile_read8(void* memory) { see_volatile_read<uint64_t>(memory); }
void __tsan_volatile_write1(void* memory) { see_volatile_write<uint8_t>(memory); }
void __tsan_volatile_write2(void* memory) { see_volatile_write<uint16_t>(memory); }
void __tsan_volatile_write4(void* memory) { see_volatile_write<uint32_t>(memory); }
void __tsan_volatile_write8(void* memory) { see_volatile_write<uint64_t>(memory); }

}  // extern "C"

#endif
