// Values and gradients of the layer through the C ABI, against the layer written plainly.
#include "plain_layer.h"

namespace flashmoe::test {
namespace {

fm_layer random_layer(Rng& rng, int32_t dtype, int32_t world) {
  const int64_t experts = world * rng.between(1, std::max(2, 8 / world));
  fm_layer layer =
      plain_layer(dtype, rng.pick<int64_t>({1, 3, 24, 40, 61}), rng.pick<int64_t>({1, 5, 16, 33}),
                  experts, rng.between(1, std::min<int64_t>(experts, 4)));
  draw_options(rng, layer);
  return layer;
}

std::vector<int64_t> random_tokens(Rng& rng, int32_t world, int64_t most) {
  std::vector<int64_t> tokens;
  for (int32_t rank = 0; rank < world; ++rank) {
    tokens.push_back(rng.chance(0.2) ? 0 : rng.between(1, most));
  }
  return tokens;
}

CaseOptions random_options(Rng& rng, const fm_layer& layer, int32_t world) {
  CaseOptions o;
  o.world = world;
  o.tokens = random_tokens(rng, world, kSanitized ? 80 : 150);
  o.biases = rng.chance(0.4);
  o.router = rng.chance(0.5);
  o.router_bias = rng.chance(0.7);
  o.selection_bias = rng.chance(0.5) && layer.score != FM_SCORE_TOPK_SOFTMAX;
  o.transposed = rng.chance(0.4);
  // A transposed row or column of one element has no stride that tells the order apart.
  const bool flat = layer.hidden == 1 || layer.intermediate == 1;
  o.gap = o.transposed && flat ? 0 : rng.pick<int64_t>({0, 0, 3});
  o.wide_gradients = rng.chance(0.3);
  o.wide_router = rng.chance(0.5);
  o.sentinels = rng.pick({0.0, 0.1, 1.0, 0.1});
  o.duplicates = rng.chance(0.3);
  o.save_z = world == 1 && rng.chance(0.5);
  o.id_dtype = rng.pick<int32_t>({FM_I32, FM_I64});
  return o;
}

class Layer : public testing::TestWithParam<std::tuple<int32_t, int32_t>> {
 protected:
  int32_t dtype() const { return std::get<0>(GetParam()); }
  int32_t world() const { return std::get<1>(GetParam()); }
};

TEST_P(Layer, ValuesAndGradientsAreWithinTheYardstick) {
  Yardstick yardstick(epsilon_of(dtype()));
  for_seeds((kSanitized ? 24 : 120) / world(), [&](Rng& rng) {
    const fm_layer layer = random_layer(rng, dtype(), world());
    LayerCase c(rng, layer, random_options(rng, layer, world()));
    const Ranks group(world());
    group.set("num_threads", rng.between32(1, 3));
    c.poison_outputs();
    expect_all_ok(c.forward(group));
    if (testing::Test::HasFailure()) return;
    for (int32_t rank = 0; rank < world(); ++rank) {
      const fm_stats stats = group.stats(rank);
      EXPECT_EQ(stats.scratch_bytes, stats.allocated_bytes) << "the table is what is allocated";
      EXPECT_EQ(stats.symmetric_bytes > 0, world() > 1);
    }
    expect_all_ok(c.backward(group));
    if (!testing::Test::HasFailure()) add_to(yardstick, c, true);
  });
  yardstick.check();
}

std::string layer_name(const testing::TestParamInfo<std::tuple<int32_t, int32_t>>& info) {
  constexpr const char* kNames[] = {"f64", "f32", "bf16", "f16"};
  return std::string(kNames[std::get<0>(info.param)]) + "_ranks" +
         std::to_string(std::get<1>(info.param));
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Layer,
                         testing::Combine(testing::Values(FM_F64, FM_F32, FM_BF16, FM_F16),
                                          testing::Values(1, 2, 3, 4)),
                         layer_name);

// Sizes that take several column blocks, up tiles, weight tiles and row blocks.
TEST(LargeLayer, TakesEveryTileBranch) {
  struct Sizes {
    int32_t world;
    int64_t hidden, intermediate, experts, tokens;
  };
  const std::vector<Sizes> all = kSanitized ? std::vector<Sizes>{{2, 530, 24, 2, 70}}
                                            : std::vector<Sizes>{{1, 1600, 24, 2, 70},
                                                                 {2, 1100, 16, 4, 90},
                                                                 {2, 40, 8, 70, 90},
                                                                 {1, 24, 1100, 3, 70},
                                                                 {2, 40, 530, 2, 300}};
  for (const Sizes& s : all) {
    SCOPED_TRACE("hidden " + std::to_string(s.hidden));
    Rng rng(11);
    fm_layer layer = plain_layer(FM_F32, s.hidden, s.intermediate, s.experts, 2);
    CaseOptions o{.world = s.world, .tokens = {s.tokens, s.tokens / 2}};
    o.router = s.experts > 64;  // more than one router-gradient tile
    o.tokens.resize(static_cast<size_t>(s.world));
    for (const bool on_input : {false, true}) {
      layer.weight_on_input = on_input ? 1 : 0;
      LayerCase c(rng, layer, o);
      const Ranks group(s.world);
      group.set("num_threads", 3);
      expect_all_ok(c.forward(group));
      expect_all_ok(c.backward(group));
      expect_within_yardstick(c, true);
    }
  }
}

// --- exact properties -----------------------------------------------------------------------

struct ExactCase {
  ExactCase(int32_t world, bool router) : rng(5) {
    layer = plain_layer(FM_F32, 24, 16, 2 * world, 2);
    CaseOptions o{.world = world, .tokens = {}};
    o.tokens = {70, 0, 129, 3};
    o.tokens.resize(static_cast<size_t>(world));
    o.router = router;
    o.biases = true;
    made = std::make_unique<LayerCase>(rng, layer, o);
  }
  Rng rng;
  fm_layer layer;
  std::unique_ptr<LayerCase> made;
};

std::vector<uint8_t> run_once(LayerCase& c, const Ranks& group) {
  c.poison_outputs();
  expect_all_ok(c.forward(group));
  expect_all_ok(c.backward(group));
  return c.output_bytes();
}

TEST(Determinism, SameBitsUnderJitterAndAnyNumberOfThreads) {
  for (const int32_t world : {1, 2, 4}) {
    for (const bool router : {false, true}) {
      ExactCase e(world, router);
      const Ranks calm(world);
      calm.set("num_threads", 1);
      const auto first = run_once(*e.made, calm);
      const Ranks shaken(world);
      shaken.set("jitter_us", 200);
      for (int run = 0; run < rounds(12); ++run) {
        shaken.set("num_threads", 1 + run % 3);
        ASSERT_TRUE(run_once(*e.made, shaken) == first) << world << " ranks, run " << run;
      }
    }
  }
}

// Four column blocks pass through a ring of two while return chunks are delayed.
TEST(Determinism, TheRingKeepsAColumnBlockUntilItIsReturned) {
  for (const auto& [world, on_input] : {std::pair{1, 0}, {1, 1}, {2, 0}, {2, 1}}) {
    Rng rng(12);
    CaseOptions o{.world = world, .tokens = {130, 70}};
    o.tokens.resize(static_cast<size_t>(world));
    fm_layer layer = plain_layer(FM_F32, 1600, 8, 2 * world, 2);
    layer.weight_on_input = on_input;
    LayerCase c(rng, layer, o);
    const auto expected = calm_bytes(c, true);
    const Ranks shaken(world);
    shaken.set("jitter_us", 300);
    shaken.set("num_threads", 3);
    for (int run = 0; run < rounds(8); ++run) {
      ASSERT_TRUE(run_once(c, shaken) == expected) << world << " ranks, run " << run;
    }
  }
}

TEST(Backward, IdleExpertsHaveGradientsOfExactlyZero) {
  for (const int32_t world : {1, 3}) {
    ExactCase e(world, false);
    LayerCase& c = *e.made;
    for (auto& rank : c.ranks) {  // all tokens on expert 1
      Buffer& ids = rank.named("topk_ids");
      ids.each([&](int64_t t, int64_t j, int64_t) { ids.set(j == 0 ? 1 : -1, t, j); });
    }
    const Ranks group(world);
    run_once(c, group);
    for (int64_t expert = 0; expert < c.layer.num_experts; ++expert) {
      double up = 0, down = 0;
      for (int64_t i = 0; i < 2 * c.layer.intermediate; ++i) {
        up += std::abs(c.up_bias("grad_", expert, i));
        for (int64_t h = 0; h < c.layer.hidden; ++h) {
          up += std::abs(c.up_weight("grad_", expert, i, h));
        }
      }
      for (int64_t h = 0; h < c.layer.hidden; ++h) {
        down += std::abs(c.of_expert("grad_b_down", expert, h, 0));
        for (int64_t i = 0; i < c.layer.intermediate; ++i) {
          down += std::abs(c.of_expert("grad_w_down", expert, h, i));
        }
      }
      EXPECT_EQ(up > 0 && down > 0, expert == 1) << "expert " << expert;
      EXPECT_EQ(up == 0 && down == 0, expert != 1) << "expert " << expert;
    }
  }
}

TEST(Forward, ATokenOfSentinelsIsExactlyZero) {
  ExactCase e(2, false);
  LayerCase& c = *e.made;
  Buffer& ids = c.ranks[0].named("topk_ids");
  for (const int64_t token : {0, 63, 64, 69}) {
    ids.set(-1, token, 0);
    ids.set(1e6, token, 1);
  }
  const Ranks group(2);
  run_once(c, group);
  for (const int64_t token : {0, 63, 64, 69}) {
    for (int64_t h = 0; h < c.layer.hidden; ++h) {
      ASSERT_EQ(c.ranks[0].named("y").get(token, h), 0.0);
      ASSERT_EQ(c.ranks[0].named("grad_x").get(token, h), 0.0);
    }
    ASSERT_EQ(c.ranks[0].named("grad_topk_weights").get(token, 1), 0.0);
  }
}

// NaN in one token stays in its row; every other row keeps its bits.
TEST(Forward, NaNStaysInItsToken) {
  for (const int32_t world : {1, 2}) {
    ExactCase e(world, false);
    LayerCase& c = *e.made;
    const Ranks group(world);
    c.poison_outputs();
    expect_all_ok(c.forward(group));
    Buffer clean = c.ranks[0].named("y");
    for (int64_t h = 0; h < c.layer.hidden; ++h) c.ranks[0].named("x").set(NAN, 7, h);
    expect_all_ok(c.forward(group));
    Buffer& y = c.ranks[0].named("y");
    y.each([&](int64_t t, int64_t h, int64_t) {
      if (t == 7) {
        ASSERT_TRUE(std::isnan(y.get(t, h)));
      } else {
        ASSERT_EQ(y.get(t, h), clean.get(t, h)) << "token " << t;
      }
    });
  }
}

// One slot over the capacity is dropped: the last in slot order.
TEST(Capacity, DropsTheLastSlotAndItsGradients) {
  Rng rng(2);
  fm_layer layer = plain_layer(FM_F64, 8, 8, 4, 1);
  layer.capacity_factor = 0.5;  // ceil(0.5 * 64 / 4) = 8
  LayerCase c(rng, layer, {.world = 1, .tokens = {64}});
  Buffer& ids = c.ranks[0].named("topk_ids");
  ids.each([&](int64_t t, int64_t, int64_t) { ids.set(t % 7 == 0 ? 2 : (t < 8 ? 1 : -1), t, 0); });
  const Ranks group(1);
  run_once(c, group);
  EXPECT_EQ(c.ranks[0].named("dropped").get(0), 2.0);  // 10 slots of expert 2
  EXPECT_EQ(c.ranks[0].named("tokens_per_expert").get(2), 10.0);
  for (int64_t t = 0; t < 64; t += 7) {
    double sum = 0;
    for (int64_t h = 0; h < 8; ++h) sum += std::abs(c.ranks[0].named("y").get(t, h));
    EXPECT_EQ(sum == 0.0, t >= 56) << "token " << t;
    EXPECT_EQ(c.ranks[0].named("grad_topk_weights").get(t, 0) == 0.0, t >= 56);
  }
  expect_within_yardstick(c, true);
}

TEST(Backward, SavedZGivesTheSameGradientsWithinTheYardstick) {
  Rng rng(4);
  for (const int32_t layout : {FM_GATE_CONCATENATED, FM_GATE_INTERLEAVED, FM_GATE_SEPARATE}) {
    fm_layer layer = plain_layer(FM_F64, 24, 40, 3, 2);
    layer.gate_layout = layout;
    CaseOptions o{.world = 1, .tokens = {90}};
    o.save_z = true;
    LayerCase saved(rng, layer, o);
    LayerCase without = saved;
    without.ranks[0].out.erase("z");
    const Ranks group(1);
    int64_t rows = 0;
    expect_ok(outcome(fm_z_rows(group[0], &layer, 90, &rows)));
    EXPECT_LE(rows, saved.ranks[0].named("z").shape(0));
    EXPECT_GE(rows, 180);
    run_once(saved, group);
    run_once(without, group);
    EXPECT_EQ(saved.ranks[0].named("grad_x").bytes(), without.ranks[0].named("grad_x").bytes());
  }
}

TEST(Stats, RowsAndTrafficAreCounted) {
  Rng rng(6);
  const fm_layer layer = plain_layer(FM_F32, 16, 8, 4, 2);  // experts 0, 1 | 2, 3
  LayerCase c(rng, layer, {.world = 2, .tokens = {10, 6}});
  for (auto& rank : c.ranks) {
    Buffer& ids = rank.named("topk_ids");  // both slots on rank 1
    ids.each([&](int64_t t, int64_t j, int64_t) { ids.set(2.0 + j, t, j); });
  }
  const Ranks group(2);
  expect_all_ok(c.forward(group));
  const fm_stats first = group.stats(0), second = group.stats(1);
  EXPECT_EQ(first.rows, 0);
  EXPECT_EQ(second.rows, 32);
  EXPECT_EQ(first.rows_sent, 10);
  EXPECT_EQ(first.rows_sent_plain, 20);
  EXPECT_EQ(second.rows_sent, 0);
  EXPECT_EQ(second.bytes_sent, 10 * 16 * 4 + 2 * 4) << "one partial a token, and the counts";
  EXPECT_EQ(first.epoch, second.epoch);
}

}  // namespace
}  // namespace flashmoe::test
