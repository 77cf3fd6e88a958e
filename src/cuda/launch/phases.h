// What a launch's marks come to. No CUDA: tested without a GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "cuda/kernel/mark.h"
#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

using kernel::Mark;
using Marks = std::array<uint64_t, static_cast<std::size_t>(Mark::kCount)>;

struct LaunchKind {
  bool is_backward = false;
  int32_t world = 1;
};

// A launch without tiles leaves some marks of an earlier one. They become those before them.
inline void make_ascending(Marks& marks) {
  constexpr auto kLast = static_cast<std::size_t>(Mark::kDone);
  for (std::size_t i = 1; i <= kLast; ++i) marks[i] = std::max(marks[i], marks[i - 1]);
}

// Fills seconds and phase_seconds. Of a forward: route, plan, up, down, combine; of a backward:
// route, plan, up (hidden gradients, and pre-activations that were not kept), weight, down (input
// gradients), combine (what follows the last tile). Of several ranks also, beside those: push (rows
// of all ranks) and return (from the first sums on; 0 where the next rank has no tokens).
inline void fill_phases(Marks marks, const LaunchKind& kind, fm_stats& stats) {
  make_ascending(marks);
  const auto at = [&](Mark mark) {
    return marks[static_cast<std::size_t>(mark)];
  };
  // 0 where a mark is of an earlier launch.
  const auto seconds = [&](Mark from, Mark to) {
    if (at(from) < at(Mark::kStart) || at(to) <= at(from)) return 0.0;
    return static_cast<double>(at(to) - at(from)) * 1e-9;
  };
  std::fill(std::begin(stats.phase_seconds), std::end(stats.phase_seconds), 0.0);
  double* phases = stats.phase_seconds;
  phases[FM_PHASE_ROUTE] = seconds(Mark::kStart, Mark::kRouted);
  phases[FM_PHASE_PLAN] = seconds(Mark::kRouted, Mark::kPlanned);
  const Mark end = kind.is_backward ? Mark::kDone : Mark::kEnd;
  if (kind.is_backward) {
    phases[FM_PHASE_UP] = seconds(Mark::kPlanned, Mark::kDownGrad);
    phases[FM_PHASE_DOWN] = seconds(Mark::kDown, Mark::kUpGrad);
    phases[FM_PHASE_WEIGHT] =
        seconds(Mark::kDownGrad, Mark::kDown) + seconds(Mark::kUpGrad, Mark::kLastTile);
  } else {
    phases[FM_PHASE_UP] = seconds(Mark::kPlanned, Mark::kDown);
    phases[FM_PHASE_DOWN] = seconds(Mark::kDown, Mark::kLastTile);
  }
  phases[FM_PHASE_COMBINE] = seconds(Mark::kLastTile, end);
  if (kind.world > 1) {
    phases[FM_PHASE_PUSH] = seconds(Mark::kPlanned, Mark::kRowsIn);
    phases[FM_PHASE_RETURN] = seconds(Mark::kFirstSum, end);
  }
  stats.seconds = seconds(Mark::kStart, end);
}

}  // namespace flashmoe::cuda::launch
