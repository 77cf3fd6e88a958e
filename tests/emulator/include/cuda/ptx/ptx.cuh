// src/cuda/ptx/ptx.cuh for the emulator: the same names, as C++.
#pragma once

#include <chrono>
#include <cstdint>

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

// Order between accesses of one OS thread is the program's.
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

  void settle() {
    if (pending != 0 || bytes != 0) return;
    phase ^= 1;
    pending = count;
  }
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

inline Mbarrier& mbarrier_at(void* barrier) { return *static_cast<Mbarrier*>(barrier); }
inline void mbarrier_init(uint64_t* barrier, uint32_t count) {
  mbarrier_at(barrier) = {
      .phase = 0, .pending = count & 0x7FFF, .count = count & 0xFFFF, .bytes = 0};
}
inline void mbarrier_complete(void* barrier, uint32_t num_bytes) {
  mbarrier_at(barrier).bytes -= static_cast<int32_t>(num_bytes);
  mbarrier_at(barrier).settle();
}
inline void mbarrier_arrive(Release, CtaScope, SharedSpace, uint64_t* barrier) {
  --mbarrier_at(barrier).pending;
  mbarrier_at(barrier).settle();
}
inline void mbarrier_arrive_expect_tx(Release, CtaScope, SharedSpace, uint64_t* barrier,
                                      uint32_t num_bytes) {
  mbarrier_at(barrier).bytes += static_cast<int32_t>(num_bytes);
  --mbarrier_at(barrier).pending;
  mbarrier_at(barrier).settle();
}
inline bool mbarrier_try_wait_parity(uint64_t* barrier, uint32_t parity) {
  if (mbarrier_at(barrier).phase != parity) return true;
  emulator::yield();
  return mbarrier_at(barrier).phase != parity;
}

inline void barrier_cluster_arrive() {
  emulator::Thread& thread = emulator::self();
  emulator::Cluster& cluster = *thread.cta->cluster;
  thread.cluster_generation = cluster.gathering.generation;
  if (++cluster.gathering.arrived < emulator::launch().cluster * emulator::launch().block) return;
  cluster.gathering.arrived = 0;
  ++cluster.gathering.generation;
}
inline void barrier_cluster_wait() {
  emulator::Thread& thread = emulator::self();
  while (thread.cta->cluster->gathering.generation == thread.cluster_generation) emulator::yield();
}

}  // namespace flashmoe::cuda::ptx

#include "cuda/ptx/tensor_copy.cuh"
