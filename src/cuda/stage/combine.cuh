// y[t] = sum of the token's rows, weighted, in slot order and fp32: a column block at a time, while
// the products of the next one run.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/kernel/mark.cuh"
#include "cuda/kernel/roles.cuh"
#include "cuda/stage/choose.cuh"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/element.cuh"

namespace flashmoe::cuda::stage {

// A lane's eight columns.
struct ColumnSums {
  float values[kVector];

  FM_DEVICE void clear(float start) {
    FM_UNROLL
    for (float& value : values) value = start;
  }
  template <class Element>
  FM_DEVICE void add(const int4& row, float weight) {
    const uint32_t words[4] = {static_cast<uint32_t>(row.x), static_cast<uint32_t>(row.y),
                               static_cast<uint32_t>(row.z), static_cast<uint32_t>(row.w)};
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Element::unpack(words[i]);
      values[2 * i] = fmaf(weight, pair.x, values[2 * i]);
      values[2 * i + 1] = fmaf(weight, pair.y, values[2 * i + 1]);
    }
  }
  template <class Element>
  FM_DEVICE int4 rounded() const {
    return {static_cast<int>(Element::pack(values[0], values[1])),
            static_cast<int>(Element::pack(values[2], values[3])),
            static_cast<int>(Element::pack(values[4], values[5])),
            static_cast<int>(Element::pack(values[6], values[7]))};
  }
};

// A token's slots: lane j knows slot j's row and weight.
struct TokenSlots {
  int32_t row;
  float weight;

  FM_DEVICE static TokenSlots load(const kernel::ForwardParams& params, int32_t token) {
    const auto& sizes = params.sizes;
    const int32_t lane = ptx::lane_idx();
    if (lane >= sizes.top_k || token >= sizes.tokens) return {kNoExpert, 0.0f};
    const int64_t slot = int64_t{token} * sizes.top_k + lane;
    return {params.memory.slot_row[slot],
            sizes.weight_on_input ? 1.0f : params.memory.weights[slot]};
  }
};

inline constexpr int32_t kPieceColumns = 32 * kVector;  // a warp's, eight of each lane

// A token's columns of a column block: the loads of kRows rows of kPieces pieces are under way
// together. Whole warp.
template <class Config, int kPieces, int kRows>
FM_DEVICE void combine_token(const kernel::ForwardParams& params, const TokenSlots& slots,
                             int32_t token, int32_t column_block) {
  using Element = tile::ElementOf<Config::value.element>;
  const auto& sizes = params.sizes;
  const bool is_undefined = __any_sync(kAllLanes, slots.row == kUndefined);
  const auto* rows = static_cast<const uint16_t*>(params.memory.rows);
  const int32_t end = min((column_block + 1) * sizes.column_width, sizes.hidden);
#pragma unroll 1
  for (int32_t column = column_block * sizes.column_width + ptx::lane_idx() * kVector;
       __any_sync(kAllLanes, column < end); column += kPieces * kPieceColumns) {
    ColumnSums sums[kPieces];
    FM_UNROLL
    for (ColumnSums& piece : sums) piece.clear(is_undefined ? __int_as_float(0x7FC00000) : 0.0f);
#pragma unroll 1
    for (int32_t j = 0; j < sizes.top_k; j += kRows) {
      int4 values[kRows][kPieces];
      FM_UNROLL
      for (int i = 0; i < kRows; ++i) {  // lanes from top_k on have no row
        const int32_t row = __shfl_sync(kAllLanes, slots.row, j + i);
        FM_UNROLL
        for (int piece = 0; piece < kPieces; ++piece) {
          const int32_t at = column + piece * kPieceColumns;
          values[i][piece] = int4{};
          if (at >= end || row < 0) continue;
          values[i][piece] =
              __ldcg(reinterpret_cast<const int4*>(rows + int64_t{row} * sizes.hidden + at));
        }
      }
      FM_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const float weight = __shfl_sync(kAllLanes, slots.weight, j + i);
        if (__shfl_sync(kAllLanes, slots.row, j + i) < 0) continue;
        FM_UNROLL
        for (int piece = 0; piece < kPieces; ++piece) {
          sums[piece].template add<Element>(values[i][piece], weight);
        }
      }
    }
    auto* y = static_cast<uint16_t*>(params.y) + token * params.y_stride + column;
    FM_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      if (column + piece * kPieceColumns >= end) break;
      *reinterpret_cast<int4*>(y + piece * kPieceColumns) = sums[piece].template rounded<Element>();
    }
  }
}

// Warps of a CTA that combine: the communication warps, and the math warps after their last tile.
inline constexpr int32_t kCombineWarps = config::kCommWarps + config::kMathWarps;

// Combines unit after unit, of the first column block to the last, until none is left. num_blocks:
// where the number of all experts' blocks is. Whole warp; kCombineWarps of every CTA come here.
template <class Config, int kPieces, int kRows>
FM_DEVICE void combine(const kernel::ForwardParams& params, const int32_t& num_blocks,
                       sync::Waiter& waiter) {
  const auto& sizes = params.sizes;
  auto& state = *params.memory.state;
  int32_t ready = -1;  // column blocks up to here are known to be stored
  while (true) {
    int32_t unit = 0;
    if (ptx::lane_idx() == 0) unit = static_cast<int32_t>(atomicAdd(&state.combine.next, 1u));
    unit = __shfl_sync(kAllLanes, unit, 0);
    const int32_t column_block = unit / sizes.combine_units;
    const int32_t first = (unit - column_block * sizes.combine_units) * sizes.combine_tokens;
    if (column_block >= sizes.column_blocks) break;
    if (column_block > ready) {
      const int32_t tiles = num_blocks * sizes.pairs_of_column_block(column_block);
      waiter.wait_word(&params.memory.down_done[column_block], tiles * config::kClusterSize,
                       sync::WaitTag::kDownDone);
      if (!__all_sync(kAllLanes, waiter.alive())) break;
      ready = column_block;
    }
    const int32_t end = min(first + sizes.combine_tokens, sizes.tokens);
    TokenSlots slots = TokenSlots::load(params, first);
    for (int32_t token = first; token < end; ++token) {
      const TokenSlots next = TokenSlots::load(params, token + 1 < end ? token + 1 : sizes.tokens);
      combine_token<Config, kPieces, kRows>(params, slots, token, column_block);
      slots = next;
    }
  }
  if (ptx::lane_idx() == 0 && kernel::finish_tickets(state.combine, gridDim.x * kCombineWarps)) {
    kernel::set_mark(params, kernel::Mark::kEnd);
  }
}

}  // namespace flashmoe::cuda::stage
