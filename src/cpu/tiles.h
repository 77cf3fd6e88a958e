// Tile sizes of the CPU engine: pure functions of the problem, never of the number of threads, so
// that the bits do not depend on it.
#pragma once

#include "plan/blocks.h"
#include "plan/problem.h"

namespace flashmoe::cpu {

struct TileConfig {
  plan::BlockShape block{.row_align = 8, .max_rows = 256};
  int64_t up_width = 0;         // intermediate columns of an up tile
  int64_t column_width = 0;     // hidden columns of a column block
  int64_t weight_hidden = 0;    // extent of a weight-gradient tile along H
  int64_t weight_other = 0;     // and along I (or G * I)
  int64_t weight_depth = 1024;  // rows of one product of a weight-gradient tile
  int64_t router_experts = 64;  // experts of a router-gradient tile
};

// Splits `extent` evenly over as few pieces of at most `most` as possible, in multiples of 16.
constexpr int64_t even_width(int64_t extent, int64_t most) {
  return plan::align_up(plan::ceil_div(extent, plan::ceil_div(extent, most)), 16);
}

// Widths near 512 keep a tile's products over 90 % of the library's best rate and leave enough
// tiles for balance (docs/perf-notes.md).
constexpr TileConfig choose_tiles(const plan::Problem& problem) {
  TileConfig tiles;
  tiles.up_width = even_width(problem.intermediate, 512);
  tiles.column_width = even_width(problem.hidden, 512);
  tiles.weight_hidden = even_width(problem.hidden, 512);
  tiles.weight_other = even_width(problem.intermediate, 512);
  return tiles;
}

}  // namespace flashmoe::cpu
