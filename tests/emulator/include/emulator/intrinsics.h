// What nvcc knows by itself, for a C++ compiler: included before every kernel source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../fibers.h"

#define __builtin_assume(condition) ((void)0)
#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace flashmoe::emulator {

// A built-in variable, of whose three numbers kernels use the first.
template <uint32_t (*kRead)()>
struct Place {
  struct {
    operator uint32_t() const { return kRead(); }
  } x;
};
inline uint32_t thread_place() { return self().idx; }
inline uint32_t block_place() { return self().cta->idx; }
inline uint32_t grid_size() { return launch().grid; }

// One word of every lane, shown to all. It orders no memory, and no more do votes and shuffles.
inline const uint32_t (*show(uint32_t word))[kExchangeWords] { return exchange(&word, 1); }
// The lanes' accesses before it happen before those after it.
inline void sync_lanes() {
  const uint32_t nothing = 0;
  exchange(&nothing, 1, Order::kMemory);
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return std::bit_cast<To>(value);
}

}  // namespace flashmoe::emulator

inline constexpr flashmoe::emulator::Place<flashmoe::emulator::thread_place> threadIdx{};
inline constexpr flashmoe::emulator::Place<flashmoe::emulator::block_place> blockIdx{};
inline constexpr flashmoe::emulator::Place<flashmoe::emulator::grid_size> gridDim{};

inline void __syncthreads() {
  flashmoe::emulator::sync_threads(0, flashmoe::emulator::launch().block, false);
}
inline int __syncthreads_count(int vote) {
  return static_cast<int>(
      flashmoe::emulator::sync_threads(0, flashmoe::emulator::launch().block, vote != 0));
}
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) > 0; }
inline int __syncthreads_and(int vote) { return __syncthreads_count(vote == 0) == 0; }
inline void __syncwarp(uint32_t = 0xFFFFFFFF) { flashmoe::emulator::sync_lanes(); }
inline void __nanosleep(uint32_t) { flashmoe::emulator::yield(); }
inline void __threadfence_system() { flashmoe::emulator::fence(); }

inline uint32_t __ballot_sync(uint32_t, int vote) {
  const auto* lanes = flashmoe::emulator::show(vote != 0);
  uint32_t votes = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) votes |= lanes[lane][0] << lane;
  return votes;
}
inline int __any_sync(uint32_t mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(uint32_t mask, int vote) { return __ballot_sync(mask, vote) == 0xFFFFFFFF; }
inline uint32_t __match_any_sync(uint32_t, int value) {
  const auto word = static_cast<uint32_t>(value);
  const auto* lanes = flashmoe::emulator::show(word);
  uint32_t same = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) same |= uint32_t{lanes[lane][0] == word} << lane;
  return same;
}
template <class Reduce>
uint32_t reduce_lanes(uint32_t value, const Reduce& reduce) {
  const auto* lanes = flashmoe::emulator::show(value);
  uint32_t all = value;
  for (uint32_t lane = 0; lane < 32; ++lane) all = reduce(all, lanes[lane][0]);
  return all;
}
inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  return reduce_lanes(value, [](uint32_t a, uint32_t b) { return a | b; });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  return reduce_lanes(value, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t value) {
  return reduce_lanes(value, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint32_t words[2] = {};
  std::memcpy(words, &value, sizeof(T));
  const auto* lanes = flashmoe::emulator::exchange(words, 2);
  std::memcpy(&value, lanes[lane & 31], sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(flashmoe::emulator::self().lane()) ^ distance);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t distance) {
  const uint32_t lane = flashmoe::emulator::self().lane();
  return __shfl_sync(mask, value, static_cast<int>(lane >= distance ? lane - distance : lane));
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref(*address).fetch_add(value, std::memory_order_relaxed);
}
inline uint32_t atomicOr(uint32_t* address, uint32_t bits) {
  return std::atomic_ref(*address).fetch_or(bits);
}
inline uint32_t atomicCAS_system(uint32_t* address, uint32_t expected, uint32_t desired) {
  std::atomic_ref(*address).compare_exchange_strong(expected, desired, std::memory_order_relaxed);
  return expected;
}

inline uint32_t __float_as_uint(float x) { return flashmoe::emulator::bits_as<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return flashmoe::emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return flashmoe::emulator::bits_as<float>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  }
  return result;
}

using std::isnan;
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
