// src/cuda/ptx/word.cuh for the emulator. Whoever looks at a word may be waiting for it: others run
// meanwhile.
#pragma once

#include <atomic>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

template <class T>
T ld_and_yield(T* word) {
  const T value = std::atomic_ref(*word).load();
  emulator::yield();
  return value;
}
inline uint32_t ld_acquire_gpu(uint32_t* word) { return ld_and_yield(word); }
inline void add_release_gpu(uint32_t* word, uint32_t value) {
  std::atomic_ref(*word).fetch_add(value);
}
inline uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
  return std::atomic_ref(*word).fetch_add(value);
}
inline void st_release_gpu(uint32_t* word, uint32_t value) { std::atomic_ref(*word).store(value); }
inline uint32_t cas_acq_rel_gpu(uint32_t* word, uint32_t expected, uint32_t desired) {
  std::atomic_ref(*word).compare_exchange_strong(expected, desired);
  return expected;
}
inline uint32_t ld_acquire_sys(uint32_t* word) { return ld_and_yield(word); }
inline uint32_t ld_relaxed_sys(uint32_t* word) { return ld_and_yield(word); }
inline void st_relaxed_sys(uint32_t* word, uint32_t value) { std::atomic_ref(*word).store(value); }
inline void st_release_sys(uint32_t* word, uint32_t value) { std::atomic_ref(*word).store(value); }
inline uint64_t ld_acquire_cta(uint64_t* word) { return ld_and_yield(word); }
inline void st_release_cta(uint64_t* word, uint64_t value) { std::atomic_ref(*word).store(value); }

}  // namespace flashmoe::cuda::ptx
