// The backward's rows: grad y and tokens copied into expert order ahead of the tiles.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/stage/send_rows.cuh"

namespace flashmoe::cuda::stage {

// An operand's rows of this rank's tokens, as send_rows.cuh takes them.
struct OwnRows {
  const kernel::RowCopy& copy;

  FM_DEVICE config::RowKind kind() const { return copy.kind; }
  FM_DEVICE const uint16_t* row(int32_t token) const {
    return static_cast<const uint16_t*>(copy.from) + token * copy.stride;
  }
};

// Copies a token's row. Whole warp; kBatch loads of a lane are under way at a time. Past the
// first-level cache: a peer may have written the row in this launch.
template <class Config, int kBatch>
FM_DEVICE void copy_operand_row(const kernel::RowCopy& copy, const kernel::ForwardParams& params,
                                int32_t row, const uint16_t* token) {
  const int32_t hidden = params.sizes.hidden;
  const int32_t lane = ptx::lane_idx();
  const auto* from = reinterpret_cast<const int4*>(token) + lane;
  auto* to =
      reinterpret_cast<int4*>(static_cast<uint16_t*>(copy.to) + int64_t{row} * hidden) + lane;
  for (int32_t left = hidden / kVector - lane; left > 0; left -= 32 * kBatch) {
    int4 vectors[kBatch];
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      vectors[i] = int4{};
      if (i * 32 < left) vectors[i] = __ldcg(from + i * 32);
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

// Copies the unit of rows that begins at `row` and counts it at its block and at its expert;
// find(row_token): the token's row, by the word that the plan left for it. Whole warp.
template <class Config, int kBatch, class Find>
FM_DEVICE void copy_operand_unit(const kernel::ForwardParams& params, const kernel::RowCopy& copy,
                                 const tile::ExpertTable& experts, int32_t row, const Find& find) {
  constexpr int32_t kMaxRows = config::kBackwardBlockRows;
  const int32_t num_rows = rows_of_unit(experts, row);
  if (num_rows <= 0) return;
  const int32_t own = params.memory.row_token[row + ptx::lane_idx() % config::kCopyRows];
#pragma unroll 1
  for (int32_t i = 0; i < num_rows; ++i) {
    copy_operand_row<Config, kBatch>(copy, params, row + i, find(__shfl_sync(kAllLanes, own, i)));
  }
  // Written by ordinary stores, read by the copy engine of any SM.
  ptx::fence_proxy_async(ptx::space_global);
  __syncwarp();
  if (ptx::lane_idx() != 0) return;
  const int32_t block = block_begin_of(experts, {kMaxRows, 1}, row);
  ptx::fence_gpu();
  ptx::add_fenced_gpu(&copy.of_block[block / config::kRowGroup], num_rows);
  if (copy.of_expert != nullptr) {
    const int32_t e = experts.expert_of_row(row) % params.sizes.local_experts;
    ptx::add_fenced_gpu(&copy.of_expert[e], num_rows);
  }
}

// The rows that are copied in the n-th step: tokens first where Z is made of them.
FM_DEVICE const kernel::RowCopy& copy_of_step(const kernel::BackwardParams& params,
                                              bool tokens_first, int step) {
  return params.copies[static_cast<int32_t>(config::kind_of_step(tokens_first, step))];
}

// Both operands of a rank alone, one after the other: every num_workers-th unit of rows, from the
// first expert to the last. Whole warp.
template <class Config>
FM_DEVICE void copy_operands(const kernel::BackwardParams& params, const tile::ExpertTable& experts,
                             int32_t worker_idx, int32_t num_workers) {
#pragma unroll 1
  for (int step = 0; step < config::kRowKinds; ++step) {
    const OwnRows rows{copy_of_step(params, params.sizes.pre_activation_pairs > 0, step)};
    for (int32_t row = worker_idx * config::kCopyRows; row < experts.begin(experts.num_experts);
         row += num_workers * config::kCopyRows) {
      copy_operand_unit<Config, 8>(params.forward, rows.copy, experts, row,
                                   [&](int32_t token) { return rows.row(token); });
    }
  }
}

// Both operands of several ranks: those of this rank's tokens are sent, those of all sources copied
// when they are there, a kind after the other in the order of all ranks. Whole warp; worker_idx()
// and num_workers() as in send_and_copy_rows().
template <class Config, class Index, class Count>
FM_DEVICE void exchange_operands(const kernel::BackwardParams& params, RankState& state,
                                 const tile::ExpertTable& experts, const Index& worker_idx,
                                 const Count& num_workers, sync::Waiter& waiter) {
#pragma unroll 1
  for (int step = 0; step < config::kRowKinds; ++step) {
    const OwnRows rows{copy_of_step(params, state.tokens_first, step)};
    send_and_copy_rows(params.forward, state, rows, experts, worker_idx, num_workers, waiter,
                       [&](int32_t row, const auto& find) {
                         copy_operand_unit<Config, 4>(params.forward, rows.copy, experts, row,
                                                      find);
                       });
  }
}

}  // namespace flashmoe::cuda::stage
