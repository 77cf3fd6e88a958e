// What ranks tell each other before rows travel: every source its slots, every owner what follows
// for its rows. The protocol's words are in config/ranks.h.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/kernel/roles.cuh"
#include "cuda/stage/plan.cuh"
#include "cuda/sync/grid_barrier.cuh"
#include "cuda/sync/holder.h"
#include "cuda/sync/post.cuh"
#include "cuda/tile/combine_walk.h"

namespace flashmoe::cuda::stage {

// What roles know of the launch's ranks, in shared memory.
struct RankState {
  uint32_t epoch;
  int32_t tokens[config::kMaxRanks];
  bool tokens_first;  // of a backward: at least one rank asked for it
  sync::PostOffice<config::kMathWarps + config::kCommWarps> post;  // by post_box()
};

// The box of a math or communication warp: of each its own, since both may send at a time.
FM_DEVICE int32_t post_box() {
  constexpr int32_t kFirstSender = config::kForwardWarps - config::kMathWarps - config::kCommWarps;
  return ptx::thread_idx() / 32 - kFirstSender;
}

FM_DEVICE bool is_alone(const kernel::ForwardParams& params) { return params.ranks.world == 1; }

// Gives the scratch free for the next launch. One thread of the launch, the last that uses it.
FM_DEVICE void release_scratch(const kernel::ForwardParams& params) {
  sync::release(params.launch_id, [&](uint32_t expected, uint32_t desired) {
    return ptx::cas_acq_rel_gpu(&params.memory.state->holder, expected, desired);
  });
}

// Addresses in the regions of the ranks. `at`: whose region.
struct Regions {
  const kernel::RankParams& ranks;

  FM_DEVICE config::RankControl& control(int32_t at) const {
    return *reinterpret_cast<config::RankControl*>(ranks.regions[at]);
  }
  FM_DEVICE int32_t* counts(int32_t at, uint32_t epoch, int32_t source) const {
    return of<int32_t>(at, ranks.counts_offset) + bank(epoch, source) * ranks.bank_experts;
  }
  FM_DEVICE config::RankSlot* slots(int32_t at, uint32_t epoch, int32_t source) const {
    return of<config::RankSlot>(at, ranks.slots_offset) +
           int64_t{bank(epoch, source)} * ranks.bank_slots;
  }
  // word: of config::FlagWords.
  FM_DEVICE uint32_t* flag(int32_t at, uint32_t word) const {
    return of<uint32_t>(at, ranks.flags_offset) + word;
  }
  // Row of a source's token among those received, or of an owner's part of the token's sum.
  FM_DEVICE uint16_t* received(config::RowKind kind, int32_t at, int32_t source, int32_t token,
                               int32_t hidden) const {
    return of<uint16_t>(at, ranks.received_offsets[static_cast<int32_t>(kind)]) +
           row_of(source, token) * hidden;
  }
  FM_DEVICE uint16_t* partial(int32_t at, int32_t owner, int32_t token, int32_t hidden) const {
    return of<uint16_t>(at, ranks.partial_offset) + row_of(owner, token) * hidden;
  }
  FM_DEVICE float* slot_grads(int32_t at) const { return of<float>(at, ranks.slot_grads_offset); }

 private:
  template <class T>
  FM_DEVICE T* of(int32_t at, int64_t offset) const {
    return reinterpret_cast<T*>(ranks.regions[at] + offset);
  }
  FM_DEVICE int32_t bank(uint32_t epoch, int32_t source) const {
    return plan::bank_of(epoch) * ranks.world + source;
  }
  FM_DEVICE int64_t row_of(int32_t rank, int32_t token) const {
    return int64_t{rank} * ranks.token_cap + token;
  }
};

FM_DEVICE config::FlagWords flag_words(const kernel::ForwardParams& params) {
  return {params.ranks.world, params.ranks.token_cap, params.sizes.column_blocks};
}

// The posting warp's part.
FM_DEVICE void post_flags(const kernel::ForwardParams& params, RankState& state) {
  const Regions regions{params.ranks};
  state.post.run(state.epoch, [&](int32_t at, uint32_t word) { return regions.flag(at, word); });
}

FM_DEVICE int32_t source_of_step(const kernel::RankParams& ranks, int32_t step) {
  return tile::source_of_step(ranks.rank, ranks.world, step);
}

// The rank of a slot's expert and the slot's place there; owner < 0: none.
struct SlotPlace {
  int32_t owner;
  uint32_t place;
};

FM_DEVICE SlotPlace place_of_slot(const kernel::ForwardParams& params, int32_t slot) {
  const auto& sizes = params.sizes;
  const int32_t e = params.memory.ids[slot];
  if (e < 0) return {e, config::kNoPlace};
  const int32_t tile_idx = slot / (static_cast<int32_t>(plan::kTileTokens) * sizes.top_k);
  const int32_t rank = rows_before_tile(params, e, tile_idx) + params.memory.slot_ranks[slot];
  if (!plan::is_kept(rank, sizes.capacity)) return {kNoExpert, config::kNoPlace};
  const int32_t owner = e / sizes.local_experts;
  const auto local = static_cast<uint32_t>(e - owner * sizes.local_experts);
  return {owner, local << config::kPlaceBits | static_cast<uint32_t>(rank)};
}

// Writes this rank's slots, counts and header into every rank's bank. All threads of all CTAs,
// after routing.
FM_DEVICE void tell_ranks(const kernel::ForwardParams& params, uint32_t epoch) {
  const auto& sizes = params.sizes;
  const auto& ranks = params.ranks;
  const Regions regions{ranks};
  const int32_t thread = ptx::block_idx() * config::kForwardThreads + ptx::thread_idx();
  const int32_t num_threads = gridDim.x * config::kForwardThreads;
  for (int32_t slot = thread; slot < sizes.slots(); slot += num_threads) {
    const SlotPlace own = place_of_slot(params, slot);
    params.memory.slot_owner[slot] = own.owner;
    const float weight = params.memory.weights[slot];
#pragma unroll 1
    for (int32_t at = 0; at < ranks.world; ++at) {
      const uint32_t place = at == own.owner ? own.place : config::kNoPlace;
      regions.slots(at, epoch, ranks.rank)[slot] = {place, weight};
    }
  }
  for (int32_t e = thread; e < sizes.num_experts; e += num_threads) {
    const int32_t owner = e / sizes.local_experts;
    regions.counts(owner, epoch, ranks.rank)[e - owner * sizes.local_experts] =
        min(total_of(params, e), sizes.capacity);
  }
  if (thread < ranks.world) {
    regions.control(thread).headers[plan::bank_of(epoch)][ranks.rank] = ranks.header;
  }
}

// Raises this rank's flag at every rank, and waits for theirs. All threads of all CTAs, when all of
// them have told. False if a rank did not come in time.
FM_DEVICE bool meet_ranks(const kernel::ForwardParams& params, uint32_t epoch) {
  sync::Waiter waiter(params.waits);
  const auto& ranks = params.ranks;
  const Regions regions{ranks};
  const int32_t peer = ptx::thread_idx();
  const int32_t bank = plan::bank_of(epoch);
  if (peer < ranks.world) {
    if (ptx::block_idx() == 0) {
      ptx::st_release_sys(&regions.control(peer).meta_ready[bank][ranks.rank], epoch);
    }
    waiter.wait_flag(&regions.control(ranks.rank).meta_ready[bank][peer], epoch,
                     sync::WaitTag::kMetadata, peer);
  }
  return __syncthreads_and(waiter.alive());
}

// Do all ranks run the same layer? All threads of the CTA; the first CTA reports.
FM_DEVICE bool check_headers(const kernel::ForwardParams& params, uint32_t epoch) {
  constexpr auto kFields = static_cast<int32_t>(config::RankField::kCount);
  const auto& ranks = params.ranks;
  const auto& headers = Regions{ranks}.control(ranks.rank).headers[plan::bank_of(epoch)];
  bool agrees = true;
  for (int32_t i = ptx::thread_idx(); i < ranks.world * kFields; i += config::kForwardThreads) {
    const int32_t peer = i / kFields;
    const int32_t field = i - peer * kFields;
    if (headers[peer].fields[field] == ranks.header.fields[field]) continue;
    agrees = false;
    if (ptx::block_idx() != 0) continue;
    sync::write_report(params.notice, sync::WaitTag::kMismatch, field, 0, {peer, epoch, 0});
  }
  return __syncthreads_and(agrees);
}

// What may differ between ranks. All threads of the CTA; __syncthreads() before it is read.
FM_DEVICE void read_headers(const kernel::ForwardParams& params, uint32_t epoch, RankState& state) {
  const auto& ranks = params.ranks;
  const auto& headers = Regions{ranks}.control(ranks.rank).headers[plan::bank_of(epoch)];
  const int32_t peer = ptx::thread_idx();
  int tokens_first = 0;
  if (peer < ranks.world) {
    state.tokens[peer] = static_cast<int32_t>(headers[peer].tokens);
    tokens_first = headers[peer].tokens_first != 0 ? 1 : 0;
  }
  const bool any = __syncthreads_or(tokens_first) != 0;
  if (peer == 0) state.tokens_first = any;
}

// Slots that a group of sources sends to a local expert.
FM_DEVICE int32_t rows_of_group(const kernel::ForwardParams& params, uint32_t epoch, int32_t group,
                                int32_t local_expert_idx) {
  const auto& ranks = params.ranks;
  const Regions regions{ranks};
  const bool is_one = params.sizes.source_groups > 1;
  int32_t rows = 0;
#pragma unroll 1
  for (int32_t step = is_one ? group : 0; step < (is_one ? group + 1 : ranks.world); ++step) {
    rows += regions.counts(ranks.rank, epoch, source_of_step(ranks, step))[local_expert_idx];
  }
  return rows;
}

// The table of virtual experts in `words`. All threads of the CTA.
template <int32_t kBlockRows>
FM_DEVICE void make_rank_table(const kernel::ForwardParams& params, uint32_t epoch,
                               int32_t* words) {
  const auto& sizes = params.sizes;
  const ExpertPlaces experts(words, sizes.table_experts());
  for (int32_t v = ptx::thread_idx(); v < sizes.table_experts(); v += config::kForwardThreads) {
    const int32_t group = v / sizes.local_experts;
    experts.rows[v] = rows_of_group(params, epoch, group, v - group * sizes.local_experts);
  }
  __syncthreads();
  if (ptx::thread_idx() < 32) place_experts<kBlockRows>(sizes.table_experts(), experts);
  __syncthreads();
}

// Rows of a local expert that sources before `step` of the same group have.
FM_DEVICE int32_t rows_before_step(const kernel::ForwardParams& params, uint32_t epoch,
                                   int32_t step, int32_t local_expert_idx) {
  if (params.sizes.source_groups > 1) return 0;
  const auto& ranks = params.ranks;
  int32_t rows = 0;
#pragma unroll 1
  for (int32_t before = 0; before < step; ++before) {
    rows +=
        Regions{ranks}.counts(ranks.rank, epoch, source_of_step(ranks, before))[local_expert_idx];
  }
  return rows;
}

// Gives the slots of a source from `first` on, `step` apart, their rows here.
FM_DEVICE void place_source(const kernel::ForwardParams& params, const RankState& state,
                            const tile::ExpertTable& experts, int32_t source, int32_t first,
                            int32_t distance) {
  const auto& sizes = params.sizes;
  const auto& ranks = params.ranks;
  const int32_t step = tile::step_of_source(ranks.rank, ranks.world, source);
  const config::RankSlot* slots = Regions{ranks}.slots(ranks.rank, state.epoch, source);
  int32_t* slot_row = params.memory.slot_row + int64_t{source} * ranks.token_cap * sizes.top_k;
  const int32_t num_slots = state.tokens[source] * sizes.top_k;
  for (int32_t slot = first; slot < num_slots; slot += distance) {
    const config::RankSlot found = slots[slot];
    if (found.place == config::kNoPlace) {
      slot_row[slot] = kNoExpert;
      continue;
    }
    const auto e = static_cast<int32_t>(found.place >> config::kPlaceBits);
    const auto rank = static_cast<int32_t>(found.place & ((1u << config::kPlaceBits) - 1));
    const int32_t v = sizes.source_groups > 1 ? step * sizes.local_experts + e : e;
    const int32_t row = experts.begin(v) + rows_before_step(params, state.epoch, step, e) + rank;
    slot_row[slot] = row;
    params.memory.row_token[row] = source * ranks.token_cap + slot / sizes.top_k;
    if (params.memory.row_weight != nullptr) params.memory.row_weight[row] = found.weight;
  }
}

// What plan_ranks() returns if the launch cannot go on.
inline constexpr int32_t kStopped = -1;
inline constexpr int32_t kRanksDiffer = -2;  // in all CTAs, or in none

// The plan of several ranks, after routing: what the ranks tell each other, and the rows of all
// their slots that came here. All threads of all CTAs; arena and kept as in place_rows(). Returns
// the number of all experts' blocks, or one of the above.
template <int32_t kBlockRows>
FM_DEVICE int32_t plan_ranks(const kernel::ForwardParams& params, uint8_t* arena, int32_t* kept,
                             RankState& state) {
  const auto& sizes = params.sizes;
  const auto& ranks = params.ranks;
  const Regions regions{ranks};
  const int32_t thread = ptx::thread_idx();
  if (thread == 0) state.epoch = plan::next_epoch(regions.control(ranks.rank).epoch);
  __syncthreads();
  const uint32_t epoch = state.epoch;
  auto* words = reinterpret_cast<int32_t*>(arena);
  tell_ranks(params, epoch);
  if (!sync::meet_all(&params.memory.state->barrier, params.waits)) return kStopped;
  // All CTAs have read it.
  if (ptx::block_idx() == 0 && thread == 0) regions.control(ranks.rank).epoch = epoch;
  if (!meet_ranks(params, epoch)) return kStopped;
  if (!check_headers(params, epoch)) return kRanksDiffer;
  read_headers(params, epoch, state);
  make_rank_table<kBlockRows>(params, epoch, words);
  const tile::ExpertTable experts{words, sizes.table_experts()};
  const int32_t num_words = tile::ExpertTable::num_words(sizes.table_experts());
  keep_table(experts, words, kept);
  const int32_t num_rows = experts.begin(experts.num_experts);
  if (num_rows > ranks.row_cap) {
    if (ptx::block_idx() == 0 && thread == 0) {
      sync::write_report(params.waits.report, sync::WaitTag::kTooManyRows, 0, num_rows,
                         {ranks.rank, epoch, static_cast<uint32_t>(ranks.row_cap)});
      atomicCAS_system(params.waits.abort, 0u, params.waits.own_mark);
    }
    return kStopped;
  }
  if (ptx::block_idx() == 0) publish_totals(params, words + num_words);
#pragma unroll 1
  for (int32_t source = 0; source < ranks.world; ++source) {
    place_source(params, state, experts, source,
                 ptx::block_idx() * config::kForwardThreads + thread,
                 gridDim.x * config::kForwardThreads);
  }
  return experts.num_blocks();
}

// Ends the waits of all ranks once this one is stopped. One thread of a CTA.
FM_DEVICE void stop_peers(const kernel::ForwardParams& params) {
  if (is_alone(params)) return;
  const uint32_t by = ptx::ld_relaxed_sys(params.waits.abort);
  if (by == 0) return;
  const auto& ranks = params.ranks;
#pragma unroll 1
  for (int32_t peer = 0; peer < ranks.world; ++peer) {
    atomicCAS_system(&Regions{ranks}.control(peer).abort, 0u, by);
  }
}

}  // namespace flashmoe::cuda::stage
