// What host and device share of the one-launch forward: its parameters, and the kernels there are.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "cuda/config/activation.h"
#include "cuda/config/forward.h"
#include "cuda/kernel/grouped_product.h"
#include "cuda/sync/grid_barrier.h"
#include "cuda/sync/report.h"

namespace flashmoe::cuda::kernel {

// When the launch passed what; nanoseconds of the GPU's global timer, written by the first cluster.
enum class Mark : int32_t {
  kStart,
  kRouted,    // its tiles are routed
  kPlanned,   // all CTAs have the plan
  kUp,        // its first up tile may start
  kDown,      // its first down tile may start
  kLastTile,  // no tile is left
  kEnd,       // all tokens are combined
  kDownGrad,  // backward: its first tile of the gradient of w_down may start
  kUpGrad,    // of w_up
  kDone,      // gradients of routing and biases are there
  kCount
};

// The head of the scratch: zero when made, and left by every launch as the next one needs it.
struct ForwardState {
  TicketCounter tickets;
  // Combine units given out, and warps that found none left; the last of those leaves zeros.
  TicketCounter combine;
  sync::GridBarrier barrier;
  uint64_t marks[static_cast<int>(Mark::kCount)];  // of the last launch
};

// A tensor of up to two dimensions whose dtype is known at run time. Strides in elements.
struct StridedView {
  void* data;
  int64_t row_stride;
  int64_t column_stride;
  int32_t dtype;  // fm_dtype
};

// The router, or with `weight` null the routing that comes from outside.
struct RouterParams {
  const void* weight;  // [E, H], rows contiguous: the layer's element type, or f32
  int64_t weight_stride;
  StridedView bias;            // [E], may be null
  StridedView selection_bias;  // [E] f32, may be null
  float* logits;               // [T, E]
  int32_t score;               // fm_score
  bool renormalize;
  bool weight_is_wide;  // f32
  float scale;
  int32_t num_groups;
  int32_t top_groups;
  int32_t group_top;
  StridedView ids;      // [T, k] i32 or i64; out with a router, else in
  StridedView weights;  // [T, k] f32 or the layer's element type; likewise
};

// The regions of config::ForwardScratch.
struct ForwardMemory {
  ForwardState* state;
  uint32_t* rows_ready;
  uint32_t* up_done;
  uint32_t* down_done;
  int32_t* ids;
  float* weights;
  int32_t* slot_ranks;
  int32_t* histograms;
  int32_t* totals;
  int32_t* experts;
  int32_t* row_token;
  float* row_weight;  // null where no row's weight is needed
  int32_t* slot_row;
  float* logit_parts;
  void* rows;
};

inline constexpr int32_t kTokenMaps = config::Forward{}.up().max_steps();

struct ForwardParams {
  CUtensorMap up_weights[2];  // one of gate and up rows, or (separate) one of each
  CUtensorMap down_weights;
  CUtensorMap row_tokens[kTokenMaps];     // [n - 1]: boxes of n * 8 rows of `rows`
  CUtensorMap hidden_tokens[kTokenMaps];  // likewise of hidden rows
  CUtensorMap hidden_out;
  CUtensorMap row_out;
  bool separate_gate;
  config::BiasView up_bias;
  config::BiasView down_bias;
  config::Activation activation;
  config::ForwardSizes sizes;
  RouterParams router;
  ForwardMemory memory;
  const void* x;  // [T, H]
  int64_t x_stride;
  void* y;  // [T, H]
  int64_t y_stride;
  int64_t* tokens_per_expert;  // [E], may be null
  int64_t tokens_per_expert_stride;
  int64_t* dropped;  // [1], may be null
  sync::WaitReport* report;
  uint64_t timeout_ns;
};

static_assert(sizeof(ForwardParams) <= 4096);  // a launch's parameters, without the large ones

struct ForwardEntry {
  const void* function;
  std::size_t shared_bytes;
  config::Forward config;
};

// One source file an element type and major order of w_up: they compile side by side.
ForwardEntry forward_bf16_depth(config::Epilogue up_epilogue, config::Major down_major);
ForwardEntry forward_bf16_columns(config::Epilogue up_epilogue, config::Major down_major);
ForwardEntry forward_fp16_depth(config::Epilogue up_epilogue, config::Major down_major);
ForwardEntry forward_fp16_columns(config::Epilogue up_epilogue, config::Major down_major);

}  // namespace flashmoe::cuda::kernel
