// What the launches of a forward read of its operands, whichever kernel runs it.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/launch/forward.h"
#include "cuda/launch/weights.h"

namespace flashmoe::cuda::launch {

config::Major major_of(const fm_tensor& weight);
GateOrder gate_order_of(const fm_layer& layer);

// Weights [num_experts, rows, depth] of a product with so many columns.
WeightOperand weight_operand(const fm_tensor& weight, int64_t columns, int64_t depth,
                             GateOrder gate_order);

config::ForwardTable table_of(const fm_layer& layer, const fm_forward_args& operands,
                              const RankArguments& ranks);

template <class T>
T* region(const ForwardArguments& arguments, const config::ForwardTable& table,
          config::ForwardScratch which) {
  return reinterpret_cast<T*>(static_cast<char*>(arguments.scratch) + table[which].offset);
}

// All but sizes, the operands of products and the ranks.
kernel::ForwardParams common_params(const ForwardArguments& arguments,
                                    const config::ForwardTable& table);

}  // namespace flashmoe::cuda::launch
