// From histograms to rows: plan/routing.h and plan/rows.h by all threads of the grid.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/stage/choose.cuh"
#include "cuda/tile/expert_memory.cuh"
#include "cuda/tile/schedule.h"
#include "plan/routing.h"

namespace flashmoe::cuda::stage {

// Sum over the lanes before this one; `total` becomes the sum over all. Whole warp.
FM_DEVICE int32_t exclusive_sum(int32_t value, int32_t& total) {
  const int32_t lane = ptx::lane_idx();
  int32_t sum = value;
  FM_UNROLL
  for (int32_t distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += below;
  }
  total = __shfl_sync(kAllLanes, sum, 31);
  return sum - value;
}

// Counters of this launch begin at zero. All threads of all CTAs.
FM_DEVICE void clear_counters(const kernel::ForwardParams& params, int32_t num_groups) {
  const int32_t thread = ptx::block_idx() * config::kForwardThreads + ptx::thread_idx();
  const int32_t num_threads = gridDim.x * config::kForwardThreads;
  for (int32_t i = thread; i < num_groups; i += num_threads) {
    params.memory.rows_ready[i] = 0;
    params.memory.up_done[i] = 0;
  }
  for (int32_t i = thread; i < params.sizes.column_blocks; i += num_threads) {
    params.memory.down_done[i] = 0;
  }
}

// Histograms become prefix sums over the tiles; totals of each expert. A warp takes an expert.
FM_DEVICE void scan_histograms(const kernel::ForwardParams& params) {
  const auto& sizes = params.sizes;
  const int32_t lane = ptx::lane_idx();
  const int32_t num_warps = gridDim.x * config::kForwardWarps;
  // Neighbouring experts go to different CTAs.
  for (int32_t e = ptx::block_idx() + ptx::thread_idx() / 32 * gridDim.x; e < sizes.num_experts;
       e += num_warps) {
    int32_t* of_expert = params.memory.histograms + int64_t{e} * sizes.route_tiles;
    int32_t sum = 0;
    for (int32_t first = 0; first < sizes.route_tiles; first += 32) {
      const int32_t tile_idx = first + lane;
      const bool exists = tile_idx < sizes.route_tiles;
      int32_t total;
      const int32_t before = exclusive_sum(exists ? of_expert[tile_idx] : 0, total);
      if (exists) of_expert[tile_idx] = sum + before;
      sum += total;
    }
    if (lane == 0) params.memory.totals[e] = sum;
  }
}

// Histograms of few tiles are not scanned but summed where they are read, which saves a meeting of
// all CTAs.
FM_DEVICE int32_t rows_before_tile(const kernel::ForwardParams& params, int32_t expert_idx,
                                   int32_t tile_idx) {
  const auto& sizes = params.sizes;
  const int32_t* of_expert = params.memory.histograms + int64_t{expert_idx} * sizes.route_tiles;
  if (!sizes.has_few_tiles) return of_expert[tile_idx];
  int32_t sum = 0;
#pragma unroll 4
  for (int32_t i = 0; i < tile_idx; ++i) sum += of_expert[i];
  return sum;
}

// Slots that chose the expert, dropped ones too.
FM_DEVICE int32_t total_of(const kernel::ForwardParams& params, int32_t expert_idx) {
  const auto& sizes = params.sizes;
  return sizes.has_few_tiles ? rows_before_tile(params, expert_idx, sizes.route_tiles)
                             : params.memory.totals[expert_idx];
}

// The table of experts while it is made: arrays of a tile::ExpertTable.
struct ExpertPlaces {
  int32_t* begin;
  int32_t* rows;
  int32_t* blocks_before;

  FM_DEVICE ExpertPlaces(int32_t* words, int32_t num_experts)
      : begin(words), rows(words + num_experts + 1), blocks_before(rows + num_experts) {}
};

// Where every expert's rows and blocks of at most kBlockRows begin, from their rows. Whole warp.
template <int32_t kBlockRows>
FM_DEVICE void place_experts(int32_t num_experts, const ExpertPlaces& experts) {
  const int32_t lane = ptx::lane_idx();
  const tile::TileGrid grid{kBlockRows, 1};
  int32_t groups_before = 0;
  int32_t blocks_before = 0;
  for (int32_t first = 0; first < num_experts; first += 32) {
    const int32_t e = first + lane;
    const int32_t rows = e < num_experts ? experts.rows[e] : 0;
    int32_t groups;
    int32_t blocks;
    const int32_t group = exclusive_sum((rows + config::kRowGroup - 1) / config::kRowGroup, groups);
    const int32_t block = exclusive_sum(grid.num_blocks(rows), blocks);
    if (e < num_experts) {
      experts.begin[e] = (groups_before + group) * config::kRowGroup;
      experts.blocks_before[e] = blocks_before + block;
    }
    groups_before += groups;
    blocks_before += blocks;
  }
  if (lane == 0) experts.begin[num_experts] = groups_before * config::kRowGroup;
  if (lane == 0) experts.blocks_before[num_experts] = blocks_before;
}

// The table of experts in `words`. All threads of the CTA.
template <int32_t kBlockRows>
FM_DEVICE void make_table(const kernel::ForwardParams& params, int32_t* words) {
  const auto& sizes = params.sizes;
  const ExpertPlaces experts(words, sizes.num_experts);
  for (int32_t e = ptx::thread_idx(); e < sizes.num_experts; e += config::kForwardThreads) {
    experts.rows[e] = min(total_of(params, e), sizes.capacity);
  }
  __syncthreads();
  if (ptx::thread_idx() < 32) place_experts<kBlockRows>(sizes.num_experts, experts);
  __syncthreads();
}

// The table of experts to where the CTA's roles will read it: its own shared memory, or global
// memory, to which all CTAs write the same. All threads of the CTA.
FM_DEVICE void keep_table(const tile::ExpertTable& experts, const int32_t* words, int32_t* kept) {
  const int32_t num_words = tile::ExpertTable::num_words(experts.num_experts);
  for (int32_t i = ptx::thread_idx(); i < num_words; i += config::kForwardThreads) {
    kept[i] = words[i];
  }
}

// What the caller reads of the plan; by one CTA. sum: a word of shared memory.
FM_DEVICE void publish_totals(const kernel::ForwardParams& params, int32_t* sum) {
  const auto& sizes = params.sizes;
  if (ptx::thread_idx() == 0) *sum = 0;
  __syncthreads();
  int32_t dropped = 0;
  for (int32_t e = ptx::thread_idx(); e < sizes.num_experts; e += config::kForwardThreads) {
    const int32_t total = total_of(params, e);
    dropped += total - min(total, sizes.capacity);
    if (params.tokens_per_expert == nullptr) continue;
    params.tokens_per_expert[e * params.tokens_per_expert_stride] = total;
  }
  if (dropped > 0) atomicAdd(sum, dropped);
  __syncthreads();
  if (ptx::thread_idx() == 0 && params.dropped != nullptr) *params.dropped = *sum;
}

// Gives every slot from `first` on, `step` apart, its row.
FM_DEVICE void place_slots(const kernel::ForwardParams& params, const tile::ExpertTable& experts,
                           int32_t first, int32_t step) {
  const auto& sizes = params.sizes;
  const auto& memory = params.memory;
  const int32_t slots_of_tile = static_cast<int32_t>(plan::kTileTokens) * sizes.top_k;
  for (int32_t slot = first; slot < sizes.slots(); slot += step) {
    const int32_t e = memory.ids[slot];
    int32_t row = e;
    if (e >= 0) {
      const int32_t rank =
          rows_before_tile(params, e, slot / slots_of_tile) + memory.slot_ranks[slot];
      row = plan::is_kept(rank, sizes.capacity) ? experts.begin(e) + rank : kNoExpert;
    }
    memory.slot_row[slot] = row;
    if (row < 0) continue;
    memory.row_token[row] = slot / sizes.top_k;
    if (memory.row_weight != nullptr) memory.row_weight[row] = memory.weights[slot];
  }
}

// The same for few slots, of which every CTA gives all their rows and reads what it wrote itself:
// all write the same, which saves a meeting. All threads of the CTA.
FM_DEVICE void place_few_slots(const kernel::ForwardParams& params,
                               const tile::ExpertTable& experts) {
  place_slots(params, experts, ptx::thread_idx(), config::kForwardThreads);
}

// Least shared memory that the plan needs: the table of experts and a word.
inline constexpr int32_t kPlanBytes =
    4 * (tile::ExpertTable::num_words(static_cast<int32_t>(config::kMaxExperts)) + 1);

// The plan of the launch, after routing. All threads of all CTAs; arena: shared memory of the CTA;
// kept: where its roles will read the table of experts. Every CTA makes that table. Returns the
// number of all experts' blocks.
template <int32_t kBlockRows>
FM_DEVICE int32_t place_rows(const kernel::ForwardParams& params, uint8_t* arena, int32_t* kept) {
  const auto& sizes = params.sizes;
  const int32_t thread = ptx::thread_idx();
  const int32_t num_words = tile::ExpertTable::num_words(sizes.num_experts);
  auto* words = reinterpret_cast<int32_t*>(arena);
  make_table<kBlockRows>(params, words);
  const tile::ExpertTable experts{words, sizes.num_experts};
  keep_table(experts, words, kept);
  if (ptx::block_idx() == 0) publish_totals(params, words + num_words);
  if (sizes.has_few_slots) {
    place_few_slots(params, experts);
  } else {
    place_slots(params, experts, ptx::block_idx() * config::kForwardThreads + thread,
                gridDim.x * config::kForwardThreads);
  }
  return experts.num_blocks();
}

}  // namespace flashmoe::cuda::stage
