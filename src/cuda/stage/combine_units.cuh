// What is left to do once the down product's rows are there: sums of a token's rows, in units of
// one column block of a few tokens.
//
// A rank alone sums every token's rows into y. Of several ranks each sums the rows that it has of
// every source's tokens and sends the sums home; at home the parts of all ranks are added up, in
// rank order, into y.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/kernel/mark.cuh"
#include "cuda/kernel/roles.cuh"
#include "cuda/stage/choose.cuh"
#include "cuda/stage/exchange.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/combine_walk.h"

namespace flashmoe::cuda::stage {

// What a token's sum is made of: lane j knows the j-th row, among those of its kind, and its
// weight. A row below 0 does not exist; kUndefined: and the sum is not a number.
struct TokenRows {
  int32_t row;
  float weight;
};

using tile::CombineUnit;

class CombineUnits {
 public:
  // num_blocks: where the number of all experts' blocks is.
  FM_DEVICE CombineUnits(const kernel::ForwardParams& params, const RankState& state,
                         const int32_t& num_blocks)
      : params_(params), state_(state), num_blocks_(num_blocks) {}

  // The unit of a ticket.
  FM_DEVICE CombineUnit unit_at(int32_t ticket) const { return walk().unit_at(ticket); }
  FM_DEVICE bool is_end(const CombineUnit& unit) const { return walk().is_end(unit); }
  // Returns when all rows of the unit are there. ready: column blocks up to here are known to be
  // stored. Whole warp. A unit at home is waited for with all the warp's sums finished.
  FM_DEVICE void wait(const CombineUnit& unit, int32_t& ready, sync::Waiter& waiter) const {
    if (unit.is_home()) {
      wait_for_parts(unit, waiter);
    } else if (unit.column_block > ready) {
      ready = unit.column_block;
      const int32_t tiles = num_blocks_ * params_.sizes.pairs_of_column_block(ready);
      waiter.wait_word(&params_.memory.down_done[ready], tiles * config::kClusterSize,
                       sync::WaitTag::kDownDone);
      if (is_first(unit) && ptx::lane_idx() == 0) {
        kernel::set_mark(params_, kernel::Mark::kFirstSum);
      }
    }
  }

  // Rows of a token's sum, those that do not exist too.
  FM_DEVICE int32_t num_rows(const CombineUnit& unit) const {
    return unit.is_home() ? params_.ranks.world : params_.sizes.top_k;
  }
  // Of any token: none of one that does not exist. Whole warp.
  FM_DEVICE TokenRows rows_of(const CombineUnit& unit, int32_t token) const {
    if (unit.is_home()) return parts_of(token);
    const int32_t lane = ptx::lane_idx();
    if (lane >= params_.sizes.top_k || token >= tokens_of(unit)) return {kNoExpert, 0.0f};
    const int64_t slot = int64_t{token} * params_.sizes.top_k + lane;
    if (is_alone(params_)) {
      return {params_.memory.slot_row[slot], weight_of(params_.memory.weights[slot])};
    }
    const auto& ranks = params_.ranks;
    const int64_t first = int64_t{unit.source} * ranks.token_cap * params_.sizes.top_k;
    const auto* slots = Regions{ranks}.slots(ranks.rank, state_.epoch, unit.source);
    return {params_.memory.slot_row[first + slot], weight_of(slots[slot].weight)};
  }
  // Row 0 of a unit at home, and of another.
  FM_DEVICE const uint16_t* first_part() const {
    return Regions{params_.ranks}.partial(params_.ranks.rank, 0, 0, params_.sizes.hidden);
  }
  FM_DEVICE const uint16_t* first_row() const {
    return static_cast<const uint16_t*>(params_.memory.rows);
  }
  // Where the sum of `unit.token` goes.
  FM_DEVICE uint16_t* target_of(const CombineUnit& unit) const {
    if (!has_letter(unit)) {
      return static_cast<uint16_t*>(params_.y) + unit.token * params_.y_stride;
    }
    return Regions{params_.ranks}.partial(unit.source, params_.ranks.rank, unit.token,
                                          params_.sizes.hidden);
  }
  // Is the unit sent home?
  FM_DEVICE bool has_letter(const CombineUnit& unit) const {
    return !unit.is_home() && !is_alone(params_);
  }
  // What tells the source that the unit's sums are there.
  FM_DEVICE sync::Letter letter_of(const CombineUnit& unit) const {
    const auto& ranks = params_.ranks;
    const int32_t idx = (unit.end - 1) / config::return_tokens(state_.tokens[unit.source]);
    const int32_t word = flag_words(params_).returned(ranks.rank, unit.column_block, idx);
    return {static_cast<uint32_t>(word), 1u << unit.source};
  }

 private:
  FM_DEVICE float weight_of(float weight) const {
    return params_.sizes.weight_on_input ? 1.0f : weight;
  }
  FM_DEVICE tile::CombineWalk walk() const {
    const auto& sizes = params_.sizes;
    return {.column_blocks = sizes.column_blocks,
            .rank = params_.ranks.rank,
            .world = params_.ranks.world,
            .tokens = state_.tokens,
            .num_tokens = sizes.tokens,
            .unit_tokens = sizes.combine_tokens};
  }
  // The unit of ticket 0, if the rank of step 1 has tokens.
  FM_DEVICE bool is_first(const CombineUnit& unit) const {
    return unit.column_block == 0 && unit.token == 0 &&
           unit.source == source_of_step(params_.ranks, 1);
  }
  FM_DEVICE int32_t tokens_of(const CombineUnit& unit) const {
    return is_alone(params_) ? params_.sizes.tokens : state_.tokens[unit.source];
  }
  // The parts of a token's sum that the ranks of its experts send. A token without a defined
  // routing has none.
  FM_DEVICE TokenRows parts_of(int32_t token) const {
    const auto& sizes = params_.sizes;
    const int32_t lane = ptx::lane_idx();
    int32_t owner = kNoExpert;
    if (lane < sizes.top_k && token < sizes.tokens) {
      owner = params_.memory.slot_owner[int64_t{token} * sizes.top_k + lane];
    }
    const uint32_t owners = __reduce_or_sync(kAllLanes, owner >= 0 ? 1u << owner : 0u);
    const bool is_undefined = __any_sync(kAllLanes, owner == kUndefined);
    const bool has_part = (owners >> lane & 1) != 0;
    const int32_t row = has_part ? lane * params_.ranks.token_cap + token : kNoExpert;
    return {is_undefined ? kUndefined : row, 1.0f};
  }
  // Lanes look at the flags of a unit each.
  FM_DEVICE void wait_for_parts(const CombineUnit& unit, sync::Waiter& waiter) const {
    const Regions regions{params_.ranks};
    const auto& ranks = params_.ranks;
    const int32_t unit_tokens = config::return_tokens(params_.sizes.tokens);
    const int32_t token = unit.token + ptx::lane_idx() % config::kHomeUnits * unit_tokens;
#pragma unroll 1
    for (int32_t peer = ptx::lane_idx() / config::kHomeUnits;
         peer < ranks.world && token < unit.end; peer += 32 / config::kHomeUnits) {
      const int32_t word =
          flag_words(params_).returned(peer, unit.column_block, token / unit_tokens);
      waiter.wait_flag(regions.flag(ranks.rank, word), state_.epoch, sync::WaitTag::kReturned,
                       peer);
    }
    __syncwarp();
  }

  const kernel::ForwardParams& params_;
  const RankState& state_;
  const volatile int32_t& num_blocks_;  // read when it is needed: no register holds it
};

}  // namespace flashmoe::cuda::stage
