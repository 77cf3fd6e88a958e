// What host and device share of the grouped product: its parameters, and the kernels there are.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "cuda/config/activation.h"
#include "cuda/config/grouped_product.h"
#include "cuda/sync/report.h"

namespace flashmoe::cuda::kernel {

// In device memory, zero before the first launch. `next` counts the tickets given out beyond the
// first of each cluster, `finished` the clusters that have taken their last; the last of those
// leaves both at zero for the next launch on the stream.
struct TicketCounter {
  uint32_t next;
  uint32_t finished;
};

// What launches that follow each other on one stream share.
struct Workspace {
  TicketCounter tickets;
  sync::WaitReport report;
};

struct GroupedProductParams {
  CUtensorMap weights;
  CUtensorMap out;
  CUtensorMap tokens[config::kTokenMaps];  // [n - 1]: boxes of n * 8 rows, half of n steps
  config::BiasView bias;
  config::Activation activation;
  const int64_t* expert_begin;  // [num_experts] first row
  const int64_t* expert_rows;   // [num_experts]
  Workspace* workspace;
  sync::WaitBounds waits;
  int32_t num_experts;
  int32_t num_k_blocks;
  int32_t num_weight_pairs;  // of an expert
};

struct KernelEntry {
  const void* function;
  std::size_t shared_bytes;
  config::GroupedProduct config;
};

// One source file an element type: they compile side by side.
KernelEntry grouped_product_bf16(config::Major major, config::Epilogue epilogue);
KernelEntry grouped_product_fp16(config::Major major, config::Epilogue epilogue);

}  // namespace flashmoe::cuda::kernel
