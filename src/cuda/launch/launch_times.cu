#include "cuda/launch/launch_times.h"

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/kernel/forward.h"
#include "cuda/launch/check.h"

namespace flashmoe::cuda::launch {

void time_launch(const void* scratch, const LaunchKind& kind, fm_stats& stats) {
  static_assert(sizeof(Marks) == sizeof(kernel::ForwardState::marks));
  Marks marks{};
  const auto* from = static_cast<const char*>(scratch) + offsetof(kernel::ForwardState, marks);
  check(cudaMemcpyAsync(marks.data(), from, sizeof(marks), cudaMemcpyDeviceToHost,
                        cudaStreamPerThread),
        "cudaMemcpyAsync of a launch's marks");
  check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
  fill_phases(marks, kind, stats);
}

}  // namespace flashmoe::cuda::launch
