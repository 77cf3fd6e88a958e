// Tokens travel to the ranks that hold their experts: each of them once, however many of its
// experts are there. Behind them the rows of all sources are copied into expert order.
#pragma once

#include "cuda/stage/copy_rows.cuh"
#include "cuda/stage/exchange.cuh"

namespace flashmoe::cuda::stage {

// The ranks, as bits, that have experts of a token. Whole warp.
FM_DEVICE uint32_t owners_of(const kernel::ForwardParams& params, int32_t token) {
  const int32_t lane = ptx::lane_idx();
  int32_t owner = kNoExpert;
  if (lane < params.sizes.top_k) {
    owner = params.memory.slot_owner[int64_t{token} * params.sizes.top_k + lane];
  }
  return __reduce_or_sync(kAllLanes, owner >= 0 ? 1u << owner : 0u);
}

// Sends a token to the ranks of `owners`. Whole warp; it is read once.
FM_DEVICE void send_row(const kernel::ForwardParams& params, int32_t token, uint32_t owners) {
  constexpr int kBatch = 4;
  const auto& ranks = params.ranks;
  const int32_t num_vectors = params.sizes.hidden / tile::kVector;
  const auto* from = reinterpret_cast<const int4*>(token_of(params, token));
  for (int32_t first = ptx::lane_idx(); first < num_vectors; first += 32 * kBatch) {
    int4 vectors[kBatch];
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * 32 < num_vectors) vectors[i] = __ldg(from + first + i * 32);
    }
#pragma unroll 1
    for (uint32_t left = owners; left != 0; left &= left - 1) {
      auto* to = reinterpret_cast<int4*>(Regions{ranks}.received(
          __ffs(static_cast<int>(left)) - 1, ranks.rank, token, params.sizes.hidden));
      FM_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * 32 < num_vectors) to[first + i * 32] = vectors[i];
      }
    }
  }
}

// Sends the tokens from `token` on that share a flag, and has it raised at every other rank.
// warp_idx: of the communication warp.
FM_DEVICE void send_unit(const kernel::ForwardParams& params, RankState& state, int32_t warp_idx,
                         int32_t token) {
  const auto& ranks = params.ranks;
  const int32_t end = min(token + config::kPushTokens, params.sizes.tokens);
#pragma unroll 1
  for (int32_t t = token; t < end; ++t) {
    send_row(params, t, owners_of(params, t) & ~(1u << ranks.rank));
  }
  const uint32_t others = ((1u << ranks.world) - 1) & ~(1u << ranks.rank);
  state.post.send(warp_idx, {Regions{ranks}.push_word(ranks.rank, token), others});
}

// Where a row's token is, once it has come. Whole warp.
FM_DEVICE const uint16_t* arrived_token(const kernel::ForwardParams& params, uint32_t epoch,
                                        int32_t row_token, sync::Waiter& waiter) {
  const auto& ranks = params.ranks;
  const int32_t source = row_token / ranks.token_cap;
  const int32_t token = row_token - source * ranks.token_cap;
  if (source == ranks.rank) return token_of(params, token);
  const Regions regions{ranks};
  waiter.wait_flag(regions.flag(ranks.rank, regions.push_word(source, token)), epoch,
                   sync::WaitTag::kPushed, source);
  return regions.received(ranks.rank, source, token, params.sizes.hidden);
}

// Sends this rank's tokens and copies the rows of all sources into expert order, unit by unit: with
// rows of its own tokens apart, one unit of each in turn, so that the first tiles start at once;
// else the peers' tiles come first. Whole warp; worker_idx() and num_workers() are asked where they
// are needed, and limits read from the table, to hold fewer registers.
template <class Config, class Index, class Count>
FM_DEVICE void send_and_copy_rows(const kernel::ForwardParams& params, RankState& state,
                                  const tile::ExpertTable& experts, const Index& worker_idx,
                                  const Count& num_workers, sync::Waiter& waiter) {
  const auto& sizes = params.sizes;
  int32_t row = worker_idx() * config::kCopyRows;
  int32_t token = worker_idx() * config::kPushTokens;
#pragma unroll 1
  while (true) {
    const bool sends = token < sizes.tokens;
    const int32_t own_experts = sizes.source_groups > 1 ? sizes.local_experts : 0;
    if (row < experts.begin(sends ? own_experts : experts.num_experts)) {
      copy_unit<Config, 4>(params, experts, row, [&](int32_t row_token) {
        return arrived_token(params, state.epoch, row_token, waiter);
      });
      row += num_workers() * config::kCopyRows;
    } else if (!sends) {
      break;
    }
    if (!sends) continue;
    send_unit(params, state, ptx::thread_idx() / 32 % config::kCommWarps, token);
    token += num_workers() * config::kPushTokens;
  }
}

}  // namespace flashmoe::cuda::stage
