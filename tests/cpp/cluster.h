// W ranks with random routing, placed by counting: what the tests of the plan compare with.
#pragma once

#include "plan/layout.h"
#include "plan/rows.h"
#include "support.h"

namespace flashmoe::test {

inline plan::Problem random_problem(Rng& rng) {
  plan::Problem p;
  p.world = rng.between32(1, 5);
  p.rank = rng.between32(0, p.world - 1);
  p.tokens = rng.chance(0.15) ? 0 : rng.between(1, 150);
  p.hidden = rng.between(1, 64);
  p.intermediate = rng.between(1, 64);
  p.num_experts = p.world * rng.between(1, 6);
  p.top_k = rng.between(1, std::min<int64_t>(p.num_experts, 4));
  p.gates = rng.between32(1, 2);
  return p;
}

// The shape that a launch of this problem has in a memory made for `token_cap` tokens.
inline plan::SymmetricShape symmetric_shape(const plan::Problem& p, int64_t token_cap,
                                            int32_t element_bytes, bool backward) {
  plan::SymmetricShape shape;
  shape.world = p.world;
  shape.token_cap = plan::align_up(std::max<int64_t>(token_cap, 1), plan::kTileTokens);
  shape.hidden = p.hidden;
  shape.top_k = p.top_k;
  shape.local_experts = p.local_experts();
  shape.column_blocks = plan::ceil_div(p.hidden, 512);
  shape.flag_words = plan::needed_flag_words(p.world, shape.token_cap, shape.column_blocks);
  shape.bank_experts = shape.local_experts;
  shape.bank_slots = shape.token_cap * shape.top_k;
  shape.element_bytes = element_bytes;
  shape.acc_bytes = element_bytes == 8 ? 8 : 4;
  shape.backward = backward;
  return shape;
}

// The two shapes of launches that share a memory.
inline void share_capacity(plan::SymmetricShape& a, plan::SymmetricShape& b) {
  for (const auto field : {&plan::SymmetricShape::flag_words, &plan::SymmetricShape::bank_experts,
                           &plan::SymmetricShape::bank_slots}) {
    a.*field = b.*field = std::max(a.*field, b.*field);
  }
}

struct RankedSlots {
  std::vector<int32_t> ranks;   // [slots]
  std::vector<int32_t> totals;  // [E]
};

// The plan's own way: histograms of tiles, their prefix sums, ranks inside the tiles.
inline RankedSlots rank_slots_by_tiles(const plan::Problem& p, const std::vector<int32_t>& ids) {
  const int64_t tiles = plan::num_chunks(p.tokens), tile_slots = plan::kTileTokens * p.top_k;
  std::vector<int32_t> histograms(static_cast<size_t>(tiles * p.num_experts));
  RankedSlots out{std::vector<int32_t>(ids.size()),
                  std::vector<int32_t>(static_cast<size_t>(p.num_experts))};
  const auto slots_of = [&](int64_t tile) {
    return std::min(tile_slots, p.slots() - tile * tile_slots);
  };
  for (int64_t tile = 0; tile < tiles; ++tile) {
    plan::tile_histogram(ids.data() + tile * tile_slots, slots_of(tile), p.num_experts,
                         histograms.data() + tile * p.num_experts);
  }
  plan::scan_histograms(histograms.data(), tiles, p.num_experts, out.totals.data());
  for (int64_t tile = 0; tile < tiles; ++tile) {
    plan::rank_slots(ids.data() + tile * tile_slots, slots_of(tile), p.num_experts,
                     histograms.data() + tile * p.num_experts,
                     out.ranks.data() + tile * tile_slots);
  }
  return out;
}

// One launch of W ranks: sizes, ids and, by counting, which slots are kept.
struct Cluster {
  std::vector<plan::Problem> problems;
  std::vector<std::vector<int32_t>> ids;    // [rank][slots], -1: no expert
  std::vector<std::vector<int32_t>> ranks;  // [rank][slots], by plan
  std::vector<std::vector<bool>> kept;      // [rank][slots], by counting

  explicit Cluster(Rng& rng) : Cluster(rng, random_problem(rng)) {}

  Cluster(Rng& rng, const plan::Problem& sizes) {
    const double capacity_factor = rng.chance(0.5) ? 0.0 : rng.between32(1, 12) / 8.0;
    const bool skewed = rng.chance(0.3);
    for (int32_t rank = 0; rank < sizes.world; ++rank) {
      plan::Problem p = sizes;
      p.rank = rank;
      p.tokens = rng.chance(0.15) ? 0 : rng.between(1, 150);
      std::vector<int32_t> chosen(static_cast<size_t>(p.slots()));
      const auto last = static_cast<int32_t>(skewed ? 0 : p.num_experts - 1);
      for (auto& id : chosen) id = rng.chance(0.05) ? -1 : rng.between32(0, last);
      ranks.push_back(rank_slots_by_tiles(p, chosen).ranks);
      kept.push_back(keep(p, chosen, plan::expert_capacity(capacity_factor, p)));
      problems.push_back(p);
      ids.push_back(std::move(chosen));
    }
  }

  int32_t world() const { return static_cast<int32_t>(problems.size()); }

  // Kept slots of a source with this expert, in slot order.
  std::vector<int64_t> kept_slots(int32_t source, int64_t expert_idx) const {
    std::vector<int64_t> slots;
    for (size_t s = 0; s < ids[source].size(); ++s) {
      if (kept[source][s] && ids[source][s] == expert_idx) slots.push_back(static_cast<int64_t>(s));
    }
    return slots;
  }

  // counts[W][E_loc] of what arrives at `owner`.
  std::vector<int32_t> counts(int32_t owner) const {
    const int64_t experts = problems[owner].local_experts();
    std::vector<int32_t> counts(static_cast<size_t>(world() * experts), 0);
    for (int32_t source = 0; source < world(); ++source) {
      for (size_t s = 0; s < ids[source].size(); ++s) {
        const int64_t local = ids[source][s] - owner * experts;
        if (kept[source][s] && local >= 0 && local < experts) ++counts[source * experts + local];
      }
    }
    return counts;
  }

 private:
  static std::vector<bool> keep(const plan::Problem& p, const std::vector<int32_t>& ids,
                                int64_t capacity) {
    std::vector<int64_t> seen(static_cast<size_t>(p.num_experts), 0);
    std::vector<bool> kept;
    for (const int32_t id : ids) {
      kept.push_back(id >= 0 && seen[static_cast<size_t>(std::max(id, 0))]++ < capacity);
    }
    return kept;
  }
};

// place_rows() of what arrives at a rank.
struct Placed {
  std::vector<int64_t> begin, rows, segments;
  int64_t total = 0;
};

inline Placed place(const Cluster& cluster, int32_t owner, int64_t row_align) {
  const plan::Problem& p = cluster.problems[owner];
  const auto experts = static_cast<size_t>(p.local_experts());
  Placed placed{std::vector<int64_t>(experts + 1), std::vector<int64_t>(experts),
                std::vector<int64_t>(experts * static_cast<size_t>(p.world))};
  placed.total = plan::place_rows(p, cluster.counts(owner).data(), row_align, placed.begin.data(),
                                  placed.rows.data(), placed.segments.data());
  return placed;
}

}  // namespace flashmoe::test
