// The forward's own clock: where a launch's time goes, for benchmarks (Nsight Compute cannot
// profile a cooperative launch of clusters).
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/word.cuh"

namespace flashmoe::cuda::kernel {

// Any thread; of several the last one counts.
FM_DEVICE void set_mark(const ForwardParams& params, Mark mark) {
  ptx::st_relaxed_gpu(&params.memory.state->marks[static_cast<int>(mark)],
                      ptx::get_sreg_globaltimer());
}
// Likewise, of those of the first CTA.
FM_DEVICE void set_mark_of_first(const ForwardParams& params, Mark mark) {
  if (ptx::block_idx() == 0) set_mark(params, mark);
}

}  // namespace flashmoe::cuda::kernel
