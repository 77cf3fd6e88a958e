// The protocol between ranks, attacked: growth, epochs across the wrap, failures, two threads.
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <fstream>

#include "base/error.h"
#include "fabric/fabric.h"
#include "fabric/wait.h"
#include "group_common.h"
#include "plain_layer.h"

namespace flashmoe::test {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A wait ends this soon after an abort; a sanitized program on a loaded machine needs longer.
constexpr double kPromptly = kSanitized ? 5.0 : 0.1;

std::vector<int64_t> random_tokens(Rng& rng, int32_t world, int64_t most) {
  std::vector<int64_t> tokens;
  for (int32_t rank = 0; rank < world; ++rank) {
    tokens.push_back(most == 0 || rng.chance(0.2) ? 0 : rng.between(1, most));
  }
  return tokens;
}

// --- growth and state -----------------------------------------------------------------------

TEST(Growth, TokensGrowAndShrinkAndSizesChange) {
  for (const int32_t world : {2, 3}) {
    const Ranks group(world);
    Rng rng(static_cast<uint64_t>(world));
    for (const int64_t most : {0, 3, 65, 1, 200, 2, 64, 0, 129}) {
      for (const int64_t hidden : {8, 40, 3}) {
        run_checked(rng, group, small_layer(2 * world, 2, hidden), random_tokens(rng, world, most),
                    most % 2 == 1);
        if (HasFailure()) return;
      }
    }
  }
}

// Layers that differ in all that places the metadata, one after the other without a pause: a rank
// may be one launch ahead of its peers.
TEST(Growth, LayersOfDifferentSizesTakeTurns) {
  const int32_t world = 3;
  const Ranks group(world);
  group.set("jitter_us", 100);
  group.set("num_threads", 2);
  Rng rng(8);
  std::vector<LayerCase> cases;
  for (const auto& [experts, top_k, hidden] :
       {std::tuple{3, 1, 8}, {24, 6, 24}, {6, 2, 3}, {48, 1, 16}}) {
    cases.emplace_back(rng, small_layer(experts, top_k, hidden),
                       CaseOptions{.world = world, .tokens = {70, 0, 5}});
  }
  std::vector<std::vector<uint8_t>> expected;
  for (auto& c : cases) expected.push_back(calm_bytes(c, true));
  for (int round = 0; round < rounds(30); ++round) {
    for (auto& c : cases) c.poison_outputs();
    std::atomic<int> failures{0};
    on_ranks(world, [&](int32_t r) {  // every rank runs through all of them on its own
      for (auto& c : cases) {
        const auto forward = c.ranks[static_cast<size_t>(r)].forward_args();
        const auto backward = c.ranks[static_cast<size_t>(r)].backward_args(false);
        failures += fm_forward(group[r], &c.layer, &forward) != FM_OK;
        failures += fm_backward(group[r], &c.layer, &backward) != FM_OK;
      }
    });
    ASSERT_EQ(failures.load(), 0) << fm_last_error();
    for (size_t i = 0; i < cases.size(); ++i) {
      ASSERT_TRUE(cases[i].output_bytes() == expected[i]) << "layer " << i << ", round " << round;
    }
  }
}

// Rank 1 has nothing to do in every other launch: it is in the next one while its peers still read
// the metadata of this one.
TEST(Growth, AnIdleRankIsALaunchAhead) {
  constexpr int32_t world = 3;
  const Ranks group(world);
  group.set("jitter_us", 50);
  Rng rng(4);
  const fm_layer layer = small_layer(96, 2);  // many counts to read
  std::vector<LayerCase> cases;
  cases.emplace_back(rng, layer, CaseOptions{.world = world, .tokens = {150, 0, 150}});
  cases.emplace_back(rng, layer, CaseOptions{.world = world, .tokens = {3, 150, 5}});
  for (auto& rank : cases[0].ranks) {
    Buffer& ids = rank.named("topk_ids");  // nothing for rank 1
    ids.each([&](int64_t t, int64_t j, int64_t) { ids.set(double(t % 32 + 64 * j), t, j); });
  }
  const std::vector<std::vector<uint8_t>> expected{calm_bytes(cases[0], false),
                                                   calm_bytes(cases[1], false)};
  for (int round = 0; round < rounds(100); ++round) {
    for (auto& c : cases) c.poison_outputs();
    on_ranks(world, [&](int32_t r) {
      for (auto& c : cases) expect_ok(forward_alone(c, group[r], r));
    });
    for (size_t i = 0; i < 2; ++i) ASSERT_TRUE(cases[i].output_bytes() == expected[i]) << round;
  }
}

// A rank that has nothing to wait for leaves first and is destroyed while its peers still run.
TEST(Growth, ARankMayBeDestroyedAsSoonAsItHasFinished) {
  Rng rng(3);
  constexpr int32_t world = 3;
  LayerCase c(rng, small_layer(3, 1), {.world = world, .tokens = {150, 0, 150}});
  for (auto& rank : c.ranks) {
    Buffer& ids = rank.named("topk_ids");
    ids.each([&](int64_t t, int64_t j, int64_t) { ids.set(t % 2 == 0 ? 0 : 2, t, j); });
  }
  const auto expected = calm_bytes(c, false);
  for (int round = 0; round < rounds(100); ++round) {
    c.poison_outputs();
    fm_group groups[world];
    expect_ok(outcome(fm_group_create_local(world, groups)));
    on_ranks(world, [&](int32_t r) {
      expect_ok(outcome(fm_group_set(groups[r], "jitter_us", 100)));
      expect_ok(outcome(fm_group_set(groups[r], "num_threads", 2)));
      const auto args = c.ranks[static_cast<size_t>(r)].forward_args();
      expect_ok(outcome(fm_forward(groups[r], &c.layer, &args)));
      fm_group_destroy(groups[r]);
    });
    ASSERT_TRUE(c.output_bytes() == expected) << "round " << round;
  }
}

// Thousands of launches across the wrap of the epoch, with new routing and token counts each time.
// Every rank goes at its own pace; every result is checked.
TEST(Epochs, EveryLaunchAcrossTheWrapIsRight) {
  const int32_t world = kSanitized ? 3 : 4;
  const int kLaunches = kSanitized ? 800 : 3000;
  const Ranks group(world);
  group.set("epoch", 4294967296.0 - kLaunches / 2);
  group.set("num_threads", 1);
  Rng rng(1);
  // A pool of cases, made and checked once; the run then mixes them in a random order.
  std::vector<LayerCase> pool;
  const fm_layer layer = small_layer(world, 2, 4);
  Yardstick yardstick(epsilon_of(FM_F32));
  for (int i = 0; i < 12; ++i) {
    pool.emplace_back(
        rng, layer,
        CaseOptions{.world = world, .tokens = random_tokens(rng, world, 70), .sentinels = 0.1});
    pool.back().poison_outputs();
    const Ranks own(world);
    expect_all_ok(pool.back().forward(own));
    add_to(yardstick, pool.back(), false);
  }
  yardstick.check();
  ASSERT_FALSE(HasFailure());
  std::vector<size_t> order;
  for (int i = 0; i < kLaunches; ++i) {
    order.push_back(static_cast<size_t>(rng.between(0, static_cast<int64_t>(pool.size()) - 1)));
  }
  std::atomic<int> wrong{0};
  std::vector<Outcome> failed(static_cast<size_t>(world));
  on_ranks(world, [&](int32_t r) {
    for (const size_t i : order) {
      RankOperands mine = pool[i].ranks[static_cast<size_t>(r)];
      mine.out["y"].poison();
      const auto args = mine.forward_args();
      const Outcome result = outcome(fm_forward(group[r], &layer, &args));
      if (result.status != FM_OK) {
        failed[static_cast<size_t>(r)] = result;
        return;
      }
      const auto& right = pool[i].ranks[static_cast<size_t>(r)].out.at("y").bytes();
      if (mine.out["y"].bytes() != right) ++wrong;
    }
  });
  expect_all_ok(failed);
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_LT(group.stats(0).epoch, static_cast<uint32_t>(kLaunches)) << "the epoch has wrapped";
}

TEST(Epochs, CanOnlyBeSetBeforeTheFirstLaunch) {
  Rng rng(1);
  const Ranks group(1);
  run_checked(rng, group, small_layer(2, 1), {3}, false);
  expect_error(outcome(fm_group_set(group[0], "epoch", 7)), FM_INVALID_VALUE,
               {"epoch", "before the first launch"});
}

// --- failures -------------------------------------------------------------------------------

TEST(Failure, AnAbsentRankEndsInATimeoutThatNamesIt) {
  Rng rng(1);
  LayerCase c(rng, small_layer(2, 1), {.world = 2, .tokens = {5, 5}});
  const Ranks group(2);
  expect_all_ok(c.forward(group));
  group.set("timeout_s", 0.05);
  expect_error(
      forward_alone(c, group[0]), FM_TIMEOUT,
      {"rank 0 waited 0.05 s", "plan", "metadata", "rank 1", "epoch", "FLASHMOE_TIMEOUT_S"});
  expect_error(forward_alone(c, group[1], 1), FM_ABORTED, {"aborted", "rank 0 waited"});
}

// A rank that is late because of another one is not taken for the culprit.
TEST(Failure, ATimeoutNamesWhomThePeerItselfWaitsFor) {
  const auto fabrics = fabric::make_thread_fabrics(4);
  const fabric::Waiter waiter(*fabrics[0], 0, 0.02);
  const auto text_of = [&](int32_t peer) -> std::string {
    try {
      waiter.until_equal(fabrics[0]->control(0)->done[peer], 9, {"rows", "up", peer, 9});
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  fabrics[0]->control(1)->waits_for.store(2 + 1);
  fabrics[0]->control(2)->waits_for.store(3 + 1);
  EXPECT_NE(text_of(1).find("rank 1, which itself waits for rank 2, which itself waits for rank 3"),
            std::string::npos)
      << text_of(1);
  EXPECT_NE(text_of(3).find("for rows of rank 3: epoch 9"), std::string::npos) << text_of(3);
  fabrics[0]->control(3)->waits_for.store(2 + 1);  // two that wait for each other
  EXPECT_LT(text_of(1).size(), 400u);
}

TEST(Failure, AnAbortEndsAWaitAtOnce) {
  Rng rng(1);
  for (const bool first_launch : {true, false}) {
    LayerCase c(rng, small_layer(2, 1), {.world = 2, .tokens = {5, 5}});
    const Ranks group(2);
    if (!first_launch) expect_all_ok(c.forward(group));
    Outcome waited;
    std::thread waiting([&] { waited = forward_alone(c, group[0]); });
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    const auto start = Clock::now();
    expect_ok(outcome(fm_group_abort(group[1], "the test said so")));
    waiting.join();
    EXPECT_LT(seconds_since(start), kPromptly);
    expect_error(waited, FM_ABORTED, {"rank 1", "the test said so", "make a new group"});
    expect_error(forward_alone(c, group[1], 1), FM_ABORTED, {"the test said so"});
    const Ranks fresh(2);  // the process goes on with a new group
    for (int i = 0; i < 20; ++i) expect_calm_bits(c, fresh);
  }
}

TEST(Failure, AnErrorOnOneRankIsToldToAllAndTheGroupLivesOn) {
  Rng rng(1);
  LayerCase c(rng, small_layer(3, 1), {.world = 3, .tokens = {5, 6, 7}});
  const Ranks group(3);
  for (int round = 0; round < 5; ++round) {
    c.ranks[1].named("topk_ids").set(-5, 3, 0);
    const auto results = c.forward(group);
    expect_error(results[1], FM_ROUTING, {"topk_ids[3, 0]", "rank 1", "-5", "0..2"});
    for (const int32_t peer : {0, 2}) {
      expect_error(results[static_cast<size_t>(peer)], FM_MISMATCH,
                   {"rank 1 refused the call", "-5"});
    }
    c.ranks[1].named("topk_ids").set(2, 3, 0);
    expect_calm_bits(c, group);
    if (HasFailure()) return;
  }
}

TEST(Failure, ARefusalReachesThePeers) {
  Rng rng(1);
  LayerCase c(rng, small_layer(2, 1), {.world = 2, .tokens = {5, 5}});
  const Ranks group(2);
  for (int round = 0; round < 20; ++round) {
    on_ranks(2, [&](int32_t r) {
      if (r == 1) {
        expect_ok(outcome(fm_group_refuse(group[1], "not today")));
      } else {
        expect_error(forward_alone(c, group[0]), FM_MISMATCH, {"rank 1 refused", "not today"});
      }
    });
  }
  expect_all_ok(c.forward(group));
}

// A rank that refuses several launches in a row waits for its slower peer's credit.
TEST(Failure, RefusalsDoNotOverrunASlowPeer) {
  Rng rng(1);
  for (const double epoch : {0.0, 4294967290.0}) {
    LayerCase c(rng, small_layer(2, 1), {.world = 2, .tokens = {5, 5}});
    const Ranks group(2);
    if (epoch > 0) group.set("epoch", epoch);
    constexpr int kCalls = 12;
    on_ranks(2, [&](int32_t r) {
      for (int call = 0; call < kCalls; ++call) {
        const std::string reason = "call " + std::to_string(call);
        if (r == 1) {
          expect_ok(outcome(fm_group_refuse(group[1], reason.c_str())));
        } else {
          std::this_thread::sleep_for(std::chrono::milliseconds(2));
          expect_error(forward_alone(c, group[0]), FM_MISMATCH, {reason.c_str()});
        }
      }
    });
    expect_calm_bits(c, group);
  }
}

// One rank changes one field of its call: every rank fails and names the field and both values.
TEST(Failure, CallsThatDifferNameTheField) {
  struct Change {
    const char* field;
    std::function<void(fm_layer&)> apply;
  };
  const std::vector<Change> changes{
      {"hidden size",
       [](fm_layer& l) {
         l.hidden = 16;
       }},
      {"intermediate size",
       [](fm_layer& l) {
         l.intermediate = 24;
       }},
      {"num_experts",
       [](fm_layer& l) {
         l.num_experts = 6;
       }},
      {"top_k",
       [](fm_layer& l) {
         l.top_k = 1;
       }},
      {"dtype",
       [](fm_layer& l) {
         l.dtype = FM_BF16;
       }},
      {"activation",
       [](fm_layer& l) {
         l.activation = FM_RELU;
       }},
      {"gated",
       [](fm_layer& l) {
         l.gated = 0;
       }},
      {"weight_on_input",
       [](fm_layer& l) {
         l.weight_on_input = 1;
       }},
      {"alpha",
       [](fm_layer& l) {
         l.act_alpha = 1.5;
       }},
      {"limit",
       [](fm_layer& l) {
         l.act_limit = 1.5;
       }},
      {"up_offset",
       [](fm_layer& l) {
         l.up_offset = 1.0;
       }},
      {"capacity_factor",
       [](fm_layer& l) {
         l.capacity_factor = 1.0;
       }},
      {"layer_id",
       [](fm_layer& l) {
         l.layer_id = 7;
       }},
  };
  const Ranks group(2);
  Rng rng(1);
  const CaseOptions options{.world = 2, .tokens = {5, 70}};
  LayerCase usual(rng, small_layer(4, 2), options);
  for (const Change& change : changes) {
    fm_layer changed = usual.layer;
    change.apply(changed);
    LayerCase other(rng, changed, options);
    std::vector<Outcome> results(2);
    on_ranks(2, [&](int32_t r) {
      results[static_cast<size_t>(r)] = forward_alone(r == 0 ? usual : other, group[r], r);
    });
    for (const Outcome& result : results) {
      expect_error(result, FM_MISMATCH,
                   {change.field, "differs between ranks", "rank 0", "rank 1"});
    }
    expect_all_ok(usual.forward(group));
    if (HasFailure()) return;
  }
}

TEST(Failure, DifferentOperationsAreToldApart) {
  Rng rng(1);
  LayerCase c(rng, small_layer(2, 1), {.world = 2, .tokens = {5, 5}});
  const Ranks group(2);
  std::vector<Outcome> results(2);
  on_ranks(2, [&](int32_t r) {
    const auto forward = c.ranks[0].forward_args();
    const auto backward = c.ranks[1].backward_args(false);
    results[static_cast<size_t>(r)] = outcome(r == 0 ? fm_forward(group[0], &c.layer, &forward)
                                                     : fm_backward(group[1], &c.layer, &backward));
  });
  for (const Outcome& result : results) {
    expect_error(result, FM_MISMATCH, {"operation", "differs"});
  }
}

// Lets this process grow by this much more while it lives.
class MemoryLimit {
 public:
  explicit MemoryLimit(int64_t bytes) {
    getrlimit(RLIMIT_AS, &before_);
    int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    rlimit limit = before_;
    limit.rlim_cur = static_cast<rlim_t>(pages * sysconf(_SC_PAGESIZE) + bytes);
    setrlimit(RLIMIT_AS, &limit);
  }
  ~MemoryLimit() { setrlimit(RLIMIT_AS, &before_); }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;

 private:
  rlimit before_{};
};

TEST(Failure, OutOfMemoryIsAnErrorAndIsTold) {
  if (kSanitized) GTEST_SKIP() << "a sanitizer ends the process when an allocation fails";
  Rng rng(1);
  LayerCase c(rng, small_layer(2, 1, 1024), {.world = 2, .tokens = {5, 5}});
  const Ranks group(2);
  group.set("num_threads", 1);
  expect_all_ok(c.forward(group));
  expect_ok(outcome(fm_group_set(group[0], "num_threads", 1024)));  // 2 MiB of panel for each
  const auto start = Clock::now();
  std::vector<Outcome> results;
  {
    const MemoryLimit limit(int64_t{1} << 30);
    results = c.forward(group);
  }
  expect_error(results[0], FM_OUT_OF_MEMORY, {"memory"});
  expect_error(results[1], FM_MISMATCH, {"rank 0 refused", "memory"});
  EXPECT_LT(seconds_since(start), 10.0);
  expect_ok(outcome(fm_group_set(group[0], "num_threads", 1)));
  expect_calm_bits(c, group);
}

// Two host threads on one group: one launch at a time.
TEST(Concurrency, CallsOfTwoThreadsTakeTurns) {
  Rng rng(1);
  LayerCase first(rng, small_layer(4, 2), {.world = 1, .tokens = {70}});
  LayerCase second(rng, small_layer(3, 1, 24), {.world = 1, .tokens = {30}});
  const Ranks group(1);
  on_ranks(2, [&](int32_t thread) {
    for (int i = 0; i < rounds(60); ++i) {
      expect_ok(forward_alone(thread == 0 ? first : second, group[0]));
    }
  });
  EXPECT_EQ(first.output_bytes(), calm_bytes(first, false));
  EXPECT_EQ(second.output_bytes(), calm_bytes(second, false));
}

}  // namespace
}  // namespace flashmoe::test
