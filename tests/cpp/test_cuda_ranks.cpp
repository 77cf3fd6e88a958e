// How the ranks of a group on CUDA come to their memory: limits, agreement, failures that all of
// them have, an abort in the middle of it. Fakes in the place of devices: tested without a GPU.
#include <array>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cuda/engine/agreement.h"
#include "cuda/engine/held_memory.h"
#include "support.h"

namespace flashmoe::test {
namespace {

using cuda::HarmlessError;
using cuda::RankNeeds;
using cuda::config::kMaxRankSlots;

constexpr RankNeeds kNeeds{.tokens = 8192, .hidden = 4096, .top_k = 8, .local_experts = 16};

// ---- limits
// --------------------------------------------------------------------------------------

// The one size of the needs that is beyond a limit, and the words of its error.
struct Beyond {
  int32_t world;
  RankNeeds needs;
  std::vector<const char*> words;
};

TEST(RankLimits, EachIsFoundByName) {
  const auto with = [](auto member, int64_t value) {
    RankNeeds needs = kNeeds;
    needs.*member = value;
    return needs;
  };
  const int64_t huge = int64_t{1} << 62;  // no product of it may be made
  const Beyond all[] = {
      {17, kNeeds, {"17 ranks", "to 16"}},
      {2, with(&RankNeeds::hidden, (1 << 20) + 64), {"hidden is 1048640", "to 1048576"}},
      {2, with(&RankNeeds::hidden, huge), {"hidden"}},
      {2, with(&RankNeeds::top_k, 33), {"top_k is 33", "to 32"}},
      {2, with(&RankNeeds::top_k, huge), {"top_k"}},
      {4, with(&RankNeeds::local_experts, 257), {"num_experts is 257 on each of 4", "to 1024"}},
      {4, with(&RankNeeds::local_experts, huge), {"num_experts"}},
      {2, with(&RankNeeds::tokens, kMaxRankSlots / 8 + 1), {"tokens * top_k", "4194304"}},
      {2, with(&RankNeeds::tokens, huge), {"tokens * top_k"}},
      {16,
       {.tokens = kMaxRankSlots, .hidden = 1 << 20, .top_k = 1, .local_experts = 1},
       {"tokens is 4194304 with hidden 1048576 on 16 ranks", "flags"}},
  };
  for (const Beyond& beyond : all) {
    const auto error = cuda::attempt([&] { cuda::check_limits(beyond.world, beyond.needs); });
    ASSERT_TRUE(error) << beyond.words.front();
    EXPECT_EQ(error->status(), FM_UNSUPPORTED);
    for (const char* word : beyond.words) {
      EXPECT_NE(std::string(error->what()).find(word), std::string::npos)
          << word << " in: " << error->what();
    }
  }
  EXPECT_FALSE(cuda::attempt([] { cuda::check_limits(16, kNeeds); }));
}

TEST(RankLimits, RoundingNeverLeavesThem) {
  for (const int64_t top_k : {1, 3, 6, 8, 32}) {
    for (const int64_t most : {kMaxRankSlots / top_k, kMaxRankSlots / top_k - 1, int64_t{1000}}) {
      const RankNeeds needs{.tokens = most, .hidden = 64, .top_k = top_k, .local_experts = 1};
      cuda::check_limits(2, needs);
      const RankNeeds has = cuda::rounded(2, needs);
      cuda::check_limits(2, has);
      EXPECT_TRUE(cuda::is_within(needs, has)) << most << " tokens, top_k " << top_k;
    }
  }
  EXPECT_EQ(cuda::rounded(2, {.tokens = 0, .hidden = 64, .top_k = 1, .local_experts = 1}).tokens,
            1024);
  EXPECT_EQ(cuda::rounded(2, kNeeds).tokens, 8192);
}

TEST(RankLimits, TheLargerOfTwoHoldsBoth) {
  const RankNeeds a{.tokens = 1, .hidden = 200, .top_k = 3, .local_experts = 400};
  const RankNeeds b{.tokens = 100, .hidden = 2, .top_k = 30, .local_experts = 4};
  const RankNeeds both = cuda::larger_of(a, b);
  EXPECT_TRUE(cuda::is_within(a, both) && cuda::is_within(b, both));
  EXPECT_FALSE(cuda::is_within(a, b) || cuda::is_within(b, a));
  EXPECT_EQ(both.tokens * 1000000 + both.hidden * 1000 + both.top_k, 100200030);
  EXPECT_EQ(both.local_experts, 400);
}

// Each word has one writer and one meaning in a launch of either direction.
TEST(RankLayout, FlagsOfALaunchAreApartAndHaveRoom) {
  constexpr int64_t kHidden = 576;  // three column blocks at most
  for (const int32_t world : {2, 3, 16}) {
    for (const int32_t token_cap : {1, 5, 1024}) {
      const auto capacity = cuda::config::needed_capacity(world, token_cap, kHidden, 2, 1);
      for (const int32_t column_blocks : {1, 2, 3}) {
        const cuda::config::FlagWords words{world, token_cap, column_blocks};
        std::set<int32_t> seen;
        const auto add = [&](int32_t word) {
          EXPECT_TRUE(word >= 0 && word < capacity.flag_words) << word;
          EXPECT_TRUE(seen.insert(word).second) << word;
        };
        for (int32_t rank = 0; rank < world; ++rank) {
          for (int32_t token = 0; token < token_cap; token += cuda::config::kPushTokens) {
            add(words.push(cuda::config::RowKind::kToken, rank, token));
            add(words.push(cuda::config::RowKind::kGrad, rank, token));
          }
          for (int32_t unit = 0; unit < cuda::config::return_units(token_cap); ++unit) {
            for (int32_t block = 0; block < column_blocks; ++block) {
              add(words.returned(rank, block, unit));
            }
            add(words.slot(rank, unit));
          }
        }
      }
    }
  }
}

// Each kind once. A rank copies its peers' rows of one kind before it sends its own of the next:
// with orders of their own two ranks would wait for each other.
TEST(RankLayout, KindsOfRowsHaveAnOrder) {
  using cuda::config::kind_of_step;
  using cuda::config::RowKind;
  static_assert(cuda::config::kRowKinds == 2);
  EXPECT_EQ(kind_of_step(true, 0), RowKind::kToken);
  EXPECT_EQ(kind_of_step(true, 1), RowKind::kGrad);
  EXPECT_EQ(kind_of_step(false, 0), RowKind::kGrad);
  EXPECT_EQ(kind_of_step(false, 1), RowKind::kToken);
}

TEST(RankLayout, RegionsAreApart) {
  const auto capacity = cuda::config::needed_capacity(cuda::sizes_of(2, kNeeds));
  const auto table = cuda::config::symmetric_table(2, capacity);
  int64_t end = 0;
  for (const plan::Region& region : table.regions) {
    EXPECT_GE(region.offset, end) << region.name;
    EXPECT_GT(region.bytes, 0) << region.name;
    end = region.offset + region.bytes;
  }
  EXPECT_GE(table.total, end);
  using cuda::config::Symmetric;
  EXPECT_EQ(table[Symmetric::kReceivedGrad].bytes, table[Symmetric::kReceived].bytes);
  EXPECT_EQ(table[Symmetric::kSlotGrads].bytes, kNeeds.tokens * kNeeds.top_k * 4);
}

TEST(RankLayout, SaysWhatSeveralRanksShare) {
  const cuda::config::RankSizes sizes = cuda::sizes_of(4, kNeeds);
  const cuda::config::SymmetricCapacity capacity = cuda::config::needed_capacity(sizes);
  const std::string text = cuda::config::describe(cuda::config::RankLayout{
      .sizes = sizes, .capacity = capacity, .rows = 131072, .source_groups = 4, .block_rows = 128});
  const int64_t received = int64_t{4} * 8192 * 4096 * 2;
  for (const std::string& word :
       {std::string("ranks   4, of up to 8192 tokens"), std::string("131072 rows"),
        std::string("twice an even share"),
        std::to_string(cuda::config::symmetric_table(4, capacity).total) + " bytes a rank",
        std::to_string(received) + " of received rows", std::string("16 here x 4 sources = 64"),
        std::string("at most 1088 blocks of 128 rows")}) {
    EXPECT_NE(text.find(word), std::string::npos) << word << " in:\n" << text;
  }
}

// ---- failures that all ranks have
// ----------------------------------------------------------------

TEST(Attempt, ThrownMemoryBecomesTheNamedError) {
  const auto error = cuda::attempt([] { throw std::bad_alloc(); });
  ASSERT_TRUE(error);
  expect_error({error->status(), error->what()}, FM_OUT_OF_MEMORY, {"no host memory"});
  EXPECT_FALSE(cuda::attempt([] {}));
}

// The ranks of a group as a test plays them: what each says, to be given to each.
class PlayedPeers final : public cuda::Peers {
 public:
  PlayedPeers(int32_t rank, const std::vector<Message>* told) : rank_(rank), told_(told) {}

  int32_t rank() const override { return rank_; }
  int32_t world() const override { return static_cast<int32_t>(told_->size()); }
  std::vector<Message> gather(const Message& own) override {
    said_ = own;
    return *told_;
  }
  std::vector<File> exchange(const File&) override { return {}; }
  const Message& said() const { return said_; }

 private:
  int32_t rank_;
  const std::vector<Message>* told_;
  Message said_{};
};

// What agree() does on each of so many ranks, whose own failures these are.
std::vector<std::optional<Error>> agreed(const std::vector<std::optional<Error>>& failures) {
  std::vector<cuda::Peers::Message> said(failures.size());
  std::vector<std::optional<Error>> results;
  for (int round = 0; round < 2; ++round) {  // the first one only to hear what each says
    const std::vector<cuda::Peers::Message> told = said;
    results.clear();
    for (size_t rank = 0; rank < failures.size(); ++rank) {
      PlayedPeers peers(static_cast<int32_t>(rank), &told);
      results.push_back(cuda::attempt([&] { cuda::agree(peers, failures[rank]); }));
      said[rank] = peers.said();
    }
  }
  return results;
}

TEST(Agreement, OneRanksFailureIsThatOfAll) {
  const Error failure(FM_OUT_OF_MEMORY, "device 1 gives no 4096 bytes");
  for (const auto& result : agreed({std::nullopt, failure, std::nullopt})) {
    ASSERT_TRUE(result);
    expect_error({result->status(), result->what()}, FM_OUT_OF_MEMORY,
                 {"rank 1: device 1", "4096"});
  }
  for (const auto& result : agreed({std::nullopt, std::nullopt})) EXPECT_FALSE(result);
}

TEST(Agreement, OfSeveralFailuresTheFirstRanksIsTold) {
  const Error first(FM_UNSUPPORTED, "no peer access");
  const Error second(FM_OUT_OF_MEMORY, "no memory");
  for (const auto& result : agreed({std::nullopt, first, second})) {
    ASSERT_TRUE(result);
    expect_error({result->status(), result->what()}, FM_UNSUPPORTED, {"rank 1: no peer access"});
  }
}

TEST(Agreement, ATextOfAnyLengthTravels) {
  const Error failure(FM_OUT_OF_MEMORY, std::string(10000, 'x'));
  const auto results = agreed({failure, std::nullopt});
  EXPECT_GT(std::string(results[0]->what()).size(), 10000u);  // its own, whole
  EXPECT_GT(std::string(results[1]->what()).size(), 200u);
}

TEST(Agreement, ItLeavesTheRanksInStep) {
  std::vector<cuda::Peers::Message> told(1);
  PlayedPeers peers(0, &told);
  const Error failure(FM_OUT_OF_MEMORY, "none");
  EXPECT_NO_THROW(cuda::agree(peers, std::nullopt));
  told[0] = peers.said();
  EXPECT_NO_THROW(cuda::agree(peers, failure));  // hears what was said before
  told[0] = peers.said();
  EXPECT_THROW(cuda::agree(peers, failure), HarmlessError);
}

TEST(OwedErrors, EveryOtherRankFailsAsManyCalls) {
  cuda::OwedErrors owed(3);
  owed.add(0, Error(FM_OUT_OF_MEMORY, "first"));
  owed.add(0, Error(FM_OUT_OF_MEMORY, "second"));
  EXPECT_FALSE(owed.take(0));
  for (const int32_t rank : {1, 2}) {
    for (const char* text : {"first", "second"}) {
      const auto error = owed.take(rank);
      ASSERT_TRUE(error);
      EXPECT_STREQ(error->what(), text);
    }
    EXPECT_FALSE(owed.take(rank));
  }
}

// ---- an abort while the memory is being made
// -----------------------------------------------------

struct FakeMemory {
  std::vector<int32_t> stops;
  bool kept = false;

  void stop(int32_t rank) { stops.push_back(rank); }
  bool is_kept() const { return kept; }
  int64_t bytes() const { return 64; }
};

TEST(HeldMemory, AStopBeforeThereIsMemoryIsNotLost) {
  cuda::HeldMemory<FakeMemory> held;
  EXPECT_EQ(held.running(), nullptr);
  EXPECT_EQ(held.bytes(), 0);
  held.stop(3);
  held.stop(1);  // the first one is named
  const auto made = std::make_shared<FakeMemory>();
  held.replace(made);
  EXPECT_EQ(made->stops, std::vector<int32_t>{3});
  const auto error = cuda::attempt([&] { held.running(); });
  ASSERT_TRUE(error);
  expect_error({error->status(), error->what()}, FM_ABORTED, {"aborted by rank 3", "new group"});
}

TEST(HeldMemory, AStopReachesWhatGraphsHoldAndNothingElse) {
  cuda::HeldMemory<FakeMemory> held;
  const auto captured = std::make_shared<FakeMemory>();
  captured->kept = true;
  const auto outgrown = std::make_shared<FakeMemory>();
  const auto last = std::make_shared<FakeMemory>();
  for (const auto& one : {captured, outgrown, last}) held.replace(one);
  EXPECT_EQ(outgrown.use_count(), 1);
  EXPECT_EQ(held.get(), last);
  EXPECT_EQ(held.bytes(), 64);
  held.stop(0);
  EXPECT_EQ(captured->stops.size(), 1u);
  EXPECT_EQ(outgrown->stops.size(), 0u);
  EXPECT_EQ(last->stops.size(), 1u);
}

}  // namespace
}  // namespace flashmoe::test
