// The up product's rows: tokens copied into expert order ahead of the tiles, by communication
// warps. A gather inside the product's loads costs it a fifth (docs/perf-notes.md).
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/stage/choose.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/walk.h"

namespace flashmoe::cuda::stage {

// Eight elements times the weight, rounded once.
template <class Config>
FM_DEVICE int4 scaled(int4 vector, float weight) {
  using Element = tile::ElementOf<Config::value.element>;
  auto* words = reinterpret_cast<uint32_t*>(&vector);
  FM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Element::unpack(words[i]);
    words[i] = Element::pack(weight * pair.x, weight * pair.y);
  }
  return vector;
}

// The row of a token of this rank.
FM_DEVICE const uint16_t* token_of(const kernel::ForwardParams& params, int32_t token) {
  return static_cast<const uint16_t*>(params.x) + token * params.x_stride;
}

// Copies a token to its row. Whole warp; kBatch loads of a lane are under way at a time. Past the
// first-level cache: a peer may have written the token in this launch.
template <class Config, int kBatch>
FM_DEVICE void copy_row(const kernel::ForwardParams& params, int32_t row, const uint16_t* token) {
  const auto& sizes = params.sizes;
  const float weight = sizes.weight_on_input ? params.memory.row_weight[row] : 1.0f;
  const int32_t lane = ptx::lane_idx();
  const auto* from = reinterpret_cast<const int4*>(token) + lane;
  auto* to = reinterpret_cast<int4*>(static_cast<uint16_t*>(params.memory.rows) +
                                     int64_t{row} * sizes.hidden) +
             lane;
  for (int32_t left = sizes.hidden / tile::kVector - lane; left > 0; left -= 32 * kBatch) {
    int4 vectors[kBatch];
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      vectors[i] = int4{};
      if (i * 32 < left) vectors[i] = __ldcg(from + i * 32);
    }
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (i * 32 >= left) break;
      to[i * 32] = sizes.weight_on_input ? scaled<Config>(vectors[i], weight) : vectors[i];
    }
    from += 32 * kBatch;
    to += 32 * kBatch;
  }
}

// Rows of a unit, from row `row` on: none in the padding after an expert's last.
FM_DEVICE int32_t rows_of_unit(const tile::ExpertTable& experts, int32_t row) {
  const int32_t e = experts.expert_of_row(row);
  return min(config::kCopyRows, experts.begin(e) + experts.rows(e) - row);
}

// First row of the block that a row is in.
FM_DEVICE int32_t block_begin_of(const tile::ExpertTable& experts, const tile::TileGrid& blocks,
                                 int32_t row) {
  const int32_t e = experts.expert_of_row(row);
  const int32_t height = blocks.block_height(experts.rows(e));
  return row - (row - experts.begin(e)) % height;
}

// Copies the unit of rows that begins at `row` and counts them at their block; find(row_token):
// the token of a row, by the word that the plan left for it. Whole warp.
template <class Config, int kBatch, class Find>
FM_DEVICE void copy_unit(const kernel::ForwardParams& params, const tile::ExpertTable& experts,
                         int32_t row, const Find& find) {
  constexpr int32_t kMaxRows = config::kForwardBlockRows;
  const int32_t num_rows = rows_of_unit(experts, row);
  if (num_rows <= 0) return;
  // The tokens of all rows at once; scratch has words for those past the last.
  const int32_t own = params.memory.row_token[row + ptx::lane_idx() % config::kCopyRows];
#pragma unroll 1
  for (int32_t i = 0; i < num_rows; ++i) {
    copy_row<Config, kBatch>(params, row + i, find(__shfl_sync(kAllLanes, own, i)));
  }
  // Written by ordinary stores, read by the copy engine of any SM.
  ptx::fence_proxy_async(ptx::space_global);
  __syncwarp();
  if (ptx::lane_idx() != 0) return;
  // The block is looked for only now: the copies leave no registers for it.
  const int32_t block = block_begin_of(experts, {kMaxRows, 1}, row);
  ptx::add_release_gpu(&params.memory.rows_ready[block / config::kRowGroup], num_rows);
}

// Copies every num_workers-th unit of rows, from the first expert to the last. Whole warp.
template <class Config>
FM_DEVICE void copy_rows(const kernel::ForwardParams& params, const tile::ExpertTable& experts,
                         int32_t worker_idx, int32_t num_workers) {
  for (int32_t row = worker_idx * config::kCopyRows; row < experts.begin(experts.num_experts);
       row += num_workers * config::kCopyRows) {
    copy_unit<Config, 8>(params, experts, row,
                         [&](int32_t token) { return token_of(params, token); });
  }
}

}  // namespace flashmoe::cuda::stage
