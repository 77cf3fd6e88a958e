// The up product's rows: tokens copied into expert order ahead of the tiles, by communication
// warps. A gather inside the product's loads costs it a fifth (docs/perf-notes.md).
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/stage/choose.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/walk.h"

namespace flashmoe::cuda::stage {

inline constexpr int32_t kVector = 8;  // 16-bit elements of a 16-byte access

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

// Copies a token to its row. Whole warp; several loads of a lane are under way at a time.
template <class Config>
FM_DEVICE void copy_row(const kernel::ForwardParams& params, int32_t row, int32_t token) {
  constexpr int kBatch = 8;
  const auto& sizes = params.sizes;
  const float weight = sizes.weight_on_input ? params.memory.row_weight[row] : 1.0f;
  const auto* from = reinterpret_cast<const int4*>(static_cast<const uint16_t*>(params.x) +
                                                   token * params.x_stride);
  auto* to = reinterpret_cast<int4*>(static_cast<uint16_t*>(params.memory.rows) +
                                     int64_t{row} * sizes.hidden);
  const int32_t num_vectors = sizes.hidden / kVector;
  for (int32_t first = ptx::lane_idx(); first < num_vectors; first += 32 * kBatch) {
    int4 vectors[kBatch];
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      vectors[i] = int4{};
      if (first + i * 32 < num_vectors) vectors[i] = __ldg(from + first + i * 32);
    }
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * 32 >= num_vectors) break;
      to[first + i * 32] = sizes.weight_on_input ? scaled<Config>(vectors[i], weight) : vectors[i];
    }
  }
}

// Copies every num_workers-th unit of rows, from the first expert to the last, and counts them at
// their block. Whole warp.
template <class Config>
FM_DEVICE void copy_rows(const kernel::ForwardParams& params, const tile::ExpertTable& experts,
                         int32_t worker_idx, int32_t num_workers) {
  constexpr int32_t kMaxRows = Config::value.up().max_tokens;
  const tile::TileGrid blocks{kMaxRows, 1};
  const int32_t end = experts.begin[experts.num_experts];
  for (int32_t row = worker_idx * config::kCopyRows; row < end;
       row += num_workers * config::kCopyRows) {
    const int32_t e = experts.expert_of_row(row);
    const int32_t begin = experts.begin[e];
    const int32_t num_rows = min(config::kCopyRows, begin + experts.rows[e] - row);
    if (num_rows <= 0) continue;  // padding
    // The tokens of all rows at once; scratch has words for those past the last.
    const int32_t own = params.memory.row_token[row + ptx::lane_idx() % config::kCopyRows];
    for (int32_t i = 0; i < num_rows; ++i) {
      copy_row<Config>(params, row + i, __shfl_sync(kAllLanes, own, i));
    }
    // Written by ordinary stores, read by the copy engine of any SM.
    ptx::fence_proxy_async(ptx::space_global);
    __syncwarp();
    if (ptx::lane_idx() != 0) continue;
    const int32_t height = blocks.block_height(experts.rows[e]);
    const int32_t block_begin = begin + (row - begin) / height * height;
    ptx::add_release_gpu(&params.memory.rows_ready[block_begin / config::kRowGroup], num_rows);
  }
}

}  // namespace flashmoe::cuda::stage
