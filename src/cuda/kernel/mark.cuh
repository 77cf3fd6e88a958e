// The forward's own clock: where a launch's time goes, for benchmarks (Nsight Compute cannot
// profile a cooperative launch of clusters).
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::kernel {

// One thread.
FM_DEVICE void set_mark(const ForwardParams& params, Mark mark) {
  params.memory.state->marks[static_cast<int>(mark)] = ptx::get_sreg_globaltimer();
}
// One thread of each cluster; the first cluster's counts.
FM_DEVICE void set_mark_of_first(const ForwardParams& params, Mark mark) {
  if (ptx::block_idx() == 0) set_mark(params, mark);
}

}  // namespace flashmoe::cuda::kernel
