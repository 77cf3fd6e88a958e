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
  const int32_t thread = blockIdx.x * config::kForwardThreads + ptx::thread_idx();
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
  for (int32_t e = blockIdx.x + ptx::thread_idx() / 32 * gridDim.x; e < sizes.num_experts;
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

// Where every expert's rows and blocks begin. All threads of the CTA.
FM_DEVICE void place_experts(const kernel::ForwardParams& params, tile::ExpertMemory& experts) {
  const auto& sizes = params.sizes;
  const auto lane = ptx::thread_idx();
  for (int32_t e = lane; e < sizes.num_experts; e += config::kForwardThreads) {
    experts.rows[e] = min(params.memory.totals[e], sizes.capacity);
  }
  __syncthreads();
  if (lane < 32) {
    const tile::TileGrid grid{config::Forward{}.up().max_tokens, 1};
    int32_t groups_before = 0;
    int32_t blocks_before = 0;
    for (int32_t first = 0; first < sizes.num_experts; first += 32) {
      const int32_t e = first + lane;
      const int32_t rows = e < sizes.num_experts ? experts.rows[e] : 0;
      int32_t groups;
      int32_t blocks;
      const int32_t group =
          exclusive_sum((rows + config::kRowGroup - 1) / config::kRowGroup, groups);
      const int32_t block = exclusive_sum(grid.num_blocks(rows), blocks);
      if (e < sizes.num_experts) {
        experts.begin[e] = (groups_before + group) * config::kRowGroup;
        experts.blocks_before[e] = blocks_before + block;
      }
      groups_before += groups;
      blocks_before += blocks;
    }
    if (lane == 0) experts.begin[sizes.num_experts] = groups_before * config::kRowGroup;
    if (lane == 0) experts.blocks_before[sizes.num_experts] = blocks_before;
  }
  __syncthreads();
}

// What the caller reads of the plan; by one CTA. sum: a word of shared memory.
FM_DEVICE void publish_plan(const kernel::ForwardParams& params, const tile::ExpertMemory& experts,
                            int32_t* sum) {
  const auto& sizes = params.sizes;
  if (ptx::thread_idx() == 0) *sum = 0;
  __syncthreads();
  int32_t dropped = 0;
  for (int32_t e = ptx::thread_idx(); e < sizes.num_experts; e += config::kForwardThreads) {
    const int32_t total = params.memory.totals[e];
    params.memory.expert_begin[e] = experts.begin[e];
    dropped += total - experts.rows[e];
    if (params.tokens_per_expert == nullptr) continue;
    params.tokens_per_expert[e * params.tokens_per_expert_stride] = total;
  }
  if (dropped > 0) atomicAdd(sum, dropped);
  __syncthreads();
  if (ptx::thread_idx() == 0 && params.dropped != nullptr) *params.dropped = *sum;
}

// Gives every slot its row. All threads of all CTAs.
FM_DEVICE void place_slots(const kernel::ForwardParams& params, const tile::ExpertMemory& experts) {
  const auto& sizes = params.sizes;
  const auto& memory = params.memory;
  const int32_t slots_of_tile = static_cast<int32_t>(plan::kTileTokens) * sizes.top_k;
  for (int32_t slot = blockIdx.x * config::kForwardThreads + ptx::thread_idx();
       slot < sizes.slots(); slot += gridDim.x * config::kForwardThreads) {
    const int32_t e = memory.ids[slot];
    int32_t row = e;
    if (e >= 0) {
      const int32_t tile_idx = slot / slots_of_tile;
      const int32_t rank =
          memory.histograms[int64_t{e} * sizes.route_tiles + tile_idx] + memory.slot_ranks[slot];
      row = plan::is_kept(rank, sizes.capacity) ? experts.begin[e] + rank : kNoExpert;
    }
    memory.slot_row[slot] = row;
    if (row < 0) continue;
    memory.row_token[row] = slot / sizes.top_k;
    if (sizes.weight_on_input) memory.row_weight[row] = memory.weights[slot];
  }
}

// The plan of the launch, after routing. All threads of all CTAs; arena: shared memory of the CTA.
FM_DEVICE void place_rows(const kernel::ForwardParams& params, tile::ExpertMemory& experts,
                          uint8_t* arena) {
  place_experts(params, experts);
  if (blockIdx.x == 0) publish_plan(params, experts, reinterpret_cast<int32_t*>(arena));
  place_slots(params, experts);
}

}  // namespace flashmoe::cuda::stage
