// Copies of one k-block's operands into a stage, by the tensor copy engine.
#pragma once

#include <cuda.h>

#include "cuda/config/grouped_product.h"
#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::tile {

// This CTA's 128 weight rows, in one copy. The map's coordinates are (k, row of 64, block of 64
// rows, gate or up, expert), the first two swapped for column-major weights; a box is two blocks,
// or a gate block and its up block. Blocks past the expert's end are zeros.
template <config::GroupedProductConfig Config>
FM_DEVICE void load_weights(uint8_t* destination, uint64_t* full, const CUtensorMap& map,
                            int32_t local_expert_idx, int32_t weight_tile_idx, int32_t depth) {
  constexpr bool kDepthMajor = Config::value.major == config::Major::kDepth;
  const int32_t block = weight_tile_idx * (Config::value.weight_step() / config::kHalfRows);
  const int32_t at[5] = {kDepthMajor ? depth : 0, kDepthMajor ? 0 : depth, block, 0,
                         local_expert_idx};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, destination, &map, at, full);
}

// This CTA's half of the pair's token rows, for both CTAs. map: of boxes of num_steps * 8 rows.
FM_DEVICE void load_tokens_for_pair(uint8_t* destination, uint64_t* full, const CUtensorMap& map,
                                    int32_t row_begin, int32_t num_steps, int32_t depth,
                                    int32_t cta_rank) {
  constexpr uint16_t kBoth = 0b11;
  const int32_t first = cta_rank * num_steps * (kTokenStep / 2);
  const int32_t at[2] = {depth, row_begin + first};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                            destination + first * config::kDepthStep * config::kElementBytes, &map,
                            at, full, kBoth);
}

}  // namespace flashmoe::cuda::tile
