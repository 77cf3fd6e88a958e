// The CUDA engine's forward and backward, run by the emulator (tests/emulator), through the C ABI:
// values and gradients against the layer written plainly, routing against the CPU engine.
#include <cstdlib>

#include "plain_layer.h"
#include "sanitizers.h"

namespace flashmoe::test {
namespace {

constexpr int32_t kDevices = 2;

// Before the library looks for devices. From this seed on, every launch has its own order of
// threads.
class Devices : public testing::Environment {
 public:
  void SetUp() override {
    setenv("FLASHMOE_EMULATED_GPUS", std::to_string(kDevices).c_str(), 0);
    setenv("FLASHMOE_EMULATED_SEED", "1", 0);
    if (emulator::kSeesRaces) setenv("FLASHMOE_TIMEOUT_S", "240", 0);  // for threads that are slow
  }
};
const auto* const kDevicesAreSet = testing::AddGlobalTestEnvironment(new Devices);

// Sizes and options that the kernels take, all of them small: an emulated SM is slow.
fm_layer random_layer(Rng& rng, int32_t dtype, int32_t world) {
  const int64_t experts = world * rng.pick<int64_t>({2, 3, 5, 8});  // to 16
  fm_layer layer = plain_layer(dtype, rng.pick<int64_t>({64, 128, 192}),
                               rng.pick<int64_t>({64, 128}), experts, rng.between(1, 3));
  layer.top_k = std::min(layer.top_k, experts);
  if (experts % 2 == 0 && rng.chance(0.3)) {
    layer.num_groups = 2;
    layer.top_groups = layer.top_k <= experts / 2 ? rng.between(1, 2) : 2;
    layer.group_top = rng.between(1, 2);
  }
  draw_options(rng, layer);
  return layer;
}

CaseOptions random_options(Rng& rng, const fm_layer& layer, std::vector<int64_t> tokens) {
  CaseOptions o;
  o.world = static_cast<int32_t>(tokens.size());
  o.tokens = std::move(tokens);
  o.biases = rng.chance(0.5);
  o.router = rng.chance(0.5);
  o.router_bias = rng.chance(0.7);
  o.selection_bias = rng.chance(0.5) && layer.score != FM_SCORE_TOPK_SOFTMAX;
  o.gap = rng.pick<int64_t>({0, 0, 8});
  o.wide_router = rng.chance(0.5);
  o.sentinels = rng.pick({0.0, 0.1, 1.0, 0.1});
  o.duplicates = rng.chance(0.3);
  o.id_dtype = rng.pick<int32_t>({FM_I32, FM_I64});
  o.device_type = FM_DEVICE_CUDA;
  return o;
}

// Waits for the launches and raises what they reported.
void finish(const Ranks& group) {
  for (int32_t rank = 0; rank < group.world(); ++rank) group.stats(rank);
}

void expect_near(RankOperands& got, RankOperands& want, const std::string& name, double relative) {
  const Buffer& values = want.named(name);
  if (!values.present()) return;
  values.each([&](int64_t i, int64_t j, int64_t k) {
    const double right = values.get(i, j, k);
    ASSERT_NEAR(got.named(name).get(i, j, k), right, relative * (1 + std::abs(right)))
        << name << "[" << i << ", " << j << "]";
  });
}

// Of a fused router: the CPU engine's logits, experts and weights.
void expect_routing_of_cpu(LayerCase& got) {
  constexpr double kLogits = 1e-4;
  LayerCase want = got;
  want.options.device_type = FM_DEVICE_HOST;
  want.poison_outputs();
  const Ranks group(want.options.world);
  expect_all_ok(want.forward(group));
  for (size_t rank = 0; rank < want.ranks.size(); ++rank) {
    expect_near(got.ranks[rank], want.ranks[rank], "logits", kLogits);
    expect_near(got.ranks[rank], want.ranks[rank], "topk_ids", 0);
    expect_near(got.ranks[rank], want.ranks[rank], "topk_weights", kLogits);
  }
}

// What one launch of each direction leaves behind, the next one of the group finds.
void run_case(LayerCase& c, const Ranks& group, bool backward, Yardstick& yardstick) {
  c.poison_outputs();
  expect_all_ok(c.forward(group));
  finish(group);
  if (testing::Test::HasFailure()) return;
  if (c.options.router) expect_routing_of_cpu(c);
  if (backward) {
    expect_all_ok(c.backward(group));
    finish(group);
  }
  if (!testing::Test::HasFailure()) add_to(yardstick, c, backward);
}

using Tokens = std::vector<int64_t>;  // of each rank
using Sizes = std::tuple<int32_t, Tokens>;

class Emulated : public testing::TestWithParam<Sizes> {
 protected:
  static constexpr int64_t kMostTokens = 200, kMostHidden = 192, kMostExperts = 16, kMostTopK = 3;

  // change(rng, layer, options): of what was drawn.
  template <class Change>
  void run(int num_seeds, bool backward, Change&& change) {
    const auto& [dtype, tokens] = GetParam();
    Yardstick yardstick(epsilon_of(dtype));
    const Ranks group(static_cast<int32_t>(tokens.size()));
    reserve(group);
    const int most_seeds = emulator::kSeesRaces ? 2 : num_seeds;
    for_seeds(std::min(num_seeds, most_seeds), [&, dtype = dtype, tokens = tokens](Rng& rng) {
      fm_layer layer = random_layer(rng, dtype, group.world());
      CaseOptions options = random_options(rng, layer, tokens);
      change(rng, layer, options);
      LayerCase c(rng, layer, options);
      run_case(c, group, backward, yardstick);
    });
    if (!HasFailure()) yardstick.check();
  }

 private:
  static void reserve(const Ranks& group) {
    const fm_capacity most{.struct_size = sizeof(fm_capacity),
                           .flags = 0,
                           .max_tokens = kMostTokens,
                           .hidden = kMostHidden,
                           .top_k = kMostTopK,
                           .num_experts = kMostExperts};
    for (int32_t rank = 0; rank < group.world(); ++rank) {
      expect_ok(outcome(fm_group_reserve(group[rank], &most)));
    }
  }
};

// Both are the same source to ThreadSanitizer, which takes ten times as long.
std::vector<int32_t> dtypes() {
  if (emulator::kSeesRaces) return {FM_BF16};
  return {FM_BF16, FM_F16};
}

std::string name_of(const testing::TestParamInfo<Sizes>& info) {
  const auto& [dtype, tokens] = info.param;
  std::string name = dtype == FM_BF16 ? "bf16" : "f16";
  for (const int64_t count : tokens) name.append("_").append(std::to_string(count));
  return name;
}

// --- few tokens ---------------------------------------------------------------------------------

class EmulatedFewTokens : public Emulated {};

TEST_P(EmulatedFewTokens, ValuesAreWithinTheYardstick) {
  run(8, false, [](Rng&, fm_layer&, CaseOptions&) {});
}

INSTANTIATE_TEST_SUITE_P(Tokens, EmulatedFewTokens,
                         testing::Combine(testing::ValuesIn(dtypes()),
                                          testing::Values(Tokens{1}, Tokens{3}, Tokens{8})),
                         name_of);

// --- the forward --------------------------------------------------------------------------------

class EmulatedForward : public Emulated {};

TEST_P(EmulatedForward, ValuesAreWithinTheYardstick) {
  run(3, false, [](Rng& rng, fm_layer&, CaseOptions& options) {
    options.transposed = rng.chance(0.5);
    options.save_z = rng.chance(0.5);
  });
}

INSTANTIATE_TEST_SUITE_P(Tokens, EmulatedForward,
                         testing::Combine(testing::ValuesIn(dtypes()),
                                          testing::Values(Tokens{0}, Tokens{9}, Tokens{70},
                                                          Tokens{200})),
                         name_of);

// --- the backward -------------------------------------------------------------------------------

class EmulatedBackward : public Emulated {};

TEST_P(EmulatedBackward, ValuesAndGradientsAreWithinTheYardstick) {
  run(3, true, [](Rng& rng, fm_layer&, CaseOptions& options) {
    options.transposed = rng.chance(0.5);
    options.wide_gradients = rng.chance(0.3);
    options.save_z = rng.chance(0.5);
  });
}

INSTANTIATE_TEST_SUITE_P(Tokens, EmulatedBackward,
                         testing::Combine(testing::ValuesIn(dtypes()),
                                          testing::Values(Tokens{3}, Tokens{40}, Tokens{150})),
                         name_of);

// --- two ranks ----------------------------------------------------------------------------------

class EmulatedRanks : public Emulated {};

TEST_P(EmulatedRanks, ValuesAndGradientsAreWithinTheYardstick) {
  run(2, true, [](Rng& rng, fm_layer&, CaseOptions& options) {
    options.transposed = rng.chance(0.5);
    options.wide_gradients = rng.chance(0.3);
  });
}

INSTANTIATE_TEST_SUITE_P(Tokens, EmulatedRanks,
                         testing::Combine(testing::ValuesIn(dtypes()),
                                          testing::Values(Tokens{8, 8}, Tokens{70, 0},
                                                          Tokens{30, 100})),
                         name_of);

// --- sizes that take other branches -------------------------------------------------------------

struct Large {
  int64_t tokens, hidden, intermediate, experts;
  bool backward;
  int64_t top_k = 2;
};

void expect_within_yardstick(const Large& sizes) {
  Rng rng(7);
  const fm_layer layer =
      plain_layer(FM_BF16, sizes.hidden, sizes.intermediate, sizes.experts, sizes.top_k);
  CaseOptions options{.world = 1, .tokens = {sizes.tokens}};
  options.router = true;
  options.biases = true;
  options.device_type = FM_DEVICE_CUDA;
  LayerCase c(rng, layer, options);
  Yardstick yardstick(epsilon_of(layer.dtype));
  run_case(c, Ranks(1), sizes.backward, yardstick);
  if (!testing::Test::HasFailure()) yardstick.check();
}

TEST(EmulatedSizes, WithMoreTokensThanTeamsThatChooseAreWithinTheYardstick) {
  expect_within_yardstick({30, 64, 64, 1024, false, 1});
}

// Of the down product's weights three boxes an expert, so that a stage has those of two experts and
// the last one of a unit may have one; of the router's sum, parts of no depth.
TEST(EmulatedFewTokens, WithStagesOfTwoExpertsAreWithinTheYardstick) {
  for (const int64_t tokens : {1, 2, 5}) {
    expect_within_yardstick({tokens, 640, 704, 5, false, 3});
  }
}

// Units of more stages than the ring of weights has, by depth or by experts; odd numbers of chunks.
// Every launch has another order of threads and copies.
TEST(SlowEmulatedFewTokens, WithLongUnitsAreWithinTheYardstick) {
  for (int launch = 0; launch < 10; ++launch) {
    expect_within_yardstick({2, 4160, 64, 2, false, 1});
    expect_within_yardstick({3, 64, 832, 40, false, 32});
  }
  expect_within_yardstick({8, 192, 320, 200, false, 5});
}

class SlowEmulatedSizes : public testing::TestWithParam<Large> {};

TEST_P(SlowEmulatedSizes, AreWithinTheYardstick) { expect_within_yardstick(GetParam()); }

INSTANTIATE_TEST_SUITE_P(
    All, SlowEmulatedSizes,
    testing::Values(Large{1100, 64, 64, 3, true},      // histograms that are scanned
                    Large{1030, 192, 64, 160, false},  // pairs of one tile; two blocks of experts
                    Large{1030, 640, 64, 40, false},   // a pair's weights of ten steps
                    Large{20, 64, 64, 200, true},      // a table of experts in scratch
                    Large{20, 1152, 64, 2, true},      // column blocks
                    Large{4, 640, 576, 12, false},     // long sums
                    Large{30, 640, 576, 3, true}),
    [](const auto& info) {
      return "tokens" + std::to_string(info.param.tokens) + "_hidden" +
             std::to_string(info.param.hidden) + "_experts" + std::to_string(info.param.experts);
    });

// --- exact properties ---------------------------------------------------------------------------

TEST(SlowEmulatedDeterminism, SameBitsInAnyOrderOfThreadsAndOnAnyNumberOfSms) {
  for (const Tokens& tokens : {Tokens{5}, Tokens{90}, Tokens{40, 70}}) {
    SCOPED_TRACE("tokens " + std::to_string(tokens.front()));
    Rng rng(9);
    const auto world = static_cast<int32_t>(tokens.size());
    const fm_layer layer = plain_layer(FM_BF16, 128, 128, 8, 2);
    CaseOptions options{.world = world, .tokens = tokens};
    options.router = true;
    options.biases = true;
    options.device_type = FM_DEVICE_CUDA;
    LayerCase c(rng, layer, options);
    const Ranks group(world);
    std::vector<uint8_t> first;
    for (const int32_t max_sms : {0, 2, 0}) {
      group.set("max_sms", max_sms);
      c.poison_outputs();
      expect_all_ok(c.forward(group));
      expect_all_ok(c.backward(group));
      finish(group);
      if (first.empty()) first = c.output_bytes();
      ASSERT_TRUE(c.output_bytes() == first) << "max_sms " << max_sms;
    }
  }
}

// --- what launches report -----------------------------------------------------------------------

TEST(EmulatedReports, ALogitThatIsNoNumberIsAnErrorOnceAndOfItsTokenAlone) {
  Rng rng(3);
  const fm_layer layer = plain_layer(FM_BF16, 64, 64, 4, 2);
  CaseOptions options{.world = 1, .tokens = {4}};
  options.router = true;
  options.device_type = FM_DEVICE_CUDA;
  LayerCase c(rng, layer, options);
  c.ranks[0].named("x").set(NAN, 2, 5);
  const Ranks group(1);
  c.poison_outputs();
  expect_all_ok(c.forward(group));
  fm_stats stats{};
  stats.struct_size = sizeof(stats);
  expect_error(outcome(fm_group_stats(group[0], &stats)), FM_ROUTING, {"token 2"});
  expect_ok(outcome(fm_group_stats(group[0], &stats)));
  const Buffer& y = c.ranks[0].named("y");
  y.each([&](int64_t t, int64_t h, int64_t) {
    ASSERT_EQ(std::isnan(y.get(t, h)), t == 2) << "token " << t;
  });
}

TEST(EmulatedReports, ADeviceThatIsNotThereIsRefused) {
  Rng rng(4);
  const fm_layer layer = plain_layer(FM_F16, 64, 64, 4, 2);
  LayerCase c(rng, layer, {.world = 1, .tokens = {4}});
  fm_forward_args args = c.ranks[0].forward_args();
  args.device_type = FM_DEVICE_CUDA;
  args.device = kDevices;
  const Ranks group(1);
  expect_error(outcome(fm_forward(group[0], &layer, &args)), FM_INVALID_VALUE, {"device is 2"});
}

}  // namespace
}  // namespace flashmoe::test
