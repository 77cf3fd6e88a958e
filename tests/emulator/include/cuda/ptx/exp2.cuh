// src/cuda/ptx/exp2.cuh for the emulator.
#pragma once

#include <cmath>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

inline float ex2(float x) {
  const float result = std::exp2(x);
  return result < 0x1p-126f ? 0.0f : result;
}
inline float rcp(float x) {
  const float result = 1.0f / x;
  return std::abs(result) < 0x1p-126f ? 0.0f : result;
}

}  // namespace flashmoe::cuda::ptx
