// Rows of tokens travel to the ranks that hold their experts: each of them once, however many of
// its experts are there. Behind them the rows of all sources are copied into expert order.
//
// `Rows`: the rows of one kind that this rank's tokens have. It has kind(), and row(token).
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

// The tokens themselves.
struct OwnTokens {
  const kernel::ForwardParams& params;

  FM_DEVICE static constexpr config::RowKind kind() { return config::RowKind::kToken; }
  FM_DEVICE const uint16_t* row(int32_t token) const { return token_of(params, token); }
};

// Sends a token's row to the ranks of `owners`. Whole warp; it is read once.
template <class Rows>
FM_DEVICE void send_row(const kernel::ForwardParams& params, const Rows& rows, int32_t token,
                        uint32_t owners) {
  constexpr int kBatch = 4;
  const auto& ranks = params.ranks;
  const int32_t num_vectors = params.sizes.hidden / tile::kVector;
  const auto* from = reinterpret_cast<const int4*>(rows.row(token));
  for (int32_t first = ptx::lane_idx(); first < num_vectors; first += 32 * kBatch) {
    int4 vectors[kBatch];
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * 32 < num_vectors) vectors[i] = __ldg(from + first + i * 32);
    }
#pragma unroll 1
    for (uint32_t left = owners; left != 0; left &= left - 1) {
      auto* to = reinterpret_cast<int4*>(Regions{ranks}.received(
          rows.kind(), __ffs(static_cast<int>(left)) - 1, ranks.rank, token, params.sizes.hidden));
      FM_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (first + i * 32 < num_vectors) to[first + i * 32] = vectors[i];
      }
    }
  }
}

// Sends the rows of tokens from `token` on that share a flag, and has it raised at every other
// rank. Whole warp.
template <class Rows>
FM_DEVICE void send_unit(const kernel::ForwardParams& params, RankState& state, const Rows& rows,
                         int32_t token) {
  const auto& ranks = params.ranks;
  const int32_t end = min(token + config::kPushTokens, params.sizes.tokens);
#pragma unroll 1
  for (int32_t t = token; t < end; ++t) {
    send_row(params, rows, t, owners_of(params, t) & ~(1u << ranks.rank));
  }
  const uint32_t others = ((1u << ranks.world) - 1) & ~(1u << ranks.rank);
  const int32_t word = flag_words(params).push(rows.kind(), ranks.rank, token);
  state.post.send(post_box(), {static_cast<uint32_t>(word), others});
}

// Returns when the row of a source's token is here. Whole warp.
template <class Rows>
FM_DEVICE void wait_for_row(const kernel::ForwardParams& params, const Rows& rows, uint32_t epoch,
                            int32_t source, int32_t token, sync::Waiter& waiter) {
  const auto& ranks = params.ranks;
  if (source == ranks.rank) return;
  const int32_t word = flag_words(params).push(rows.kind(), source, token);
  waiter.wait_flag(Regions{ranks}.flag(ranks.rank, word), epoch, sync::WaitTag::kPushed, source);
}

// The row of a source's token, which has come: here, or where its source sent it.
template <class Rows>
FM_DEVICE const uint16_t* row_of_source(const kernel::ForwardParams& params, const Rows& rows,
                                        int32_t source, int32_t token) {
  const auto& ranks = params.ranks;
  if (source == ranks.rank) return rows.row(token);
  return Regions{ranks}.received(rows.kind(), ranks.rank, source, token, params.sizes.hidden);
}

// The same by the plan's word for a row.
template <class Rows>
FM_DEVICE const uint16_t* row_by_word(const kernel::ForwardParams& params, const Rows& rows,
                                      int32_t row_token) {
  const int32_t source = row_token / params.ranks.token_cap;
  return row_of_source(params, rows, source, row_token - source * params.ranks.token_cap);
}

// The same, once it has come. Whole warp.
template <class Rows>
FM_DEVICE const uint16_t* arrived_row(const kernel::ForwardParams& params, const Rows& rows,
                                      uint32_t epoch, int32_t row_token, sync::Waiter& waiter) {
  const int32_t source = row_token / params.ranks.token_cap;
  const int32_t token = row_token - source * params.ranks.token_cap;
  wait_for_row(params, rows, epoch, source, token, waiter);
  return row_of_source(params, rows, source, token);
}

// Sends this rank's rows of a kind and copies those of all sources into expert order, unit by unit:
// with rows of its own tokens apart, one unit of each in turn, so that the first tiles start at
// once; else the peers' tiles come first. copy(row, find): the unit that begins at a row, whose
// tokens' rows find(word of the plan) gives. Whole warp; worker_idx() and num_workers() are asked
// where they are needed, and limits read from the table, to hold fewer registers.
template <class Rows, class Index, class Count, class Copy>
FM_DEVICE void send_and_copy_rows(const kernel::ForwardParams& params, RankState& state,
                                  const Rows& rows, const tile::ExpertTable& experts,
                                  const Index& worker_idx, const Count& num_workers,
                                  sync::Waiter& waiter, const Copy& copy) {
  const auto& sizes = params.sizes;
  int32_t row = worker_idx() * config::kCopyRows;
  int32_t token = worker_idx() * config::kPushTokens;
#pragma unroll 1
  while (true) {
    const bool sends = token < sizes.tokens;
    const int32_t own_experts = sizes.source_groups > 1 ? sizes.local_experts : 0;
    if (row < experts.begin(sends ? own_experts : experts.num_experts)) {
      copy(row, [&](int32_t row_token) {
        return arrived_row(params, rows, state.epoch, row_token, waiter);
      });
      row += num_workers() * config::kCopyRows;
    } else if (!sends) {
      break;
    }
    if (!sends) continue;
    send_unit(params, state, rows, token);
    token += num_workers() * config::kPushTokens;
  }
}

}  // namespace flashmoe::cuda::stage
