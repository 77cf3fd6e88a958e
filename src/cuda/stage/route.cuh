// Ids, weights and histograms of tiles of 64 tokens.
#pragma once

#include <algorithm>

#include "cuda/stage/choose.cuh"
#include "cuda/stage/logits.cuh"

namespace flashmoe::cuda::stage {

struct Choice {
  int32_t expert_idx;
  float weight;
};

// Writes a slot's routing where the next stages read it and, with a router, to the outputs.
FM_DEVICE void write_slot(const kernel::ForwardParams& params, int32_t token, int32_t j,
                          const Choice& choice, bool is_output) {
  const int64_t slot = int64_t{token} * params.sizes.top_k + j;
  params.memory.ids[slot] = choice.expert_idx;
  params.memory.weights[slot] = choice.weight;
  if (!is_output) return;
  const int32_t id = choice.expert_idx == kUndefined ? kNoExpert : choice.expert_idx;
  tile::write_index(params.router.ids, token, j, id);
  tile::write_real(params.router.weights, token, j, choice.weight);
}

// value(e) for the lane's experts into memory.scores, kBatch of them under way together.
template <int kBatch, int32_t kLanes, class Value>
FM_DEVICE void fill_scores(const TeamMemory<kLanes>& memory, const Value& value) {
  const int32_t last = memory.num_experts - 1;
#pragma unroll 1
  for (int32_t first = team_lane<kLanes>(); first <= last; first += kBatch * kLanes) {
    float values[kBatch];
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) values[i] = value(min(first + i * kLanes, last));
    FM_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * kLanes <= last) memory.scores[first + i * kLanes] = values[i];
    }
  }
}

// A token's logits into memory.scores and, if they were in parts and is_output, where they are
// kept. Its lanes.
template <int32_t kLanes>
FM_DEVICE void load_logits(const kernel::ForwardParams& params, int32_t token, bool is_output,
                           const TeamMemory<kLanes>& memory) {
  const auto& router = params.router;
  float* logits = router.logits + int64_t{token} * params.sizes.num_experts;
  if (!params.sizes.has_few_tiles) {
    fill_scores<16>(memory, [&](int32_t e) { return logits[e]; });
    return;
  }
  fill_scores<4>(memory, [&](int32_t e) { return sum_parts(params, token, e); });
#pragma unroll 1
  for (int32_t e = team_lane<kLanes>(); e < memory.num_experts; e += kLanes) {
    memory.scores[e] += read_bias(router.bias, e);
    if (is_output) logits[e] = memory.scores[e];
  }
}

// Chooses the experts of a tile whose logits, or their parts, are there. All threads of the CTA;
// arena: shared memory for as many teams at a time as it holds.
FM_DEVICE void choose_tile(const kernel::ForwardParams& params, uint8_t* arena, int32_t arena_bytes,
                           int32_t first_token) {
  const auto& sizes = params.sizes;
  const auto& router = params.router;
  const int32_t team_bytes = 4 * TeamMemory<>::words(sizes.num_experts, router.num_groups);
  const int32_t num_teams = min(kTileTokens, arena_bytes / team_bytes);
  const int32_t team_idx = ptx::thread_idx() / kTeamLanes;
  const int32_t end = min(first_token + kTileTokens, sizes.tokens);
  for (int32_t first = first_token; first < end; first += num_teams) {
    const int32_t token = first + team_idx;
    const bool has_token = team_idx < num_teams && token < end;
    if (!__any_sync(kAllLanes, has_token)) continue;
    __syncwarp();  // the teams' memory has been read by the round before
    const TeamMemory<> memory =
        TeamMemory<>::from(arena, team_idx, sizes.num_experts, router.num_groups, has_token);
    load_logits(params, token, true, memory);
    const bool is_defined = check_logits(memory);
    choose_experts(router, sizes, memory);
    const TeamSlots<kTeamLanes> slots = weigh_experts(router, sizes, memory);
    if (!has_token) continue;
    if (!is_defined && team_lane<kTeamLanes>() == 0) {
      sync::write_report(params.notice, sync::WaitTag::kUndefinedLogits, token, 0);
    }
    FM_UNROLL
    for (int i = 0; i < TeamSlots<kTeamLanes>::kOfLane; ++i) {
      const int32_t j = team_lane<kTeamLanes>() + i * kTeamLanes;
      if (j >= sizes.top_k) break;
      const Choice choice = is_defined ? Choice{slots.expert_idx[i], slots.weight[i]}
                                       : Choice{kUndefined, not_a_number()};
      write_slot(params, token, j, choice, true);
    }
  }
}

// A slot's routing that came from outside. reports: an id that is none is written down.
FM_DEVICE Choice read_choice(const kernel::ForwardParams& params, int32_t slot, bool reports) {
  const auto& sizes = params.sizes;
  const int32_t token = slot / sizes.top_k;
  const int32_t j = slot - token * sizes.top_k;
  const int64_t id = tile::read_index(params.router.ids, token, j);
  if (id < kNoExpert && reports) {
    sync::write_report(params.notice, sync::WaitTag::kInvalidId, token, 0);
  }
  if (id < 0 || id >= sizes.num_experts) return {id < kNoExpert ? kUndefined : kNoExpert, 0.0f};
  return {static_cast<int32_t>(id), tile::read_real(params.router.weights, token, j)};
}

// A lane's slots of a tile: every warp has a run of neighbours.
inline constexpr int32_t kMaxSlotsOfLane =
    kTileTokens * static_cast<int32_t>(config::kMaxTopK) / config::kForwardThreads;

// Places of a tile's slots among those of the same expert, in slot order, and how many there are.
// id_of(slot): the slot's expert, or none. All threads of the CTA; counts: [warps][E] words of
// shared memory.
template <class IdOf>
FM_DEVICE void rank_tile(const kernel::ForwardParams& params, int32_t* counts, int32_t tile_idx,
                         const IdOf& id_of) {
  const auto& sizes = params.sizes;
  const int32_t lane = ptx::lane_idx();
  const int32_t warp_idx = ptx::thread_idx() / 32;
  const int32_t first_slot = tile_idx * kTileTokens * sizes.top_k;
  const int32_t num_slots = min(kTileTokens * sizes.top_k, sizes.slots() - first_slot);
  const int32_t of_lane = plan::ceil_div(num_slots, config::kForwardThreads);
  const int32_t first = warp_idx * 32 * of_lane + lane;
  int32_t* own = counts + warp_idx * sizes.num_experts;
  for (int32_t e = lane; e < sizes.num_experts; e += 32) own[e] = 0;
  int32_t ids[kMaxSlotsOfLane];
  int32_t ranks[kMaxSlotsOfLane];  // among the warp's
  FM_UNROLL
  for (int i = 0; i < kMaxSlotsOfLane; ++i) {
    const bool exists = i < of_lane && first + 32 * i < num_slots;
    ids[i] = exists ? id_of(first_slot + first + 32 * i) : kNoExpert;
  }
  __syncwarp();
  FM_UNROLL
  for (int i = 0; i < kMaxSlotsOfLane; ++i) {
    if (i >= of_lane) break;
    const int32_t id = ids[i];
    const uint32_t same = __match_any_sync(kAllLanes, id);
    const uint32_t before = same & ((1u << lane) - 1);
    ranks[i] = id >= 0 ? own[id] + __popc(before) : -1;
    __syncwarp();
    if (id >= 0 && before == 0) own[id] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int32_t e = ptx::thread_idx(); e < sizes.num_experts; e += config::kForwardThreads) {
    int32_t sum = 0;
    for (int32_t warp = 0; warp < config::kForwardWarps; ++warp) {
      const int32_t count = counts[warp * sizes.num_experts + e];
      counts[warp * sizes.num_experts + e] = sum;
      sum += count;
    }
    params.memory.histograms[int64_t{e} * sizes.route_tiles + tile_idx] = sum;
  }
  __syncthreads();
  FM_UNROLL
  for (int i = 0; i < kMaxSlotsOfLane; ++i) {
    if (i >= of_lane || first + 32 * i >= num_slots) break;
    const int32_t before = ids[i] >= 0 ? own[ids[i]] : 0;
    params.memory.slot_ranks[first_slot + first + 32 * i] = before + ranks[i];
  }
  __syncwarp();  // the warp's counts are free for the next tile
}

FM_DEVICE void check_selection_bias(const kernel::ForwardParams& params) {
  if (params.router.selection_bias.data == nullptr || ptx::block_idx() != 0) return;
  for (int32_t e = ptx::thread_idx(); e < params.sizes.num_experts; e += config::kForwardThreads) {
    if (!isnan(tile::read_real(params.router.selection_bias, e))) continue;
    sync::write_report(params.notice, sync::WaitTag::kUndefinedBias, e, 0);
  }
}

// Least shared memory that routing needs: one team's, or every warp's counts.
inline constexpr int32_t kRouteBytes =
    4 * std::max(TeamMemory<>::words(config::kMaxExperts, config::kMaxExperts),
                 static_cast<int32_t>(config::kForwardWarps* config::kMaxExperts));

// Ids, weights and histograms of all tiles, the logits' parts being there. All threads of all CTAs;
// arena: shared memory of the CTA.
FM_DEVICE void route(const kernel::ForwardParams& params, uint8_t* arena, int32_t arena_bytes) {
  const auto& sizes = params.sizes;
  const bool is_fused = params.router.weight != nullptr;
  const auto num_ctas = static_cast<int32_t>(gridDim.x);
  if (is_fused) {
    for (int32_t tile_idx = ptx::block_idx(); tile_idx < sizes.route_tiles; tile_idx += num_ctas) {
      choose_tile(params, arena, arena_bytes, tile_idx * kTileTokens);
    }
    __syncthreads();
  }
  // The CTA that chose a tile's experts also ranks its slots.
  auto* counts = reinterpret_cast<int32_t*>(arena);
  for (int32_t tile_idx = ptx::block_idx(); tile_idx < sizes.route_tiles; tile_idx += num_ctas) {
    rank_tile(params, counts, tile_idx, [&](int32_t slot) {
      if (is_fused) return params.memory.ids[slot];
      const Choice choice = read_choice(params, slot, true);
      const int32_t token = slot / sizes.top_k;
      write_slot(params, token, slot - token * sizes.top_k, choice, false);
      return choice.expert_idx;
    });
  }
}

}  // namespace flashmoe::cuda::stage
