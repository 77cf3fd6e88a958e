// The 16-bit types of the tensor cores, and how sums become them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/config/grouped_product.h"
#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::tile {

inline constexpr int32_t kVector = 8;  // 16-bit elements of a 16-byte access

template <config::Element kElement>
struct ElementOf;

template <>
struct ElementOf<config::Element::kBf16> {
  using Type = __nv_bfloat16;
  FM_DEVICE static uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  FM_DEVICE static float2 unpack(uint32_t packed) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed));
  }
  // The same without 16-bit values, which the compiler makes long before and gives a register each.
  FM_DEVICE static float2 widen(uint32_t packed) {
    return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u)};
  }
};

template <>
struct ElementOf<config::Element::kFp16> {
  using Type = __half;
  FM_DEVICE static uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  FM_DEVICE static float2 unpack(uint32_t packed) {
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  }
  FM_DEVICE static float2 widen(uint32_t packed) { return unpack(packed); }
};

}  // namespace flashmoe::cuda::tile
