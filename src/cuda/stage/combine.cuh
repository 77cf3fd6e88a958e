// y[t] = sum of the token's rows, weighted, in slot order and fp32: a column block at a time, while
// the products of the next one run. Rows come through shared memory, so that a warp of few
// registers has several on their way at any time.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/kernel/mark.cuh"
#include "cuda/kernel/roles.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/stage/choose.cuh"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/sync/holder.h"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/element.cuh"

namespace flashmoe::cuda::stage {

// A lane's eight columns.
struct ColumnSums {
  float values[kVector];

  FM_DEVICE explicit ColumnSums(float start) {
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

// Units of work: columns of one column block of a few tokens. A warp takes them one by one; the
// copies and the sums pass through them in the same order, the copies ahead. Unit n of the warp is
// in lane n % 32: copies are less than 32 rows ahead.
class CombineUnits {
 public:
  FM_DEVICE explicit CombineUnits(kernel::TicketCounter& counter) : counter_(counter) {}

  // Takes unit n, the next one; unit() waits for it. Whole warp.
  FM_DEVICE void take(int32_t n) {
    if (ptx::lane_idx() == n % 32) {
      units_ = static_cast<int32_t>(atomicAdd(&counter_.next, 1u));
    }
  }
  FM_DEVICE int32_t unit(int32_t n) const { return __shfl_sync(kAllLanes, units_, n % 32); }

 private:
  kernel::TicketCounter& counter_;
  int32_t units_ = 0;
};

inline constexpr int32_t kPieceColumns = 32 * kVector;  // a warp's, eight of each lane

// A piece of a token's row in the units of a warp. The same in all lanes.
struct CombinePlace {
  int32_t n = 0;  // which unit of the warp
  int32_t token = 0;
  int32_t end = 0;  // token after the unit's last
  int32_t column_block = -1;
  int32_t column = 0;  // the piece's first

  FM_DEVICE void enter(const config::ForwardSizes& sizes, int32_t unit) {
    column_block = unit / sizes.combine_units;
    token = (unit - column_block * sizes.combine_units) * sizes.combine_tokens;
    end = min(token + sizes.combine_tokens, sizes.tokens);
    column = column_block * sizes.column_width;
  }
  FM_DEVICE bool is_end(const config::ForwardSizes& sizes) const {
    return column_block >= sizes.column_blocks || sizes.tokens == 0;
  }
  FM_DEVICE int32_t column_end(const config::ForwardSizes& sizes) const {
    return min((column_block + 1) * sizes.column_width, sizes.hidden);
  }
  // To the token's next piece; false, and at the next token's first, after its last.
  FM_DEVICE bool next_piece(const config::ForwardSizes& sizes) {
    column += kPieceColumns;
    if (column < column_end(sizes)) return true;
    column = column_block * sizes.column_width;
    ++token;
    return false;
  }
};

// Starts the copies of a warp's rows, piece by piece, slot by slot.
class CombineCopies {
 public:
  FM_DEVICE CombineCopies(const kernel::ForwardParams& params, int32_t num_blocks,
                          CombineUnits& units, sync::Waiter& waiter)
      : params_(params), num_blocks_(num_blocks), units_(units), waiter_(waiter) {
    units_.take(0);
    enter_unit();
  }

  // This lane's columns of the next row, null where there are none. Whole warp.
  FM_DEVICE const void* next() {
    const auto& sizes = params_.sizes;
    if (place_.is_end(sizes)) return nullptr;
    const int32_t row = __shfl_sync(kAllLanes, slots_.row, slot_);
    const int32_t column = place_.column + ptx::lane_idx() * kVector;
    const void* source = nullptr;
    if (row >= 0 && column < place_.column_end(sizes)) {
      source =
          static_cast<const uint16_t*>(params_.memory.rows) + int64_t{row} * sizes.hidden + column;
    }
    if (++slot_ == sizes.top_k) {
      slot_ = 0;
      if (!place_.next_piece(sizes)) next_token();
    }
    return source;
  }

 private:
  FM_DEVICE void next_token() {
    if (place_.token == place_.end) {
      ++place_.n;
      enter_unit();
    } else {
      slots_ = next_slots_;
      load_ahead();
    }
  }
  FM_DEVICE void enter_unit() {
    const auto& sizes = params_.sizes;
    const int32_t last_block = place_.column_block;
    place_.enter(sizes, units_.unit(place_.n));
    if (place_.is_end(sizes)) return;
    units_.take(place_.n + 1);
    slots_ = TokenSlots::load(params_, place_.token);
    load_ahead();
    if (place_.column_block == last_block) return;
    const int32_t tiles = num_blocks_ * sizes.pairs_of_column_block(place_.column_block);
    waiter_.wait_word(&params_.memory.down_done[place_.column_block], tiles * config::kClusterSize,
                      sync::WaitTag::kDownDone);
  }
  FM_DEVICE void load_ahead() {
    next_slots_ = TokenSlots::load(params_, min(place_.token + 1, params_.sizes.tokens));
  }

  const kernel::ForwardParams& params_;
  int32_t num_blocks_;
  CombineUnits& units_;
  sync::Waiter& waiter_;
  CombinePlace place_;
  int32_t slot_ = 0;
  TokenSlots slots_;
  TokenSlots next_slots_;
};

// Rows on their way through shared memory, in order. Each lane copies and reads 16 bytes of a row
// of its own, so that no lane waits for another.
template <int kRows>
class RowRing {
 public:
  static constexpr int32_t kRowBytes = 32 * 16;
  static constexpr int32_t kBytes = kRows * kRowBytes;

  // memory: kBytes of the warp's.
  FM_DEVICE explicit RowRing(uint8_t* memory)
      : first_(ptx::shared_address(memory) + ptx::lane_idx() * 16), at_(first_) {}

  // The oldest row.
  FM_DEVICE int4 read() {
    ptx::cp_async_wait_group<kRows - 1>();
    return ptx::ld_shared_16(at_);
  }
  // Starts the copy of a row, or of none, in the place of the oldest.
  FM_DEVICE void start(const void* source) {
    if (source != nullptr) ptx::cp_async_16(at_, source, 16);
    ptx::cp_async_commit_group();
    at_ = at_ == first_ + (kRows - 1) * kRowBytes ? first_ : at_ + kRowBytes;
  }

 private:
  uint32_t first_;
  uint32_t at_;
};

// Warps of a CTA that combine: the communication warps, and the math warps after their last tile.
inline constexpr int32_t kCombineWarps = config::kCommWarps + config::kMathWarps;

// Combines unit after unit, of the first column block to the last, until none is left. num_blocks:
// where the number of all experts' blocks is; memory: RowRing<kRows>::kBytes of shared memory.
// Whole warp; kCombineWarps of every CTA come here.
template <class Config, int kRows>
FM_DEVICE void combine(const kernel::ForwardParams& params, int32_t num_blocks, uint8_t* memory,
                       sync::Waiter& waiter) {
  static_assert(kRows < 31);  // see CombineUnits
  using Element = tile::ElementOf<Config::value.element>;
  const auto& sizes = params.sizes;
  auto& state = *params.memory.state;
  CombineUnits units(state.combine);
  CombineCopies copies(params, num_blocks, units, waiter);
  RowRing<kRows> rows(memory);
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) rows.start(copies.next());
  CombinePlace place;
  for (place.enter(sizes, units.unit(0)); !place.is_end(sizes);
       ++place.n, place.enter(sizes, units.unit(place.n))) {
    if (!__all_sync(kAllLanes, waiter.alive())) break;
    while (place.token < place.end) {
      const TokenSlots slots = TokenSlots::load(params, place.token);
      const bool is_undefined = __any_sync(kAllLanes, slots.row == kUndefined);
      const float start = is_undefined ? __int_as_float(0x7FC00000) : 0.0f;
      const int32_t token = place.token;
      while (place.token == token) {
        ColumnSums sums(start);
#pragma unroll 1
        for (int32_t j = 0; j < sizes.top_k; ++j) {
          const int4 row = rows.read();
          const float weight = __shfl_sync(kAllLanes, slots.weight, j);
          if (__shfl_sync(kAllLanes, slots.row, j) >= 0) {
            sums.template add<Element>(row, weight);
          }
          rows.start(copies.next());
        }
        const int32_t column = place.column + ptx::lane_idx() * kVector;
        if (column < place.column_end(sizes)) {
          auto* y = static_cast<uint16_t*>(params.y) + token * params.y_stride;
          *reinterpret_cast<int4*>(y + column) = sums.template rounded<Element>();
        }
        place.next_piece(sizes);
      }
    }
  }
  if (ptx::lane_idx() == 0 && kernel::finish_tickets(state.combine, gridDim.x * kCombineWarps)) {
    kernel::set_mark(params, kernel::Mark::kEnd);
    sync::release(params.launch_id, [&](uint32_t expected, uint32_t desired) {
      return ptx::cas_acq_rel_gpu(&state.holder, expected, desired);
    });
  }
}

}  // namespace flashmoe::cuda::stage
