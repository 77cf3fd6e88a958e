// src/cuda/ptx/prefetch.cuh for the emulator: nothing to bring nearer.
#pragma once

#include <cuda.h>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

inline void prefetch_tensormap(const CUtensorMap*) {}
inline void prefetch_tensor_2d(const CUtensorMap*, int32_t, int32_t) {}

}  // namespace flashmoe::cuda::ptx
