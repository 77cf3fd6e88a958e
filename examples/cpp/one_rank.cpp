// A layer with its router on one rank: forward, backward, and what a wrong call says.
#include <flashmoe/flashmoe.h>

#include <cmath>
#include <iostream>
#include <random>
#include <vector>

namespace {

constexpr int64_t kTokens = 12, kHidden = 16, kInter = 32, kExperts = 8, kTopK = 2;

std::vector<float> normal(int64_t size, float deviation) {
  static std::mt19937 engine(1);
  std::normal_distribution<float> draw(0.0f, deviation);
  std::vector<float> values(static_cast<size_t>(size));
  for (float& value : values) value = draw(engine);
  return values;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * double{b[i]};
  return sum;
}

}  // namespace

int main() {
  flashmoe::Layer layer(flashmoe::Group::alone(), {.dtype = flashmoe::Dtype::f32,
                                                   .hidden = kHidden,
                                                   .intermediate = kInter,
                                                   .num_experts = kExperts,
                                                   .top_k = kTopK});

  std::vector<float> x = normal(kTokens * kHidden, 1.0f);
  const std::vector<float> w_router = normal(kExperts * kHidden, 0.3f);
  const std::vector<float> w_up = normal(kExperts * 2 * kInter * kHidden, 0.2f);
  const std::vector<float> w_down = normal(kExperts * kHidden * kInter, 0.2f);
  std::vector<int32_t> ids(kTokens * kTopK);
  std::vector<float> weights(kTokens * kTopK), logits(kTokens * kExperts), y(kTokens * kHidden);

  const flashmoe::Router router = {.weight = {w_router, {kExperts, kHidden}}};
  const flashmoe::Experts experts = {.w_up = {w_up, {kExperts, 2 * kInter, kHidden}},
                                     .w_down = {w_down, {kExperts, kHidden, kInter}}};
  const auto forward = [&](const flashmoe::ConstView& tokens) {
    layer.moe({.x = tokens,
               .router = router,
               .experts = experts,
               .topk_ids = {ids, {kTokens, kTopK}},
               .topk_weights = {weights, {kTokens, kTopK}},
               .logits = {logits, {kTokens, kExperts}},
               .y = {y, {kTokens, kHidden}}});
    return dot(y, y) / 2;  // the loss
  };
  const double loss = forward({x, {kTokens, kHidden}});
  std::cout << flashmoe::version() << ", " << flashmoe::build_info() << "\nloss " << loss << '\n';

  std::vector<float> grad_x(x.size()), grad_w_down(w_down.size());
  layer.moe_backward({.x = {x, {kTokens, kHidden}},
                      .router = router,
                      .topk_ids = {ids, {kTokens, kTopK}},
                      .topk_weights = {weights, {kTokens, kTopK}},
                      .logits = {logits, {kTokens, kExperts}},
                      .experts = experts,
                      .grad_y = {y, {kTokens, kHidden}},
                      .grad_x = {grad_x, {kTokens, kHidden}},
                      .grad_experts = {.w_down = {grad_w_down, {kExperts, kHidden, kInter}}}});

  // y is linear in w_down, so <w_down, grad> = <y, y>: twice the loss. A step against grad_x must
  // lower the loss by about its squared length.
  const double linear = dot(w_down, grad_w_down) / (2 * loss);
  const double step = 1e-3 * loss / dot(grad_x, grad_x);
  for (size_t i = 0; i < x.size(); ++i) x[i] -= static_cast<float>(step) * grad_x[i];
  const double descent = (loss - forward({x, {kTokens, kHidden}})) / (step * dot(grad_x, grad_x));
  std::cout << "<w_down, grad> / <y, y> " << linear << ", descent / predicted " << descent << '\n';

  try {
    forward({x, {kTokens / 2, kHidden * 2}});
  } catch (const flashmoe::InvalidValueError& error) {
    std::cout << "a wrong call: " << error.what() << '\n';
    return std::abs(linear - 1) < 1e-3 && std::abs(descent - 1) < 1e-2 ? 0 : 1;
  }
  return 1;
}
