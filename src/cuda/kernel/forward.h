// What host and device share of the one-launch forward: its parameters, and the kernels there are.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "cuda/config/activation.h"
#include "cuda/config/forward.h"
#include "cuda/config/ranks.h"
#include "cuda/kernel/grouped_product.h"
#include "cuda/kernel/mark.h"
#include "cuda/sync/grid_barrier.h"
#include "cuda/sync/report.h"

namespace flashmoe::cuda::kernel {

// The head of the scratch: zero when made, and left by every launch as the next one needs it.
struct ForwardState {
  uint32_t holder;  // sync/holder.h
  TicketCounter tickets;
  // Combine units given out, and warps that found none left (of few tokens: CTAs that are done);
  // the last of those leaves zeros.
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
  TicketCounter* tickets;  // the state's; found without it, roles keep no register for that
  TicketCounter* combine;  // likewise
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
  int32_t* slot_owner;
  float* logit_parts;
  void* rows;
};

// This rank among the ranks of the launch; of a rank alone only `world`, 1, is read.
struct RankParams {
  int32_t rank;
  int32_t world;
  int32_t token_cap;     // most tokens of a rank: received and partial rows of one are so many
  int32_t bank_experts;  // places of a bank's counts, and of its slots
  int32_t bank_slots;
  int32_t row_cap;        // rows that scratch has
  int64_t counts_offset;  // of config::Symmetric's regions
  int64_t slots_offset;
  int64_t flags_offset;
  int64_t received_offsets[config::kRowKinds];
  int64_t partial_offset;
  int64_t slot_grads_offset;
  uint8_t* regions[config::kMaxRanks];
  config::RankHeader header;  // this rank's
};

struct ForwardParams {
  CUtensorMap up_weights[2];  // one of gate and up rows, or (separate) one of each
  CUtensorMap down_weights;
  CUtensorMap row_tokens[config::kTokenMaps];     // [n - 1]: boxes of n * 8 rows of `rows`
  CUtensorMap hidden_tokens[config::kTokenMaps];  // likewise of hidden rows
  CUtensorMap hidden_out;
  CUtensorMap row_out;
  CUtensorMap z_out;      // if keeps_z
  bool keeps_z;           // up tiles store their pre-activations, too
  bool z_is_interleaved;  // gate column i at 2 i, up column at 2 i + 1
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
  sync::WaitBounds waits;
  sync::WaitReport* notice;  // LaunchReports::notice
  RankParams ranks;
  uint32_t launch_id;   // sync/holder.h
  bool may_run_beside;  // it leaves multiprocessors free: looks first whether the scratch is
};

// The large form of a launch's parameters, which sm_70 and driver 530 brought.
static_assert(sizeof(ForwardParams) <= 32764);

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
