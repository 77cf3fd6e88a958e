#include <algorithm>
#include <cstring>

#include "cpu/stage/gather.h"
#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

// One up tile: a block's rows and a range of intermediate columns [begin, begin + count).
//
// Its pre-activations lie in a panel [rows][gates * count] whose columns follow the weight's row
// order: gates first and then ups, or interleaved.
template <class T>
struct UpTile {
  using A = Acc<T>;

  UpTile(const Launch<T>& launch_in, int64_t position, int64_t tile_in)
      : launch(launch_in),
        tile(tile_in),
        block_idx(launch.template rows_at<int32_t>(plan::RowScratch::kUpOrder)[position]),
        block(launch.template rows_at<plan::Block>(plan::RowScratch::kBlocks)[block_idx]),
        begin(tile * launch.tiles.up_width),
        count(plan::min_of(launch.tiles.up_width, launch.problem.intermediate - begin)),
        gates(launch.problem.gates),
        interleaved(launch.call.layer.gate_layout == FM_GATE_INTERLEAVED && gates == 2) {}

  const Launch<T>& launch;
  int64_t tile;
  int64_t block_idx;
  const plan::Block& block;
  int64_t begin, count;
  int32_t gates;
  bool interleaved;

  int64_t panel_width() const { return gates * count; }

  PreActivation<A> pre_activation(const A* row) const {
    if (gates == 1) return {row, nullptr, 1};
    if (interleaved) return {row, row + 1, 2};
    return {row, row + count, 1};
  }
  A* grad_up_of(A* grad_row) const {
    if (gates == 1) return nullptr;
    return interleaved ? grad_row + 1 : grad_row + count;
  }

  // Calls f(panel column, column in the weight's row order, columns) for each contiguous piece.
  template <class F>
  void for_each_piece(F&& f) const {
    if (gates == 1 || interleaved) {
      f(int64_t{0}, gates * begin, gates * count);
      return;
    }
    f(int64_t{0}, begin, count);
    f(count, launch.problem.intermediate + begin, count);
  }

  // The weight rows of a piece: [E_loc, G*I, H], or two tensors when gate and up are separate.
  StridedMatrix<const T> weight_rows(int64_t weight_row) const {
    const auto& ops = launch.call.operands;
    const bool separate = present(ops.w_gate);
    const bool is_up = separate && weight_row >= launch.problem.intermediate;
    const fm_tensor& tensor = separate && !is_up ? ops.w_gate : ops.w_up;
    auto matrix = expert_matrix<const T>(tensor, block.local_expert_idx);
    matrix.data +=
        (is_up ? weight_row - launch.problem.intermediate : weight_row) * matrix.row_stride;
    return matrix;
  }
};

template <class T>
void add_bias(const UpTile<T>& t, Acc<T>* z) {
  const fm_tensor& bias = t.launch.call.operands.b_up;
  if (!present(bias)) return;
  const T* row = row_of<const T>(bias, t.block.local_expert_idx);
  t.for_each_piece([&](int64_t panel_col, int64_t weight_row, int64_t count) {
    for (int64_t r = 0; r < t.block.padded_rows; ++r) {
      MutableArray<Acc<T>>(z + r * t.panel_width() + panel_col, count) +=
          ArrayView<T>(row + weight_row, count).template cast<Acc<T>>();
    }
  });
}

// z = x w_up^T + b_up for the tile; `rows` is the room for the gathered tokens.
template <class T>
void compute_z(const UpTile<T>& t, T* rows, Acc<T>* z) {
  const auto& launch = t.launch;
  const int64_t hidden = launch.problem.hidden, m = t.block.padded_rows;
  gather_rows(launch, launch.call.operands.x, plan::Symmetric::kRecvX, t.block.row_begin, m, 0,
              hidden, launch.call.layer.weight_on_input != 0, rows);
  t.for_each_piece([&](int64_t panel_col, int64_t weight_row, int64_t count) {
    const auto w = t.weight_rows(weight_row);
    gemm<T>(m, count, hidden, {rows, hidden, 1}, {w.data, w.col_stride, w.row_stride},
            z + panel_col, t.panel_width(), false);
  });
  add_bias(t, z);
}

// Between the panel and a tensor [rows][G * I] of the whole layer.
template <class T>
void store_z(const UpTile<T>& t, const Acc<T>* z, T* tensor, int64_t row_stride) {
  t.for_each_piece([&](int64_t panel_col, int64_t weight_row, int64_t count) {
    for (int64_t r = 0; r < t.block.padded_rows; ++r) {
      convert(z + r * t.panel_width() + panel_col,
              tensor + (t.block.row_begin + r) * row_stride + weight_row, count);
    }
  });
}

template <class T>
void load_z(const UpTile<T>& t, const T* tensor, int64_t row_stride, Acc<T>* z) {
  t.for_each_piece([&](int64_t panel_col, int64_t weight_row, int64_t count) {
    for (int64_t r = 0; r < t.block.padded_rows; ++r) {
      convert(tensor + (t.block.row_begin + r) * row_stride + weight_row,
              z + r * t.panel_width() + panel_col, count);
    }
  });
}

// Padding rows must read as zeros in every later product.
template <class T>
void clear_padding(T* first_row, int64_t row_stride, int64_t count, const plan::Block& block) {
  for (int64_t r = block.num_rows; r < block.padded_rows; ++r) {
    std::memset(static_cast<void*>(first_row + r * row_stride), 0,
                static_cast<size_t>(count) * sizeof(T));
  }
}

template <class T>
T* hidden_rows(const UpTile<T>& t) {
  return t.launch.template rows_at<T>(plan::RowScratch::kHiddenRows) +
         t.block.row_begin * t.launch.problem.intermediate + t.begin;
}

template <class T>
void finish(Launch<T>& launch, int64_t block_idx) {
  launch.up_done()[block_idx].fetch_add(1, std::memory_order_acq_rel);
  launch.up_total.fetch_add(1, std::memory_order_acq_rel);
}

// dA' = dY W_down, without the slots' weights.
template <class T>
void compute_grad_hidden(const UpTile<T>& t, T* rows, Acc<T>* grad_hidden) {
  const auto& launch = t.launch;
  const int64_t hidden = launch.problem.hidden, m = t.block.padded_rows;
  gather_rows(launch, launch.call.operands.grad_y, plan::Symmetric::kRecvGrad, t.block.row_begin, m,
              0, hidden, false, rows);
  const auto w = expert_matrix<const T>(launch.call.operands.w_down, t.block.local_expert_idx);
  gemm<T>(m, t.count, hidden, {rows, hidden, 1},
          {w.data + t.begin * w.col_stride, w.row_stride, w.col_stride}, grad_hidden, t.count,
          false);
}

// <b_down[e], dY_r>: the bias' share of a slot weight's gradient, for the first tile of a block.
template <class T>
Acc<T> bias_share(const UpTile<T>& t, const T* grad_y_row) {
  const fm_tensor& bias = t.launch.call.operands.b_down;
  if (!present(bias) || t.tile != 0) return Acc<T>(0);
  const int64_t hidden = t.launch.problem.hidden;
  const T* row = row_of<const T>(bias, t.block.local_expert_idx);
  return (ArrayView<T>(row, hidden).template cast<Acc<T>>() *
          ArrayView<T>(grad_y_row, hidden).template cast<Acc<T>>())
      .sum();
}

// Turns z into dZ in place, writes weight * A, and the tile's piece of the weights' gradient.
template <class T>
void differentiate_rows(const UpTile<T>& t, const T* grad_y_rows, Acc<T>* z,
                        const Acc<T>* grad_hidden, Acc<T>* value) {
  using A = Acc<T>;
  const auto& launch = t.launch;
  const bool on_input = launch.call.layer.weight_on_input != 0;
  const A* weights = launch.template rows_at<A>(plan::RowScratch::kRowWeight);
  A* parts = launch.template rows_at<A>(plan::RowScratch::kWeightParts);
  T* hidden = hidden_rows(t);
  for (int64_t r = 0; r < t.block.num_rows; ++r) {
    const int64_t row = t.block.row_begin + r;
    A* z_row = z + r * t.panel_width();
    const A* grad = grad_hidden + r * t.count;
    activate_backward<A>(launch.call.activation, t.pre_activation(z_row), grad, value, z_row,
                         t.grad_up_of(z_row), t.count);
    MutableArray<A> activated(value, t.count);
    if (!on_input) {
      parts[row * launch.weight_parts + t.tile] =
          (activated * ArrayView<A>(grad, t.count)).sum() +
          bias_share(t, grad_y_rows + r * launch.problem.hidden);
      activated *= weights[row];
      MutableArray<A>(z_row, t.panel_width()) *= weights[row];
    }
    convert(value, hidden + r * launch.problem.intermediate, t.count);
  }
}

}  // namespace

template <class T>
void up_tile(Launch<T>& launch, int64_t position, int64_t tile, void* panel) {
  using A = Acc<T>;
  const UpTile<T> t(launch, position, tile);
  Panel memory(panel);
  T* rows = memory.take<T>(t.block.padded_rows * launch.problem.hidden);
  A* z = memory.take<A>(t.block.padded_rows * t.panel_width());
  A* value = memory.take<A>(t.count);
  wait_for_rows(launch, t.block.row_begin, t.block.num_rows, "up");
  compute_z(t, rows, z);
  const fm_tensor& saved = launch.call.operands.z;
  if (present(saved)) store_z(t, z, static_cast<T*>(saved.data), saved.stride[0]);
  T* hidden = hidden_rows(t);
  const int64_t stride = launch.problem.intermediate;
  for (int64_t r = 0; r < t.block.num_rows; ++r) {
    activate<A>(launch.call.activation, t.pre_activation(z + r * t.panel_width()), value, t.count);
    convert(value, hidden + r * stride, t.count);
  }
  clear_padding(hidden, stride, t.count, t.block);
  finish(launch, t.block_idx);
}

template <class T>
void grad_up_tile(Launch<T>& launch, int64_t position, int64_t tile, void* panel) {
  using A = Acc<T>;
  const UpTile<T> t(launch, position, tile);
  Panel memory(panel);
  T* rows = memory.take<T>(t.block.padded_rows * launch.problem.hidden);
  A* z = memory.take<A>(t.block.padded_rows * t.panel_width());
  A* value = memory.take<A>(t.count);
  A* grad_hidden = memory.take<A>(t.block.padded_rows * t.count);
  wait_for_rows(launch, t.block.row_begin, t.block.num_rows, "gradient of the activation");
  const fm_tensor& saved = launch.call.operands.z;
  if (present(saved)) {
    load_z(t, static_cast<const T*>(saved.data), saved.stride[0], z);
  } else {
    compute_z(t, rows, z);
  }
  compute_grad_hidden(t, rows, grad_hidden);
  differentiate_rows(t, rows, z, grad_hidden, value);
  T* grad_z = launch.template rows_at<T>(plan::RowScratch::kGradZ);
  store_z(t, z, grad_z, launch.problem.up_rows());
  t.for_each_piece([&](int64_t, int64_t weight_row, int64_t count) {
    clear_padding(grad_z + t.block.row_begin * launch.problem.up_rows() + weight_row,
                  launch.problem.up_rows(), count, t.block);
  });
  clear_padding(hidden_rows(t), launch.problem.intermediate, t.count, t.block);
  finish(launch, t.block_idx);
}

#define FM_INSTANTIATE(T)                                        \
  template void up_tile<T>(Launch<T>&, int64_t, int64_t, void*); \
  template void grad_up_tile<T>(Launch<T>&, int64_t, int64_t, void*);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
