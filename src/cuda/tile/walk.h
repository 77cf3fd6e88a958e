// Ticket -> task of the forward's math roles:
//
//   up tiles | down tiles of column block 0 | of column block 1 | ...
//
// plan/tasks.h without what communication warps do. Every task depends only on smaller tickets and
// on copies that wait for no ticket, so the walk never deadlocks. Inside a product the order is
// tile/schedule.h's; column blocks go over the experts forward and backward in turn, so that the
// hidden rows that one used last are used first by the next (they are in the L2 cache). The first
// goes forward: the up tiles of the last experts are not finished when it begins.
#pragma once

#include "cuda/tile/schedule.h"

namespace flashmoe::cuda::tile {

// Tile::product of the forward.
inline constexpr int8_t kUpProduct = 0;
inline constexpr int8_t kDownProduct = 1;

// The plan's rows of each expert: three arrays, one after the other, in memory that the walk reads
// quickly.
struct ExpertTable {
  const int32_t* words;  // [num_words(num_experts)]
  int32_t num_experts;

  FM_HD static constexpr int32_t num_words(int32_t num_experts) { return 3 * num_experts + 2; }

  // First row; a multiple of kTokenStep. Of expert num_experts: the end of all rows.
  FM_HD constexpr int32_t begin(int32_t e) const { return words[e]; }
  FM_HD constexpr int32_t rows(int32_t e) const { return words[num_experts + 1 + e]; }
  // Blocks of the experts before.
  FM_HD constexpr int32_t blocks_before(int32_t e) const { return words[2 * num_experts + 1 + e]; }

  FM_HD constexpr int32_t num_blocks() const { return blocks_before(num_experts); }
  // The expert that row `row_idx` (rounded up to groups) belongs to.
  FM_HD constexpr int32_t expert_of_row(int32_t row_idx) const {
    return last_at_most(words, row_idx);
  }
  FM_HD constexpr int32_t expert_of_block(int32_t block_idx) const {
    return last_at_most(words + 2 * num_experts + 1, block_idx);
  }

 private:
  // The last expert whose value is at most `value`: of those without rows or blocks, which repeat
  // their successor's value, none is the last.
  FM_HD constexpr int32_t last_at_most(const int32_t* ascending, int32_t value) const {
    int32_t low = 0;
    int32_t high = num_experts;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      if (ascending[middle] <= value) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

struct Walk {
  ExpertTable experts;
  int32_t max_rows;  // of a block
  int32_t up_pairs;
  int32_t down_pairs;
  int32_t column_pairs;

  FM_HD constexpr ColumnBlocks columns() const { return {down_pairs, column_pairs}; }
  FM_HD constexpr int32_t pairs_of(int32_t column_block) const {
    return column_block < 0 ? up_pairs : columns().pairs_of(column_block);
  }

  // The tile of any ticket; an end tile from the last ticket on.
  FM_HD constexpr Tile tile_at(int32_t ticket) const {
    const int32_t num_blocks = experts.num_blocks();
    int32_t column_block = -1;  // up
    int32_t num_tiles = num_blocks * up_pairs;
    while (ticket >= num_tiles) {
      ticket -= num_tiles;
      if (++column_block == columns().count()) return Tile{};
      num_tiles = num_blocks * pairs_of(column_block);
    }
    const int32_t pairs = pairs_of(column_block);
    const bool is_reversed = column_block > 0 && column_block % 2 == 1;
    const int32_t place = ticket / pairs;
    const int32_t e = experts.expert_of_block(is_reversed ? num_blocks - 1 - place : place);
    const int32_t blocks_before =
        is_reversed ? num_blocks - experts.blocks_before(e + 1) : experts.blocks_before(e);
    Tile tile = TileGrid{max_rows, pairs}.tile_at(ticket - blocks_before * pairs, e,
                                                  experts.begin(e), experts.rows(e));
    if (column_block < 0) return tile;
    tile.product = kDownProduct;
    tile.weight_pair_idx += column_block * column_pairs;
    return tile;
  }
};

}  // namespace flashmoe::cuda::tile
