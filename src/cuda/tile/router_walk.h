// How the router's products in the backward are cut into warps' units, and which elements a lane
// has of the matrix products (mma.sync m16n8k8) that a unit is made of:
//
//   grad_x[T, H]        = grad_logits[T, E] W_router[E, H]     M tokens,  K experts
//   grad_W_router[E, H] = grad_logits^T[E, T] X[T, H]          M experts, K tokens
//
// Operands come from global memory without shared memory in between. The products' rows, columns
// and depth are permuted, so that a lane's elements are contiguous there, and in registers as the
// products take them: pairs of grad_logits, four columns of W_router or X, and the results. A pair
// of grad_logits is of two experts: of the depth in grad_x, where it is the products' B, and of M
// in grad_W_router, where two are A.
#pragma once

#include <cstdint>

#include "cuda/config/backward.h"
#include "plan/math.h"

namespace flashmoe::cuda::tile {

enum class RouterProduct { kGradX, kGradWeight };

inline constexpr int32_t kRouterRows = 16;                         // M of a unit
inline constexpr int32_t kRouterDepth = 8;                         // K of a product
inline constexpr int32_t kRouterLaneColumns = 4;                   // of N that a lane loads
inline constexpr int32_t kRouterColumns = 8 * kRouterLaneColumns;  // of a unit
inline constexpr int32_t kRouterProducts = 4;                      // of a unit, each of 16 by 8

// Where a sum is: register `index` of the lane's four of a product.
struct RouterSum {
  int32_t product;
  int32_t index;
};

template <RouterProduct kProduct>
struct RouterLane {
  static constexpr bool kIsX = kProduct == RouterProduct::kGradX;
  // Of the lane's sums, which are contiguous in a row.
  static constexpr int32_t kSumRows = kIsX ? 4 : 2;
  static constexpr int32_t kSumColumns = kIsX ? 4 : 8;
  int32_t lane;

  // Rows and depths of the elements of grad_logits, depths and columns of those of W_router or X.
  FM_HD constexpr int32_t row(int32_t half) const {
    return kIsX ? lane / 4 + 8 * half : lane / 4 * 2 + half;
  }
  FM_HD constexpr int32_t depth(int32_t half) const { return lane % 4 * 2 + half; }
  FM_HD constexpr int32_t column(int32_t j) const { return lane / 4 * kRouterLaneColumns + j; }

  FM_HD constexpr int32_t sum_row(int32_t i) const {
    return kIsX ? i / 2 * 8 + lane % 4 * 2 + i % 2 : lane / 4 * 2 + i;
  }
  FM_HD constexpr int32_t sum_column(int32_t j) const {
    return (kIsX ? lane / 4 : lane % 4 * 2) * kRouterLaneColumns + j;
  }
  // grad_x: product 2 p + h is of columns 2 p and 2 p + 1 of the lanes, and of tokens from 8 h on;
  // grad_W_router: product p of column p.
  FM_HD static constexpr RouterSum sum_at(int32_t i, int32_t j) {
    if (kIsX) return {.product = j / 2 * 2 + i / 2, .index = j % 2 * 2 + i % 2};
    return {.product = j % kRouterLaneColumns, .index = 2 * i + j / kRouterLaneColumns};
  }
};

// Rows [m, m + kRouterRows), columns [n, n + kRouterColumns) of a product; of grad_W_router, summed
// over one segment of the tokens.
struct RouterUnit {
  int32_t m;
  int32_t n;
  int32_t segment;
};

// What a unit is summed over: experts, or tokens of its segment.
struct RouterDepth {
  int32_t begin;
  int32_t end;
  int32_t num_steps;  // of kRouterDepth
};

// The units of a product, as runs of a warp: those of up to `run_rows` rows of a column, one after
// the other. Runs go by rows first, then columns, then segments.
template <RouterProduct kProduct>
struct RouterWalk {
  int32_t tokens;
  int32_t hidden;  // a multiple of kRouterColumns
  int32_t num_experts;
  int32_t run_rows = kRouterRows;  // times a power of two

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
  FM_HD constexpr int32_t num_runs() const {
    return runs_of_column() * num_columns() *
           (kProduct == RouterProduct::kGradX ? 1 : num_segments());
  }
  // The first unit of a run.
  FM_HD constexpr RouterUnit run_at(int32_t idx) const {
    const int32_t column = idx / runs_of_column();
    const int32_t segment = kProduct == RouterProduct::kGradX ? 0 : column / num_columns();
    return {.m = (idx - column * runs_of_column()) * run_rows,
            .n = (column - segment * num_columns()) * kRouterColumns,
            .segment = segment};
  }
  // Whether the run has a unit behind `unit`, which then is that one.
  FM_HD constexpr bool advance(RouterUnit& unit) const {
    unit.m += kRouterRows;
    return unit.m < rows() && (unit.m & (run_rows - 1)) != 0;
  }
  FM_HD constexpr RouterDepth depth(const RouterUnit& unit) const {
    RouterDepth depth{.begin = 0, .end = num_experts, .num_steps = 0};
    if (kProduct == RouterProduct::kGradWeight) {
      depth.begin = unit.segment * segment_tokens();
      depth.end = plan::min_of(depth.begin + segment_tokens(), tokens);
    }
    depth.num_steps = plan::ceil_div(depth.end - depth.begin, kRouterDepth);
    return depth;
  }

 private:
  FM_HD constexpr int32_t runs_of_column() const { return plan::ceil_div(rows(), run_rows); }
  FM_HD constexpr int32_t num_columns() const { return hidden / kRouterColumns; }
};

inline constexpr int32_t kRouterBiasExperts = 32;   // of a run of column sums: one of each lane
inline constexpr int32_t kRouterReduceWords = 128;  // of a run that adds segments
inline constexpr int32_t kRouterRunSteps = 32;      // of a run of grad_x, at most, if it has units
inline constexpr int32_t kRouterLeastRuns = 4096;   // of grad_x, where there are so many units

enum class RouterTask {
  kBias,        // column sums of grad_logits: of 32 experts, then segments
  kGradWeight,  // RouterWalk
};

struct RouterRun {
  RouterTask task;
  int32_t idx;  // of the task's
};

// All that warps make of the gradients of the logits, as runs that they take by tickets of three
// counters: the share of grad x, for which the combine waits; sums over tokens; then the additions
// of words of their segments (of the weight, then of the bias), which wait for all of those.
class RouterRuns {
 public:
  RouterRuns() = default;
  // by_tiles: all but the bias's sums and the additions is tiles of the math warpgroups.
  constexpr RouterRuns(int32_t tokens, int32_t hidden, int32_t num_experts, bool has_weight,
                       bool has_bias, bool by_tiles) {
    RouterWalk<RouterProduct::kGradX> x{tokens, hidden, num_experts};
    const RouterWalk<RouterProduct::kGradWeight> weight{tokens, hidden, num_experts};
    x_depth_ = x.depth({});
    int32_t units = 1;
    while (2 * units * x_depth_.num_steps <= kRouterRunSteps &&
           2 * units * kRouterLeastRuns <= x.num_runs()) {
      units *= 2;
    }
    x.run_rows = x_run_rows_ = units * kRouterRows;
    num_shares_ = by_tiles ? 0 : x.num_runs();
    if (has_bias) {
      weight_begin_ = weight.num_segments() * plan::ceil_div(num_experts, kRouterBiasExperts);
    }
    num_sums_ = weight_begin_ + (has_weight && !by_tiles ? weight.num_runs() : 0);
    const int32_t of_weight = num_experts * hidden;
    words_begin_ = has_weight ? 0 : of_weight;
    words_end_ = of_weight + (has_bias ? num_experts : 0);
    num_reductions_ = plan::ceil_div(words_end_ - words_begin_, kRouterReduceWords);
  }

  // Runs of grad x.
  FM_HD constexpr int32_t num_shares() const { return num_shares_; }
  FM_HD constexpr int32_t num_sums() const { return num_sums_; }
  FM_HD constexpr int32_t num_reductions() const { return num_reductions_; }

  // Of the sums.
  FM_HD constexpr RouterRun run_at(int32_t idx) const {
    if (idx < weight_begin_) return {RouterTask::kBias, idx};
    return {RouterTask::kGradWeight, idx - weight_begin_};
  }
  FM_HD constexpr int32_t x_run_rows() const { return x_run_rows_; }
  FM_HD constexpr const RouterDepth& x_depth() const { return x_depth_; }
  // Words of a reduction.
  FM_HD constexpr int32_t words_begin(int32_t idx) const {
    return words_begin_ + idx * kRouterReduceWords;
  }
  FM_HD constexpr int32_t words_end(int32_t idx) const {
    return plan::min_of(words_begin(idx + 1), words_end_);
  }

 private:
  int32_t num_shares_ = 0;
  int32_t weight_begin_ = 0;  // where sums of the weight begin
  int32_t num_sums_ = 0;
  int32_t num_reductions_ = 0;
  int32_t x_run_rows_ = kRouterRows;
  RouterDepth x_depth_{};
  int32_t words_begin_ = 0;
  int32_t words_end_ = 0;
};

}  // namespace flashmoe::cuda::tile
