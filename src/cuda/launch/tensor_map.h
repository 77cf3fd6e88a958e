// Tensor maps (the copy engine's descriptions of tensors), made through the driver's own function:
// no link-time dependency on the driver.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/config/grouped_product.h"

namespace flashmoe::cuda::launch {

inline constexpr int kMaxTensorDims = 5;

// A view of a 16-bit tensor, fastest dimension first; elements swizzled over 128 bytes in shared
// memory, zeros where a box leaves the tensor.
struct TensorView {
  const void* base;
  int num_dims;
  uint64_t sizes[kMaxTensorDims];
  uint64_t strides[kMaxTensorDims];  // bytes; the first is the element's and not read
  uint32_t box[kMaxTensorDims];
};

// Throws Error (FM_INTERNAL) with the operands if the driver refuses the view.
CUtensorMap encode(const TensorView& view, config::Element element, const char* name);

// View of [num_rows, columns], for boxes of box_columns by box_rows at coordinates (column, row).
TensorView rows_view(const void* base, int64_t num_rows, int64_t columns, uint32_t box_columns,
                     uint32_t box_rows);

// The same with the coordinates of tile/window.h, which clip the rows of a box.
TensorView window_view(const void* base, int64_t num_rows, int64_t columns, uint32_t box_columns,
                       uint32_t box_rows);

}  // namespace flashmoe::cuda::launch
