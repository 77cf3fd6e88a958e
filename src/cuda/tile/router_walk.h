// How the router's products in the backward are cut into warps' units, and which elements a lane
// has of the matrix products (mma.sync m16n8k8) that a unit is made of:
//
//   grad_x[T, H]        = grad_logits[T, E] W_router[E, H]     M tokens,  K experts
//   grad_W_router[E, H] = grad_logits^T[E, T] X[T, H]          M experts, K tokens
//
// Operands come from global memory without shared memory in between. The products' rows, columns
// and depth are permuted, so that a lane's elements are contiguous there: pairs of grad_logits,
// four columns of W_router or X, and eight of the result.
#pragma once

#include <cstdint>

#include "cuda/config/backward.h"
#include "plan/math.h"

namespace flashmoe::cuda::tile {

enum class RouterProduct { kGradX, kGradWeight };

inline constexpr int32_t kRouterRows = 16;        // M of a product, and of a unit
inline constexpr int32_t kRouterDepth = 8;        // K of a product
inline constexpr int32_t kRouterLaneColumns = 4;  // of N that a lane loads: a product has one
inline constexpr int32_t kRouterColumns = 8 * kRouterLaneColumns;  // of a unit

template <RouterProduct kProduct>
struct RouterLane {
  int32_t lane;

  // Row of the elements of A in rows 0-7 (half 0) or 8-15 (half 1) of the product, and of its sums.
  FM_HD constexpr int32_t row(int32_t half) const {
    return kProduct == RouterProduct::kGradX ? lane / 4 + 8 * half : lane / 4 * 2 + half;
  }
  // Depth of the elements of A and B in the first (half 0) or second four of the product's K.
  FM_HD constexpr int32_t depth(int32_t half) const { return lane % 4 * 2 + half; }
  // Column of the element of B of the unit's j-th product.
  FM_HD constexpr int32_t operand_column(int32_t j) const {
    return lane / 4 * kRouterLaneColumns + j;
  }
  // Column of the even (half 0) or odd sum of the unit's j-th product.
  FM_HD constexpr int32_t sum_column(int32_t half, int32_t j) const {
    return (lane % 4 * 2 + half) * kRouterLaneColumns + j;
  }
};

// Rows [m, m + kRouterRows), columns [n, n + kRouterColumns) of a product; of grad_W_router, summed
// over one segment of the tokens.
struct RouterUnit {
  int32_t m;
  int32_t n;
  int32_t segment;
};

// The units of a product, dealt to warps by runs, which take them one after the other: rows first,
// then columns, then segments.
template <RouterProduct kProduct>
struct RouterWalk {
  int32_t tokens;
  int32_t hidden;  // a multiple of kRouterColumns
  int32_t num_experts;

  FM_HD constexpr int32_t rows() const {
    return kProduct == RouterProduct::kGradX ? tokens : num_experts;
  }
  // At most config::kRouterSegments, which begin at whole products.
  FM_HD constexpr int32_t segment_tokens() const {
    return plan::align_up(plan::ceil_div(tokens, config::kRouterSegments), kRouterDepth);
  }
  FM_HD constexpr int32_t num_segments() const {
    return tokens == 0 ? 0 : plan::ceil_div(tokens, segment_tokens());
  }
  FM_HD constexpr int32_t num_units() const {
    return num_row_tiles() * num_columns() *
           (kProduct == RouterProduct::kGradX ? 1 : num_segments());
  }
  FM_HD constexpr RouterUnit unit_at(int32_t idx) const {
    const int32_t column = idx / num_row_tiles();
    const int32_t segment = column / num_columns();
    return {.m = (idx - column * num_row_tiles()) * kRouterRows,
            .n = (column - segment * num_columns()) * kRouterColumns,
            .segment = segment};
  }
  // The one behind `unit`, without a division.
  FM_HD constexpr RouterUnit after(RouterUnit unit) const {
    unit.m += kRouterRows;
    if (unit.m < rows()) return unit;
    unit.m = 0;
    unit.n += kRouterColumns;
    if (unit.n < hidden) return unit;
    return {.m = 0, .n = 0, .segment = unit.segment + 1};
  }
  // What is summed over: experts, or the tokens of the segment.
  FM_HD constexpr int32_t depth_begin(const RouterUnit& unit) const {
    return kProduct == RouterProduct::kGradX ? 0 : unit.segment * segment_tokens();
  }
  FM_HD constexpr int32_t depth_end(const RouterUnit& unit) const {
    if (kProduct == RouterProduct::kGradX) return num_experts;
    return plan::min_of((unit.segment + 1) * segment_tokens(), tokens);
  }

 private:
  FM_HD constexpr int32_t num_row_tiles() const { return plan::ceil_div(rows(), kRouterRows); }
  FM_HD constexpr int32_t num_columns() const { return hidden / kRouterColumns; }
};

// Run of a warp of many: every unit is in one.
struct RouterRun {
  int32_t first;
  int32_t count;

  FM_HD constexpr RouterRun(int32_t num_units, int32_t worker_idx, int32_t num_workers) {
    const int32_t most = plan::ceil_div(num_units, num_workers);
    first = worker_idx * most;
    count = plan::max_of(plan::min_of(most, num_units - first), 0);
  }
};

}  // namespace flashmoe::cuda::tile
