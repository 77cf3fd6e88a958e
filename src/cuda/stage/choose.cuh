// From a token's logits to its experts and weights: the rules of cpu/router.cpp. A team of kLanes
// lanes works on a token. Of many tokens teams have eight lanes (kTeamLanes), and the four of a
// warp go through the same steps together: the choice of k experts is k chains of reductions, which
// one token a warp would wait for. Of few tokens a warp is one team.
#pragma once

#include "cuda/config/forward.h"
#include "cuda/kernel/forward.h"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/strided.cuh"

namespace flashmoe::cuda::stage {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFF;
inline constexpr int32_t kTeamLanes = 8;
// Marks in the scratch's ids and slot rows.
inline constexpr int32_t kNoExpert = -1;
inline constexpr int32_t kUndefined = -2;  // the token's logits are not numbers

template <int32_t kLanes>
FM_DEVICE int32_t team_lane() {
  return ptx::thread_idx() % kLanes;
}

FM_DEVICE float infinity() { return __int_as_float(0x7F800000); }
FM_DEVICE float not_a_number() { return __int_as_float(0x7FC00000); }

// Order of floats as order of words. 0 is below all of them: a key that was taken. Both zeros are
// one.
FM_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return max(bits & 0x80000000u ? ~bits : bits | 0x80000000u, 1u);
}

// A team's token.
template <int32_t kLanes = kTeamLanes>
struct TeamMemory {
  float* scores;        // [E]
  uint32_t* keys;       // [E], of the selection scores; 0: taken
  uint32_t* groups;     // [num_groups], keys of their scores
  int32_t* chosen;      // [k]
  int32_t num_experts;  // 0: the team has no token

  // Words of shared memory from one team's to the next: the teams of a warp use different banks.
  FM_HD static constexpr int32_t words(int32_t num_experts, int32_t num_groups) {
    const int32_t used = 2 * num_experts + num_groups + static_cast<int32_t>(config::kMaxTopK);
    return (used + 31) / 32 * 32 + kLanes;
  }
  FM_DEVICE static TeamMemory from(uint8_t* arena, int32_t team_idx, int32_t num_experts,
                                   int32_t num_groups, bool has_token) {
    auto* base = reinterpret_cast<float*>(arena) + team_idx * words(num_experts, num_groups);
    auto* keys = reinterpret_cast<uint32_t*>(base + num_experts);
    return {base, keys, keys + num_experts,
            reinterpret_cast<int32_t*>(keys + num_experts + num_groups),
            has_token ? num_experts : 0};
  }
};

// The same in all lanes of a team. Whole warp.
template <int32_t kLanes>
FM_DEVICE float team_max(float x) {
  FM_UNROLL
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}
template <int32_t kLanes>
FM_DEVICE float team_sum(float x) {
  FM_UNROLL
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}
template <int32_t kLanes>
FM_DEVICE bool team_any(bool vote) {
  const uint32_t votes = __ballot_sync(kAllLanes, vote);
  const int32_t first_lane = ptx::lane_idx() - team_lane<kLanes>();
  return (votes >> first_lane & kAllLanes >> (32 - kLanes)) != 0;
}

// Takes the largest keys of each team's list one by one; of equal ones the lowest index first.
// Whole warp: lane l of a team watches elements l, l + kLanes, ... as kGroups groups of neighbours,
// whose best keys it holds.
template <int32_t kLanes>
class BestKeys {
 public:
  FM_DEVICE BestKeys(uint32_t* keys, int32_t count)
      : keys_(keys), count_(count), of_group_((count + kGroups * kLanes - 1) / (kGroups * kLanes)) {
    FM_UNROLL
    for (uint32_t& best : best_) best = 0;
#pragma unroll 1
    for (int32_t i = 0; i < of_group_; ++i) {
      FM_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        best_[group] = max(best_[group], key_at(idx_of(group, i)));
      }
    }
  }

  // Index of the best key that is left, which is then taken. The same in all lanes of a team; of a
  // team without keys meaningless.
  FM_DEVICE int32_t take() {
    uint32_t best = 0;
    FM_UNROLL
    for (uint32_t of_group : best_) best = max(best, of_group);
    FM_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      best = max(best, __shfl_xor_sync(kAllLanes, best, distance));
    }
    int32_t group = kGroups;
    FM_UNROLL
    for (int i = kGroups - 1; i >= 0; --i) {
      if (best_[i] == best) group = i;
    }
    const int32_t own = group < kGroups ? first_in(group, best) : kNone;
    int32_t idx = own;
    FM_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      idx = min(idx, __shfl_xor_sync(kAllLanes, idx, distance));
    }
    if (idx == own && idx != kNone) remove(idx, group);
    return idx;
  }

 private:
  static constexpr int kGroups = 16;
  static constexpr int32_t kNone = 0x7FFFFFFF;

  FM_DEVICE int32_t idx_of(int32_t group, int32_t i) const {
    return team_lane<kLanes>() + (group * of_group_ + i) * kLanes;
  }
  FM_DEVICE uint32_t key_at(int32_t idx) const { return idx < count_ ? keys_[idx] : 0; }
  FM_DEVICE int32_t first_in(int32_t group, uint32_t key) const {
    int32_t first = kNone;
#pragma unroll 1
    for (int32_t i = of_group_ - 1; i >= 0; --i) {
      if (key_at(idx_of(group, i)) == key) first = idx_of(group, i);
    }
    return first;
  }
  FM_DEVICE void remove(int32_t idx, int32_t group) {
    keys_[idx] = 0;
    uint32_t left = 0;
#pragma unroll 1
    for (int32_t i = 0; i < of_group_; ++i) left = max(left, key_at(idx_of(group, i)));
    FM_UNROLL
    for (int i = 0; i < kGroups; ++i) {
      if (i == group) best_[i] = left;
    }
  }

  uint32_t* keys_;
  int32_t count_;
  int32_t of_group_;
  uint32_t best_[kGroups];
};

// The same of a team that is a warp, which reduces words in one instruction. A lane holds its best
// key and where that is. Of many tokens, four teams a warp are faster all the same.
template <>
class BestKeys<32> {
 public:
  FM_DEVICE BestKeys(uint32_t* keys, int32_t count) : keys_(keys), count_(count) { look(); }

  FM_DEVICE int32_t take() {
    const uint32_t best = __reduce_max_sync(kAllLanes, best_);
    const uint32_t idx = __reduce_min_sync(kAllLanes, best_ == best ? best_idx_ : ~0u);
    if (idx == best_idx_) {
      keys_[idx] = 0;
      look();
    }
    return static_cast<int32_t>(idx);
  }

 private:
  FM_DEVICE void look() {
    best_ = 0;
    best_idx_ = ptx::lane_idx();
#pragma unroll 4
    for (int32_t idx = ptx::lane_idx(); idx < count_; idx += 32) {
      const uint32_t key = keys_[idx];
      if (key > best_) best_idx_ = idx;
      best_ = max(best_, key);
    }
  }

  uint32_t* keys_;
  int32_t count_;
  uint32_t best_;
  uint32_t best_idx_;  // one that no other lane has
};

// a / b rounded to within an ulp, b in the middle of the range. The compiler's own division has a
// branch to a subroutine, around which it spills.
FM_DEVICE float divide(float a, float b) {
  const float inverse = __fdividef(1.0f, b);
  const float quotient = a * inverse;
  return fmaf(fmaf(-quotient, b, a), inverse, quotient);
}

FM_DEVICE float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return divide(x >= 0.0f ? 1.0f : e, 1.0f + e);
}

FM_DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// For the reason above, too.
FM_DEVICE float square_root(float x) {
  if (x == 0.0f) return 0.0f;
  const float inverse = rsqrtf(x);
  const float root = x * inverse;
  return fmaf(fmaf(-root, root, x), 0.5f * inverse, root);
}

// Whether the logits, in memory.scores, define a choice: none NaN or +inf, one finite. Those of a
// token whose do not become zeros: its choice means nothing. Whole warp; a lane looks at its own.
template <int32_t kLanes>
FM_DEVICE bool check_logits(const TeamMemory<kLanes>& memory) {
  bool bad = false;
  bool any = false;
#pragma unroll 4
  for (int32_t e = team_lane<kLanes>(); e < memory.num_experts; e += kLanes) {
    const float x = memory.scores[e];
    bad |= !(x < infinity());
    any |= x < infinity() && x > -infinity();
  }
  const bool is_bad = team_any<kLanes>(bad);  // all lanes vote twice: teams differ
  const bool is_any = team_any<kLanes>(any);
  const bool is_defined = !is_bad && is_any;
  if (!is_defined) {
    for (int32_t e = team_lane<kLanes>(); e < memory.num_experts; e += kLanes)
      memory.scores[e] = 0.0f;
  }
  return is_defined;
}

// Logits become scores as the choice sees them, before the selection bias. Whole warp; a lane works
// on its own elements only.
template <int32_t kLanes>
FM_DEVICE void score_all(int32_t score, const TeamMemory<kLanes>& memory) {
  const int32_t lane = team_lane<kLanes>();
  float* scores = memory.scores;
  if (score == FM_SCORE_TOPK_SOFTMAX) return;
  if (score != FM_SCORE_SOFTMAX) {
#pragma unroll 4
    for (int32_t e = lane; e < memory.num_experts; e += kLanes) {
      const float x = scores[e];
      scores[e] = score == FM_SCORE_SIGMOID ? sigmoid(x) : square_root(softplus(x));
    }
    return;
  }
  float top = -infinity();
#pragma unroll 4
  for (int32_t e = lane; e < memory.num_experts; e += kLanes) top = fmaxf(top, scores[e]);
  top = team_max<kLanes>(top);
  float sum = 0.0f;
#pragma unroll 4
  for (int32_t e = lane; e < memory.num_experts; e += kLanes) {
    sum += scores[e] = expf(scores[e] - top);
  }
  sum = team_sum<kLanes>(sum);
#pragma unroll 4
  for (int32_t e = lane; e < memory.num_experts; e += kLanes) {
    scores[e] = divide(scores[e], sum);
  }
}

// A group's score: the sum of its best selection scores, best first. One thread; `keys` of the
// group.
FM_DEVICE float group_score(const uint32_t* keys, int32_t size, int32_t group_top) {
  float sum = 0.0f;
  uint32_t below = ~0u;  // keys are taken in falling order, `repeats` of the last one already
  int32_t repeats = 0;
  for (int32_t taken = 0; taken < min(group_top, size); ++taken) {
    uint32_t best = 0;
    int32_t equal = 0;
    for (int32_t i = 0; i < size; ++i) {
      if (keys[i] == below) ++equal;
      if (keys[i] < below && keys[i] > best) best = keys[i];
    }
    if (equal > repeats) {
      ++repeats;
    } else {
      below = best;
      repeats = 1;
    }
    sum += __uint_as_float(below & 0x80000000u ? below & 0x7FFFFFFFu : ~below);
  }
  return sum;
}

// Keys of experts outside the best groups become -inf's. Whole warp.
template <int32_t kLanes>
FM_DEVICE void exclude_groups(const kernel::RouterParams& router, int32_t group_size,
                              const TeamMemory<kLanes>& memory) {
  const int32_t lane = team_lane<kLanes>();
  const int32_t num_groups = memory.num_experts == 0 ? 0 : router.num_groups;
  for (int32_t g = lane; g < num_groups; g += kLanes) {
    memory.groups[g] =
        key_of(group_score(memory.keys + g * group_size, group_size, router.group_top));
  }
  __syncwarp();
  BestKeys<kLanes> groups(memory.groups, num_groups);
  for (int32_t i = 0; i < router.top_groups; ++i) groups.take();
  __syncwarp();
#pragma unroll 4
  for (int32_t e = lane; e < memory.num_experts; e += kLanes) {
    if (memory.groups[e / group_size] != 0) memory.keys[e] = key_of(-infinity());
  }
  __syncwarp();
}

// The token's experts, best first, into memory.chosen; its logits are in memory.scores. Whole warp.
template <int32_t kLanes>
FM_DEVICE void choose_experts(const kernel::RouterParams& router, const config::ForwardSizes& sizes,
                              const TeamMemory<kLanes>& memory) {
  const int32_t lane = team_lane<kLanes>();
  score_all(router.score, memory);
#pragma unroll 4
  for (int32_t e = lane; e < memory.num_experts; e += kLanes) {
    memory.keys[e] = key_of(memory.scores[e]);
  }
  if (router.selection_bias.data != nullptr) {
    for (int32_t e = lane; e < memory.num_experts; e += kLanes) {
      memory.keys[e] = key_of(memory.scores[e] + tile::read_real(router.selection_bias, e));
    }
  }
  __syncwarp();
  if (router.num_groups > 1) exclude_groups(router, sizes.num_experts / router.num_groups, memory);
  BestKeys<kLanes> experts(memory.keys, memory.num_experts);
  for (int32_t j = 0; j < sizes.top_k; ++j) {
    const int32_t best = experts.take();
    if (lane == 0 && memory.num_experts > 0) memory.chosen[j] = best;
  }
  __syncwarp();
}

// What DeepSeek-V3 adds to the sum of the weights.
inline constexpr float kRenormalizeEps = 1e-20f;

// A lane's share of its token's slots: lane l has slots l, l + kLanes, ...
template <int32_t kLanes>
struct TeamSlots {
  static constexpr int32_t kOfLane = static_cast<int32_t>(config::kMaxTopK) / kLanes;
  int32_t expert_idx[kOfLane];
  float weight[kOfLane];
};

// The chosen experts and their weights. Whole warp.
template <int32_t kLanes>
FM_DEVICE TeamSlots<kLanes> weigh_experts(const kernel::RouterParams& router,
                                          const config::ForwardSizes& sizes,
                                          const TeamMemory<kLanes>& memory) {
  const bool is_topk_softmax = router.score == FM_SCORE_TOPK_SOFTMAX;
  TeamSlots<kLanes> slots;
  float top = -infinity();
  FM_UNROLL
  for (int i = 0; i < TeamSlots<kLanes>::kOfLane; ++i) {
    const int32_t j = team_lane<kLanes>() + i * kLanes;
    const bool has_slot = j < sizes.top_k && memory.num_experts > 0;
    slots.expert_idx[i] = has_slot ? memory.chosen[j] : kNoExpert;
    slots.weight[i] = has_slot ? memory.scores[slots.expert_idx[i]] : -infinity();
    top = fmaxf(top, slots.weight[i]);
  }
  top = team_max<kLanes>(top);
  float sum = 0.0f;
  FM_UNROLL
  for (int i = 0; i < TeamSlots<kLanes>::kOfLane; ++i) {
    float& weight = slots.weight[i];
    if (is_topk_softmax) weight = expf(weight - top);
    if (slots.expert_idx[i] == kNoExpert) weight = 0.0f;
    sum += weight;
  }
  sum = team_sum<kLanes>(sum);
  float factor = router.scale;
  if (is_topk_softmax) {
    FM_UNROLL
    for (float& weight : slots.weight) weight = divide(weight, sum);
    sum = 1.0f;
  }
  if (router.renormalize) factor = divide(factor, sum + kRenormalizeEps);
  FM_UNROLL
  for (float& weight : slots.weight) weight *= factor;
  return slots;
}

}  // namespace flashmoe::cuda::stage
