// How the one-launch backward is cut for a GPU: its products, sizes and scratch, on host and
// device.
#pragma once

#include <concepts>
#include <cstdint>

#include "cuda/config/forward.h"
#include "cuda/tile/backward_walk.h"

namespace flashmoe::cuda::config {

// One kernel an element type: it holds the products of every layout, runtime values choose.
struct Backward {
  Element element = Element::kBf16;

  // 144 tokens leave registers for the activation's derivative, and shared memory for the Z that it
  // reads beside as many stages as the forward has.
  FM_HD constexpr GroupedProduct product(Major major) const {
    return {.element = element,
            .major = major,
            .epilogue = Epilogue::kStore,
            .max_tokens = 144,
            .num_stages = 5,
            .load_registers = 32,
            .math_registers = 208};
  }
};
inline constexpr int32_t kBackwardCommRegisters = 64;
// Sums over few rows are loaded sooner than a ticket and its tile come.
inline constexpr int32_t kBackwardTicketLead = 2;

// Most rows of a block.
inline constexpr int32_t kBackwardBlockRows = Backward{}.product(Major::kDepth).max_tokens;

inline constexpr int32_t kBoxColumns = tile::kGradUnit;  // of a copy: 128 bytes
inline constexpr int32_t kBoxBytes = kBoxColumns * kDepthStep * kElementBytes;

// Tiles of weight gradients: 128 of M by up to 256 of N, which both math warpgroups share, half of
// N each. Tiles of one warpgroup would have half the N and take a third more bytes for a product,
// more than a multiprocessor takes in meanwhile (docs/backward_pass.md). Steps go through a ring of
// their own, in the memory of the other tiles' stages.
inline constexpr int32_t kGradDepth = 32;  // rows of a step
inline constexpr int32_t kGradBoxBytes = kBoxColumns * kGradDepth * kElementBytes;
inline constexpr int32_t kMaxColumnBoxes = tile::kGradColumns / kBoxColumns;
inline constexpr int32_t kGradWeightBytes = kWeightRows / kBoxColumns * kGradBoxBytes;
inline constexpr int32_t kGradStageBytes = kGradWeightBytes + kMaxColumnBoxes * kGradBoxBytes;
inline constexpr int32_t kGradStages = 7;
// Of N's operand, each CTA of a pair loads 16 rows: all columns of one product's depth.
inline constexpr int32_t kGradHalfBytes = kMaxColumnBoxes * kGradBoxBytes / kClusterSize;
static_assert(kGradDepth / kClusterSize == 16);
// Steps that one warpgroup is ahead of the other: what hides a part of either's epilogue.
inline constexpr int32_t kGradLead = 1;

// Of a math warpgroup: chunks of the hidden gradients, or the other tiles' staging.
inline constexpr int32_t kHiddenRows = 16;  // of a chunk, by 64 columns
inline constexpr int32_t kHiddenBytes = kHiddenRows * kHalfRows * kElementBytes;
inline constexpr int32_t kHiddenSets = 4;
inline constexpr int32_t kHiddenBuffers = 3;  // gate (or x), up, A
inline constexpr int32_t kBackwardStagingBytes = kHiddenSets * kHiddenBuffers * kHiddenBytes;
inline constexpr int32_t kGradStoreColumns = 64;  // a weight gradient's epilogue chunk: by 64 of M
inline constexpr int32_t kGradStoreBytes = kGradStoreColumns * kHalfRows * kElementBytes;
static_assert(kStoreBuffers * kGradStoreBytes <= kBackwardStagingBytes);
// Gradients of the router are sums over this many ranges of tokens, whoever makes them.
inline constexpr int32_t kRouterSegments = 8;
// Steps of the router's products whose loads a warp has under way: what its registers hold.
struct RouterStages {
  int num_steps;
  int num_wide_steps;  // of products with an fp32 W_router
};
inline constexpr RouterStages kCommRouterStages{.num_steps = 3, .num_wide_steps = 2};
inline constexpr RouterStages kMathRouterStages{.num_steps = 8, .num_wide_steps = 8};

// Tokens and experts of grad_logits in scratch are rounded up to this: the router's products read
// whole tiles, with zeros where there is no token or expert.
inline constexpr int32_t kRouterPadding = 16;

template <class Count>
FM_HD constexpr Count router_padded(Count count) {
  return plan::align_up(count, Count{kRouterPadding});
}

// The router's tiles take a gradient of a logit as a sum of two elements: a token has the first
// terms of all experts, rounded up to whole steps of depth, then the second ones.
template <class Count>
FM_HD constexpr Count router_depth(Count num_experts) {
  return plan::align_up(num_experts, Count{kDepthStep});
}
inline constexpr int kLogitTerms = 2;

// Words of a range's sums of the router's weight: as many as the tiles have, those of either term
// apart, or as warps make them. Those of its bias follow. A multiple of 16 bytes.
FM_HD constexpr int64_t router_weight_words(int64_t num_experts, int64_t hidden, bool by_tiles) {
  return (by_tiles ? kLogitTerms * router_depth(num_experts) : num_experts) * hidden;
}
FM_HD constexpr int64_t router_part_words(int64_t num_experts, int64_t hidden, bool by_tiles) {
  return router_weight_words(num_experts, hidden, by_tiles) + plan::align_up(num_experts, 4);
}

constexpr bool is_valid(const Backward& config) {
  const GroupedProduct product = config.product(Major::kDepth);
  return is_valid(product) && kWarpgroup * (product.load_registers + 2 * product.math_registers +
                                            kBackwardCommRegisters) <=
                                  kRegisterFile;
}

template <class C>
concept BackwardConfig = requires {
  { C::value } -> std::convertible_to<const Backward&>;
}
&&is_valid(C::value);

template <Element kElement>
struct BackwardOf {
  static constexpr Backward value{kElement};
};

// The products of a kernel, as the tile functions take them.
template <BackwardConfig Config, Major kMajor>
struct BackwardProductOf {
  static constexpr GroupedProduct value = Config::value.product(kMajor);
};

// What a launch needs beside config::ForwardSizes, whose down product is the input gradient here.
struct BackwardSizes {
  int32_t up_columns;            // G * I
  int32_t pre_activation_pairs;  // pairs of 128 of G * I, 0: kept by the forward
  int32_t z_rows;        // of several ranks: rows that the kept Z has; below 0: none is kept
  int32_t hidden_pairs;  // of I
  int32_t hidden_tiles;  // of 128 of I: parts of a slot's weight gradient
  int32_t max_rows;      // rows that scratch has
  int32_t share_tokens;  // whose router's share of grad x is tiles; 0: made by warps, or not at all
  int32_t logit_segments;  // ranges of tokens whose sums for the router's weight are tiles; or 0
  int32_t logit_range;     // tokens of a range, but for the last
  tile::WeightGrid weight_grads[tile::kWeightGrads];
  bool gated;
  bool interleaved;      // gate column i of Z at 2 i, up column at 2 i + 1
  bool separate;         // gate and up weights are two tensors
  bool weight_on_input;  // ForwardSizes has the reverse: what its combine weighs
};

// Scratch of a launch. The head is that of config::ForwardScratch: launches of both kinds share it.
enum class BackwardScratch : int {
  kState,     // kernel::ForwardState
  kCounters,  // u32, cleared by the launch: kernel::BackwardCounters
  kIds,       // from here to kSlotOwner as in ForwardScratch
  kWeights,
  kSlotRanks,
  kHistograms,
  kTotals,
  kExperts,
  kRowToken,
  kRowWeight,
  kSlotRow,
  kSlotOwner,
  kParts,           // f32 [tiles of I][rows]: of <A, dA'>
  kGradLogits,      // f32 [T][E], both router_padded, fused router
  kGradLogitTerms,  // T [T][2][router_depth(E)]: grad logits, where the router's products are tiles
  kRouterParts,     // f32 [kRouterSegments][router_part_words], fused router
  kXRows,           // T [rows][H]: tokens in expert order
  kRows,            // T [rows][H]: grad y in expert order; then the input gradients
  kGradZ,           // T [rows][G * I]: Z, if it was not kept; then dZ
  kHidden,          // T [rows][I]: w A
  kCount
};

using BackwardTable = plan::RegionTable<BackwardScratch, static_cast<int>(BackwardScratch::kCount)>;

struct BackwardTableShape {
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  int64_t up_columns;
  int64_t num_experts;
  int64_t top_k;
  int64_t rows;        // that a launch may have
  int64_t rank_slots;  // most slots of all ranks together, 0 for a rank alone
  int64_t state_bytes;
  int64_t num_counters;
  bool has_router;
  bool routes_by_tiles;  // the router's share of grad x and its weight's gradient
};

FM_HD constexpr BackwardTable backward_table(const BackwardTableShape& s) {
  BackwardTable table;
  const int64_t slots = s.tokens * s.top_k;
  const int64_t tiles = plan::num_chunks(s.tokens);
  const int64_t parts = plan::ceil_div(s.intermediate, kWeightRows);
  const int64_t router_words =
      s.has_router ? kRouterSegments * router_part_words(s.num_experts, s.hidden, s.routes_by_tiles)
                   : 0;
  table.add(BackwardScratch::kState, "state", s.state_bytes);
  table.add(BackwardScratch::kCounters, "counters", s.num_counters * 4);
  table.add(BackwardScratch::kIds, "ids", slots * 4);
  table.add(BackwardScratch::kWeights, "weights", slots * 4);
  table.add(BackwardScratch::kSlotRanks, "slot ranks", slots * 4);
  table.add(BackwardScratch::kHistograms, "histograms", tiles * s.num_experts * 4);
  table.add(BackwardScratch::kTotals, "totals", s.num_experts * 4);
  table.add(BackwardScratch::kExperts, "experts", (3 * s.num_experts + 2) * 4);
  table.add(BackwardScratch::kRowToken, "row token", s.rows * 4);
  table.add(BackwardScratch::kRowWeight, "row weight", s.rows * 4);
  const bool is_alone = s.rank_slots == 0;
  table.add(BackwardScratch::kSlotRow, "slot row", (is_alone ? slots : s.rank_slots) * 4);
  table.add(BackwardScratch::kSlotOwner, "slot owner", is_alone ? 0 : slots * 4);
  table.add(BackwardScratch::kParts, "weight parts", s.rows * parts * 4);
  table.add(BackwardScratch::kGradLogits, "grad logits",
            s.has_router ? router_padded(s.tokens) * router_padded(s.num_experts) * 4 : 0);
  table.add(
      BackwardScratch::kGradLogitTerms, "grad logit terms",
      s.routes_by_tiles ? s.tokens * kLogitTerms * router_depth(s.num_experts) * kElementBytes : 0);
  table.add(BackwardScratch::kRouterParts, "router parts", router_words * 4);
  table.add(BackwardScratch::kXRows, "x rows", s.rows * s.hidden * kElementBytes);
  table.add(BackwardScratch::kRows, "rows", s.rows * s.hidden * kElementBytes);
  table.add(BackwardScratch::kGradZ, "grad z", s.rows * s.up_columns * kElementBytes);
  table.add(BackwardScratch::kHidden, "hidden rows", s.rows * s.intermediate * kElementBytes);
  return table;
}

}  // namespace flashmoe::cuda::config
