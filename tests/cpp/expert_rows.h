// The experts' table of a CUDA plan, for tests of the walks over it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cuda/config/forward.h"
#include "cuda/tile/walk.h"

namespace flashmoe::cuda {

// The table as the plan writes it, from the rows of each expert. block_rows: most of a block.
struct ExpertRows {
  std::vector<int32_t> begin{0}, rows, blocks_before{0}, words;

  ExpertRows(std::vector<int32_t> rows_of_expert, int32_t block_rows)
      : rows(std::move(rows_of_expert)) {
    const tile::TileGrid grid{block_rows, 1};
    for (const int32_t count : rows) {
      const int32_t groups = (count + config::kRowGroup - 1) / config::kRowGroup;
      begin.push_back(begin.back() + groups * config::kRowGroup);
      blocks_before.push_back(blocks_before.back() + grid.num_blocks(count));
    }
    for (const auto* array : {&begin, &rows, &blocks_before}) {
      words.insert(words.end(), array->begin(), array->end());
    }
  }
  tile::ExpertTable view() const { return {words.data(), static_cast<int32_t>(rows.size())}; }
};

}  // namespace flashmoe::cuda
