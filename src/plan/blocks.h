// Blocks: consecutive rows of one expert that one tile takes. An expert's rows are split evenly
// over as few blocks as the largest height allows, each a multiple of row_align.
#pragma once

#include <cstdint>

#include "plan/rows.h"

namespace flashmoe::plan {

struct Block {
  int32_t local_expert_idx;
  int32_t step;       // of its last row: the block can start when this source has arrived
  int64_t row_begin;  // multiple of row_align
  int64_t num_rows;   // rows with a slot
  int64_t padded_rows;
};

struct BlockShape {
  int64_t row_align;
  int64_t max_rows;  // multiple of row_align
};

FM_HD constexpr int64_t blocks_of_expert(int64_t rows, const BlockShape& shape) {
  return ceil_div(rows, shape.max_rows);
}

FM_HD constexpr int64_t block_height(int64_t rows, const BlockShape& shape) {
  if (rows == 0) return 0;
  return align_up(ceil_div(rows, blocks_of_expert(rows, shape)), shape.row_align);
}

// Most blocks that num_rows (padding included) rows of local_experts experts can make.
FM_HD constexpr int64_t max_blocks(int64_t num_rows, int64_t local_experts,
                                   const BlockShape& shape) {
  return num_rows / shape.max_rows + local_experts;
}

// Writes the blocks in natural order (expert, row) and returns how many there are.
FM_HD inline int64_t make_blocks(const Problem& problem, const BlockShape& shape,
                                 const int64_t* expert_begin, const int64_t* expert_rows,
                                 const int64_t* segment_begin, Block* blocks) {
  int64_t num_blocks = 0;
  for (int64_t e = 0; e < problem.local_experts(); ++e) {
    const int64_t height = block_height(expert_rows[e], shape);
    for (int64_t first = 0; first < expert_rows[e]; first += height) {
      const int64_t rows = min_of(height, expert_rows[e] - first);
      const int64_t row_begin = expert_begin[e] + first;
      const int32_t step = step_of_row(problem, segment_begin, e, row_begin + rows - 1);
      blocks[num_blocks++] =
          Block{static_cast<int32_t>(e), step, row_begin, rows, align_up(rows, shape.row_align)};
    }
  }
  return num_blocks;
}

// up_order: natural block indices sorted by (step, expert, block); stable, so own tokens start at
// once and the others follow in arrival order.
FM_HD inline void sort_blocks_by_step(const Block* blocks, int64_t num_blocks, int32_t world,
                                      int32_t* up_order) {
  int64_t next = 0;
  for (int32_t step = 0; step < world; ++step) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (blocks[b].step == step) up_order[next++] = static_cast<int32_t>(b);
    }
  }
}

}  // namespace flashmoe::plan
