// What the marks of a launch come to: phases, also where some are those of an earlier launch.
#include <gtest/gtest.h>

#include "cuda/launch/phases.h"

namespace flashmoe::cuda::launch {
namespace {

constexpr LaunchKind kForward{.is_backward = false, .world = 1};
constexpr LaunchKind kBackward{.is_backward = true, .world = 1};
constexpr LaunchKind kForwardOfTwo{.is_backward = false, .world = 2};
constexpr uint64_t kSecond = 1000000000;

// Marks of a launch that began at `start` seconds, one second apart in their order.
Marks marks_from(uint64_t start) {
  Marks marks{};
  for (std::size_t i = 0; i < marks.size(); ++i) marks[i] = (start + i) * kSecond;
  return marks;
}

uint64_t& at(Marks& marks, Mark mark) { return marks[static_cast<std::size_t>(mark)]; }

fm_stats phases_of(const Marks& marks, const LaunchKind& kind) {
  fm_stats stats{};
  stats.phase_seconds[FM_PHASE_WEIGHT] = 7;  // of what was measured before
  fill_phases(marks, kind, stats);
  return stats;
}

void expect_phases(const fm_stats& stats, std::initializer_list<double> expected, double seconds) {
  int phase = 0;
  for (const double one : expected) EXPECT_DOUBLE_EQ(stats.phase_seconds[phase++], one) << phase;
  EXPECT_DOUBLE_EQ(stats.seconds, seconds);
}

TEST(Phases, OfAForwardAndOfABackward) {
  // route, plan, push, up, down, weight, return, combine
  expect_phases(phases_of(marks_from(100), kForward), {1, 1, 0, 3, 2, 0, 0, 1}, 8);
  expect_phases(phases_of(marks_from(100), kBackward), {1, 1, 0, 2, 1, 2, 0, 2}, 9);
}

TEST(Phases, OfSeveralRanksLieBesideTheTiles) {
  Marks marks = marks_from(100);
  at(marks, Mark::kRowsIn) = 103 * kSecond;
  at(marks, Mark::kFirstSum) = 106 * kSecond;
  expect_phases(phases_of(marks, kForwardOfTwo), {1, 1, 1, 3, 2, 0, 2, 1}, 8);
}

TEST(Phases, NoMarkOfAnEarlierLaunchCounts) {
  Marks marks = marks_from(100);
  const Marks earlier = marks_from(1);
  for (const Mark mark : {Mark::kUp, Mark::kDownGrad, Mark::kDown, Mark::kUpGrad, Mark::kDone,
                          Mark::kRowsIn, Mark::kFirstSum}) {
    at(marks, mark) = earlier[static_cast<std::size_t>(mark)];
  }
  // Without tiles and sums: what lies between the plan and the last ticket counts as down.
  expect_phases(phases_of(marks, kForwardOfTwo), {1, 1, 0, 0, 5, 0, 0, 1}, 8);
}

}  // namespace
}  // namespace flashmoe::cuda::launch
