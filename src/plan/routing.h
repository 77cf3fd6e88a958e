// From expert ids to places: sentinels, capacity, and prefix sums over tiles of tokens.
//
// Every function here is pure and works on plain arrays, so that a CPU thread and a CTA run the
// same text. Order is always slot order (slot_idx = token_idx * k + j); nothing depends on timing.
#pragma once

#include <cstdint>

#include "plan/problem.h"

namespace flashmoe::plan {

// Tokens of one router tile and of one push, return or combine chunk.
inline constexpr int64_t kTileTokens = 64;

FM_HD constexpr int64_t num_chunks(int64_t tokens) { return ceil_div(tokens, kTileTokens); }

// -1 and anything >= E mean "no expert". Ids below -1 are an error, found before this is asked.
FM_HD constexpr bool is_routed(int64_t expert_idx, int64_t num_experts) {
  return expert_idx >= 0 && expert_idx < num_experts;
}

// Slots that one (source rank, expert) pair keeps: ceil(c * T * k / E), all of them when c is 0.
FM_HD constexpr int64_t expert_capacity(double capacity_factor, const Problem& problem) {
  if (!(capacity_factor > 0)) return problem.slots();
  const double exact = capacity_factor * static_cast<double>(problem.slots()) /
                       static_cast<double>(problem.num_experts);
  if (exact >= static_cast<double>(problem.slots())) return problem.slots();
  const int64_t floor = static_cast<int64_t>(exact);
  return floor + (static_cast<double>(floor) < exact ? 1 : 0);
}

// histogram[E]: slots of one tile per expert. ids: [tokens of the tile * k].
FM_HD inline void tile_histogram(const int32_t* ids, int64_t num_slots, int64_t num_experts,
                                 int32_t* histogram) {
  for (int64_t e = 0; e < num_experts; ++e) histogram[e] = 0;
  for (int64_t s = 0; s < num_slots; ++s) {
    if (is_routed(ids[s], num_experts)) ++histogram[ids[s]];
  }
}

// Turns histograms[num_tiles][E] into exclusive prefix sums over the tiles and writes the
// totals[E].
FM_HD inline void scan_histograms(int32_t* histograms, int64_t num_tiles, int64_t num_experts,
                                  int32_t* totals) {
  for (int64_t e = 0; e < num_experts; ++e) {
    int32_t sum = 0;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int32_t count = histograms[tile * num_experts + e];
      histograms[tile * num_experts + e] = sum;
      sum += count;
    }
    totals[e] = sum;
  }
}

// ranks[s]: how many earlier slots of this rank chose the same expert, -1 for a slot without one.
// cursor[E] starts as the tile's exclusive prefix and is advanced.
FM_HD inline void rank_slots(const int32_t* ids, int64_t num_slots, int64_t num_experts,
                             int32_t* cursor, int32_t* ranks) {
  for (int64_t s = 0; s < num_slots; ++s) {
    ranks[s] = is_routed(ids[s], num_experts) ? cursor[ids[s]]++ : -1;
  }
}

// A slot travels when it has an expert and its place is under the capacity.
FM_HD constexpr bool is_kept(int32_t slot_rank, int64_t capacity) {
  return slot_rank >= 0 && slot_rank < capacity;
}

}  // namespace flashmoe::plan
