// src/cuda/ptx/word.cuh for the emulator. Whoever looks at a word may be waiting for it: others run
// meanwhile.
#pragma once

#include <atomic>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

template <class T>
T ld_and_yield(T* word, std::memory_order order) {
  const T value = std::atomic_ref(*word).load(order);
  emulator::yield();
  return value;
}
inline uint32_t ld_acquire_gpu(uint32_t* word) {
  return ld_and_yield(word, std::memory_order_acquire);
}
inline uint32_t ld_relaxed_gpu(uint32_t* word) {
  return ld_and_yield(word, std::memory_order_relaxed);
}
inline void add_release_gpu(uint32_t* word, uint32_t value) {
  std::atomic_ref(*word).fetch_add(value, std::memory_order_release);
}
inline void fence_gpu() { emulator::fence(); }
inline void add_fenced_gpu(uint32_t* word, uint32_t value) {
  emulator::release_since_fence(word);
  std::atomic_ref(*word).fetch_add(value, std::memory_order_relaxed);
}
// Whoever writes next must come after the copies that have read: a release says so here.
inline void add_after_reads_gpu(uint32_t* word, uint32_t value) { add_release_gpu(word, value); }
inline uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  return std::atomic_ref(*word).fetch_add(value, std::memory_order_acq_rel);
}
inline void st_release_gpu(uint32_t* word, uint32_t value) {
  std::atomic_ref(*word).store(value, std::memory_order_release);
}
template <class Word>
void st_relaxed_gpu(Word* word, Word value) {
  std::atomic_ref(*word).store(value, std::memory_order_relaxed);
}
inline uint32_t cas_acq_rel_gpu(uint32_t* word, uint32_t expected, uint32_t desired) {
  std::atomic_ref(*word).compare_exchange_strong(expected, desired, std::memory_order_acq_rel,
                                                 std::memory_order_acquire);
  return expected;
}
inline uint32_t ld_acquire_sys(uint32_t* word) {
  return ld_and_yield(word, std::memory_order_acquire);
}
inline uint32_t ld_relaxed_sys(uint32_t* word) {
  return ld_and_yield(word, std::memory_order_relaxed);
}
inline void st_relaxed_sys(uint32_t* word, uint32_t value) {
  emulator::release_since_fence(word);
  std::atomic_ref(*word).store(value, std::memory_order_relaxed);
}
inline void st_release_sys(uint32_t* word, uint32_t value) {
  std::atomic_ref(*word).store(value, std::memory_order_release);
}
inline uint64_t ld_acquire_cta(uint64_t* word) {
  return ld_and_yield(word, std::memory_order_acquire);
}
inline void st_release_cta(uint64_t* word, uint64_t value) {
  std::atomic_ref(*word).store(value, std::memory_order_release);
}

}  // namespace flashmoe::cuda::ptx
