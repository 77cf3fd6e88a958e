// Reads and writes of tensors whose dtype is known at run time: the router's small operands.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernel/forward.h"
#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::tile {

FM_DEVICE int64_t offset_of(const kernel::StridedView& view, int32_t row, int32_t column) {
  return row * view.row_stride + column * view.column_stride;
}

FM_DEVICE float read_real(const kernel::StridedView& view, int32_t row, int32_t column = 0) {
  const int64_t at = offset_of(view, row, column);
  if (view.dtype == FM_F32) return static_cast<const float*>(view.data)[at];
  if (view.dtype == FM_BF16) {
    return __bfloat162float(static_cast<const __nv_bfloat16*>(view.data)[at]);
  }
  return __half2float(static_cast<const __half*>(view.data)[at]);
}

FM_DEVICE void write_real(const kernel::StridedView& view, int32_t row, int32_t column,
                          float value) {
  const int64_t at = offset_of(view, row, column);
  if (view.dtype == FM_F32) {
    static_cast<float*>(view.data)[at] = value;
  } else if (view.dtype == FM_BF16) {
    static_cast<__nv_bfloat16*>(view.data)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(view.data)[at] = __float2half_rn(value);
  }
}

FM_DEVICE int64_t read_index(const kernel::StridedView& view, int32_t row, int32_t column) {
  const int64_t at = offset_of(view, row, column);
  if (view.dtype == FM_I32) return static_cast<const int32_t*>(view.data)[at];
  return static_cast<const int64_t*>(view.data)[at];
}

FM_DEVICE void write_index(const kernel::StridedView& view, int32_t row, int32_t column,
                           int32_t value) {
  const int64_t at = offset_of(view, row, column);
  if (view.dtype == FM_I32) {
    static_cast<int32_t*>(view.data)[at] = value;
  } else {
    static_cast<int64_t*>(view.data)[at] = value;
  }
}

}  // namespace flashmoe::cuda::tile
