// Words that one CTA writes and another waits for: of the same GPU, or (sys) of any.
#pragma once

#include <cuda/atomic>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

using GpuWord = ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_device>;

// Any thread, sm_70.
FM_DEVICE uint32_t ld_acquire_gpu(uint32_t* word) {
  return GpuWord(*word).load(::cuda::memory_order_acquire);
}
FM_DEVICE uint32_t ld_relaxed_gpu(uint32_t* word) {
  return GpuWord(*word).load(::cuda::memory_order_relaxed);
}
FM_DEVICE void add_release_gpu(uint32_t* word, uint32_t value) {
  GpuWord(*word).fetch_add(value, ::cuda::memory_order_release);
}
FM_DEVICE uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  return GpuWord(*word).fetch_add(value, ::cuda::memory_order_acq_rel);
}
FM_DEVICE void st_release_gpu(uint32_t* word, uint32_t value) {
  GpuWord(*word).store(value, ::cuda::memory_order_release);
}
// For several words: fence_gpu() once, then an addition each, publish what the thread wrote before
// the fence. A release each would wait for its stores each time.
FM_DEVICE void fence_gpu() {
  ::cuda::atomic_thread_fence(::cuda::memory_order_acq_rel, ::cuda::thread_scope_device);
}
FM_DEVICE void add_fenced_gpu(uint32_t* word, uint32_t value) {
  GpuWord(*word).fetch_add(value, ::cuda::memory_order_relaxed);
}
// Says that memory may be written again which copies have read whose bytes the thread has waited
// for. It publishes nothing that was written, and so waits for nothing.
FM_DEVICE void add_after_reads_gpu(uint32_t* word, uint32_t value) {
  GpuWord(*word).fetch_add(value, ::cuda::memory_order_relaxed);
}
// Of a word that others write meanwhile, or have written without telling.
template <class Word>
FM_DEVICE void st_relaxed_gpu(Word* word, Word value) {
  ::cuda::atomic_ref<Word, ::cuda::thread_scope_device>(*word).store(value,
                                                                     ::cuda::memory_order_relaxed);
}

// Compare-and-swap; returns what the word held.
FM_DEVICE uint32_t cas_acq_rel_gpu(uint32_t* word, uint32_t expected, uint32_t desired) {
  GpuWord(*word).compare_exchange_strong(expected, desired, ::cuda::memory_order_acq_rel,
                                         ::cuda::memory_order_acquire);
  return expected;
}

using SystemWord = ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_system>;

// Any thread, sm_70.
FM_DEVICE uint32_t ld_acquire_sys(uint32_t* word) {
  return SystemWord(*word).load(::cuda::memory_order_acquire);
}
FM_DEVICE uint32_t ld_relaxed_sys(uint32_t* word) {
  return SystemWord(*word).load(::cuda::memory_order_relaxed);
}
FM_DEVICE void st_relaxed_sys(uint32_t* word, uint32_t value) {
  SystemWord(*word).store(value, ::cuda::memory_order_relaxed);
}
FM_DEVICE void st_release_sys(uint32_t* word, uint32_t value) {
  SystemWord(*word).store(value, ::cuda::memory_order_release);
}

using CtaWord = ::cuda::atomic_ref<uint64_t, ::cuda::thread_scope_block>;

// Any thread of the CTA, sm_70.
FM_DEVICE uint64_t ld_acquire_cta(uint64_t* word) {
  return CtaWord(*word).load(::cuda::memory_order_acquire);
}
FM_DEVICE void st_release_cta(uint64_t* word, uint64_t value) {
  CtaWord(*word).store(value, ::cuda::memory_order_release);
}

}  // namespace flashmoe::cuda::ptx
