#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

// The matrices that one down tile multiplies: rows [num_rows][depth] and, beside each other along
// depth, the weight's column block. Two pieces when gate and up weights are separate tensors.
template <class T>
struct Piece {
  const T* rows;
  int64_t row_stride;
  int64_t depth;
  MatrixView<T> weight;  // [depth][columns]
};

template <class T>
int make_pieces(const Launch<T>& launch, const plan::Block& block, int64_t column_begin,
                Piece<T> (&pieces)[2]) {
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  const int64_t e = block.local_expert_idx;
  if (!launch.call.backward) {
    const auto w = expert_matrix<const T>(ops.w_down, e);
    pieces[0] = {launch.template rows_at<T>(plan::RowScratch::kHiddenRows) +
                     block.row_begin * p.intermediate,
                 p.intermediate,
                 p.intermediate,
                 {w.data + column_begin * w.row_stride, w.col_stride, w.row_stride}};
    return 1;
  }
  const T* grad_z =
      launch.template rows_at<T>(plan::RowScratch::kGradZ) + block.row_begin * p.up_rows();
  const auto add = [&](int at, const fm_tensor& tensor, int64_t first, int64_t depth) {
    const auto w = expert_matrix<const T>(tensor, e);
    pieces[at] = {grad_z + first,
                  p.up_rows(),
                  depth,
                  {w.data + column_begin * w.col_stride, w.row_stride, w.col_stride}};
  };
  if (!present(ops.w_gate)) {
    add(0, ops.w_up, 0, p.up_rows());
    return 1;
  }
  add(0, ops.w_gate, 0, p.intermediate);
  add(1, ops.w_up, p.intermediate, p.intermediate);
  return 2;
}

template <class T>
void add_down_bias(const Launch<T>& launch, const plan::Block& block, int64_t column_begin,
                   int64_t columns, Acc<T>* out) {
  const fm_tensor& bias = launch.call.operands.b_down;
  if (launch.call.backward || !present(bias)) return;
  const T* row = row_of<const T>(bias, block.local_expert_idx) + column_begin;
  for (int64_t r = 0; r < block.num_rows; ++r) {
    MutableArray<Acc<T>>(out + r * columns, columns) +=
        ArrayView<T>(row, columns).template cast<Acc<T>>();
  }
}

// With the weight on the input, d w_r = <x_t, dZ_r W_up>: this column block's share.
template <class T>
void weight_share_of_input(const Launch<T>& launch, const plan::Block& block, int64_t column_block,
                           const Acc<T>* grad, int64_t columns) {
  using A = Acc<T>;
  const auto* token = launch.template rows_at<int32_t>(plan::RowScratch::kRowToken);
  const auto* source = launch.template rows_at<int32_t>(plan::RowScratch::kRowSource);
  A* parts = launch.template rows_at<A>(plan::RowScratch::kWeightParts);
  for (int64_t r = 0; r < block.num_rows; ++r) {
    const int64_t row = block.row_begin + r;
    const T* x =
        launch.token_row(launch.call.operands.x, plan::Symmetric::kRecvX, source[row], token[row]) +
        launch.column_begin(column_block);
    parts[row * launch.weight_parts + column_block] =
        (ArrayView<T>(x, columns).template cast<A>() * ArrayView<A>(grad + r * columns, columns))
            .sum();
  }
}

}  // namespace

template <class T>
void down_tile(Launch<T>& launch, int64_t column_block, int64_t block_idx, void* panel) {
  using A = Acc<T>;
  const auto& block = launch.template rows_at<plan::Block>(plan::RowScratch::kBlocks)[block_idx];
  const int64_t columns = launch.column_count(column_block);
  launch.waiter.until_equal(launch.up_done()[block_idx], static_cast<uint32_t>(launch.up_tiles),
                            {"up tiles", "down", -1, launch.epoch});
  if (column_block >= plan::kRingSlots) {
    launch.waiter.until_equal(
        launch.return_done[static_cast<size_t>(column_block - plan::kRingSlots)],
        static_cast<uint32_t>(launch.space.return_chunks),
        {"the ring slot", "down", -1, launch.epoch});
  }
  Piece<T> pieces[2];
  const int num_pieces = make_pieces(launch, block, launch.column_begin(column_block), pieces);
  A* out = Panel(panel).take<A>(block.padded_rows * columns);
  for (int i = 0; i < num_pieces; ++i) {
    const Piece<T>& piece = pieces[i];
    gemm<T>(block.padded_rows, columns, piece.depth, {piece.rows, piece.row_stride, 1},
            piece.weight, out, columns, i > 0);
  }
  add_down_bias(launch, block, launch.column_begin(column_block), columns, out);
  if (launch.call.backward && launch.call.layer.weight_on_input != 0) {
    weight_share_of_input(launch, block, column_block, out, columns);
  }
  T* ring = launch.ring_at(column_block);
  for (int64_t r = 0; r < block.num_rows; ++r) {
    convert(out + r * columns, ring + (block.row_begin + r) * launch.tiles.column_width, columns);
  }
  launch.down_done[static_cast<size_t>(column_block)].fetch_add(1, std::memory_order_acq_rel);
}

#define FM_INSTANTIATE(T) template void down_tile<T>(Launch<T>&, int64_t, int64_t, void*);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
