// From a token's logits to its experts and weights, by one warp: the rules of cpu/router.cpp.
#pragma once

#include "cuda/config/forward.h"
#include "cuda/kernel/forward.h"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/strided.cuh"

namespace flashmoe::cuda::stage {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFF;
// Marks in the scratch's ids and slot rows.
inline constexpr int32_t kNoExpert = -1;
inline constexpr int32_t kUndefined = -2;  // the token's logits are not numbers

FM_DEVICE float infinity() { return __int_as_float(0x7F800000); }

// Order of floats as order of words; 0 is below all of them, and both zeros are one. -inf is 1 or
// more, so that an excluded expert still comes before one that was taken.
FM_DEVICE uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Shared memory of one warp.
struct ChoiceMemory {
  float* scores;        // [E]
  uint32_t* keys;       // [E], of the selection scores; 0: taken
  float* group_scores;  // [num_groups]

  FM_DEVICE static int32_t words(int32_t num_experts) { return 3 * num_experts; }
  FM_DEVICE static ChoiceMemory from(uint8_t* arena, int32_t num_experts, int32_t warp_idx) {
    auto* base = reinterpret_cast<float*>(arena) + warp_idx * words(num_experts);
    return {base, reinterpret_cast<uint32_t*>(base + num_experts), base + 2 * num_experts};
  }
};

FM_DEVICE float warp_max(float x) {
  FM_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

FM_DEVICE float warp_sum(float x) {
  FM_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Takes the largest keys of a list one by one; of equal ones the lowest index first. Whole warp:
// lane l watches elements l, l + 32, ...
class BestKeys {
 public:
  FM_DEVICE BestKeys(uint32_t* keys, int32_t count) : keys_(keys), count_(count) { scan(); }

  // Index of the best key that is left; it is marked as taken. The same in all lanes.
  FM_DEVICE int32_t take() {
    const uint32_t best = __reduce_max_sync(kAllLanes, key_);
    const uint32_t candidate = key_ == best ? static_cast<uint32_t>(idx_) : ~0u;
    const auto idx = static_cast<int32_t>(__reduce_min_sync(kAllLanes, candidate));
    if (idx == idx_) {
      keys_[idx] = 0;
      scan();
    }
    return idx;
  }

 private:
  FM_DEVICE void scan() {
    key_ = 0;
    idx_ = 0x7FFFFFFF;
#pragma unroll 4
    for (int32_t i = ptx::lane_idx(); i < count_; i += 32) {
      const uint32_t key = keys_[i];
      if (key > key_) {
        key_ = key;
        idx_ = i;
      }
    }
  }

  uint32_t* keys_;
  int32_t count_;
  uint32_t key_;
  int32_t idx_;
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

// The logits into shared memory; whether they define a choice: none NaN or +inf, one finite. Whole
// warp.
FM_DEVICE bool load_logits(int32_t num_experts, const float* logits, float* scores) {
  bool bad = false;
  bool any = false;
#pragma unroll 4
  for (int32_t e = ptx::lane_idx(); e < num_experts; e += 32) {
    const float x = logits[e];
    scores[e] = x;
    bad |= !(x < infinity());
    any |= x < infinity() && x > -infinity();
  }
  return !__any_sync(kAllLanes, bad) && __any_sync(kAllLanes, any);
}

// Logits become scores as the choice sees them, before the selection bias. Whole warp; a lane works
// on its own elements only.
FM_DEVICE void score_all(int32_t score, int32_t num_experts, float* scores) {
  const int lane = ptx::lane_idx();
  if (score == FM_SCORE_TOPK_SOFTMAX) return;
  if (score != FM_SCORE_SOFTMAX) {
#pragma unroll 4
    for (int32_t e = lane; e < num_experts; e += 32) {
      const float x = scores[e];
      scores[e] = score == FM_SCORE_SIGMOID ? sigmoid(x) : square_root(softplus(x));
    }
    return;
  }
  float top = -infinity();
#pragma unroll 4
  for (int32_t e = lane; e < num_experts; e += 32) top = fmaxf(top, scores[e]);
  top = warp_max(top);
  float sum = 0.0f;
#pragma unroll 4
  for (int32_t e = lane; e < num_experts; e += 32) sum += scores[e] = expf(scores[e] - top);
  sum = warp_sum(sum);
#pragma unroll 4
  for (int32_t e = lane; e < num_experts; e += 32) scores[e] = divide(scores[e], sum);
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
FM_DEVICE void exclude_groups(const kernel::RouterParams& router, int32_t num_experts,
                              const ChoiceMemory& memory) {
  if (router.num_groups <= 1) return;
  const int lane = ptx::lane_idx();
  const int32_t size = num_experts / router.num_groups;
  auto* group_keys = reinterpret_cast<uint32_t*>(memory.group_scores);
  for (int32_t g = lane; g < router.num_groups; g += 32) {
    group_keys[g] = key_of(group_score(memory.keys + g * size, size, router.group_top));
  }
  __syncwarp();
  BestKeys groups(group_keys, router.num_groups);
  for (int32_t i = 0; i < router.top_groups; ++i) groups.take();
  __syncwarp();
#pragma unroll 4
  for (int32_t e = lane; e < num_experts; e += 32) {
    if (group_keys[e / size] != 0) memory.keys[e] = key_of(-infinity());
  }
  __syncwarp();
}

// This lane's weight of the chosen experts before renormalisation and scale; lane j has slot j.
FM_DEVICE float raw_weight(int32_t score, bool has_slot, float chosen) {
  if (score != FM_SCORE_TOPK_SOFTMAX) return has_slot ? chosen : 0.0f;
  const float top = warp_max(has_slot ? chosen : -infinity());
  const float value = has_slot ? expf(chosen - top) : 0.0f;
  return divide(value, warp_sum(value));
}

// What DeepSeek-V3 adds to the sum of the weights.
inline constexpr float kRenormalizeEps = 1e-20f;

struct Choice {
  int32_t expert_idx;  // of lane j's slot j
  float weight;
};

// The token's experts and weights; its logits are in memory.scores. Whole warp.
FM_DEVICE Choice choose_experts(const kernel::RouterParams& router, int32_t num_experts,
                                int32_t top_k, const ChoiceMemory& memory) {
  const int lane = ptx::lane_idx();
  score_all(router.score, num_experts, memory.scores);
  const bool biased = router.selection_bias.data != nullptr;
#pragma unroll 4
  for (int32_t e = lane; e < num_experts; e += 32) {
    const float bias = biased ? tile::read_real(router.selection_bias, e) : 0.0f;
    memory.keys[e] = key_of(memory.scores[e] + bias);
  }
  __syncwarp();
  exclude_groups(router, num_experts, memory);
  BestKeys experts(memory.keys, num_experts);
  Choice choice{kNoExpert, 0.0f};
  for (int32_t j = 0; j < top_k; ++j) {
    const int32_t best = experts.take();
    if (lane == j) choice.expert_idx = best;
  }
  const bool has_slot = lane < top_k;
  const float chosen = has_slot ? memory.scores[choice.expert_idx] : 0.0f;
  const float raw = raw_weight(router.score, has_slot, chosen);
  float factor = router.scale;
  if (router.renormalize) factor = divide(factor, warp_sum(raw) + kRenormalizeEps);
  choice.weight = raw * factor;
  __syncwarp();
  return choice;
}

}  // namespace flashmoe::cuda::stage
