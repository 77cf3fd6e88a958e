// The rule by which launches of one scratch keep out of each other's way, over all interleavings.
#include <gtest/gtest.h>

#include <array>
#include <optional>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/sync/holder.h"

namespace flashmoe::cuda::sync {
namespace {

struct Pause {};

// A CTA that claims: the results of the exchanges it has made. claim() is run anew for every step,
// with these results, makes one more exchange and goes on to the next, or to its answer.
struct Cta {
  uint32_t id;
  std::vector<uint32_t> results{};
  std::optional<bool> answer{};

  void step(uint32_t& word) {
    std::size_t call = 0;
    bool moved = false;
    try {
      answer = claim(id, [&](uint32_t expected, uint32_t desired) {
        if (call == results.size()) {
          if (moved) throw Pause{};
          moved = true;
          results.push_back(word);
          if (word == expected) word = desired;
        }
        return results[call++];
      });
    } catch (const Pause&) {
    }
  }
};

// Launches whose CTAs come in any order, of which the one that has the scratch leaves when all of
// its CTAs have come.
class Search {
 public:
  Search(const std::vector<uint32_t>& ids, int ctas_of_launch) : ids_(ids) {
    for (const uint32_t id : ids) {
      for (int i = 0; i < ctas_of_launch; ++i) ctas_.push_back(Cta{id});
    }
  }

  void run(uint32_t word) { visit(word, 0); }

  int ends() const { return ends_; }
  int ends_with_all() const { return ends_with_all_; }

 private:
  using State = std::tuple<uint32_t, unsigned, std::vector<std::vector<uint32_t>>>;

  // left: launches that have left the scratch, a bit each.
  void visit(uint32_t word, unsigned left) {
    std::vector<std::vector<uint32_t>> results;
    for (const Cta& cta : ctas_) results.push_back(cta.results);
    if (!seen_.insert(State{word, left, results}).second) return;
    check(left);
    bool moved = false;
    for (Cta& cta : ctas_) {
      if (cta.answer.has_value()) continue;
      const Cta before = cta;
      uint32_t next = word;
      cta.step(next);
      visit(next, left);
      cta = before;
      moved = true;
    }
    for (std::size_t launch = 0; launch < ids_.size(); ++launch) {
      if ((left >> launch & 1) != 0 || !all_of(ids_[launch], true)) continue;
      uint32_t next = word;
      release(ids_[launch], [&](uint32_t expected, uint32_t desired) {
        if (next == expected) next = desired;
        return 0u;
      });
      visit(next, left | 1u << launch);
      moved = true;
    }
    if (!moved) end(left);
  }

  bool all_of(uint32_t id, bool answer) const {
    for (const Cta& cta : ctas_) {
      if (cta.id == id && cta.answer != answer) return false;
    }
    return true;
  }

  // One launch at a time, and one answer for all CTAs of a launch.
  void check(unsigned left) const {
    int holders = 0;
    for (std::size_t launch = 0; launch < ids_.size(); ++launch) {
      bool in = false;
      bool out = false;
      for (const Cta& cta : ctas_) {
        if (cta.id != ids_[launch] || !cta.answer.has_value()) continue;
        (*cta.answer ? in : out) = true;
      }
      ASSERT_FALSE(in && out) << "the CTAs of launch " << ids_[launch] << " got two answers";
      holders += in && (left >> launch & 1) == 0 ? 1 : 0;
    }
    ASSERT_LE(holders, 1);
  }

  void end(unsigned left) {
    ++ends_;
    ends_with_all_ += left + 1 == 1u << ids_.size() ? 1 : 0;
    for (const uint32_t id : ids_) EXPECT_TRUE(all_of(id, true) || all_of(id, false));
  }

  std::vector<uint32_t> ids_;
  std::vector<Cta> ctas_;
  std::set<State> seen_;
  int ends_ = 0;
  int ends_with_all_ = 0;
};

TEST(CudaHolder, AllCtasOfALaunchGetOneAnswerAndOneLaunchHasTheScratch) {
  Search two({2, 4}, 3);
  two.run(0);
  EXPECT_GT(two.ends_with_all(), 0) << "one after the other, both get it";
  EXPECT_GT(two.ends(), two.ends_with_all()) << "side by side, one does not";
  Search three({2, 4, 6}, 2);
  three.run(0);
  EXPECT_GT(three.ends_with_all(), 0);
}

TEST(CudaHolder, WhoIsTurnedAwayLeavesAMarkThatStays) {
  uint32_t word = 2;
  const auto exchange = [&](uint32_t expected, uint32_t desired) {
    const uint32_t before = word;
    if (word == expected) word = desired;
    return before;
  };
  EXPECT_FALSE(claim(4, exchange));
  EXPECT_EQ(word, 2 | kTurnedAway);
  EXPECT_TRUE(claim(2, exchange)) << "a CTA of the launch that has it, which comes late";
  release(2, exchange);
  EXPECT_FALSE(claim(4, exchange));
  EXPECT_FALSE(claim(6, exchange)) << "until the host has zeroed it";
}

TEST(CudaHolder, IdsAreEvenAndNeverZero) {
  EXPECT_EQ(next_holder(0), 2u);
  EXPECT_EQ(next_holder(2), 4u);
  EXPECT_EQ(next_holder(0xFFFFFFFEu), 2u);
}

}  // namespace
}  // namespace flashmoe::cuda::sync
