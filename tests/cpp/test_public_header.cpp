// flashmoe/flashmoe.h: every status has its exception, views check their extents, and a layer hands
// every operand to its place.
#include <array>
#include <numeric>
#include <thread>

#include "flashmoe/flashmoe.h"
#include "layer_case.h"

namespace flashmoe::test {
namespace {

template <class Type>
void expect_raised(fm_status status) {
  try {
    api::detail::raise(status, "the text");
  } catch (const Type& error) {
    EXPECT_EQ(error.status(), status);
    EXPECT_STREQ(error.what(), "the text");
    return;
  } catch (const std::exception&) {
  }
  ADD_FAILURE() << "another exception for status " << status;
}

TEST(PublicHeader, EveryStatusHasItsException) {
  expect_raised<InvalidValueError>(FM_INVALID_VALUE);
  expect_raised<InvalidTypeError>(FM_INVALID_TYPE);
  expect_raised<RoutingError>(FM_ROUTING);
  expect_raised<RankMismatchError>(FM_MISMATCH);
  expect_raised<WaitTimeoutError>(FM_TIMEOUT);
  expect_raised<GroupAbortedError>(FM_ABORTED);
  expect_raised<OutOfMemoryError>(FM_OUT_OF_MEMORY);
  expect_raised<UnsupportedError>(FM_UNSUPPORTED);
  expect_raised<InternalError>(FM_INTERNAL);
  expect_raised<VersionMismatchError>(FM_VERSION_MISMATCH);
}

TEST(PublicHeader, ViewsAreRowMajorAndKnowTheirType) {
  std::vector<double> values(24);
  const ConstView view(values, {2, 3, 4});
  EXPECT_EQ(view.native().data, values.data());
  EXPECT_EQ(view.native().dtype, FM_F64);
  EXPECT_EQ(view.native().ndim, 3);
  EXPECT_EQ(view.native().stride[0], 12);
  EXPECT_EQ(view.native().stride[1], 4);
  EXPECT_EQ(view.native().stride[2], 1);
  const ConstView transposed = View(values.data(), {2, 4, 3}).strided({12, 1, 4});
  EXPECT_EQ(transposed.native().stride[2], 4);
  EXPECT_EQ(View(values.data(), Dtype::bf16, {5}).native().dtype, FM_BF16);
  EXPECT_FALSE(View());
}

TEST(PublicHeader, WrongExtentsAreNamed) {
  const std::array<float, 6> values{};
  const std::span<const float> span(values);
  EXPECT_THROW(ConstView(span, {2, 4}), InvalidValueError);
  EXPECT_THROW(ConstView(values.data(), {1, 1, 2, 3}), InvalidValueError);
  EXPECT_THROW(ConstView(span, {2, 3}).strided({1}), InvalidValueError);
}

TEST(PublicHeader, GroupsCarryTheErrorsOfTheLibrary) {
  EXPECT_THROW(Group::local(0), InvalidValueError);
  EXPECT_THROW(Group::processes("a/b", 0, 2), InvalidValueError);
  std::vector<Group> groups = Group::local(2);
  EXPECT_EQ(groups[1].rank(), 1);
  EXPECT_EQ(groups[1].world(), 2);
  EXPECT_THROW(groups[0].set_num_threads(-1), InvalidValueError);
  groups[0].set_timeout(std::chrono::milliseconds(20));
  float one = 1;
  int32_t id = 0;
  Layer layer(groups[0], {.hidden = 1,
                          .intermediate = 1,
                          .num_experts = 2,
                          .top_k = 1,
                          .activation = {FM_RELU, false}});
  const ExpertsForward call = {.x = {&one, {1, 1}},
                               .topk_ids = {&id, {1, 1}},
                               .topk_weights = {&one, {1, 1}},
                               .experts = {.w_up = {&one, {1, 1, 1}}, .w_down = {&one, {1, 1, 1}}},
                               .y = {&one, {1, 1}}};
  EXPECT_THROW(layer.experts(call), Error);  // y is x
  EXPECT_THROW(layer.z_rows(-1), InvalidValueError);
  EXPECT_THROW(groups[1].set("speed", 1), InvalidValueError);
  layer.use_cuda(1 << 20, nullptr);
  EXPECT_THROW(layer.experts(call), Error) << "there is no such device";
}

// The exception of another rank, through threads: the layers differ in nothing but their number.
TEST(PublicHeader, RanksThatCallDifferentLayersAreTold) {
  const std::vector<Group> groups = Group::local(2);
  std::array<int, 2> mismatches{};
  const auto run = [&](int32_t rank) {
    Layer layer(groups[static_cast<size_t>(rank)], {.hidden = 1,
                                                    .intermediate = 1,
                                                    .num_experts = 2,
                                                    .top_k = 1,
                                                    .activation = {FM_RELU, false},
                                                    .layer_id = rank});
    const float one = 1;
    const int32_t id = 0;
    float y = 0;
    try {
      layer.experts({.x = {&one, {1, 1}},
                     .topk_ids = {&id, {1, 1}},
                     .topk_weights = {&one, {1, 1}},
                     .experts = {.w_up = {&one, {1, 1, 1}}, .w_down = {&one, {1, 1, 1}}},
                     .y = {&y, {1, 1}}});
    } catch (const RankMismatchError&) {
      mismatches[static_cast<size_t>(rank)] = 1;
    }
  };
  std::thread other(run, 1);
  run(0);
  other.join();
  EXPECT_EQ(mismatches, (std::array{1, 1}));
}

TEST(PublicHeader, EveryOperandReachesItsPlace) {
  constexpr int64_t kTokens = 5, kHidden = 6, kInter = 4, kExperts = 4, kTopK = 2;
  Rng rng(3);
  const auto fill = [&](int64_t size) {
    return rng.vector<double>(static_cast<size_t>(size));
  };
  const auto x = fill(kTokens * kHidden), w_router = fill(kExperts * kHidden);
  const auto router_bias = fill(kExperts), selection_bias = fill(kExperts);
  const auto w_gate = fill(kExperts * kInter * kHidden), w_up = fill(kExperts * kInter * kHidden);
  const auto w_down = fill(kExperts * kHidden * kInter), b_up = fill(kExperts * 2 * kInter);
  const auto b_down = fill(kExperts * kHidden), grad_y = fill(kTokens * kHidden);
  const auto grad_weights = fill(kTokens * kTopK), grad_logits = fill(kTokens * kExperts);
  std::vector<int64_t> ids(kTokens * kTopK), counts(kExperts), dropped(1);
  std::vector<double> weights(kTokens * kTopK), logits(kTokens * kExperts), y(x.size());

  Layer layer(Group::alone(), {.dtype = Dtype::f64,
                               .hidden = kHidden,
                               .intermediate = kInter,
                               .num_experts = kExperts,
                               .top_k = kTopK,
                               .activation = {.limit = 0.5, .up_offset = 1.0},
                               .gate_layout = FM_GATE_SEPARATE,
                               .weight_on_input = true,
                               .capacity_factor = 0.5,
                               .routing = {.score = FM_SCORE_SIGMOID, .scale = 1.5}});
  const Router router = {.weight = {w_router, {kExperts, kHidden}},
                         .bias = {router_bias, {kExperts}},
                         .selection_bias = {selection_bias, {kExperts}}};
  const Experts experts = {.w_up = {w_up, {kExperts, kInter, kHidden}},
                           .w_down = {w_down, {kExperts, kHidden, kInter}},
                           .w_gate = {w_gate, {kExperts, kInter, kHidden}},
                           .b_up = {b_up, {kExperts, 2 * kInter}},
                           .b_down = {b_down, {kExperts, kHidden}}};
  std::vector<double> z(static_cast<size_t>(layer.z_rows(kTokens) * 2 * kInter));
  const View z_view(z, {layer.z_rows(kTokens), 2 * kInter});
  layer.moe({.x = {x, {kTokens, kHidden}},
             .router = router,
             .experts = experts,
             .topk_ids = {ids, {kTokens, kTopK}},
             .topk_weights = {weights, {kTokens, kTopK}},
             .logits = {logits, {kTokens, kExperts}},
             .y = {y, {kTokens, kHidden}},
             .z = z_view,
             .tokens_per_expert = {counts, {kExperts}},
             .dropped = {dropped, {1}}});
  EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), kTokens * kTopK);
  EXPECT_GT(dropped[0], 0);

  // The same ids and weights from outside give the same output.
  std::vector<double> y_of_experts(x.size());
  layer.experts({.x = {x, {kTokens, kHidden}},
                 .topk_ids = {ids, {kTokens, kTopK}},
                 .topk_weights = {weights, {kTokens, kTopK}},
                 .experts = experts,
                 .y = {y_of_experts, {kTokens, kHidden}}});
  EXPECT_EQ(y, y_of_experts);

  // The gradient of each operand, with and without the router in the launch: those of the experts
  // agree, and with z as without it.
  std::vector<double> grad_x(x.size()), other_grad_x(x.size()), grad_topk(kTokens * kTopK);
  std::vector<std::vector<double>> grads(5), others(5);
  const auto gradients = [&](std::vector<std::vector<double>>& to) -> ExpertGradients {
    const std::array sizes = {w_up.size(), w_down.size(), w_gate.size(), b_up.size(),
                              b_down.size()};
    for (size_t i = 0; i < sizes.size(); ++i) to[i].assign(sizes[i], -7.0);
    return {.w_up = {to[0], {kExperts, kInter, kHidden}},
            .w_down = {to[1], {kExperts, kHidden, kInter}},
            .w_gate = {to[2], {kExperts, kInter, kHidden}},
            .b_up = {to[3], {kExperts, 2 * kInter}},
            .b_down = {to[4], {kExperts, kHidden}}};
  };
  std::vector<double> grad_w_router(w_router.size(), -7.0), grad_bias(kExperts, -7.0);
  layer.moe_backward({.x = {x, {kTokens, kHidden}},
                      .router = router,
                      .topk_ids = {ids, {kTokens, kTopK}},
                      .topk_weights = {weights, {kTokens, kTopK}},
                      .logits = {logits, {kTokens, kExperts}},
                      .experts = experts,
                      .grad_y = {grad_y, {kTokens, kHidden}},
                      .grad_x = {grad_x, {kTokens, kHidden}},
                      .grad_w_router = {grad_w_router, {kExperts, kHidden}},
                      .grad_router_bias = {grad_bias, {kExperts}},
                      .grad_experts = gradients(grads),
                      .grad_weights = {grad_weights, {kTokens, kTopK}},
                      .grad_logits = {grad_logits, {kTokens, kExperts}},
                      .z = z_view});
  layer.experts_backward({.x = {x, {kTokens, kHidden}},
                          .topk_ids = {ids, {kTokens, kTopK}},
                          .topk_weights = {weights, {kTokens, kTopK}},
                          .experts = experts,
                          .grad_y = {grad_y, {kTokens, kHidden}},
                          .grad_x = {other_grad_x, {kTokens, kHidden}},
                          .grad_topk_weights = {grad_topk, {kTokens, kTopK}},
                          .grad_experts = gradients(others)});
  EXPECT_EQ(grads, others);
  EXPECT_NE(grad_x, other_grad_x) << "the router's part of grad_x";
  for (const auto& grad : grads) EXPECT_EQ(std::count(grad.begin(), grad.end(), -7.0), 0);
  EXPECT_EQ(std::count(grad_w_router.begin(), grad_w_router.end(), -7.0), 0);
  EXPECT_EQ(std::count(grad_bias.begin(), grad_bias.end(), -7.0), 0);
}

}  // namespace
}  // namespace flashmoe::test
