// How the one-launch forward is cut for a GPU: the kernels there are, and pure functions from the
// problem to sizes, on host and device.
#pragma once

#include <concepts>
#include <cstdint>

#include "cuda/config/grouped_product.h"
#include "plan/layout.h"
#include "plan/rows.h"

namespace flashmoe::cuda::config {

// Products of one forward kernel. Runtime values decide all the rest.
struct Forward {
  Element element = Element::kBf16;
  Major up_major = Major::kDepth;
  Epilogue up_epilogue = Epilogue::kGated;
  Major down_major = Major::kDepth;

  FM_HD constexpr GroupedProduct up() const { return product(up_major, up_epilogue); }
  FM_HD constexpr GroupedProduct down() const { return product(down_major, Epilogue::kStore); }

  // 176 tokens and 208 registers leave room for a communication warpgroup; it costs the products
  // less than 1.2 % (docs/perf-notes.md).
  FM_HD constexpr GroupedProduct product(Major major, Epilogue epilogue) const {
    return {.element = element,
            .major = major,
            .epilogue = epilogue,
            .max_tokens = 176,
            .num_stages = 5,
            .load_registers = 32,
            .math_registers = 208};
  }
};

// Most rows of a block.
inline constexpr int32_t kForwardBlockRows = Forward{}.up().max_tokens;
inline constexpr int32_t kCommRegisters = 64;
inline constexpr int32_t kForwardThreads = 4 * kWarpgroup;  // load, math, math, comm
inline constexpr int32_t kForwardWarps = kForwardThreads / 32;
inline constexpr int32_t kCommWarps = kWarpgroup / 32;
inline constexpr int32_t kMathWarps = 2 * kWarpgroup / 32;

// Tables of more experts than this are in global memory instead of shared.
inline constexpr int32_t kNearExperts = 170;

constexpr bool is_valid(const Forward& config) {
  const GroupedProduct up = config.up();
  return is_valid(up) && is_valid(config.down()) &&
         kWarpgroup * (up.load_registers + 2 * up.math_registers + kCommRegisters) <= kRegisterFile;
}

template <class C>
concept ForwardConfig = requires {
  { C::value } -> std::convertible_to<const Forward&>;
}
&&is_valid(C::value);

template <Element kElement, Major kUpMajor, Epilogue kUpEpilogue, Major kDownMajor>
struct ForwardOf {
  static constexpr Forward value{kElement, kUpMajor, kUpEpilogue, kDownMajor};
};

// The two products of a kernel, as the tile functions take them.
template <ForwardConfig Config>
struct UpOf {
  static constexpr GroupedProduct value = Config::value.up();
};
template <ForwardConfig Config>
struct DownOf {
  static constexpr GroupedProduct value = Config::value.down();
};

// Most that a kernel's tables and registers hold.
inline constexpr int64_t kMaxExperts = 1024;
inline constexpr int64_t kMaxWidth = int64_t{1} << 20;  // hidden and intermediate size
inline constexpr int64_t kMaxTopK = 32;                 // a slot a lane

// Rows of an expert start on multiples of this: blocks, copies and counters share no group.
inline constexpr int32_t kRowGroup = tile::kTokenStep;
// Rows that one warp copies before it says so.
inline constexpr int32_t kCopyRows = 4;

// Few tokens are routed by all CTAs together: the sums of their logits are divided among them
// (kLogitSegments), and meetings of all CTAs are replaced by work that each does for itself.
inline constexpr int64_t kFewTiles = 16;
inline constexpr int64_t kFewSlots = kForwardThreads;
// A logit is the sum of this many sums over parts of the hidden size, whoever makes them: the same
// bits for any number of tokens.
inline constexpr int32_t kLogitSegments = 8;

// Sizes of one launch in 32 bits: 64-bit division is a call, see tile/schedule.h.
struct ForwardSizes {
  int32_t tokens;
  int32_t hidden;
  int32_t intermediate;
  int32_t num_experts;
  int32_t top_k;
  int32_t route_tiles;   // of 64 tokens
  int32_t capacity;      // slots that an expert keeps
  int32_t up_pairs;      // weight pairs of an expert's up product
  int32_t down_pairs;    // and of its down product
  int32_t column_pairs;  // weight pairs of a column block of the down product
  int32_t column_blocks;
  int32_t column_width;    // columns of a column block
  int32_t combine_tokens;  // tokens that a warp combines at a time: a unit
  int32_t row_groups;      // groups of 16 rows that scratch has
  // Of several ranks: how their rows lie here. Tables are of virtual experts: (group of sources,
  // local expert), all local experts of the first group first.
  int32_t local_experts;
  int32_t source_groups;  // sources in step order: each a group, or all of them one
  bool has_few_tiles;     // kFewTiles or less to route
  bool has_few_slots;     // kFewSlots or less, of few tiles
  bool weight_on_input;

  FM_HD constexpr int32_t slots() const { return tokens * top_k; }
  FM_HD constexpr int32_t table_experts() const { return source_groups * local_experts; }
  FM_HD constexpr int32_t pairs_of_column_block(int32_t column_block) const {
    return tile::ColumnBlocks{down_pairs, column_pairs}.pairs_of(column_block);
  }
};

// Scratch of a launch. The head is zero when made and lasts; the rest belongs to one launch.
enum class ForwardScratch : int {
  kState,       // kernel::ForwardState
  kRowsReady,   // u32 [rows / 16]: at a block's first group, rows of it that are copied
  kUpDone,      // u32 [rows / 16]: at a block's first group, up tiles that are stored
  kDownDone,    // u32 [column blocks]: down tiles that are stored
  kIds,         // i32 [T * k]: -1 no expert, -2 the token has no defined routing
  kWeights,     // f32 [T * k]
  kSlotRanks,   // i32 [T * k]: place among the tile's slots of the same expert
  kHistograms,  // i32 [E][tiles]: slots of a tile; after the scan, of all tiles before it
  kTotals,      // i32 [E]
  kExperts,     // i32 [3 * E + 2]: tile::ExpertTable of more than kNearExperts (virtual) experts
  kRowToken,    // i32 [rows]: with several ranks, source * most tokens of a rank + token
  kRowWeight,   // f32 [rows], weight_on_input
  kSlotRow,     // i32 [T * k], of every rank: -1 none; -2 as in kIds, of a rank alone
  kSlotOwner,   // i32 [T * k], several ranks: the rank of its expert; -1 none, -2 as in kIds
  kLogits,      // f32 [T][E], fused router without an output for them
  kLogitParts,  // f32 [8][T][E], fused router of few tiles
  kRows,        // T [rows][H]: tokens in expert order; then the down product, block by block
  kHidden,      // T [rows][I]
  kCount
};

using ForwardTable = plan::RegionTable<ForwardScratch, static_cast<int>(ForwardScratch::kCount)>;

// Rows of an expert-sorted order of so many slots. num_experts: virtual ones.
FM_HD constexpr int64_t forward_rows(int64_t slots, int64_t num_experts) {
  return plan::max_rows(slots, num_experts, kRowGroup);
}

struct ForwardTableShape {
  int64_t tokens;
  int64_t hidden;
  int64_t intermediate;
  int64_t num_experts;
  int64_t top_k;
  int64_t rows;        // that a launch may have
  int64_t rank_slots;  // most slots of all ranks together, 0 for a rank alone
  int64_t state_bytes;
  bool has_router;
  bool own_logits;
  bool weight_on_input;
};

FM_HD constexpr ForwardTable forward_table(const ForwardTableShape& s) {
  ForwardTable table;
  const int64_t slots = s.tokens * s.top_k;
  const int64_t groups = s.rows / kRowGroup;
  const int64_t tiles = plan::num_chunks(s.tokens);
  // One column block is never less than a weight pair.
  const int64_t column_blocks = plan::ceil_div(s.hidden, kClusterSize * kWeightRows);
  table.add(ForwardScratch::kState, "state", s.state_bytes);
  table.add(ForwardScratch::kRowsReady, "rows ready", groups * 4);
  table.add(ForwardScratch::kUpDone, "up done", groups * 4);
  table.add(ForwardScratch::kDownDone, "down done", column_blocks * 4);
  table.add(ForwardScratch::kIds, "ids", slots * 4);
  table.add(ForwardScratch::kWeights, "weights", slots * 4);
  table.add(ForwardScratch::kSlotRanks, "slot ranks", slots * 4);
  table.add(ForwardScratch::kHistograms, "histograms", tiles * s.num_experts * 4);
  table.add(ForwardScratch::kTotals, "totals", s.num_experts * 4);
  table.add(ForwardScratch::kExperts, "experts", (3 * s.num_experts + 2) * 4);
  table.add(ForwardScratch::kRowToken, "row token", s.rows * 4);
  table.add(ForwardScratch::kRowWeight, "row weight", s.weight_on_input ? s.rows * 4 : 0);
  const bool is_alone = s.rank_slots == 0;
  table.add(ForwardScratch::kSlotRow, "slot row", (is_alone ? slots : s.rank_slots) * 4);
  table.add(ForwardScratch::kSlotOwner, "slot owner", is_alone ? 0 : slots * 4);
  table.add(ForwardScratch::kLogits, "logits", s.own_logits ? s.tokens * s.num_experts * 4 : 0);
  const int64_t parts = s.has_router && tiles <= kFewTiles ? kLogitSegments : 0;
  table.add(ForwardScratch::kLogitParts, "logit parts", parts * s.tokens * s.num_experts * 4);
  table.add(ForwardScratch::kRows, "rows", s.rows * s.hidden * kElementBytes);
  table.add(ForwardScratch::kHidden, "hidden rows", s.rows * s.intermediate * kElementBytes);
  return table;
}

}  // namespace flashmoe::cuda::config
