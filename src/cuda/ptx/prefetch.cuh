// Prefetches that <cuda/ptx> lacks.
#pragma once

#include <cuda.h>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// Brings a tensor map (a __grid_constant__ parameter) into the descriptor cache. One thread, sm_90.
FM_DEVICE void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

}  // namespace flashmoe::cuda::ptx
