// Several ranks: gradients of the slots' weights are made by the ranks of their experts, and go
// home as a float a slot, where those of the router follow from them.
#pragma once

#include "cuda/stage/send_rows.cuh"
#include "cuda/stage/slot_grad.cuh"

namespace flashmoe::cuda::stage {

// Grad y of this rank's tokens, as send_rows.cuh takes it.
struct OwnGrads {
  const kernel::BackwardParams& params;

  FM_DEVICE static constexpr config::RowKind kind() { return config::RowKind::kGrad; }
  FM_DEVICE const uint16_t* row(int32_t token) const {
    return static_cast<const uint16_t*>(params.grad_y) + token * params.grad_y_stride;
  }
};

// As OwnOperands, of a source's token whose rows have come.
struct SourceOperands {
  const kernel::BackwardParams& params;
  int32_t source;
  int32_t token;

  FM_DEVICE const uint16_t* x() const {
    return row_of_source(params.forward, OwnTokens{params.forward}, source, token);
  }
  FM_DEVICE const uint16_t* grad_y() const {
    return row_of_source(params.forward, OwnGrads{params}, source, token);
  }
};

// Sends the gradients of those slots of a source's token that have a row here. Whole warp.
template <class Element>
FM_DEVICE void send_slots_of_token(const kernel::BackwardParams& params, const RankState& state,
                                   int32_t source, int32_t token, sync::Waiter& waiter) {
  const kernel::ForwardParams& forward = params.forward;
  const Regions regions{forward.ranks};
  const int32_t top_k = forward.sizes.top_k;
  const int32_t slot = token * top_k + ptx::lane_idx();
  int32_t row = kNoExpert;
  int32_t local_expert_idx = 0;
  if (ptx::lane_idx() < top_k) {
    row = forward.memory.slot_row[int64_t{source} * forward.ranks.token_cap * top_k + slot];
    const uint32_t place = regions.slots(forward.ranks.rank, state.epoch, source)[slot].place;
    local_expert_idx = static_cast<int32_t>(place >> config::kPlaceBits);
  }
  if (!__any_sync(kAllLanes, row >= 0)) return;
  // Where Z was kept, no tile of dX has waited for the tokens.
  if (params.sizes.weight_on_input) {
    wait_for_row(forward, OwnTokens{forward}, state.epoch, source, token, waiter);
  }
  const float gradient = gradient_of_row<Element>(params, SourceOperands{params, source, token},
                                                  row, local_expert_idx);
  if (row >= 0) regions.slot_grads(source)[slot] = gradient;
}

// Sends those of all sources' slots that have rows here, the peers' first: units of tokens, dealt
// to num_workers() warps. Whole warp.
template <class Element, class Index, class Count>
FM_DEVICE void send_slots(const kernel::BackwardParams& params, RankState& state,
                          const Index& worker_idx, const Count& num_workers, sync::Waiter& waiter) {
  const kernel::ForwardParams& forward = params.forward;
  const auto& ranks = forward.ranks;
#pragma unroll 1
  for (int32_t step = 1; step <= ranks.world; ++step) {
    const int32_t source = source_of_step(ranks, step < ranks.world ? step : 0);
    const auto tokens = [&] {  // read where it is used: no register holds it in between
      return state.tokens[source];
    };
#pragma unroll 1
    for (int32_t unit = worker_idx(); unit < config::return_units(tokens());
         unit += num_workers()) {
      const int32_t begin = unit * config::return_tokens(tokens());
#pragma unroll 1
      for (int32_t i = 0; i < config::return_tokens(tokens()); ++i) {
        if (begin + i >= tokens()) break;
        send_slots_of_token<Element>(params, state, source, begin + i, waiter);
      }
      const int32_t word = flag_words(forward).slot(ranks.rank, unit);
      state.post.send(post_box(), {static_cast<uint32_t>(word), 1u << source});
    }
  }
}

// The gradient of the weight of the lane's slot, which has come; 0 for one without a row.
FM_DEVICE float returned_gradient(const kernel::ForwardParams& params, int32_t token) {
  if (ptx::lane_idx() >= params.sizes.top_k) return 0.0f;
  const int32_t slot = token * params.sizes.top_k + ptx::lane_idx();
  const int32_t owner = params.memory.slot_owner[slot];
  if (owner == kUndefined) return not_a_number();
  return owner < 0 ? 0.0f : __ldcg(Regions{params.ranks}.slot_grads(params.ranks.rank) + slot);
}

// Gradients of the slots of this rank's tokens, unit by unit as they come. Whole warp.
template <class Element, class Index, class Count>
FM_DEVICE void take_slots(const kernel::BackwardParams& params, const RankState& state,
                          const Index& worker_idx, const Count& num_workers, sync::Waiter& waiter) {
  if (!params.routing.any_slot()) return;
  const kernel::ForwardParams& forward = params.forward;
  const auto& ranks = forward.ranks;
  const Regions regions{ranks};
  const int32_t tokens = forward.sizes.tokens;
  const int32_t unit_tokens = config::return_tokens(tokens);
  static_assert(config::kMaxRanks <= 32);  // a rank a lane
#pragma unroll 1
  for (int32_t unit = worker_idx(); unit * unit_tokens < tokens; unit += num_workers()) {
    const int32_t peer = ptx::lane_idx();
    if (peer < ranks.world) {
      waiter.wait_flag(regions.flag(ranks.rank, flag_words(forward).slot(peer, unit)), state.epoch,
                       sync::WaitTag::kSlotGrads, peer);
    }
    __syncwarp();
    if (!__all_sync(kAllLanes, waiter.alive())) return;
    const int32_t end = min((unit + 1) * unit_tokens, tokens);
#pragma unroll 1
    for (int32_t token = unit * unit_tokens; token < end; ++token) {
      finish_slots<Element>(params, token, returned_gradient(forward, token));
    }
  }
}

}  // namespace flashmoe::cuda::stage
