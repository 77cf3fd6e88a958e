#include "cpu/router.h"

#include <cmath>
#include <limits>

#include "plan/routing.h"

namespace flashmoe::cpu {
namespace {

template <class A>
bool is_defined(const A* logits, int64_t num_experts) {
  bool any = false;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (std::isnan(logits[e]) || logits[e] == std::numeric_limits<A>::infinity()) return false;
    any |= std::isfinite(logits[e]);
  }
  return any;
}

// One scalar exp an element: a vector one differs from it in the last bit, and at the tail of a row
// equal logits would get unequal scores. exp(-inf) is exactly 0.
template <class A>
void softmax(const A* logits, int64_t count, A* out) {
  const A top = ArrayView<A>(logits, count).maxCoeff();
  A sum = A(0);
  for (int64_t i = 0; i < count; ++i) sum += out[i] = std::exp(logits[i] - top);
  MutableArray<A>(out, count) /= sum;
}

template <class A>
A softplus(A x) {
  return x > A(0) ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <class A>
A sigmoid(A x) {
  return A(1) / (A(1) + std::exp(-x));
}

// scores[E] as the choice sees them, before the selection bias. topk_softmax chooses by logits.
template <class A>
void score_all(const RouterSpec& spec, const A* logits, A* scores) {
  switch (spec.score) {
    case FM_SCORE_SOFTMAX:
      return softmax(logits, spec.num_experts, scores);
    case FM_SCORE_TOPK_SOFTMAX:
      MutableArray<A>(scores, spec.num_experts) = ArrayView<A>(logits, spec.num_experts);
      return;
    case FM_SCORE_SIGMOID:
      for (int64_t e = 0; e < spec.num_experts; ++e) scores[e] = sigmoid(logits[e]);
      return;
    default:
      for (int64_t e = 0; e < spec.num_experts; ++e) scores[e] = std::sqrt(softplus(logits[e]));
  }
}

// Best `count` of values[n] in falling order; of equal values the lowest index comes first.
template <class A>
void choose_best(const A* values, int64_t n, int64_t count, int32_t* best) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (kept == count && !(values[i] > values[best[kept - 1]])) continue;
    int64_t place = kept < count ? kept++ : kept - 1;
    while (place > 0 && values[i] > values[best[place - 1]]) {
      best[place] = best[place - 1];
      --place;
    }
    best[place] = static_cast<int32_t>(i);
  }
}

// Experts outside the best top_groups groups can not be chosen.
template <class A>
void exclude_groups(const RouterSpec& spec, A* selection) {
  constexpr int64_t kMost = kMaxExperts;
  if (spec.num_groups <= 1) return;
  const int64_t size = spec.num_experts / spec.num_groups;
  const int64_t top = plan::min_of(spec.group_top, size);
  A scores[kMost];
  int32_t best[kMost];
  for (int64_t g = 0; g < spec.num_groups; ++g) {
    choose_best(selection + g * size, size, top, best);
    scores[g] = A(0);
    for (int64_t i = 0; i < top; ++i) scores[g] += selection[g * size + best[i]];
  }
  choose_best(scores, spec.num_groups, spec.top_groups, best);
  bool kept[kMost] = {};
  for (int64_t i = 0; i < spec.top_groups; ++i) kept[best[i]] = true;
  for (int64_t e = 0; e < spec.num_experts; ++e) {
    if (!kept[e / size]) selection[e] = -std::numeric_limits<A>::infinity();
  }
}

// Weights of the choice before renormalisation and scale.
template <class A>
void raw_weights(const RouterSpec& spec, const A* scores, const int32_t* ids, A* raw) {
  for (int64_t j = 0; j < spec.top_k; ++j) raw[j] = ids[j] < 0 ? A(0) : scores[ids[j]];
  if (spec.score != FM_SCORE_TOPK_SOFTMAX) return;
  softmax(raw, spec.top_k, raw);
}

template <class A>
A sum_of(const A* values, int64_t count) {
  A sum = A(0);
  for (int64_t j = 0; j < count; ++j) sum += values[j];
  return sum;
}

// d raw -> d logits, added.
template <class A>
void score_backward(const RouterSpec& spec, const A* logits, const A* scores, const A* raw,
                    const int32_t* ids, const A* grad_raw, A* grad_logits) {
  A dot = A(0);
  for (int64_t j = 0; j < spec.top_k; ++j) dot += raw[j] * grad_raw[j];
  if (spec.score == FM_SCORE_SOFTMAX) {
    for (int64_t e = 0; e < spec.num_experts; ++e) grad_logits[e] -= scores[e] * dot;
  }
  for (int64_t j = 0; j < spec.top_k; ++j) {
    if (ids[j] < 0) continue;
    const A x = logits[ids[j]];
    switch (spec.score) {
      case FM_SCORE_SOFTMAX:
        grad_logits[ids[j]] += raw[j] * grad_raw[j];
        break;
      case FM_SCORE_TOPK_SOFTMAX:
        grad_logits[ids[j]] += raw[j] * (grad_raw[j] - dot);
        break;
      case FM_SCORE_SIGMOID:
        grad_logits[ids[j]] += raw[j] * (A(1) - raw[j]) * grad_raw[j];
        break;
      default:
        // d sqrt(softplus(x)) = sigmoid(x) / (2 sqrt(softplus(x))); both vanish together at -inf.
        if (raw[j] > A(0)) grad_logits[ids[j]] += sigmoid(x) / (A(2) * raw[j]) * grad_raw[j];
    }
  }
}

}  // namespace

template <class A>
bool route_token(const RouterSpec& spec, const A* logits, const A* selection_bias, int32_t* ids,
                 A* weights, A* work) {
  if (!is_defined(logits, spec.num_experts)) return false;
  A* scores = work;
  A* selection = work + spec.num_experts;
  score_all(spec, logits, scores);
  for (int64_t e = 0; e < spec.num_experts; ++e) {
    selection[e] = scores[e] + (selection_bias == nullptr ? A(0) : selection_bias[e]);
  }
  exclude_groups(spec, selection);
  choose_best(selection, spec.num_experts, spec.top_k, ids);
  raw_weights(spec, scores, ids, weights);
  A factor = static_cast<A>(spec.scale);
  if (spec.renormalize) {
    factor /= sum_of(weights, spec.top_k) + static_cast<A>(kRenormalizeEps);
  }
  for (int64_t j = 0; j < spec.top_k; ++j) weights[j] *= factor;
  return true;
}

template <class A>
void route_token_backward(const RouterSpec& spec, const A* logits, const int32_t* ids,
                          const A* grad_weights, A* grad_logits, A* work) {
  A* scores = work;
  A* raw = work + spec.num_experts;
  A grad_raw[kMaxTopK];
  score_all(spec, logits, scores);
  raw_weights(spec, scores, ids, raw);
  const A scale = static_cast<A>(spec.scale);
  A mean = A(0);  // subtracted first: with k = 1 the difference is exactly 0
  A sum = A(1);
  if (spec.renormalize) {
    sum = sum_of(raw, spec.top_k) + static_cast<A>(kRenormalizeEps);
    for (int64_t j = 0; j < spec.top_k; ++j) mean += grad_weights[j] * (raw[j] / sum);
  }
  for (int64_t j = 0; j < spec.top_k; ++j) {
    grad_raw[j] = scale * (grad_weights[j] - mean) / sum;
  }
  score_backward(spec, logits, scores, raw, ids, grad_raw, grad_logits);
}

template bool route_token<float>(const RouterSpec&, const float*, const float*, int32_t*, float*,
                                 float*);
template bool route_token<double>(const RouterSpec&, const double*, const double*, int32_t*,
                                  double*, double*);
template void route_token_backward<float>(const RouterSpec&, const float*, const int32_t*,
                                          const float*, float*, float*);
template void route_token_backward<double>(const RouterSpec&, const double*, const int32_t*,
                                           const double*, double*, double*);

}  // namespace flashmoe::cpu
