// src/cuda/ptx/ptx.cuh for the emulator: the same names, as C++.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "emulator/intrinsics.h"

#define FM_DEVICE inline
#define FM_UNROLL
#define FM_DYNAMIC_SHARED(name) \
  auto* name = reinterpret_cast<uint8_t*>(::flashmoe::emulator::self().cta->shared)

namespace flashmoe::cuda::ptx {

namespace emulator = flashmoe::emulator;

struct SharedSpace {};
struct GlobalSpace {};
struct ClusterSpace {};
struct Release {};
struct CtaScope {};
struct ClusterScope {};
inline constexpr SharedSpace space_shared;
inline constexpr GlobalSpace space_global;
inline constexpr ClusterSpace space_cluster;
inline constexpr Release sem_release;
inline constexpr CtaScope scope_cta;
inline constexpr ClusterScope scope_cluster;
template <int kValue>
struct n32_t {
  static constexpr int value = kValue;
};

inline uint32_t shared_address(const void* pointer) { return emulator::shared_address_of(pointer); }
template <class Params>
const void* kernel_address(void (*kernel)(Params)) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  emulator::register_kernel(
      address, {[kernel](const void* params) { kernel(*static_cast<const Params*>(params)); },
                sizeof(Params)});
  return address;
}

inline int32_t thread_idx() { return static_cast<int32_t>(emulator::self().idx); }
inline void forget(uint8_t*&) {}
inline int32_t lane_idx() { return static_cast<int32_t>(emulator::self().lane()); }
inline int32_t block_idx() { return static_cast<int32_t>(emulator::self().cta->idx); }
inline int32_t num_blocks() { return static_cast<int32_t>(emulator::launch().grid); }
inline uint32_t get_sreg_cluster_ctarank() { return emulator::self().cta->rank; }
inline uint64_t get_sreg_globaltimer() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}
inline bool elect_one() {
  emulator::show(0);
  return emulator::self().lane() == 0;
}

// Order between accesses of one OS thread is the program's; the proxies of a GPU are not known.
template <class Space>
void fence_proxy_async(Space) {}
inline void fence_mbarrier_init(Release, ClusterScope) {}

// The barrier's word: phase, arrivals that are missing, arrivals of a phase, bytes that are
// missing.
struct Mbarrier {
  uint32_t phase : 1;
  uint32_t pending : 15;
  uint32_t count : 16;
  int32_t bytes;

  void arrive() {
    if (pending == 0)
      throw std::logic_error("an arrival at an mbarrier whose phase has all of them");
    --pending;
    settle();
  }
  void settle() {
    if (pending != 0 || bytes != 0) return;
    phase ^= 1;
    pending = count;
  }
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

// Relaxed: the barrier itself must be known to be there, and says nothing of other memory.
inline std::atomic_ref<uint64_t> mbarrier_word(void* barrier) {
  return std::atomic_ref(*static_cast<uint64_t*>(barrier));
}
inline Mbarrier mbarrier_at(void* barrier) {
  return std::bit_cast<Mbarrier>(mbarrier_word(barrier).load(std::memory_order_relaxed));
}
template <class Change>
void mbarrier_change(void* barrier, const Change& change) {
  Mbarrier state = mbarrier_at(barrier);
  change(state);
  mbarrier_word(barrier).store(std::bit_cast<uint64_t>(state), std::memory_order_relaxed);
}
// Where those release that complete a phase, and acquire that wait for it: the next but one has no
// arrivals before all have seen this one.
inline const void* order_of_phase(const void* barrier, uint32_t phase) {
  return static_cast<const std::byte*>(barrier) + phase;
}

inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  *barrier = std::bit_cast<uint64_t>(
      Mbarrier{.phase = 0, .pending = count & 0x7FFF, .count = count & 0xFFFF, .bytes = 0});
}
// What the hardware counts for copies. Their order is said where they are started.
inline void mbarrier_complete(void* barrier, uint32_t num_bytes) {
  mbarrier_change(barrier, [&](Mbarrier& state) {
    state.bytes -= static_cast<int32_t>(num_bytes);
    state.settle();
  });
}
// An arrival that announces bytes.
inline void mbarrier_arrive_at(void* barrier, uint32_t num_bytes) {
  mbarrier_change(barrier, [&](Mbarrier& state) {
    emulator::release_at(order_of_phase(barrier, state.phase));
    state.bytes += static_cast<int32_t>(num_bytes);
    state.arrive();
  });
}
inline void mbarrier_arrive(Release, CtaScope, SharedSpace, uint64_t* barrier, uint32_t count = 1) {
  for (uint32_t i = 0; i < count; ++i) mbarrier_arrive_at(barrier, 0);
}
inline void mbarrier_arrive_expect_tx(Release, CtaScope, SharedSpace, uint64_t* barrier,
                                      uint32_t num_bytes) {
  mbarrier_arrive_at(barrier, num_bytes);
}
inline bool mbarrier_has_completed(uint64_t* barrier, uint32_t parity) {
  if (mbarrier_at(barrier).phase == parity) return false;
  emulator::acquire_at(order_of_phase(barrier, parity));
  return true;
}
inline bool mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
  if (mbarrier_has_completed(barrier, parity)) return true;
  emulator::yield();
  return mbarrier_has_completed(barrier, parity);
}

// A copy that this thread starts and `barrier` will count, in the phase that it is in now.
inline void see_copy(void* barrier, const std::vector<emulator::Access>& accesses) {
  emulator::see_copy(accesses, order_of_phase(barrier, mbarrier_at(barrier).phase));
}

inline void barrier_cluster_arrive() { emulator::arrive_at_cluster(); }
inline void barrier_cluster_wait() { emulator::wait_for_cluster(); }

}  // namespace flashmoe::cuda::ptx

#include "cuda/ptx/tensor_copy.cuh"
