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

FM_DEVICE int32_t k_blocks_of(const Tile& tile, const config::ForwardSizes& sizes) {
  return (tile.product == kUpProduct ? sizes.hidden : sizes.intermediate) / config::kDepthStep;
}

}  // namespace flashmoe::cuda::tile
