// Rows of a block from where they lie: own tokens in the caller's tensor, others as received.
#pragma once

#include <cstring>

#include "cpu/launch.h"

namespace flashmoe::cpu {

// Waits until the rows of remote tokens in [row_begin, row_begin + num_rows) have arrived.
template <class T>
void wait_for_rows(const Launch<T>& launch, int64_t row_begin, int64_t num_rows,
                   const char* phase) {
  if (launch.problem.world == 1) return;
  const auto* token = launch.template rows_at<int32_t>(plan::RowScratch::kRowToken);
  const auto* source = launch.template rows_at<int32_t>(plan::RowScratch::kRowSource);
  const auto* flags = launch.template symmetric_at<std::atomic<uint32_t>>(
      launch.problem.rank, plan::Symmetric::kPushFlags);
  int64_t last = -1;
  for (int64_t r = row_begin; r < row_begin + num_rows; ++r) {
    if (token[r] < 0 || source[r] == launch.problem.rank) continue;
    const int64_t flag =
        plan::push_flag_index(launch.symmetric_shape, source[r], token[r] / plan::kTileTokens);
    if (flag == last) continue;
    launch.waiter.until_equal(flags[flag], launch.epoch,
                              {"token rows", phase, source[r], launch.epoch});
    last = flag;
  }
}

// to[num_rows][col_count] = columns of the token rows behind rows row_begin.. of `own` (x or
// grad_y); padding rows are zero. With scale, each row is multiplied by its slot's weight.
template <class T>
void gather_rows(const Launch<T>& launch, const fm_tensor& own, plan::Symmetric received,
                 int64_t row_begin, int64_t num_rows, int64_t col_begin, int64_t col_count,
                 bool scale, T* to) {
  using A = Acc<T>;
  const auto* token = launch.template rows_at<int32_t>(plan::RowScratch::kRowToken);
  const auto* source = launch.template rows_at<int32_t>(plan::RowScratch::kRowSource);
  const auto* weight = launch.template rows_at<A>(plan::RowScratch::kRowWeight);
  const size_t bytes = static_cast<size_t>(col_count) * sizeof(T);
  for (int64_t i = 0; i < num_rows; ++i, to += col_count) {
    const int64_t r = row_begin + i;
    if (token[r] < 0) {
      std::memset(static_cast<void*>(to), 0, bytes);
      continue;
    }
    const T* from = launch.token_row(own, received, source[r], token[r]) + col_begin;
    if (scale) {
      MutableArray<T>(to, col_count) =
          (ArrayView<T>(from, col_count).template cast<A>() * weight[r]).template cast<T>();
    } else {
      std::memcpy(static_cast<void*>(to), from, bytes);
    }
  }
}

}  // namespace flashmoe::cpu
