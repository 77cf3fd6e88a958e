// The router of one token: scores, choice, weights, and the gradient of the logits.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace flashmoe::cpu {

struct RouterSpec {
  int32_t score = FM_SCORE_SOFTMAX;  // fm_score
  bool renormalize = true;
  double scale = 1.0;
  int64_t num_experts = 0;
  int64_t top_k = 0;
  int64_t num_groups = 1;  // experts e / (E / num_groups)
  int64_t top_groups = 1;
  int64_t group_top = 2;  // a group's score: sum of its best group_top selection scores
};

// What renormalisation adds to the sum, as DeepSeek-V3 does.
// Limits of the engine (validated): k = E = 1024 is the largest choice.
inline constexpr int64_t kMaxExperts = 1024;
inline constexpr int64_t kMaxTopK = 1024;

inline constexpr double kRenormalizeEps = 1e-20;

// logits[E] -> ids[k] in falling order of the selection score (equal scores: lowest id first) and
// weights[k]. selection_bias[E] may be null. work: 2 * E values. Returns false when a logit is NaN
// or +inf, or all are -inf: such a token has no defined choice.
template <class A>
bool route_token(const RouterSpec& spec, const A* logits, const A* selection_bias, int32_t* ids,
                 A* weights, A* work);

// grad_logits[E] += d (weights) / d (logits) times grad_weights[k], for the choice ids[k] (-1:
// skip). work: 2 * E values.
template <class A>
void route_token_backward(const RouterSpec& spec, const A* logits, const int32_t* ids,
                          const A* grad_weights, A* grad_logits, A* work);

}  // namespace flashmoe::cpu
