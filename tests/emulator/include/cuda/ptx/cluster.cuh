// src/cuda/ptx/cluster.cuh for the emulator.
#pragma once

#include <cstring>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

inline void st_async_16(void* destination, int4 value, uint64_t* barrier, uint32_t cta_rank) {
  std::byte* to = emulator::shared_of(destination, cta_rank);
  void* counted = emulator::shared_of(barrier, cta_rank);
  if constexpr (emulator::kSeesRaces) see_copy(counted, {{to, sizeof(value), true}});
  emulator::start_background([=] {
    std::memcpy(to, &value, sizeof(value));
    mbarrier_complete(counted, sizeof(value));
  });
}
inline void st_cluster(uint32_t* destination, uint32_t value, uint32_t cta_rank) {
  std::memcpy(emulator::shared_of(destination, cta_rank), &value, sizeof(value));
}

}  // namespace flashmoe::cuda::ptx
