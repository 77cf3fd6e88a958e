#include "cuda/launch/launch_times.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/kernel/forward.h"
#include "cuda/launch/check.h"

namespace flashmoe::cuda::launch {
namespace {

using kernel::Mark;

constexpr std::size_t kMarks = static_cast<std::size_t>(Mark::kCount);
using Marks = std::array<uint64_t, kMarks>;

Marks read_marks(const void* scratch) {
  static_assert(sizeof(Marks) == sizeof(kernel::ForwardState::marks));
  Marks marks{};
  const auto* from = static_cast<const char*>(scratch) + offsetof(kernel::ForwardState, marks);
  check(cudaMemcpyAsync(marks.data(), from, sizeof(marks), cudaMemcpyDeviceToHost,
                        cudaStreamPerThread),
        "cudaMemcpyAsync of a launch's marks");
  check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
  return marks;
}

// A launch without tiles leaves some of an earlier one's.
void make_ascending(Marks& marks) {
  constexpr auto kLast = static_cast<std::size_t>(Mark::kDone);
  for (std::size_t i = 1; i <= kLast; ++i) marks[i] = std::max(marks[i], marks[i - 1]);
}

}  // namespace

void time_launch(const void* scratch, const LaunchKind& kind, fm_stats& stats) {
  Marks marks = read_marks(scratch);
  make_ascending(marks);
  const auto seconds = [&](Mark from, Mark to) {
    const uint64_t begin = marks[static_cast<std::size_t>(from)];
    const uint64_t end = marks[static_cast<std::size_t>(to)];
    return end > begin ? static_cast<double>(end - begin) * 1e-9 : 0.0;
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
