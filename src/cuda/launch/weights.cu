#include "cuda/launch/weights.h"

namespace flashmoe::cuda::launch {
namespace {

using config::kElementBytes;

constexpr uint64_t kBlock = config::kHalfRows;  // weight rows of a box, once or twice

// An expert's weight rows as the kernel takes them: `halves` sets (gate rows and up rows, or all)
// of `rows`, `stride` apart; half_offset leads from a tile's first 64 rows to its second.
struct WeightRows {
  uint64_t halves;
  uint64_t rows;
  uint64_t stride;
  uint64_t half_offset;
};

WeightRows weight_rows(const WeightOperand& weights, const config::GroupedProduct& config) {
  const uint64_t columns = weights.columns;
  if (!config.halves_are_gates()) return {1, (config.gated() ? 2 : 1) * columns, 1, kBlock};
  if (weights.gate_order == GateOrder::kInterleaved) return {2, columns, 2, 1};
  if (weights.gate_order == GateOrder::kSeparate) return {1, columns, 1, columns};
  return {2, columns, 1, columns};
}

}  // namespace

TensorView weights_view(const WeightOperand& weights, const config::GroupedProduct& config) {
  const WeightRows rows = weight_rows(weights, config);
  const uint64_t line = weights.line_stride;
  TensorView view{};
  view.base = weights.base;
  view.num_dims = 5;
  const auto set = [&view](int dim, uint64_t size, uint64_t stride, uint64_t box) {
    view.sizes[dim] = size;
    view.strides[dim] = stride * kElementBytes;
    view.box[dim] = static_cast<uint32_t>(box);
  };
  const uint64_t blocks = config.halves_are_gates() ? 1 : 2;  // of a box, in each half
  // A dimension of size 1 needs a stride that the hardware accepts, whatever it is.
  const uint64_t one_half = 8;
  if (config.major == config::Major::kDepth) {
    set(0, weights.depth, 1, config::kDepthStep);
    set(1, kBlock, rows.stride * line, kBlock);
    set(2, rows.rows / kBlock, kBlock * rows.stride * line, blocks);
    set(3, rows.halves, rows.halves == 1 ? one_half : rows.half_offset * line, rows.halves);
  } else {
    set(0, kBlock, 1, kBlock);
    set(1, weights.depth, line, config::kDepthStep);
    set(2, rows.rows / kBlock, kBlock, blocks);
    set(3, rows.halves, rows.halves == 1 ? one_half : rows.half_offset, rows.halves);
  }
  set(4, weights.num_experts, weights.expert_stride, 1);
  return view;
}

config::BiasView bias_view(const void* data, int64_t expert_stride, const WeightOperand& weights,
                           const config::GroupedProduct& config) {
  const WeightRows rows = weight_rows(weights, config);
  const uint64_t halves =
      weights.gate_order == GateOrder::kSeparate && config.halves_are_gates() ? 2 : rows.halves;
  return {.data = data,
          .per_expert = static_cast<int64_t>(rows.rows * halves),
          .expert_stride = expert_stride,
          .column_stride = static_cast<int32_t>(rows.stride),
          .half_offset = static_cast<int32_t>(rows.half_offset)};
}

}  // namespace flashmoe::cuda::launch
