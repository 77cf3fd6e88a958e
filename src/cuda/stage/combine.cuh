// Sums of tokens' rows, weighted, in slot order and fp32: a column block at a time, while the
// products of the next one run.
#pragma once

#include "cuda/stage/combine_units.cuh"
#include "cuda/tile/element.cuh"

namespace flashmoe::cuda::stage {

using tile::kVector;

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

inline constexpr int32_t kPieceColumns = 32 * kVector;  // a warp's, eight of each lane

// The columns of the unit's column block of its token `unit.token`: the loads of kRows rows of
// kPieces pieces are under way together. base: row 0; adds(): to what the target holds. Whole warp.
template <class Config, int kPieces, int kRows, class Adds>
FM_DEVICE void combine_token(const kernel::ForwardParams& params, const CombineUnits& units,
                             const CombineUnit& unit, const TokenRows& rows, const uint16_t* base,
                             const Adds& adds) {
  using Element = tile::ElementOf<Config::value.element>;
  const auto& sizes = params.sizes;
  const bool is_undefined = __any_sync(kAllLanes, rows.row == kUndefined);
  const int32_t end = min((unit.column_block + 1) * sizes.column_width, sizes.hidden);
#pragma unroll 1
  for (int32_t column = unit.column_block * sizes.column_width + ptx::lane_idx() * kVector;
       __any_sync(kAllLanes, column < end); column += kPieces * kPieceColumns) {
    ColumnSums sums[kPieces];
    FM_UNROLL
    for (ColumnSums& piece : sums) piece.clear(is_undefined ? __int_as_float(0x7FC00000) : 0.0f);
#pragma unroll 1
    for (int32_t j = 0; j < units.num_rows(unit); j += kRows) {
      int4 values[kRows][kPieces];
      FM_UNROLL
      for (int i = 0; i < kRows; ++i) {  // lanes from num_rows on have no row
        const int32_t row = __shfl_sync(kAllLanes, rows.row, j + i);
        FM_UNROLL
        for (int piece = 0; piece < kPieces; ++piece) {
          const int32_t at = column + piece * kPieceColumns;
          values[i][piece] = int4{};
          if (at >= end || row < 0) continue;
          values[i][piece] =
              __ldcg(reinterpret_cast<const int4*>(base + int64_t{row} * sizes.hidden + at));
        }
      }
      FM_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const float weight = __shfl_sync(kAllLanes, rows.weight, j + i);
        if (__shfl_sync(kAllLanes, rows.row, j + i) < 0) continue;
        FM_UNROLL
        for (int piece = 0; piece < kPieces; ++piece) {
          sums[piece].template add<Element>(values[i][piece], weight);
        }
      }
    }
    uint16_t* target = units.target_of(unit);
    FM_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      const int32_t at = column + piece * kPieceColumns;
      if (at >= end) break;
      auto* to = reinterpret_cast<int4*>(target + at);
      if (adds()) sums[piece].template add<Element>(__ldcg(to), 1.0f);
      *to = sums[piece].template rounded<Element>();
    }
  }
}

// Warps of a CTA that combine: the communication warps, and the math warps after their last tile.
inline constexpr int32_t kCombineWarps = config::kCommWarps + config::kMathWarps;

// Combines unit after unit, of the first column block to the last, until none is left. num_blocks:
// where the number of all experts' blocks is; adds(): y holds what the sums are added to. Whole
// warp; kCombineWarps of every CTA come here. True in a lane of the last one.
template <class Config, int kPieces, int kRows, class Adds>
FM_DEVICE bool combine(const kernel::ForwardParams& params, RankState& ranks,
                       const int32_t& num_blocks, sync::Waiter& waiter, const Adds& adds) {
  const CombineUnits units(params, ranks, num_blocks);
  int32_t ready = -1;  // column blocks up to here are known to be stored
#pragma unroll 1
  while (true) {
    int32_t ticket = 0;
    if (ptx::lane_idx() == 0)
      ticket = static_cast<int32_t>(atomicAdd(&params.memory.combine->next, 1u));
    CombineUnit unit = units.unit_at(__shfl_sync(kAllLanes, ticket, 0));
    if (units.is_end(unit)) break;
    units.wait(unit, ready, waiter);
    if (!__all_sync(kAllLanes, waiter.alive())) break;
    TokenRows rows = units.rows_of(unit, unit.token);
#pragma unroll 1
    for (; unit.token < unit.end; ++unit.token) {
      const TokenRows next = units.rows_of(unit, unit.token + 1);
      // Nobody reads what a rank without the token's experts would send.
      const bool is_empty = !__any_sync(kAllLanes, rows.row >= 0);
      if (is_empty && units.has_letter(unit)) {
        rows = next;
        continue;
      }
      // Once for each base: a register pair less than a choice of it.
      if (unit.is_home()) {
        combine_token<Config, kPieces, kRows>(params, units, unit, rows, units.first_part(), adds);
      } else {
        const auto adds_to_y = [&] {
          return adds() && !units.has_letter(unit);
        };
        combine_token<Config, kPieces, kRows>(params, units, unit, rows, units.first_row(),
                                              adds_to_y);
      }
      rows = next;
    }
    if (units.has_letter(unit)) ranks.post.send(post_box(), units.letter_of(unit));
  }
  if (!is_alone(params)) ranks.post.close(post_box());
  if (ptx::lane_idx() != 0) return false;
  return kernel::finish_tickets(*params.memory.combine, ptx::num_blocks() * kCombineWarps);
}

}  // namespace flashmoe::cuda::stage
