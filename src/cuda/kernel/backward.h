// What host and device share of the one-launch backward: its parameters, and the kernels there are.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "cuda/config/backward.h"
#include "cuda/kernel/forward.h"
#include "cuda/tile/router_walk.h"

namespace flashmoe::cuda::kernel {

// Rows that communication warps copy into expert order.
struct RowCopy {
  config::RowKind kind;
  const void* from;  // [T, H]
  int64_t stride;
  void* to;             // [rows, H]
  uint32_t* of_block;   // at a block's first group: rows of it that are copied
  uint32_t* of_expert;  // [E] rows of the expert that are copied; may be null
  bool is_weighted;     // rows times the slot's weight
};

// Counters, cleared by every launch before its plan; published by release, read by acquire.
struct BackwardCounters {
  uint32_t* grad_y_ready;      // at a block's first group: rows of grad y that are copied
  uint32_t* x_ready;           // likewise tokens
  uint32_t* z_done;            // likewise CTAs' pre-activation tiles that are stored
  uint32_t* hidden_done;       // likewise CTAs' hidden-gradient tiles
  uint32_t* x_of_expert;       // [E] rows of tokens that are copied
  uint32_t* hidden_of_expert;  // [E] CTAs' hidden-gradient tiles that are stored
  uint32_t* down_of_expert;    // [E] warpgroups' halves of tiles of grad w_down that read all rows
  uint32_t* hidden_of_all;     // [1] CTAs' hidden-gradient tiles of all experts
  uint32_t* logits_done;       // [1] communication warps that have their gradients of logits
  uint32_t* shares_taken;      // [1] runs of the router's share of grad x that are given out
  uint32_t* shares_done;       // [1] and that are done, or CTAs' tiles of it
  uint32_t* sums_taken;        // [1] runs of sums over tokens, likewise
  uint32_t* sums_done;         // [1] and warpgroups' halves of tiles of them
  uint32_t* reductions_taken;  // [1] runs that add those up
  uint32_t* left;              // [1] CTAs that have done everything
  uint32_t* first;             // all of them, one after the other, with ForwardMemory::down_done
  int32_t count;
};

// Where a weight's gradient goes: [E][N][M], M contiguous where the copy engine stores it.
struct WeightGradOut {
  void* data;
  int64_t expert_stride;
  int64_t n_stride;
  int64_t m_stride;
  int32_t m_columns;  // M
  int32_t m_offset;   // first column of the M operand's rows
  int32_t n_offset;
  bool is_wide;         // f32, else the layer's element type
  bool is_accumulated;  // added to
  bool is_direct;       // stored by the threads: wide, accumulated, or strides that no copy takes
};

// Gradients of routing and biases; data is null where one was not given or not asked for.
struct RoutingGrads {
  const void* w_router;  // [E, H] of the layer's element type or f32; null without a fused router
  bool w_router_is_wide;
  const float* logits;            // [T, E]
  StridedView grad_weights;       // [T, k], arriving at the returned weights
  StridedView grad_logits;        // [T, E]
  StridedView grad_topk_weights;  // [T, k] out, without a fused router
  StridedView grad_w_router;      // [E, H] out
  StridedView grad_router_bias;   // [E] out
  StridedView b_down;             // [E, H]
  StridedView grad_b_up;          // [E, G * I] out
  StridedView grad_b_down;        // [E, H] out

  FM_HD bool any() const { return any_slot() || any_bias(); }
  FM_HD bool any_slot() const { return w_router != nullptr || grad_topk_weights.data != nullptr; }
  FM_HD bool any_bias() const { return grad_b_up.data != nullptr || grad_b_down.data != nullptr; }
};

// Bytes from a row to the next one of what the router's products read: they fit in a word.
struct RouterStrides {
  uint32_t grad_logits;
  uint32_t w_router;
  uint32_t x;
};

struct BackwardParams {
  // The forward's steps that the backward repeats: routing that is given, the plan, and the
  // combine, whose rows are the input gradients and whose y is grad x. Of its maps row_tokens (the
  // tokens in expert order) and row_out (the input gradients) are used.
  ForwardParams forward;
  CUtensorMap grad_y_tokens[config::kTokenMaps];
  CUtensorMap grad_z_tokens[config::kTokenMaps];
  // Of the router's share as tiles:
  CUtensorMap grad_logit_tokens[config::kTokenMaps];
  CUtensorMap router_weights;  // boxes of 64 x 64
  CUtensorMap share_out;       // grad x
  CUtensorMap up_weights[2];   // boxes of 64 x 64; one, or (separate) gate and up
  CUtensorMap down_weights;
  CUtensorMap pre_activation_out;
  CUtensorMap z_in[2];     // [makes_z]: boxes of 64 columns by 16 rows by both buffers of a chunk
  CUtensorMap z_ahead[2];  // boxes of 64 columns by a block's rows
  CUtensorMap grad_z_out;  // boxes as z_in's
  CUtensorMap hidden_out;
  // Operands of weight gradients (down, up, router), in boxes of 64 columns by rows by boxes side
  // by side: of M two, of N as many as a tile has.
  CUtensorMap grad_m[tile::kGradOperands];
  CUtensorMap grad_n[tile::kGradOperands][config::kMaxColumnBoxes];
  CUtensorMap weight_grads[tile::kWeightGrads];
  WeightGradOut weight_grad_out[tile::kWeightGrads];
  bool up_is_hidden_major;  // w_up rows run along H
  bool down_is_hidden_major;
  config::BackwardSizes sizes;
  BackwardCounters counters;
  RowCopy copies[config::kRowKinds];  // by kind
  RoutingGrads routing;
  tile::RouterRuns router_runs;  // none without a fused router
  RouterStrides router_strides;
  const void* grad_y;  // [T, H]
  int64_t grad_y_stride;
  float* parts;            // [hidden_tiles][max_rows]
  float* grad_logits;      // [T, E], both rounded up (config::router_padded)
  void* grad_logit_terms;  // [T, 2, config::router_depth(E)]
  float* router_parts;     // [kRouterSegments][router_part_words]
  void* grad_z;            // [max_rows, G * I]
};

static_assert(sizeof(BackwardParams) <= 32764);  // a launch's parameters

struct BackwardEntry {
  const void* function;
  std::size_t shared_bytes;
  config::Backward config;
};

// One source file an element type: they compile side by side.
BackwardEntry backward_bf16();
BackwardEntry backward_fp16();

}  // namespace flashmoe::cuda::kernel
