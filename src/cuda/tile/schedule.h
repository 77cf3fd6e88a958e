// Ticket -> tile of a grouped product, on host and device.
//
// A cluster pair takes one tile at a time: `tokens` rows of one expert (plan/blocks.h splits them)
// and two neighbouring weight tiles, one for each CTA. Order: expert, then weight pair, then block,
// so that the pairs at work share weight tiles through L2.
//
// In 32 bits, where plan/ counts in 64: a 64-bit division is a call, and ptxas serialises the
// matrix products of a kernel that has one.
#pragma once

#include <cstdint>

#include "plan/math.h"

namespace flashmoe::cuda::tile {

inline constexpr int32_t kTokenStep = 16;  // granularity of a block's rows, plan's row_align

// One task, as the ticket warp sends it to the other roles: 16 bytes.
struct alignas(16) Tile {
  int32_t row_begin;
  int32_t num_k_blocks;  // steps, of 64 k where nothing else is said; set by the ticket warp
  int16_t num_rows;      // 0: no more tiles
  int16_t local_expert_idx;
  int16_t weight_pair_idx;
  int8_t product;  // of a kernel that has several
  bool is_ready;   // its tokens are known to be in global memory

  FM_HD constexpr bool is_end() const { return num_rows == 0; }
  FM_HD constexpr int32_t num_steps() const { return plan::ceil_div(num_rows, kTokenStep); }
};

// The weight pairs of a product, cut into column blocks of equal width, the last one of what is
// left.
struct ColumnBlocks {
  int32_t num_pairs;
  int32_t pairs_of_block;

  FM_HD constexpr int32_t count() const { return plan::ceil_div(num_pairs, pairs_of_block); }
  FM_HD constexpr int32_t pairs_of(int32_t column_block) const {
    return plan::min_of(num_pairs - column_block * pairs_of_block, pairs_of_block);
  }
};

// How the blocks and weight pairs of every expert are counted.
struct TileGrid {
  int32_t max_rows;          // of a block
  int32_t num_weight_pairs;  // of an expert

  FM_HD constexpr int32_t num_blocks(int32_t expert_rows) const {
    return plan::ceil_div(expert_rows, max_rows);
  }
  FM_HD constexpr int32_t num_tiles(int32_t expert_rows) const {
    return num_blocks(expert_rows) * num_weight_pairs;
  }
  // Rows of every block but the last; expert_rows > 0.
  FM_HD constexpr int32_t block_height(int32_t expert_rows) const {
    return plan::align_up(plan::ceil_div(expert_rows, num_blocks(expert_rows)), kTokenStep);
  }
  // tile_idx: of the expert, in [0, num_tiles(expert_rows)).
  FM_HD constexpr Tile tile_at(int32_t tile_idx, int32_t local_expert_idx, int32_t expert_begin,
                               int32_t expert_rows) const {
    const int32_t blocks = num_blocks(expert_rows);
    const int32_t weight_pair_idx = tile_idx / blocks;
    const int32_t block_idx = tile_idx - weight_pair_idx * blocks;
    const int32_t height = block_height(expert_rows);
    const int32_t first = block_idx * height;
    const int32_t left = expert_rows - first;
    return {.row_begin = expert_begin + first,
            .num_k_blocks = 0,
            .num_rows = static_cast<int16_t>(left < height ? left : height),
            .local_expert_idx = static_cast<int16_t>(local_expert_idx),
            .weight_pair_idx = static_cast<int16_t>(weight_pair_idx),
            .product = 0,
            .is_ready = false};
  }
};

}  // namespace flashmoe::cuda::tile
