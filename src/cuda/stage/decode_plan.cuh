// Routing and plan of few tokens, which every CTA makes for itself in shared memory: no CTA waits
// for another after the logits. The first CTA writes what the caller reads.
#pragma once

#include "cuda/config/decode.h"
#include "cuda/stage/route.cuh"
#include "plan/routing.h"

namespace flashmoe::cuda::stage {

struct DecodePlan {
  static constexpr int32_t kTokens = config::Decode::kTokens;
  static constexpr int32_t kSlots = config::Decode::kSlots;

  // Of slot t * k + j: the expert, kNoExpert or kUndefined, and its weight.
  int32_t ids[kSlots];
  float weights[kSlots];
  bool is_kept[kSlots];  // it has an expert, and its place is under the capacity
  uint32_t is_chosen[config::kMaxExperts / 32];  // a bit an expert
  // The experts that are read, in rising order, and what a token's row of each counts: the sum of
  // the weights of its slots there.
  int32_t num_chosen;
  int32_t experts[kSlots];
  float coefficients[kSlots][kTokens];
  bool is_routed[kSlots][kTokens];
  bool is_undefined[kTokens];  // the token has a slot that is kUndefined
};

// A warp that is a token's team.
inline constexpr int32_t kWarpLanes = 32;

// Chooses the experts of all tokens, a warp a token; their logits' parts are there.
FM_DEVICE void choose_few(const kernel::ForwardParams& params, uint8_t* arena, DecodePlan& plan) {
  const auto& sizes = params.sizes;
  const auto& router = params.router;
  const bool is_output = ptx::block_idx() == 0;
  const int32_t token = ptx::thread_idx() / kWarpLanes;
  if (token >= sizes.tokens) return;
  using Memory = TeamMemory<kWarpLanes>;
  const Memory memory = Memory::from(arena, token, sizes.num_experts, router.num_groups, true);
  load_logits(params, token, is_output, memory);
  const bool is_defined = check_logits(memory);
  choose_experts(router, sizes, memory);
  const TeamSlots<kWarpLanes> slots = weigh_experts(router, sizes, memory);
  const int32_t j = ptx::lane_idx();
  if (!is_defined && is_output && j == 0) {
    sync::write_report(params.notice, sync::WaitTag::kUndefinedLogits, token, 0);
  }
  if (j >= sizes.top_k) return;
  const int32_t slot = token * sizes.top_k + j;
  plan.ids[slot] = is_defined ? slots.expert_idx[0] : kUndefined;
  plan.weights[slot] = is_defined ? slots.weight[0] : not_a_number();
  if (!is_output) return;
  tile::write_index(router.ids, token, j, is_defined ? slots.expert_idx[0] : kNoExpert);
  tile::write_real(router.weights, token, j, plan.weights[slot]);
}

// The routing that came from outside.
FM_DEVICE void read_few(const kernel::ForwardParams& params, DecodePlan& plan) {
  const auto& sizes = params.sizes;
  const int32_t slot = ptx::thread_idx();
  if (slot >= sizes.slots()) return;
  const Choice choice = read_choice(params, slot, ptx::block_idx() == 0);
  plan.ids[slot] = choice.expert_idx;
  plan.weights[slot] = choice.weight;
}

// Which slots are kept, and the bits of their experts. A thread a slot; the bits are zero.
FM_DEVICE void keep_slots(const config::ForwardSizes& sizes, DecodePlan& plan) {
  const int32_t slot = ptx::thread_idx();
  if (slot >= sizes.slots()) return;
  const int32_t id = plan.ids[slot];
  int32_t rank = -1;
  if (id >= 0) {
    rank = 0;
    for (int32_t before = 0; before < slot; ++before) rank += plan.ids[before] == id ? 1 : 0;
  }
  plan.is_kept[slot] = plan::is_kept(rank, sizes.capacity);
  if (plan.is_kept[slot]) atomicOr(&plan.is_chosen[id / 32], 1u << id % 32);
}

// Experts whose bits are set before this one.
FM_DEVICE int32_t chosen_before(const DecodePlan& plan, int32_t expert_idx) {
  int32_t count = __popc(plan.is_chosen[expert_idx / 32] & ((1u << expert_idx % 32) - 1));
  for (int32_t word = 0; word < expert_idx / 32; ++word) count += __popc(plan.is_chosen[word]);
  return count;
}

FM_DEVICE void list_experts(const config::ForwardSizes& sizes, DecodePlan& plan) {
  for (int32_t e = ptx::thread_idx(); e < sizes.num_experts; e += config::kForwardThreads) {
    const bool is_chosen = (plan.is_chosen[e / 32] >> e % 32 & 1) != 0;
    const int32_t before = is_chosen || e == sizes.num_experts - 1 ? chosen_before(plan, e) : 0;
    if (is_chosen) plan.experts[before] = e;
    if (e == sizes.num_experts - 1) plan.num_chosen = before + (is_chosen ? 1 : 0);
  }
}

FM_DEVICE void mark_undefined(const config::ForwardSizes& sizes, DecodePlan& plan) {
  const int32_t token = ptx::thread_idx();
  if (token >= sizes.tokens) return;
  bool is_undefined = false;
  for (int32_t j = 0; j < sizes.top_k; ++j) {
    is_undefined |= plan.ids[token * sizes.top_k + j] == kUndefined;
  }
  plan.is_undefined[token] = is_undefined;
}

// A thread a chosen expert and token.
FM_DEVICE void sum_weights(const config::ForwardSizes& sizes, DecodePlan& plan) {
  constexpr int32_t kTokens = DecodePlan::kTokens;
  for (int32_t i = ptx::thread_idx(); i < plan.num_chosen * kTokens; i += config::kForwardThreads) {
    const int32_t token = i % kTokens;
    const int32_t expert_idx = plan.experts[i / kTokens];
    bool is_routed = false;
    float sum = 0.0f;
    for (int32_t j = 0; j < sizes.top_k && token < sizes.tokens; ++j) {
      const int32_t slot = token * sizes.top_k + j;
      if (plan.ids[slot] != expert_idx || !plan.is_kept[slot]) continue;
      is_routed = true;
      sum += plan.weights[slot];
    }
    plan.is_routed[i / kTokens][token] = is_routed;
    plan.coefficients[i / kTokens][token] = sum;
  }
}

// What the caller reads of the plan. All threads of one CTA.
FM_DEVICE void publish_few(const kernel::ForwardParams& params, DecodePlan& plan) {
  const auto& sizes = params.sizes;
  if (params.tokens_per_expert != nullptr) {
    for (int32_t e = ptx::thread_idx(); e < sizes.num_experts; e += config::kForwardThreads) {
      int32_t total = 0;
      for (int32_t slot = 0; slot < sizes.slots(); ++slot) total += plan.ids[slot] == e ? 1 : 0;
      params.tokens_per_expert[e * params.tokens_per_expert_stride] = total;
    }
  }
  if (params.dropped == nullptr) return;
  const int32_t slot = ptx::thread_idx();
  const bool is_dropped = slot < sizes.slots() && plan.ids[slot] >= 0 && !plan.is_kept[slot];
  const int32_t count = __syncthreads_count(is_dropped);
  if (slot == 0) *params.dropped = count;
}

// The plan of a launch, the logits' parts being there. All threads of all CTAs; arena: shared
// memory of the CTA.
FM_DEVICE void plan_few(const kernel::ForwardParams& params, uint8_t* arena, DecodePlan& plan) {
  const auto& sizes = params.sizes;
  for (int32_t i = ptx::thread_idx(); i < config::kMaxExperts / 32; i += config::kForwardThreads) {
    plan.is_chosen[i] = 0;
  }
  if (params.router.weight == nullptr) {
    read_few(params, plan);
  } else {
    choose_few(params, arena, plan);
  }
  __syncthreads();
  keep_slots(sizes, plan);
  __syncthreads();
  mark_undefined(sizes, plan);
  list_experts(sizes, plan);
  __syncthreads();
  sum_weights(sizes, plan);
  if (ptx::block_idx() == 0) publish_few(params, plan);
  __syncthreads();
}

}  // namespace flashmoe::cuda::stage
