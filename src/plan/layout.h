// Region tables: one table gives every offset and the total. The allocator, the stages and the
// reports read it; nothing is written twice.
//
// Three tables:
//   symmetric  memory that peers write (control words live apart, see fabric/control.h)
//   route      local scratch whose size is known before the plan
//   rows       local scratch whose size follows from the plan
#pragma once

#include <cstdint>

#include "plan/blocks.h"
#include "plan/flags.h"
#include "plan/problem.h"
#include "plan/routing.h"
#include "plan/tasks.h"

namespace flashmoe::plan {

inline constexpr int64_t kRegionAlign = 256;  // bytes

struct Region {
  const char* name = "";
  int64_t offset = 0;  // bytes
  int64_t bytes = 0;
};

template <class Name, int kCount>
struct RegionTable {
  Region regions[kCount];
  int64_t total = 0;  // bytes

  FM_HD constexpr void add(Name id, const char* name, int64_t bytes) {
    regions[static_cast<int>(id)] = Region{name, total, bytes};
    total += align_up(bytes, kRegionAlign);
  }
  FM_HD constexpr const Region& operator[](Name id) const { return regions[static_cast<int>(id)]; }
  static constexpr int size() { return kCount; }
};

// A slot as its source announces it to the expert's owner.
struct SlotRecord {
  int32_t token_idx;
  int32_t slot_j;
  double weight;  // exact for every layer dtype
};

// ---------------------------------------------------------------------------------------------
// Symmetric memory

enum class Symmetric : int {
  kPushFlags,    // u32 [W source][chunk]: rows of the chunk are in kRecvX (and kRecvGrad)
  kReturnFlags,  // u32 [W owner][column block][chunk]: partials are in kPartial (and kSlotGrad)
  kCounts,       // i32 [2 banks][W source][bank_experts], E_loc of them in use
  kSlots,        // SlotRecord [2 banks][W source][bank_slots], grouped by expert
  kRecvX,        // T [W source][token_cap][H]
  kRecvGrad,     // T [W source][token_cap][H], backward
  kPartial,      // T [W owner][token_cap][H]
  kSlotGrad,     // acc [token_cap * k]: gradient of each slot's weight, backward
  kCount
};

// What the memory was made for: equal on all ranks, changed only by a collective growth.
struct SymmetricCapacity {
  int64_t tokens = 0;        // most tokens of a rank
  int64_t flag_words = 0;    // words of kPushFlags + kReturnFlags together
  int64_t bank_experts = 0;  // most experts of a rank
  int64_t bank_slots = 0;    // most slots of a rank
  int64_t bytes = 0;         // total
};

struct SymmetricShape {
  int32_t world = 1;
  int64_t token_cap = 0;
  int64_t flag_words = 0;
  int64_t bank_experts = 0;
  int64_t bank_slots = 0;
  int64_t hidden = 0;
  int64_t top_k = 0;
  int64_t local_experts = 0;
  int64_t column_blocks = 0;
  int32_t element_bytes = 0;
  int32_t acc_bytes = 0;
  bool backward = false;
};

using SymmetricTable = RegionTable<Symmetric, static_cast<int>(Symmetric::kCount)>;

FM_HD constexpr int64_t push_flag_words(int32_t world, int64_t token_cap) {
  return world * num_chunks(token_cap);
}

FM_HD constexpr int64_t needed_flag_words(int32_t world, int64_t token_cap, int64_t column_blocks) {
  return push_flag_words(world, token_cap) * (1 + column_blocks);
}

// Flags and metadata banks lie where the capacity, and not the layer, puts them. A reader compares
// a flag with its epoch, and stale data could look like one; and a peer that is one launch ahead,
// with another layer, writes its bank while this rank still uses the rows and partials of its own
// launch.
FM_HD constexpr SymmetricTable symmetric_table(const SymmetricShape& s) {
  SymmetricTable table;
  const int64_t push_words = push_flag_words(s.world, s.token_cap);
  const int64_t rows = s.world * s.token_cap * s.hidden * s.element_bytes;
  const int64_t slots = s.token_cap * s.top_k;
  const int64_t banks = int64_t{kNumBanks} * s.world;
  table.add(Symmetric::kPushFlags, "push flags", push_words * 4);
  table.add(Symmetric::kReturnFlags, "return flags", (s.flag_words - push_words) * 4);
  table.add(Symmetric::kCounts, "counts", banks * s.bank_experts * 4);
  table.add(Symmetric::kSlots, "slots",
            banks * s.bank_slots * static_cast<int64_t>(sizeof(SlotRecord)));
  table.add(Symmetric::kRecvX, "received x", rows);
  table.add(Symmetric::kRecvGrad, "received grad y", s.backward ? rows : 0);
  table.add(Symmetric::kPartial, "partials", rows);
  table.add(Symmetric::kSlotGrad, "slot gradients", s.backward ? slots * s.acc_bytes : 0);
  return table;
}

// Word index of a flag inside its region.
FM_HD constexpr int64_t push_flag_index(const SymmetricShape& s, int32_t source, int64_t chunk) {
  return source * num_chunks(s.token_cap) + chunk;
}

FM_HD constexpr int64_t return_flag_index(const SymmetricShape& s, int32_t owner,
                                          int64_t column_block, int64_t chunk) {
  return (owner * s.column_blocks + column_block) * num_chunks(s.token_cap) + chunk;
}

// Index of the first count and of the first slot record in a source's bank of an epoch.
FM_HD constexpr int64_t counts_index(const SymmetricShape& s, Epoch epoch, int32_t source) {
  return (int64_t{bank_of(epoch)} * s.world + source) * s.bank_experts;
}

FM_HD constexpr int64_t slots_index(const SymmetricShape& s, Epoch epoch, int32_t source) {
  return (int64_t{bank_of(epoch)} * s.world + source) * s.bank_slots;
}

// ---------------------------------------------------------------------------------------------
// Local scratch known before the plan

enum class RouteScratch : int {
  kIds,           // i32 [T * k]
  kWeights,       // acc [T * k]
  kSlotRanks,     // i32 [T * k]: place among this rank's slots of the same expert
  kDestinations,  // u64 [T]: ranks that hold an expert of the token
  kHistograms,    // i32 [tiles][E]
  kTotals,        // i32 [E]
  kLogits,        // acc [T][E], fused router
  kGradLogits,    // acc [T][E], fused router, backward
  kRouterWeight,  // [E][H], fused router: w_router widened once a launch (RouteShape)
  kPanels,        // acc [threads][panel]: private to a thread
  kCount
};

struct RouteShape {
  bool fused_router = false;
  bool backward = false;
  int32_t router_weight_bytes = 0;  // of an element of w_router widened; 0: used as it is
  int32_t acc_bytes = 0;
  int64_t num_threads = 1;
  int64_t panel_bytes = 0;  // of one thread
};

using RouteTable = RegionTable<RouteScratch, static_cast<int>(RouteScratch::kCount)>;

FM_HD constexpr RouteTable route_table(const Problem& p, const RouteShape& s) {
  RouteTable table;
  const int64_t logits = p.tokens * p.num_experts * s.acc_bytes;
  const int64_t router_weight = p.num_experts * p.hidden * s.router_weight_bytes;
  table.add(RouteScratch::kIds, "ids", p.slots() * 4);
  table.add(RouteScratch::kWeights, "weights", p.slots() * s.acc_bytes);
  table.add(RouteScratch::kSlotRanks, "slot ranks", p.slots() * 4);
  table.add(RouteScratch::kDestinations, "destinations", p.tokens * 8);
  table.add(RouteScratch::kHistograms, "histograms", num_chunks(p.tokens) * p.num_experts * 4);
  table.add(RouteScratch::kTotals, "totals", p.num_experts * 4);
  table.add(RouteScratch::kLogits, "logits", s.fused_router ? logits : 0);
  table.add(RouteScratch::kGradLogits, "grad logits", s.fused_router && s.backward ? logits : 0);
  table.add(RouteScratch::kRouterWeight, "router weight", router_weight);
  table.add(RouteScratch::kPanels, "panels", s.num_threads * align_up(s.panel_bytes, kRegionAlign));
  return table;
}

// ---------------------------------------------------------------------------------------------
// Local scratch that follows from the plan

enum class RowScratch : int {
  kExpertBegin,   // i64 [E_loc + 1]
  kExpertRows,    // i64 [E_loc]
  kSegmentBegin,  // i64 [E_loc][W]
  kRowToken,      // i32 [rows], -1 for padding
  kRowSource,     // i32 [rows]
  kRowWeight,     // acc [rows]
  kSlotRow,       // i32 [sum over sources of T_s * k]: row of a slot, -1 when it has none here
  kBlocks,        // Block [blocks]
  kUpOrder,       // i32 [blocks]
  kUpDone,        // u32 [blocks]: finished up tiles of a block
  kHiddenRows,    // T [rows][I]: act(Z); backward: weight * act(Z)
  kGradZ,         // T [rows][G * I], backward
  kRing,          // T [2][rows][column block]: the down product; backward: the input gradient
  kWeightParts,   // acc [rows][parts]: pieces of the slot weights' gradient, backward
  kCount
};

struct RowShape {
  int64_t rows = 0;    // padding included
  int64_t blocks = 0;  // bound
  int64_t all_slots = 0;
  int64_t column_width = 0;
  int64_t column_blocks = 0;
  int64_t weight_parts = 0;
  int32_t element_bytes = 0;
  int32_t acc_bytes = 0;
  bool backward = false;
};

using RowTable = RegionTable<RowScratch, static_cast<int>(RowScratch::kCount)>;

FM_HD constexpr RowTable row_table(const Problem& p, const RowShape& s) {
  RowTable table;
  const int64_t experts = p.local_experts();
  const int64_t ring_slots = min_of(kRingSlots, s.column_blocks);
  table.add(RowScratch::kExpertBegin, "expert begin", (experts + 1) * 8);
  table.add(RowScratch::kExpertRows, "expert rows", experts * 8);
  table.add(RowScratch::kSegmentBegin, "segment begin", experts * p.world * 8);
  table.add(RowScratch::kRowToken, "row token", s.rows * 4);
  table.add(RowScratch::kRowSource, "row source", s.rows * 4);
  table.add(RowScratch::kRowWeight, "row weight", s.rows * s.acc_bytes);
  table.add(RowScratch::kSlotRow, "slot row", s.all_slots * 4);
  table.add(RowScratch::kBlocks, "blocks", s.blocks * static_cast<int64_t>(sizeof(Block)));
  table.add(RowScratch::kUpOrder, "up order", s.blocks * 4);
  table.add(RowScratch::kUpDone, "up done", s.blocks * 4);
  table.add(RowScratch::kHiddenRows, "hidden rows", s.rows * p.intermediate * s.element_bytes);
  table.add(RowScratch::kGradZ, "grad z", s.backward ? s.rows * p.up_rows() * s.element_bytes : 0);
  table.add(RowScratch::kRing, "ring", ring_slots * s.rows * s.column_width * s.element_bytes);
  table.add(RowScratch::kWeightParts, "weight parts",
            s.backward ? s.rows * s.weight_parts * s.acc_bytes : 0);
  return table;
}

}  // namespace flashmoe::plan
