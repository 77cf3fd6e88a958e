// Copies of the backward's operands into stages. Products of rows (Z, dA', dX, the router's share
// of grad x, whose rows are tokens) read weights in boxes of 64 x 64, either dimension contiguous,
// and rows in the forward's boxes; sums over rows (the weights' gradients) read 32 rows of either
// operand, in boxes of 64 columns.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/tile/load.cuh"
#include "cuda/tile/window.h"

namespace flashmoe::cuda::tile {

FM_DEVICE ExpertTable table_of(const kernel::BackwardParams& params) {
  return {params.forward.memory.experts, params.forward.sizes.table_experts()};
}
FM_DEVICE ExpertParts parts_of(const kernel::BackwardParams& params, const Tile& tile) {
  return {table_of(params), params.forward.sizes.local_experts, tile.local_expert_idx};
}
// The rows that a weight's gradient is a sum over: the expert's, or of the router's weight a range
// of tokens.
FM_DEVICE StepRows rows_of_sum(const kernel::BackwardParams& params, const Tile& tile) {
  if (product_of(tile) != BackwardProduct::kRouterGrad) return StepRows(parts_of(params, tile));
  const config::BackwardSizes& sizes = params.sizes;
  const int32_t begin = tile.local_expert_idx * sizes.logit_range;
  return {StepRows::kNoMoreParts, begin, min(begin + sizes.logit_range, sizes.share_tokens)};
}
FM_DEVICE int32_t steps_of_sum(const kernel::BackwardParams& params, const Tile& tile) {
  if (product_of(tile) != BackwardProduct::kRouterGrad) {
    return parts_of(params, tile).num_steps(config::kGradDepth);
  }
  const StepRows rows = rows_of_sum(params, tile);
  return plan::ceil_div(rows.end - rows.row, config::kGradDepth);
}

// Whether the launch computes Z: it was not kept, or of several ranks more rows came than it has.
FM_DEVICE bool makes_z(const kernel::BackwardParams& params) {
  const config::BackwardSizes& sizes = params.sizes;
  if (sizes.pre_activation_pairs == 0 || sizes.z_rows < 0) return sizes.pre_activation_pairs > 0;
  const ExpertTable experts = table_of(params);
  return experts.begin(experts.num_experts) > sizes.z_rows;
}
FM_DEVICE int32_t pre_activation_pairs(const kernel::BackwardParams& params) {
  return makes_z(params) ? params.sizes.pre_activation_pairs : 0;
}

// Which gradient a tile of a sum over rows is of: an index of kernel::BackwardParams::weight_grads.
FM_DEVICE int32_t gradient_of(const Tile& tile) {
  return tile.product - static_cast<int32_t>(BackwardProduct::kDownGrad);
}
// The operands that it is made of, an index of grad_m and grad_n: 0, 1, 1, 2.
FM_DEVICE int32_t operands_of(const Tile& tile) { return (gradient_of(tile) + 1) / 2; }
static_assert((kRouterGradIdx + 1) / 2 == kRouterOperandsIdx);
FM_DEVICE int32_t column_boxes(const Tile& tile) {
  return (tile.num_rows + config::kBoxColumns - 1) / config::kBoxColumns;
}

// Boxes of rows [row, end) of a map that clips, at most kRows of them; the others are zeros. box:
// the first, of 64 columns.
template <int32_t kRows, class... Mask>
FM_DEVICE void load_rows(uint8_t* to, uint64_t* full, const CUtensorMap& map, int32_t box,
                         int32_t row, int32_t end, const Mask&... mask) {
  const int32_t num_rows = max(min(end - row, kRows), 0);
  const int32_t at[5] = {0, kWindow - num_rows, row + num_rows, kWindow, box};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, at, full, mask...);
}
// This CTA's 128 of M: two boxes a step.
class BackwardWeightLoad {
 public:
  FM_DEVICE BackwardWeightLoad(const kernel::BackwardParams& params, const Tile& tile,
                               int32_t cta_rank)
      : params_(params),
        tile_(tile),
        m_((2 * tile.weight_pair_idx + cta_rank) * config::kWeightRows) {
    if (!is_weight_grad(tile)) return;
    rows_ = rows_of_sum(params, tile);
    m_ += params.weight_grad_out[gradient_of(tile)].m_offset;
  }

  FM_DEVICE void load(uint8_t* to, uint64_t* full, int32_t depth) const {
    FM_UNROLL
    for (int half = 0; half < 2; ++half) {
      load_weights(to + half * config::kBoxBytes, full, m_ + half * config::kHalfRows, depth);
    }
  }
  // Of a sum over rows, one step after the other.
  FM_DEVICE void load_shared(uint8_t* to, uint64_t* full) {
    load_rows<config::kGradDepth>(to, full, params_.grad_m[operands_of(tile_)],
                                  m_ / config::kBoxColumns, rows_.row, rows_.end);
    rows_.advance(parts_of(params_, tile_), config::kGradDepth);
  }

 private:
  FM_DEVICE void load_weights(uint8_t* box, uint64_t* full, int32_t m, int32_t depth) const {
    const bool is_down = product_of(tile_) == BackwardProduct::kHiddenGrad;
    if (product_of(tile_) == BackwardProduct::kRouterShare) {
      load_router(box, full, m, depth);
      return;
    }
    // Of the weight's two dimensions, M runs along H in dX alone.
    const bool m_is_hidden = product_of(tile_) == BackwardProduct::kInputGrad;
    const bool hidden_major = is_down ? params_.down_is_hidden_major : params_.up_is_hidden_major;
    const bool depth_first = hidden_major != m_is_hidden;
    const int32_t intermediate = params_.forward.sizes.intermediate;
    const int32_t along_up = m_is_hidden ? depth : m;  // of the weight's G * I
    const bool is_second = !is_down && params_.sizes.separate && along_up >= intermediate;
    const int32_t less = is_second ? intermediate : 0;
    const int32_t own_m = m_is_hidden ? m : m - less;
    const int32_t own_k = m_is_hidden ? depth - less : depth;
    const CUtensorMap* map = is_down ? &params_.down_weights : &params_.up_weights[is_second];
    const int32_t at[3] = {depth_first ? own_k : own_m, depth_first ? own_m : own_k,
                           tile_.local_expert_idx};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, box, map, at, full);
  }
  // The same weights for both parts of the gradients of logits.
  FM_DEVICE void load_router(uint8_t* box, uint64_t* full, int32_t m, int32_t depth) const {
    const int32_t part_depth = config::router_depth(params_.forward.sizes.num_experts);
    const int32_t at[2] = {m, depth < part_depth ? depth : depth - part_depth};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, box, &params_.router_weights,
                              at, full);
  }

  const kernel::BackwardParams& params_;
  const Tile& tile_;
  int32_t m_;
  StepRows rows_;  // of a sum over rows
};

// Half of the pair's N side, for both CTAs: half of the rows, or half the depth of every box.
class BackwardTokenLoad {
 public:
  FM_DEVICE BackwardTokenLoad(const kernel::BackwardParams& params, const Tile& tile,
                              int32_t cta_rank)
      : params_(params), tile_(tile), map_(map_of(params, tile)) {
    if (is_weight_grad(tile)) {
      rows_ = rows_of_sum(params, tile);
      column_ = params.weight_grad_out[gradient_of(tile)].n_offset + tile.row_begin;
      first_ = cta_rank * kHalfDepth;
      place_ = cta_rank * config::kGradHalfBytes;
    } else {
      const int32_t first = cta_rank * tile.num_steps() * (kTokenStep / config::kClusterSize);
      first_ = tile.row_begin + first;
      place_ = first * config::kDepthStep * config::kElementBytes;
    }
  }

  FM_DEVICE void load(uint8_t* to, uint64_t* full, int32_t depth) const {
    constexpr uint16_t kBoth = 0b11;
    const int32_t at[2] = {depth, first_};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to + place_, &map_, at, full,
                              kBoth);
  }
  // Of a sum over rows, one step after the other.
  FM_DEVICE void load_shared(uint8_t* to, uint64_t* full) {
    constexpr uint16_t kBoth = 0b11;
    load_rows<kHalfDepth>(to + place_, full, map_, column_ / config::kBoxColumns,
                          rows_.row + first_, rows_.end, kBoth);
    rows_.advance(parts_of(params_, tile_), config::kGradDepth);
  }

 private:
  static constexpr int32_t kHalfDepth = config::kGradDepth / config::kClusterSize;
  FM_DEVICE static const CUtensorMap& map_of(const kernel::BackwardParams& params,
                                             const Tile& tile) {
    switch (product_of(tile)) {
      case BackwardProduct::kPreActivation:
        return params.forward.row_tokens[tile.num_steps() - 1];
      case BackwardProduct::kHiddenGrad:
        return params.grad_y_tokens[tile.num_steps() - 1];
      case BackwardProduct::kInputGrad:
        return params.grad_z_tokens[tile.num_steps() - 1];
      case BackwardProduct::kRouterShare:
        return params.grad_logit_tokens[tile.num_steps() - 1];
      default:
        return params.grad_n[operands_of(tile)][column_boxes(tile) - 1];
    }
  }

  const kernel::BackwardParams& params_;
  const Tile& tile_;
  const CUtensorMap& map_;
  StepRows rows_;  // of a sum over rows, and its columns
  int32_t column_ = 0;
  int32_t first_;  // row; of a sum over rows, in the step
  int32_t place_;  // in the stage
};

// Bytes of a stage.
template <class Shape>
FM_DEVICE uint32_t backward_stage_bytes(const Shape& shape, const Tile& tile) {
  if (is_weight_grad(tile)) {
    return config::kGradWeightBytes + column_boxes(tile) * config::kGradBoxBytes;
  }
  return shape.weight_bytes() + shape.token_bytes(tile.num_steps());
}

}  // namespace flashmoe::cuda::tile
