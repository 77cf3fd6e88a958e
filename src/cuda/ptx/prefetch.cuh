// Prefetches that <cuda/ptx> lacks.
#pragma once

#include <cuda.h>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// Brings a tensor map (a __grid_constant__ parameter) into the descriptor cache. One thread, sm_90.
FM_DEVICE void prefetch_tensormap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// Brings a box of a tensor of two dimensions into the L2 cache. One thread, sm_90.
FM_DEVICE void prefetch_tensor_2d(const CUtensorMap* map, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];"
               :
               : "l"(map), "r"(column), "r"(row)
               : "memory");
}

}  // namespace flashmoe::cuda::ptx
