// The backward's rows: grad y and tokens copied into expert order ahead of the tiles.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/stage/copy_rows.cuh"

namespace flashmoe::cuda::stage {

// Copies a token's row. Whole warp; several loads of a lane are under way at a time.
template <class Config>
FM_DEVICE void copy_operand_row(const kernel::RowCopy& copy, const kernel::ForwardParams& params,
                                int32_t row, int32_t token) {
  constexpr int kBatch = 8;
  const int32_t hidden = params.sizes.hidden;
  const int32_t lane = ptx::lane_idx();
  const auto* from =
      reinterpret_cast<const int4*>(static_cast<const uint16_t*>(copy.from) + token * copy.stride) +
      lane;
  auto* to =
      reinterpret_cast<int4*>(static_cast<uint16_t*>(copy.to) + int64_t{row} * hidden) + lane;
  for (int32_t left = hidden / kVector - lane; left > 0; left -= 32 * kBatch) {
    int4 vectors[kBatch];
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      vectors[i] = int4{};
      if (i * 32 < left) vectors[i] = __ldg(from + i * 32);
    }
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (i * 32 >= left) break;
      to[i * 32] =
          copy.is_weighted ? scaled<Config>(vectors[i], params.memory.row_weight[row]) : vectors[i];
    }
    from += 32 * kBatch;
    to += 32 * kBatch;
  }
}

// Both operands, one after the other: every num_workers-th unit of rows, from the first expert to
// the last, counted at its block and at its expert. Whole warp.
template <class Config>
FM_DEVICE void copy_operands(const kernel::BackwardParams& params, const tile::ExpertTable& experts,
                             int32_t worker_idx, int32_t num_workers) {
  constexpr int32_t kMaxRows = config::kBackwardBlockRows;
  const kernel::ForwardParams& forward = params.forward;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
    const kernel::RowCopy& copy = params.copies[which];
    for (int32_t row = worker_idx * config::kCopyRows; row < experts.begin(experts.num_experts);
         row += num_workers * config::kCopyRows) {
      const int32_t num_rows = rows_of_unit(experts, row);
      if (num_rows <= 0) continue;
      const int32_t own = forward.memory.row_token[row + ptx::lane_idx() % config::kCopyRows];
#pragma unroll 1
      for (int32_t i = 0; i < num_rows; ++i) {
        copy_operand_row<Config>(copy, forward, row + i, __shfl_sync(kAllLanes, own, i));
      }
      // Written by ordinary stores, read by the copy engine of any SM.
      ptx::fence_proxy_async(ptx::space_global);
      __syncwarp();
      if (ptx::lane_idx() != 0) continue;
      const int32_t block = block_begin_of(experts, {kMaxRows, 1}, row);
      ptx::add_release_gpu(&copy.of_block[block / config::kRowGroup], num_rows);
      if (copy.of_expert != nullptr) {
        ptx::add_release_gpu(&copy.of_expert[experts.expert_of_row(row)], num_rows);
      }
    }
  }
}

}  // namespace flashmoe::cuda::stage
