// How a product's weights and biases lie in memory, as tensor maps and bias views.
#pragma once

#include "cuda/config/activation.h"
#include "cuda/launch/tensor_map.h"

namespace flashmoe::cuda::launch {

enum class GateOrder : int32_t {
  kConcatenated,  // all gate rows of an expert, then its up rows
  kInterleaved,   // gate row i at 2 i, up row i at 2 i + 1
  kSeparate,      // two tensors; a view is of one of them
};

// Weights [num_experts, rows, depth], rows being `columns` or twice as many (gate and up); strides
// in elements. line_stride leads from one row to the next, or from one k to the next where the rows
// are contiguous (config::Major::kColumns).
struct WeightOperand {
  const void* base;
  uint64_t num_experts;
  uint64_t columns;
  uint64_t depth;
  uint64_t expert_stride;
  uint64_t line_stride;
  GateOrder gate_order;
};

// Coordinates (k, row of 64, block of 64 rows, gate or up, expert), the first two swapped where
// columns are contiguous. A box is what a CTA takes of a k-block: 128 rows, or 64 gate rows and
// their 64 up rows, or 64 of either where they are separate.
TensorView weights_view(const WeightOperand& weights, const config::GroupedProduct& config);

// Bias [num_experts, rows], expert_stride apart, in the order of the weights' rows (gate then up
// where those are separate).
config::BiasView bias_view(const void* data, int64_t expert_stride, const WeightOperand& weights,
                           const config::GroupedProduct& config);

}  // namespace flashmoe::cuda::launch
