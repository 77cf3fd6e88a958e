#include <algorithm>

#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

// A chunk of 64 tokens of one source, found from its index over all sources.
struct SourceChunk {
  int32_t source = 0;
  int64_t chunk = 0;
  int64_t begin = 0, end = 0;  // tokens

  template <class T>
  SourceChunk(const Launch<T>& launch, int64_t index) {
    const auto& begins = launch.source_chunk_begin;
    const auto next = std::upper_bound(begins.begin(), begins.end(), index);
    source = static_cast<int32_t>(next - begins.begin()) - 1;
    chunk = index - begins[static_cast<size_t>(source)];
    begin = chunk * plan::kTileTokens;
    end = std::min(begin + plan::kTileTokens, launch.source_tokens[static_cast<size_t>(source)]);
  }
};

// Where the sums go: the caller's tensor for a rank alone, else the source's partials.
template <class T>
T* target_row(const Launch<T>& launch, int32_t source, int64_t token_idx) {
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  if (p.world == 1) return row_of<T>(launch.call.backward ? ops.grad_x : ops.y, token_idx);
  T* partials = launch.template symmetric_at<T>(source, plan::Symmetric::kPartial);
  return partials + (p.rank * launch.symmetric_shape.token_cap + token_idx) * p.hidden;
}

// Rows of a token on this rank, in slot order.
template <class T>
const int32_t* slot_rows(const Launch<T>& launch, int32_t source, int64_t token_idx) {
  return launch.template rows_at<int32_t>(plan::RowScratch::kSlotRow) +
         launch.source_slot_begin[static_cast<size_t>(source)] + token_idx * launch.problem.top_k;
}

// sum[columns] = the token's local contributions, in slot order. False when it has none here.
template <class T>
bool sum_token(const Launch<T>& launch, const int32_t* rows, int64_t column_block, int64_t columns,
               Acc<T>* sum) {
  using A = Acc<T>;
  const A* weights = launch.template rows_at<A>(plan::RowScratch::kRowWeight);
  const bool weighted = (launch.call.layer.weight_on_input != 0) == launch.call.backward;
  const T* ring = launch.ring_at(column_block);
  MutableArray<A> total(sum, columns);
  bool any = false;
  for (int64_t j = 0; j < launch.problem.top_k; ++j) {
    if (rows[j] < 0) continue;
    const auto row = ArrayView<T>(ring + rows[j] * launch.tiles.column_width, columns);
    const A factor = weighted ? weights[rows[j]] : A(1);
    if (any) {
      total += factor * row.template cast<A>();
    } else {
      total = factor * row.template cast<A>();
    }
    any = true;
  }
  return any;
}

// The finished gradients of the slots' weights go home with the last column block.
template <class T>
void return_slot_gradients(Launch<T>& launch, int32_t source, int64_t token_idx,
                           const int32_t* rows) {
  using A = Acc<T>;
  const A* parts = launch.template rows_at<A>(plan::RowScratch::kWeightParts);
  A* home = launch.template symmetric_at<A>(source, plan::Symmetric::kSlotGrad);
  for (int64_t j = 0; j < launch.problem.top_k; ++j) {
    if (rows[j] < 0) continue;
    home[token_idx * launch.problem.top_k + j] =
        ArrayView<A>(parts + rows[j] * launch.weight_parts, launch.weight_parts).sum();
  }
}

}  // namespace

template <class T>
void return_chunk(Launch<T>& launch, int64_t column_block, int64_t index, void* panel) {
  using A = Acc<T>;
  const auto& p = launch.problem;
  const SourceChunk chunk(launch, index);
  const int64_t columns = launch.column_count(column_block);
  const int64_t column_begin = launch.column_begin(column_block);
  launch.waiter.until_equal(launch.down_done[static_cast<size_t>(column_block)],
                            static_cast<uint32_t>(launch.num_blocks),
                            {"down tiles", "return", -1, launch.epoch});
  const bool sends_slots =
      column_block == launch.column_blocks - 1 && launch.call.backward && p.world > 1;
  if (sends_slots && column_block > 0) {
    // With the weight on the input every column block has a piece of the slots' gradients, and only
    // the one before last may still be at work.
    launch.waiter.until_equal(launch.down_done[static_cast<size_t>(column_block - 1)],
                              static_cast<uint32_t>(launch.num_blocks),
                              {"down tiles", "return", -1, launch.epoch});
  }
  A* sum = Panel(panel).take<A>(columns);
  int64_t rows_sent = 0;
  for (int64_t t = chunk.begin; t < chunk.end; ++t) {
    const int32_t* rows = slot_rows(launch, chunk.source, t);
    if (sum_token(launch, rows, column_block, columns, sum)) {
      convert(sum, target_row(launch, chunk.source, t) + column_begin, columns);
      ++rows_sent;
    } else if (p.world == 1) {
      std::fill_n(target_row(launch, chunk.source, t) + column_begin, columns, T(0));
    }
    if (sends_slots) return_slot_gradients(launch, chunk.source, t, rows);
  }
  if (p.world > 1) {
    if (chunk.source != p.rank) launch.returned_elements += rows_sent * columns;
    auto* flags = launch.template symmetric_at<std::atomic<uint32_t>>(
        chunk.source, plan::Symmetric::kReturnFlags);
    flags[plan::return_flag_index(launch.symmetric_shape, p.rank, column_block, chunk.chunk)].store(
        launch.epoch, std::memory_order_release);
  }
  launch.return_done[static_cast<size_t>(column_block)].fetch_add(1, std::memory_order_acq_rel);
}

#define FM_INSTANTIATE(T) template void return_chunk<T>(Launch<T>&, int64_t, int64_t, void*);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
