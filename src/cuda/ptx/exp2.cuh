// The special function unit's power of two and reciprocal.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// 2^x within 2 ulp; 0 where that is under 2^-126. exp2f and __expf spend three instructions more on
// such results, which vanish beside the 1 that our callers add. Any thread, sm_75.
FM_DEVICE float ex2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x within 1 ulp; 0 where that is under 2^-126. __fdividef spends four instructions more on
// such results. Any thread, sm_75.
FM_DEVICE float rcp(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace flashmoe::cuda::ptx
