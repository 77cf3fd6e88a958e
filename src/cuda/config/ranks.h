// The ranks of a launch: what a rank's symmetric memory holds, and the protocol's words in it.
//
// Every rank has one region of the same layout, which its peers read and write (load and store over
// NVLink). Epochs number the launches of a group (plan/flags.h), counted by the kernels themselves.
//
//   meta_ready[bank][s]       written by s when all its slots are routed; read by the owner's plan:
//                             header, counts and slots of s are there
//   push flag [kind][s][4 tokens]
//                             written by s behind the rows that a warp sent; read by the owner's
//                             copies into expert order: the rows are in kReceived, or kReceivedGrad
//   return flag [d][c][unit]  written by d behind the sums of a warp; read where the owner adds up
//                             its tokens' parts: the rows are in kPartial
//   slot flag [d][unit]       backward: written by d behind the gradients of the weights of a
//                             unit's slots; read where their source makes the router's gradients
//   abort                     written by a rank that gives up, or by the host: 1 + that rank; read
//                             by every wait for a rank or a counter
//
// Flags: release at system scope after the data, acquire before its use, equal to the reader's
// epoch. Nothing is reset. A launch waits for the metadata of all ranks before it sends a row, and
// a rank sends its metadata of launch n + 1 after it has left launch n: so rows, partials and their
// flags need one copy, and metadata two banks by epoch parity.
#pragma once

#include <cstdint>

#include "plan/flags.h"
#include "plan/layout.h"

namespace flashmoe::cuda::config {

inline constexpr int32_t kMaxRanks = 16;   // that load and store in each other's memory
inline constexpr int32_t kPushTokens = 4;  // sent by one warp under one flag

// What must agree between the ranks of a launch, besides the library; equal bits.
enum class RankField : int32_t {
  kDtype,
  kHidden,
  kIntermediate,
  kNumExperts,
  kTopK,
  kActivation,
  kGated,
  kWeightOnInput,
  kActAlpha,
  kActLimit,
  kUpOffset,
  kCapacityFactor,
  kLayerId,
  kTokenCapacity,
  kDirection,  // a Direction
  kCount
};

enum class Direction : int64_t { kForward, kBackward };

struct RankHeader {
  int64_t tokens;        // of the sender; may differ
  int64_t tokens_first;  // likewise: a backward that makes Z of the tokens, and wants them first
  int64_t fields[static_cast<int>(RankField::kCount)];
};

// The words of a region, at its start.
struct RankControl {
  uint32_t epoch;  // of the owner's last launch; its own kernel reads and writes it
  uint32_t abort;
  uint32_t meta_ready[plan::kNumBanks][kMaxRanks];
  RankHeader headers[plan::kNumBanks][kMaxRanks];
};

// A slot as its source announces it to every rank.
struct RankSlot {
  // The expert among its owner's, shifted, and the slot's place among the source's slots of that
  // expert; kNoPlace if it has no expert of the reader's or was dropped.
  uint32_t place;
  float weight;
};
inline constexpr uint32_t kNoPlace = 0xFFFFFFFF;
inline constexpr int32_t kPlaceBits = 22;
inline constexpr int64_t kMaxRankSlots = int64_t{1} << kPlaceBits;  // of one source
inline constexpr int64_t kMaxLocalExperts = (1 << (32 - kPlaceBits)) - 1;

enum class Symmetric : int {
  kControl,       // RankControl
  kCounts,        // i32 [2 banks][W source][local experts]: slots that the source sends
  kSlots,         // RankSlot [2 banks][W source][slots]
  kFlags,         // u32: push flags of both kinds, return flags, slot flags
  kReceived,      // T [W source][tokens][H]
  kReceivedGrad,  // T [W source][tokens][H]: grad y, backward
  kPartial,       // T [W owner][tokens][H]
  kSlotGrads,     // f32 [slots]: gradients of the owner's top-k weights, backward
  kCount
};

// Rows that travel from the rank of a token to those of its experts.
enum class RowKind : int32_t { kToken, kGrad, kCount };
inline constexpr int32_t kRowKinds = static_cast<int32_t>(RowKind::kCount);

// The kind that the backward sends and copies in its n-th step. Warps wait for peers' rows of one
// kind before they send the next: all ranks of a launch have one order, or wait for each other.
FM_HD constexpr RowKind kind_of_step(bool tokens_first, int32_t step) {
  return tokens_first == (step == 0) ? RowKind::kToken : RowKind::kGrad;
}

using SymmetricTable = plan::RegionTable<Symmetric, static_cast<int>(Symmetric::kCount)>;

// What the regions of a group were made for: the same on all ranks.
struct SymmetricCapacity {
  int64_t tokens = 0;  // most of a rank
  int64_t slots = 0;   // most of a rank: tokens * top_k
  int64_t local_experts = 0;
  int64_t flag_words = 0;
  int64_t row_bytes = 0;  // of kReceived, kReceivedGrad and kPartial each
};

// Tokens of a source that a warp sums and sends home under one flag: few, since a warp that takes
// its last unit late is waited for.
FM_HD constexpr int32_t return_tokens(int64_t tokens) {
  return tokens <= 4096 ? 1 : tokens <= 16384 ? 2 : 8;
}
FM_HD constexpr int32_t return_units(int32_t tokens) {
  const int32_t unit = return_tokens(tokens);
  return (tokens + unit - 1) / unit;
}
// Most units of a source of up to `token_cap` tokens.
FM_HD constexpr int64_t return_stride(int64_t token_cap) {
  const int64_t of_few = token_cap < 16384 ? token_cap : 16384;
  const int64_t of_many = (token_cap + 7) / 8;
  return of_few > of_many ? of_few : of_many;
}
// Tokens whose parts from all ranks a warp adds up at a time: those of some units.
inline constexpr int32_t kHomeUnits = 4;
FM_HD constexpr int32_t home_tokens(int64_t tokens) { return return_tokens(tokens) * kHomeUnits; }
FM_HD constexpr int32_t home_units(int32_t tokens) {
  const int32_t unit = home_tokens(tokens);
  return (tokens + unit - 1) / unit;
}
FM_HD constexpr int64_t push_stride(int64_t token_cap) {
  return (token_cap + kPushTokens - 1) / kPushTokens;
}

// The words of kFlags, numbered from the first push flag on: push flags | return flags | slot
// flags.
struct FlagWords {
  int32_t world;
  int32_t token_cap;          // most tokens of a rank
  int32_t num_column_blocks;  // of the launch

  FM_HD constexpr int32_t push(RowKind kind, int32_t source, int32_t token) const {
    return (static_cast<int32_t>(kind) * world + source) * of_source() + token / kPushTokens;
  }
  FM_HD constexpr int32_t returned(int32_t owner, int32_t column_block, int32_t unit) const {
    return first_return() + (owner * num_column_blocks + column_block) * of_owner() + unit;
  }
  FM_HD constexpr int32_t slot(int32_t owner, int32_t unit) const {
    return first_return() + (world * num_column_blocks + owner) * of_owner() + unit;
  }

 private:
  FM_HD constexpr int32_t of_source() const { return static_cast<int32_t>(push_stride(token_cap)); }
  FM_HD constexpr int32_t of_owner() const {
    return static_cast<int32_t>(return_stride(token_cap));
  }
  FM_HD constexpr int32_t first_return() const { return kRowKinds * world * of_source(); }
};

// What one layer needs of a region.
FM_HD constexpr SymmetricCapacity needed_capacity(int32_t world, int64_t token_cap, int64_t hidden,
                                                  int64_t top_k, int64_t local_experts) {
  // A column block is never less than a weight pair: 256 columns.
  const int64_t column_blocks = (hidden + 255) / 256;
  return {.tokens = token_cap,
          .slots = token_cap * top_k,
          .local_experts = local_experts,
          .flag_words = world * (kRowKinds * push_stride(token_cap) +
                                 (column_blocks + 1) * return_stride(token_cap)),
          .row_bytes = world * token_cap * hidden * 2};
}

FM_HD constexpr SymmetricTable symmetric_table(int32_t world, const SymmetricCapacity& c) {
  SymmetricTable table;
  const int64_t banks = int64_t{plan::kNumBanks} * world;
  table.add(Symmetric::kControl, "control", sizeof(RankControl));
  table.add(Symmetric::kCounts, "counts", banks * c.local_experts * 4);
  table.add(Symmetric::kSlots, "slots", banks * c.slots * static_cast<int64_t>(sizeof(RankSlot)));
  table.add(Symmetric::kFlags, "flags", c.flag_words * 4);
  table.add(Symmetric::kReceived, "received rows", c.row_bytes);
  table.add(Symmetric::kReceivedGrad, "received grad y rows", c.row_bytes);
  table.add(Symmetric::kPartial, "partial rows", c.row_bytes);
  table.add(Symmetric::kSlotGrads, "slot gradients", c.slots * 4);
  return table;
}

}  // namespace flashmoe::cuda::config
