// The router of one token: choice by sorting, weights by definition, gradients by differences.
#include <numeric>

#include "cpu/router.h"
#include "support.h"

namespace flashmoe::test {
namespace {

using cpu::RouterSpec;
constexpr double kInf = std::numeric_limits<double>::infinity();

RouterSpec random_spec(Rng& rng, int32_t score) {
  RouterSpec spec;
  spec.score = score;
  spec.renormalize = rng.chance(0.5);
  spec.scale = rng.pick({1.0, 2.5});
  spec.num_groups = rng.pick<int64_t>({1, 1, 2, 4});
  spec.num_experts = spec.num_groups * rng.between(1, 12);
  spec.top_groups = rng.between(1, spec.num_groups);
  spec.group_top = rng.between(1, 3);
  const int64_t eligible = spec.num_experts / spec.num_groups * spec.top_groups;
  spec.top_k = rng.between(1, std::min<int64_t>(eligible, 8));
  return spec;
}

std::vector<double> softmax(const std::vector<double>& x) {
  const double top = *std::max_element(x.begin(), x.end());
  std::vector<double> out;
  for (const double value : x) out.push_back(std::exp(value - top));
  const double sum = std::accumulate(out.begin(), out.end(), 0.0);
  for (double& value : out) value /= sum;
  return out;
}

std::vector<double> scores_of(const RouterSpec& spec, const std::vector<double>& logits) {
  if (spec.score == FM_SCORE_SOFTMAX) return softmax(logits);
  std::vector<double> out;
  for (const double x : logits) {
    if (spec.score == FM_SCORE_TOPK_SOFTMAX) out.push_back(x);
    if (spec.score == FM_SCORE_SIGMOID) out.push_back(1 / (1 + std::exp(-x)));
    if (spec.score == FM_SCORE_SQRT_SOFTPLUS) out.push_back(std::sqrt(std::log1p(std::exp(x))));
  }
  return out;
}

// Indices by falling value; equal values by rising index.
std::vector<int32_t> sorted(const std::vector<double>& values) {
  std::vector<int32_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  return order;
}

std::vector<int32_t> choose(const RouterSpec& spec, const std::vector<double>& logits,
                            const std::vector<double>& bias) {
  std::vector<double> selection = scores_of(spec, logits);
  for (size_t e = 0; e < bias.size(); ++e) selection[e] += bias[e];
  const auto size = static_cast<size_t>(spec.num_experts / spec.num_groups);
  std::vector<double> group_scores;
  for (int64_t g = 0; g < spec.num_groups; ++g) {
    std::vector<double> group(selection.begin() + g * size, selection.begin() + (g + 1) * size);
    std::sort(group.rbegin(), group.rend());
    const size_t best = std::min<size_t>(size, spec.group_top);
    group_scores.push_back(std::accumulate(group.begin(), group.begin() + best, 0.0));
  }
  auto kept = sorted(group_scores);
  kept.resize(static_cast<size_t>(spec.num_groups > 1 ? spec.top_groups : 1));
  for (size_t e = 0; e < selection.size(); ++e) {
    if (std::find(kept.begin(), kept.end(), e / size) == kept.end()) selection[e] = -kInf;
  }
  auto ids = sorted(selection);
  ids.resize(static_cast<size_t>(spec.top_k));
  return ids;
}

std::vector<double> weights_of(const RouterSpec& spec, const std::vector<double>& logits,
                               const std::vector<int32_t>& ids) {
  const auto scores = scores_of(spec, logits);
  std::vector<double> weights;
  for (const int32_t id : ids) weights.push_back(scores[id]);
  if (spec.score == FM_SCORE_TOPK_SOFTMAX) weights = softmax(weights);
  const double sum = std::accumulate(weights.begin(), weights.end(), 1e-20);
  for (double& weight : weights) weight *= spec.scale / (spec.renormalize ? sum : 1.0);
  return weights;
}

struct Routed {
  bool defined;
  std::vector<int32_t> ids;
  std::vector<double> weights;
};

template <class A = double>
Routed route(const RouterSpec& spec, const std::vector<double>& logits,
             const std::vector<double>& bias) {
  const std::vector<A> in(logits.begin(), logits.end()), selection(bias.begin(), bias.end());
  std::vector<A> weights(static_cast<size_t>(spec.top_k)), work(2 * logits.size());
  Routed out{false, std::vector<int32_t>(weights.size(), -7), {}};
  out.defined = cpu::route_token<A>(spec, in.data(), bias.empty() ? nullptr : selection.data(),
                                    out.ids.data(), weights.data(), work.data());
  out.weights.assign(weights.begin(), weights.end());
  return out;
}

class Router : public testing::TestWithParam<int32_t> {};

TEST_P(Router, ChoosesAndWeighsAsByTheDefinition) {
  for_seeds(rounds(2000), [](Rng& rng) {
    const RouterSpec spec = random_spec(rng, GetParam());
    const auto experts = static_cast<size_t>(spec.num_experts);
    const auto logits = rng.vector<double>(experts, -3, 3);
    const auto bias = rng.chance(0.5) ? rng.vector<double>(experts) : std::vector<double>();
    const Routed got = route(spec, logits, bias);
    ASSERT_TRUE(got.defined);
    ASSERT_EQ(got.ids, choose(spec, logits, bias));
    const auto want = weights_of(spec, logits, got.ids);
    for (size_t j = 0; j < want.size(); ++j) ASSERT_NEAR(got.weights[j], want[j], 1e-14);
  });
}

// Values from a small set, so that most choices have ties: the lowest expert wins, in both
// precisions.
TEST_P(Router, TiesGoToTheLowestExpert) {
  for_seeds(rounds(1000), [](Rng& rng) {
    const RouterSpec spec = random_spec(rng, GetParam());
    std::vector<double> logits(static_cast<size_t>(spec.num_experts));
    for (double& x : logits) x = rng.pick({-1.0, 0.0, 0.0, 1.0});
    if (rng.chance(0.2)) std::fill(logits.begin(), logits.end(), 0.25);
    const auto want = choose(spec, logits, {});
    if (spec.num_groups == 1) {  // sums of groups round differently in fp32
      ASSERT_EQ(route<float>(spec, logits, {}).ids, want);
    }
    ASSERT_EQ(route<double>(spec, logits, {}).ids, want);
  });
}

TEST_P(Router, GradientsFollowCentralDifferences) {
  for_seeds(rounds(400), [](Rng& rng) {
    const RouterSpec spec = random_spec(rng, GetParam());
    const auto experts = static_cast<size_t>(spec.num_experts);
    const auto logits = rng.vector<double>(experts, -3, 3);
    const auto ids = choose(spec, logits, {});
    const auto grad_weights = rng.vector<double>(ids.size());
    const auto before = rng.vector<double>(experts);
    std::vector<double> grad(before), work(2 * experts);
    cpu::route_token_backward<double>(spec, logits.data(), ids.data(), grad_weights.data(),
                                      grad.data(), work.data());
    constexpr double h = 1e-6;
    for (size_t e = 0; e < experts; ++e) {
      auto up = logits, down = logits;
      up[e] += h;
      down[e] -= h;
      const auto high = weights_of(spec, up, ids), low = weights_of(spec, down, ids);
      double slope = 0;
      for (size_t j = 0; j < ids.size(); ++j) {
        slope += grad_weights[j] * (high[j] - low[j]) / (2 * h);
      }
      ASSERT_NEAR(grad[e] - before[e], slope, 1e-8) << "expert " << e;
    }
  });
}

TEST_P(Router, RefusesNaNAndPlusInfinityAndNothingFinite) {
  RouterSpec spec{.score = GetParam(), .num_experts = 4, .top_k = 2};
  EXPECT_TRUE(route(spec, {1, 2, 3, 4}, {}).defined);
  EXPECT_FALSE(route(spec, {1, NAN, 3, 4}, {}).defined);
  EXPECT_FALSE(route(spec, {1, kInf, 3, 4}, {}).defined);
  EXPECT_FALSE(route(spec, {-kInf, -kInf, -kInf, -kInf}, {}).defined);
}

TEST_P(Router, MinusInfinityMasksAnExpert) {
  for_seeds(rounds(300), [](Rng& rng) {
    RouterSpec spec = random_spec(rng, GetParam());
    spec.num_groups = spec.top_groups = 1;
    auto logits = rng.vector<double>(static_cast<size_t>(spec.num_experts), -3, 3);
    int64_t open = 0;
    for (double& x : logits) {
      if (rng.chance(0.5)) x = -kInf;
      open += std::isfinite(x) ? 1 : 0;
    }
    if (open == 0) return;
    const Routed got = route(spec, logits, {});
    ASSERT_TRUE(got.defined);
    for (int64_t j = 0; j < spec.top_k; ++j) {
      const bool masked = !std::isfinite(logits[got.ids[j]]);
      ASSERT_EQ(masked, j >= open) << "open experts come first";
      ASSERT_TRUE(std::isfinite(got.weights[j]));
      if (masked) {
        ASSERT_EQ(got.weights[j], 0.0);
      }
    }
    std::vector<double> grad(logits.size(), 0.0), work(2 * logits.size());
    const auto grad_weights = rng.vector<double>(got.ids.size());
    cpu::route_token_backward<double>(spec, logits.data(), got.ids.data(), grad_weights.data(),
                                      grad.data(), work.data());
    for (size_t e = 0; e < logits.size(); ++e) {
      ASSERT_TRUE(std::isfinite(grad[e]));
      if (!std::isfinite(logits[e])) {
        ASSERT_EQ(grad[e], 0.0);
      }
    }
  });
}

// Large logits must not overflow on the way.
TEST_P(Router, ExtremeLogitsStayFinite) {
  const RouterSpec spec{.score = GetParam(), .num_experts = 4, .top_k = 3};
  const std::vector<double> logits{-1e30, 1e30, 800, -800};
  const Routed got = route<float>(spec, logits, {});
  ASSERT_TRUE(got.defined);
  for (const double weight : got.weights) EXPECT_TRUE(std::isfinite(weight));
  std::vector<float> in(logits.begin(), logits.end()), grad(4, 0.0f), work(8);
  const std::vector<float> grad_weights{1, -1, 1};
  cpu::route_token_backward<float>(spec, in.data(), got.ids.data(), grad_weights.data(),
                                   grad.data(), work.data());
  for (const float value : grad) EXPECT_TRUE(std::isfinite(value));
}

INSTANTIATE_TEST_SUITE_P(Scores, Router,
                         testing::Values(FM_SCORE_SOFTMAX, FM_SCORE_TOPK_SOFTMAX, FM_SCORE_SIGMOID,
                                         FM_SCORE_SQRT_SOFTPLUS));

}  // namespace
}  // namespace flashmoe::test
