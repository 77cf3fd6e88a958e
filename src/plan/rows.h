// Row placement on an owner rank: where the slots of every source land in the expert-sorted order.
//
// Rows of an expert are consecutive; inside it the sources follow in step order (own tokens first),
// and inside a source slot order. An expert's first row is aligned to `row_align`, so that tiles of
// whole row groups never touch a neighbour: the rows between are padding and hold zeros.
#pragma once

#include <cstdint>

#include "plan/problem.h"

namespace flashmoe::plan {

// counts[source][E_loc] -> expert_begin[E_loc + 1] (aligned), expert_rows[E_loc] (without padding),
// segment_begin[E_loc][W] by step. Returns the number of rows, padding included.
FM_HD inline int64_t place_rows(const Problem& problem, const int32_t* counts, int64_t row_align,
                                int64_t* expert_begin, int64_t* expert_rows,
                                int64_t* segment_begin) {
  const int64_t local_experts = problem.local_experts();
  int64_t row = 0;
  for (int64_t e = 0; e < local_experts; ++e) {
    row = align_up(row, row_align);
    expert_begin[e] = row;
    for (int32_t step = 0; step < problem.world; ++step) {
      segment_begin[e * problem.world + step] = row;
      row += counts[problem.source_of_step(step) * local_experts + e];
    }
    expert_rows[e] = row - expert_begin[e];
  }
  row = align_up(row, row_align);
  expert_begin[local_experts] = row;
  return row;
}

// Most rows that `slots` slots can take with padding.
FM_HD constexpr int64_t max_rows(int64_t slots, int64_t local_experts, int64_t row_align) {
  return align_up(slots + local_experts * (row_align - 1), row_align);
}

// Rows of a z for `slots` slots, whichever engine writes it (fm_z_rows): an expert's first row is a
// multiple of 8 on the CPU, of 16 on CUDA.
FM_HD constexpr int64_t max_z_rows(int64_t slots, int64_t local_experts) {
  constexpr int64_t kRowAlign = 16;
  return max_rows(slots, local_experts, kRowAlign);
}

// The same for one of several ranks (CUDA), where no number is sure to hold what comes: a quarter
// more than an even share, if all ranks have as many slots. A Z that more rows come to is computed
// again.
FM_HD constexpr int64_t ample_z_rows(int64_t slots, int64_t num_experts) {
  return max_z_rows(slots + slots / 4, num_experts);
}

// Step of the source that the expert's row `row_idx` came from.
FM_HD inline int32_t step_of_row(const Problem& problem, const int64_t* segment_begin,
                                 int64_t local_expert_idx, int64_t row_idx) {
  const int64_t* segments = segment_begin + local_expert_idx * problem.world;
  int32_t step = problem.world - 1;
  while (step > 0 && segments[step] > row_idx) --step;
  return step;
}

}  // namespace flashmoe::plan
