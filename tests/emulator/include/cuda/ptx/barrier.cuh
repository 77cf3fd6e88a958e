// src/cuda/ptx/barrier.cuh for the emulator.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

inline void mbarrier_arrive_cluster_default(uint64_t* barrier, uint32_t cta_rank) {
  mbarrier_arrive_at(emulator::shared_of(barrier, cta_rank), 0);
}
inline void barrier_sync(int barrier_idx, int num_threads) {
  emulator::sync_threads(barrier_idx, num_threads, false);
}
inline bool barrier_sync_and(int barrier_idx, int num_threads, bool vote) {
  return emulator::sync_threads(barrier_idx, num_threads, !vote) == 0;
}

}  // namespace flashmoe::cuda::ptx
