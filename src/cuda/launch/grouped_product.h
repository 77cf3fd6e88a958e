// The grouped product on one GPU, by itself: the step that up and down products are made of.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cuda/config/grouped_product.h"
#include "cuda/kernel/grouped_product.h"
#include "cuda/launch/weights.h"

namespace flashmoe::cuda::launch {

// out[row, column] = act(bias + sum_k tokens[row, k] * weights[expert of row, column, k]) for rows
// [expert_begin[e], expert_begin[e] + expert_rows[e]) of every expert e; no other row is written.
// All pointers are device memory; sizes are elements.
struct GroupedProductArguments {
  const void* tokens = nullptr;   // [num_rows, depth]
  const void* weights = nullptr;  // [num_experts, G * columns, depth], or [.., depth, G * ..]
  void* out = nullptr;            // [num_rows, columns]
  const int64_t* expert_begin = nullptr;  // [num_experts], ascending
  const int64_t* expert_rows = nullptr;   // [num_experts]
  const void* bias = nullptr;             // [num_experts, G * columns], or none
  int64_t num_rows = 0;
  int64_t num_experts = 0;
  int64_t depth = 0;
  int64_t columns = 0;
  config::Element element = config::Element::kBf16;
  config::Major major = config::Major::kDepth;
  config::Epilogue epilogue = config::Epilogue::kStore;  // kGated: G = 2, else 1
  GateOrder gate_order = GateOrder::kConcatenated;       // of gated weights and their bias
  config::Activation activation;                         // unused by kStore
  kernel::Workspace* workspace = nullptr;                // zeroed when made; one launch at a time
  uint64_t timeout_ns = ~uint64_t{0};                    // of every wait in the kernel
  cudaStream_t stream = nullptr;
};

// Why these arguments cannot be run, or an empty text. Looks at sizes and addresses only.
std::string reason_to_refuse(const GroupedProductArguments& arguments);

// The configuration that these arguments run with, in one line.
std::string describe_grouped_product(const GroupedProductArguments& arguments);

// Launches one kernel on the current device. Throws Error: FM_INVALID_VALUE with
// reason_to_refuse(), FM_UNSUPPORTED on a device without these instructions.
void launch_grouped_product(const GroupedProductArguments& arguments);

}  // namespace flashmoe::cuda::launch
