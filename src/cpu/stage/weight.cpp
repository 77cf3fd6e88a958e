#include <algorithm>

#include "cpu/stage/gather.h"
#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

// One weight gradient of an expert: sum over its rows of (token row along H) x (scratch row along
// the other dimension). dW_down: grad y and weight * A. dW_gate, dW_up: x and dZ.
template <class T>
struct Gradient {
  const fm_tensor* grad;
  const fm_tensor* tokens;
  plan::Symmetric received;
  const T* rows;  // scratch, at the gradient's first column
  int64_t rows_stride;
  int64_t other;      // extent of the dimension that is not H
  bool hidden_first;  // dW_down [H, I]
  bool scale;         // token rows times their slot's weight
  bool accumulate;

  int64_t tiles(const Launch<T>& launch) const {
    return plan::ceil_div(launch.problem.hidden, launch.tiles.weight_hidden) *
           plan::ceil_div(other, launch.tiles.weight_other);
  }
};

constexpr int kMaxGradients = 3;

// The gradients that the caller asked for; returns how many.
template <class T>
int list_gradients(const Launch<T>& launch, Gradient<T> (&list)[kMaxGradients]) {
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  const bool on_input = launch.call.layer.weight_on_input != 0;
  const T* grad_z = launch.template rows_at<T>(plan::RowScratch::kGradZ);
  int count = 0;
  if (present(ops.grad_w_down)) {
    list[count++] = {&ops.grad_w_down,
                     &ops.grad_y,
                     plan::Symmetric::kRecvGrad,
                     launch.template rows_at<T>(plan::RowScratch::kHiddenRows),
                     p.intermediate,
                     p.intermediate,
                     true,
                     false,
                     (ops.flags & FM_ACCUMULATE_W_DOWN) != 0};
  }
  const auto add_up = [&](const fm_tensor& grad, int64_t first, int64_t other, uint32_t flag) {
    if (!present(grad)) return;
    list[count++] = {&grad, &ops.x,   plan::Symmetric::kRecvX, grad_z + first, p.up_rows(), other,
                     false, on_input, (ops.flags & flag) != 0};
  };
  if (present(ops.w_gate)) {
    add_up(ops.grad_w_gate, 0, p.intermediate, FM_ACCUMULATE_W_GATE);
    add_up(ops.grad_w_up, p.intermediate, p.intermediate, FM_ACCUMULATE_W_UP);
  } else {
    add_up(ops.grad_w_up, 0, p.up_rows(), FM_ACCUMULATE_W_UP);
  }
  return count;
}

template <class T>
bool wants_bias(const Launch<T>& launch) {
  const auto& ops = launch.call.operands;
  return present(ops.grad_b_up) || present(ops.grad_b_down);
}

struct Expert {
  int64_t idx, row_begin, padded_rows;
};

template <class T>
Expert expert_at(const Launch<T>& launch, int64_t local_expert_idx) {
  const auto* begin = launch.template rows_at<int64_t>(plan::RowScratch::kExpertBegin);
  const auto* rows = launch.template rows_at<int64_t>(plan::RowScratch::kExpertRows);
  return {local_expert_idx, begin[local_expert_idx],
          plan::align_up(rows[local_expert_idx], launch.tiles.block.row_align)};
}

// One tile [hidden range] x [other range] of one gradient of one expert.
template <class T>
struct GradientTile {
  const Gradient<T>& gradient;
  Expert expert;
  int64_t hidden_begin, hidden_count, other_begin, other_count;
  int64_t hidden_stride, other_stride;  // of the output
  int64_t offset;                       // of the output's first element

  GradientTile(const Launch<T>& launch, const Gradient<T>& g, const Expert& e, int64_t index)
      : gradient(g), expert(e) {
    const auto& tiles = launch.tiles;
    const int64_t others = plan::ceil_div(g.other, tiles.weight_other);
    hidden_begin = index / others * tiles.weight_hidden;
    other_begin = index % others * tiles.weight_other;
    hidden_count = plan::min_of(tiles.weight_hidden, launch.problem.hidden - hidden_begin);
    other_count = plan::min_of(tiles.weight_other, g.other - other_begin);
    hidden_stride = g.grad->stride[g.hidden_first ? 1 : 2];
    other_stride = g.grad->stride[g.hidden_first ? 2 : 1];
    offset = e.idx * g.grad->stride[0] + hidden_begin * hidden_stride + other_begin * other_stride;
  }

  // The output's contiguous dimension runs along the product's columns.
  bool hidden_rows() const { return other_stride == 1 || hidden_stride != 1; }
  int64_t out_rows() const { return hidden_rows() ? hidden_count : other_count; }
  int64_t out_cols() const { return hidden_rows() ? other_count : hidden_count; }
  int64_t out_row_stride() const { return hidden_rows() ? hidden_stride : other_stride; }
  int64_t out_col_stride() const { return hidden_rows() ? other_stride : hidden_stride; }
};

// c (+)= the tile's product over all rows of the expert, weight_depth rows at a time in row order.
template <class T>
void multiply(const Launch<T>& launch, const GradientTile<T>& t, T* gathered, Acc<T>* c,
              int64_t ldc, bool accumulate) {
  const Gradient<T>& g = t.gradient;
  for (int64_t r = 0; r < t.expert.padded_rows; r += launch.tiles.weight_depth) {
    const int64_t depth = std::min(launch.tiles.weight_depth, t.expert.padded_rows - r);
    const int64_t row = t.expert.row_begin + r;
    gather_rows(launch, *g.tokens, g.received, row, depth, t.hidden_begin, t.hidden_count, g.scale,
                gathered);
    const MatrixView<T> tokens{gathered, t.hidden_count, 1};
    const MatrixView<T> rows{g.rows + row * g.rows_stride + t.other_begin, g.rows_stride, 1};
    const auto& left = t.hidden_rows() ? tokens : rows;
    const auto& right = t.hidden_rows() ? rows : tokens;
    gemm<T>(t.out_rows(), t.out_cols(), depth, left.transposed(), right, c, ldc,
            accumulate || r > 0);
  }
}

// Rounds c into the output, adding to what is there when asked.
template <class T, class Out>
void write_tile(const GradientTile<T>& t, const Acc<T>* c, Out* out) {
  using A = Acc<T>;
  const int64_t cols = t.out_cols(), col_stride = t.out_col_stride();
  for (int64_t i = 0; i < t.out_rows(); ++i) {
    const A* from = c + i * cols;
    Out* to = out + t.offset + i * t.out_row_stride();
    if (col_stride == 1 && !t.gradient.accumulate) {
      convert(from, to, cols);
      continue;
    }
    for (int64_t j = 0; j < cols; ++j) {
      Out& cell = to[j * col_stride];
      const A before = t.gradient.accumulate ? static_cast<A>(cell) : A(0);
      cell = static_cast<Out>(before + from[j]);
    }
  }
}

template <class T>
void gradient_tile(const Launch<T>& launch, const GradientTile<T>& t, void* panel) {
  using A = Acc<T>;
  const auto& tiles = launch.tiles;
  Panel memory(panel);
  T* gathered = memory.take<T>(tiles.weight_depth * tiles.weight_hidden);
  void* out = t.gradient.grad->data;
  const bool wide = t.gradient.grad->dtype == DtypeOf<A>::value;
  if (wide && t.out_col_stride() == 1 && t.expert.padded_rows > 0) {
    multiply(launch, t, gathered, static_cast<A*>(out) + t.offset, t.out_row_stride(),
             t.gradient.accumulate);
    return;
  }
  if (t.expert.padded_rows == 0 && t.gradient.accumulate) return;
  A* c = memory.take<A>(tiles.weight_hidden * tiles.weight_other);
  if (t.expert.padded_rows == 0) {
    std::fill_n(c, t.out_rows() * t.out_cols(), A(0));
  } else {
    multiply(launch, t, gathered, c, t.out_cols(), false);
  }
  if (wide) {
    write_tile<T, A>(t, c, static_cast<A*>(out));
  } else {
    write_tile<T, T>(t, c, static_cast<T*>(out));
  }
}

// Bias gradients of one expert: sums over its rows, in row order, in fp64: a long fp32 sum would be
// less exact than the blocked sums of a plain layer.
template <class T>
void bias_gradients(const Launch<T>& launch, const Expert& expert, void* panel) {
  using A = Acc<T>;
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  const bool on_input = launch.call.layer.weight_on_input != 0;
  const auto* token = launch.template rows_at<int32_t>(plan::RowScratch::kRowToken);
  const auto* source = launch.template rows_at<int32_t>(plan::RowScratch::kRowSource);
  const auto* weight = launch.template rows_at<A>(plan::RowScratch::kRowWeight);
  const T* grad_z = launch.template rows_at<T>(plan::RowScratch::kGradZ);
  Panel memory(panel);
  MutableArray<double> down(memory.take<double>(p.hidden), p.hidden);
  MutableArray<double> up(memory.take<double>(p.up_rows()), p.up_rows());
  down.setZero();
  up.setZero();
  for (int64_t r = expert.row_begin; r < expert.row_begin + expert.padded_rows; ++r) {
    if (token[r] < 0) continue;
    const T* grad_y = launch.token_row(ops.grad_y, plan::Symmetric::kRecvGrad, source[r], token[r]);
    down += (on_input ? 1.0 : static_cast<double>(weight[r])) *
            ArrayView<T>(grad_y, p.hidden).template cast<A>().template cast<double>();
    up += ArrayView<T>(grad_z + r * p.up_rows(), p.up_rows())
              .template cast<A>()
              .template cast<double>();
  }
  const auto write = [&](const fm_tensor& grad, const MutableArray<double>& sums) {
    if (!present(grad)) return;
    for (int64_t i = 0; i < sums.size(); ++i) write_real(grad, expert.idx, i, sums[i]);
  };
  write(ops.grad_b_down, down);
  write(ops.grad_b_up, up);
}

}  // namespace

template <class T>
int64_t weight_tiles_per_expert(const Launch<T>& launch) {
  Gradient<T> list[kMaxGradients];
  const int count = list_gradients(launch, list);
  int64_t tiles = wants_bias(launch) ? 1 : 0;
  for (int i = 0; i < count; ++i) tiles += list[i].tiles(launch);
  return tiles;
}

template <class T>
void weight_tile(Launch<T>& launch, int64_t index, void* panel) {
  launch.waiter.until_equal(launch.up_total,
                            static_cast<uint32_t>(launch.num_blocks * launch.up_tiles),
                            {"up tiles", "weight gradient", -1, launch.epoch});
  const int64_t per_expert = weight_tiles_per_expert(launch);
  const Expert expert = expert_at(launch, index / per_expert);
  int64_t tile = index % per_expert;
  Gradient<T> list[kMaxGradients];
  const int count = list_gradients(launch, list);
  for (int i = 0; i < count; ++i) {
    if (tile < list[i].tiles(launch)) {
      gradient_tile(launch, GradientTile<T>(launch, list[i], expert, tile), panel);
      return;
    }
    tile -= list[i].tiles(launch);
  }
  bias_gradients(launch, expert, panel);
}

#define FM_INSTANTIATE(T)                                        \
  template int64_t weight_tiles_per_expert<T>(const Launch<T>&); \
  template void weight_tile<T>(Launch<T>&, int64_t, void*);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
