// Copies of one k-block's operands into a stage, by the tensor copy engine.
#pragma once

#include <cuda.h>

#include "cuda/config/grouped_product.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/schedule.h"

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

// This CTA's half of the pair's token rows, for both CTAs. map: of boxes of half the tile's rows.
class TokenLoad {
 public:
  FM_DEVICE TokenLoad(const CUtensorMap& map, const Tile& tile, int32_t cta_rank)
      : map_(map), row_begin_(tile.row_begin), first_(cta_rank * tile.num_steps() * kStepOfCta) {}

  FM_DEVICE void load(uint8_t* to, uint64_t* full, int32_t depth) const {
    constexpr uint16_t kBoth = 0b11;
    const int32_t at[2] = {depth, row_begin_ + first_};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                              to + first_ * config::kDepthStep * config::kElementBytes, &map_, at,
                              full, kBoth);
  }

 private:
  static constexpr int32_t kStepOfCta = kTokenStep / config::kClusterSize;
  const CUtensorMap& map_;
  int32_t row_begin_;
  int32_t first_;
};

}  // namespace flashmoe::cuda::tile
