// Two ranks as threads, four experts on each: every rank gets what one rank alone would give.
#include <flashmoe/flashmoe.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int32_t kRanks = 2;
constexpr int64_t kTokens = 10, kHidden = 16, kInter = 24, kExperts = 8, kTopK = 3;
constexpr flashmoe::LayerConfig kConfig = {.dtype = flashmoe::Dtype::f64,
                                           .hidden = kHidden,
                                           .intermediate = kInter,
                                           .num_experts = kExperts,
                                           .top_k = kTopK,
                                           .activation = {.kind = FM_RELU, .gated = false}};

struct Inputs {
  std::vector<double> x, topk_weights, w_up, w_down;
  std::vector<int64_t> topk_ids;
};

Inputs make_inputs() {
  std::mt19937 engine(1);
  const auto fill = [&](auto& values, int64_t size, auto draw) {
    values.resize(static_cast<size_t>(size));
    for (auto& value : values) value = draw(engine);
  };
  Inputs in;
  fill(in.x, kRanks * kTokens * kHidden, std::normal_distribution<>());
  fill(in.topk_weights, kRanks * kTokens * kTopK, std::uniform_real_distribution<>());
  fill(in.topk_ids, kRanks * kTokens * kTopK, std::uniform_int_distribution<int64_t>(0, 7));
  fill(in.w_up, kExperts * kInter * kHidden, std::normal_distribution<>(0, 0.3));
  fill(in.w_down, kExperts * kHidden * kInter, std::normal_distribution<>(0, 0.3));
  return in;
}

// One rank of `world`: its share of the tokens and of the experts.
void run_rank(flashmoe::Group group, const Inputs& in, double* y) {
  const int64_t rank = group.rank(), world = group.world();
  const int64_t tokens = kRanks * kTokens / world, experts = kExperts / world;
  flashmoe::Layer layer(std::move(group), kConfig);
  const auto part = [](const auto& values, int64_t offset) {
    return values.data() + offset;
  };
  const double* w_up = part(in.w_up, rank * experts * kInter * kHidden);
  const double* w_down = part(in.w_down, rank * experts * kHidden * kInter);
  layer.experts({.x = {part(in.x, rank * tokens * kHidden), {tokens, kHidden}},
                 .topk_ids = {part(in.topk_ids, rank * tokens * kTopK), {tokens, kTopK}},
                 .topk_weights = {part(in.topk_weights, rank * tokens * kTopK), {tokens, kTopK}},
                 .experts = {.w_up = {w_up, {experts, kInter, kHidden}},
                             .w_down = {w_down, {experts, kHidden, kInter}}},
                 .y = {y + rank * tokens * kHidden, {tokens, kHidden}}});
  std::cout << "rank " + std::to_string(rank) + " sent " +
                   std::to_string(layer.group().stats().rows_sent) + " rows\n";
}

}  // namespace

int main() {
  const Inputs in = make_inputs();
  std::vector<double> together(in.x.size()), alone(in.x.size());
  {
    std::vector<std::jthread> ranks;
    for (flashmoe::Group& group : flashmoe::Group::local(kRanks)) {
      ranks.emplace_back(run_rank, group, std::cref(in), together.data());
    }
  }
  run_rank(flashmoe::Group::alone(), in, alone.data());

  double largest = 0, error = 0;
  for (size_t i = 0; i < alone.size(); ++i) {
    largest = std::max(largest, std::abs(alone[i]));
    error = std::max(error, std::abs(alone[i] - together[i]));
  }
  std::cout << "two ranks against one: " << error / largest << '\n';
  return error <= 0x1p-26 * largest && largest > 0 ? 0 : 1;  // half the digits of a double
}
