// The experts' rows where a CTA's roles read them: written by its plan.
#pragma once

#include "cuda/config/forward.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/walk.h"

namespace flashmoe::cuda::tile {

// In shared memory, if they are few.
struct ExpertMemory {
  int32_t words[ExpertTable::num_words(config::kNearExperts)];
};

}  // namespace flashmoe::cuda::tile
