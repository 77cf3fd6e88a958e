// The experts' rows in a CTA's shared memory: written by its plan, read by all its roles.
#pragma once

#include "cuda/config/forward.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/walk.h"

namespace flashmoe::cuda::tile {

struct ExpertMemory {
  int32_t begin[config::kMaxExperts + 1];
  int32_t rows[config::kMaxExperts];
  int32_t blocks_before[config::kMaxExperts + 1];

  FM_DEVICE ExpertTable table(int32_t num_experts) const {
    return {begin, rows, blocks_before, num_experts};
  }
};

FM_DEVICE int32_t k_blocks_of(const Tile& tile, const config::ForwardSizes& sizes) {
  return (tile.product == kUpProduct ? sizes.hidden : sizes.intermediate) / config::kDepthStep;
}

}  // namespace flashmoe::cuda::tile
