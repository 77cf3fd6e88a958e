// Sums of tokens' rows, weighted, in slot order and fp32: a column block at a time, while the
// products of the next one run.
//
// A warp sums 256 columns of a token at a time, four rows in a step: what one row needs takes a
// warp longer to issue than its 512 bytes take to come, so that four go through every step side by
// side. Rows come through shared memory: a warp of few registers then has several steps' on their
// way at any time, and with them what becomes of their sums.
#pragma once

#include "cuda/kernel/mark.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/stage/combine_units.cuh"
#include "cuda/sync/holder.h"
#include "cuda/tile/element.cuh"

namespace flashmoe::cuda::stage {

using tile::kVector;
inline constexpr int32_t kPieceColumns = 32 * kVector;  // a warp's, eight of each lane

// A lane's eight columns.
struct ColumnSums {
  float values[kVector] = {};

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

inline constexpr int32_t kStepRows = 4;

// The rows of one step, in shared memory, and what becomes of them. Rows are copied by the lanes
// that read them; the rest is written by one lane each for all.
struct alignas(16) CombineStep {
  int4 rows[kStepRows][32];
  uint32_t weights[kStepRows];  // bits of the weight, or kNoRow
  // Where the sum goes that ends with the row, and in the low bits how many times 64 columns it
  // has; 0: it goes on.
  uint64_t targets[kStepRows];
  sync::Letter letter;  // to be sent behind the step's sums
  bool is_end;          // nothing follows
};
inline constexpr uint32_t kNoRow = 0xFFFFFFFF;

// Where a warp's units, tokens and rows are at; fills one step after another.
class CombineStream {
 public:
  // num_steps: those between the step that is filled and the one that is summed.
  FM_DEVICE CombineStream(const kernel::ForwardParams& params, const CombineUnits& units,
                          kernel::TicketCounter& counter, int32_t num_steps)
      : params_(params), units_(units), tickets_(counter), num_steps_(num_steps) {
    tickets_.take(0);
    enter_unit();
  }

  // Whole warp, when all lanes have read what the step held before.
  FM_DEVICE void fill(CombineStep& step, sync::Waiter& waiter) {
    const int32_t lane = ptx::lane_idx();
    // A unit whose rows may not be there yet begins when all before it are summed: a warp that
    // waited with sums of its own unfinished could wait for a rank that waits for those.
    if (stalls_ > 0 && --stalls_ == 0 && !units_.is_end(unit_)) units_.wait(unit_, waiter);
    const bool is_alive = __all_sync(kAllLanes, waiter.alive());
    const bool is_end = stalls_ == 0 && (units_.is_end(unit_) || !is_alive);
    if (lane == 0) step.is_end = is_end;
    if (stalls_ > 0 || is_end) {
      clear(step);
    } else {
      fill_rows(step);
    }
    ptx::cp_async_commit_group();
  }

 private:
  FM_DEVICE static void clear(CombineStep& step) {
    const int32_t lane = ptx::lane_idx();
    if (lane < kStepRows) {
      step.weights[lane] = kNoRow;
      step.targets[lane] = 0;
    }
    if (lane == 0) step.letter = {0, 0};
  }
  FM_DEVICE int32_t first_column() const { return unit_.column_block * params_.sizes.column_width; }
  FM_DEVICE int32_t column_end() const {
    return min(first_column() + params_.sizes.column_width, params_.sizes.hidden);
  }
  // Rows of all of the token's pieces.
  FM_DEVICE int32_t rows_of_token() const {
    const int32_t pieces = (column_end() - first_column() + kPieceColumns - 1) / kPieceColumns;
    const bool is_empty = !__any_sync(kAllLanes, rows_.row >= 0) && !units_.writes_empty(unit_);
    return is_empty ? 0 : pieces * units_.num_rows(unit_);
  }

  // Lane i finds out about row i % kStepRows.
  FM_DEVICE void fill_rows(CombineStep& step) {
    const int32_t lane = ptx::lane_idx();
    const int32_t num_rows = units_.num_rows(unit_);
    const int32_t all = rows_of_token();
    const int32_t idx = next_ + lane % kStepRows;
    const int32_t piece = idx / num_rows;
    const int32_t slot = idx - piece * num_rows;
    const int32_t column = first_column() + piece * kPieceColumns;
    int32_t row = __shfl_sync(kAllLanes, rows_.row, slot);
    const float weight = __shfl_sync(kAllLanes, rows_.weight, slot);
    if (idx >= all) row = kNoExpert;
    if (lane < kStepRows) {
      const bool ends = idx < all && slot == num_rows - 1;
      step.weights[lane] = weight_bits(row, weight);
      step.targets[lane] = ends ? target_at(column) : 0;
    }
    copy_rows(step, row, column);
    next_ += kStepRows;
    const bool is_token_done = next_ >= all;
    const bool is_unit_done = is_token_done && unit_.token + 1 == unit_.end;
    if (lane == 0) step.letter = is_unit_done ? units_.letter_of(unit_) : sync::Letter{0, 0};
    if (is_token_done) next_token();
  }
  FM_DEVICE static uint32_t weight_bits(int32_t row, float weight) {
    constexpr uint32_t kNotANumber = 0x7FC00000;
    if (row == kUndefined || (row >= 0 && weight != weight)) return kNotANumber;
    return row >= 0 ? __float_as_uint(weight) : kNoRow;
  }
  FM_DEVICE uint64_t target_at(int32_t column) const {
    const int32_t columns = min(column_end() - column, kPieceColumns);
    return reinterpret_cast<uint64_t>(units_.target_of(unit_, unit_.token) + column) |
           static_cast<uint64_t>(columns / 64);
  }
  FM_DEVICE void copy_rows(CombineStep& step, int32_t row, int32_t column) const {
    const int32_t lane = ptx::lane_idx();
    const uint16_t* base = units_.base_of(unit_);
    const int32_t end = column_end();
    FM_UNROLL
    for (int i = 0; i < kStepRows; ++i) {
      const int32_t row_i = __shfl_sync(kAllLanes, row, i);
      const int32_t column_i = __shfl_sync(kAllLanes, column, i) + lane * kVector;
      if (row_i < 0 || column_i >= end) continue;
      ptx::cp_async_16(ptx::shared_address(&step.rows[i][lane]),
                       base + int64_t{row_i} * params_.sizes.hidden + column_i, 16);
    }
  }
  FM_DEVICE void next_token() {
    next_ = 0;
    if (++unit_.token < unit_.end) {
      rows_ = next_rows_;
      next_rows_ = units_.rows_of(unit_, unit_.token + 1);
    } else {
      ++n_;
      enter_unit();
    }
  }
  FM_DEVICE void enter_unit() {
    const CombineUnit last = unit_;
    unit_ = units_.unit_at(tickets_.ticket(n_));
    if (units_.is_end(unit_) || !units_.is_ready(unit_, last)) stalls_ = num_steps_;
    if (units_.is_end(unit_)) return;
    tickets_.take(n_ + 1);
    rows_ = units_.rows_of(unit_, unit_.token);
    next_rows_ = units_.rows_of(unit_, unit_.token + 1);
  }

  const kernel::ForwardParams& params_;
  const CombineUnits& units_;
  CombineTickets tickets_;
  int32_t num_steps_;
  int32_t n_ = 0;  // which unit of the warp
  CombineUnit unit_;
  int32_t next_ = 0;    // row of the token, over all its pieces
  int32_t stalls_ = 0;  // steps until the unit may begin
  TokenRows rows_;      // of the token
  TokenRows next_rows_;
};

// Warps of a CTA that combine: the communication warps, and the math warps after their last tile.
inline constexpr int32_t kCombineWarps = config::kCommWarps + config::kMathWarps;

// Adds a step's rows to the sums, and writes those that end. Whole warp.
template <class Element>
FM_DEVICE void sum_step(const CombineStep& step, ColumnSums& sums) {
  const int32_t lane = ptx::lane_idx();
  FM_UNROLL
  for (int i = 0; i < kStepRows; ++i) {
    const uint32_t weight = step.weights[i];
    if (weight != kNoRow) {
      const int4 row = ptx::ld_shared_16(ptx::shared_address(&step.rows[i][lane]));
      sums.template add<Element>(row, __uint_as_float(weight));
    }
    const uint64_t target = step.targets[i];
    if (target == 0) continue;
    if (lane < static_cast<int32_t>(target & 15) * (64 / kVector)) {
      reinterpret_cast<int4*>(target & ~uint64_t{15})[lane] = sums.template rounded<Element>();
    }
    sums = {};
  }
}

// Combines unit after unit, of the first column block to the last, until none is left. num_blocks:
// the number of all experts' blocks; warp_idx: of kCombineWarps; steps: the warp's, in shared
// memory. Whole warp; kCombineWarps of every CTA come here.
template <class Config, int kSteps>
FM_DEVICE void combine(const kernel::ForwardParams& params, RankState& ranks, int32_t num_blocks,
                       int32_t warp_idx, CombineStep (&steps)[kSteps], sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  auto& state = *params.memory.state;
  const CombineUnits units(params, ranks, num_blocks);
  CombineStream stream(params, units, state.combine, kSteps);
#pragma unroll 1
  for (int i = 0; i < kSteps; ++i) stream.fill(steps[i], waiter);
  ColumnSums sums;
#pragma unroll 1
  for (int at = 0;; at = at + 1 == kSteps ? 0 : at + 1) {
    CombineStep& step = steps[at];
    ptx::cp_async_wait_group<kSteps - 1>();
    __syncwarp();  // what one lane wrote for all
    if (step.is_end) break;
    sum_step<Element>(step, sums);
    if (step.letter.ranks != 0) ranks.post.send(warp_idx, step.letter);
    __syncwarp();
    stream.fill(step, waiter);
  }
  if (!is_alone(params)) ranks.post.close(warp_idx);
  if (ptx::lane_idx() == 0 && kernel::finish_tickets(state.combine, gridDim.x * kCombineWarps)) {
    kernel::set_mark(params, kernel::Mark::kEnd);
    sync::release(params.launch_id, [&](uint32_t expected, uint32_t desired) {
      return ptx::cas_acq_rel_gpu(&state.holder, expected, desired);
    });
  }
}

}  // namespace flashmoe::cuda::stage
