// Products by Eigen: fp64 always, every dtype where oneDNN is not built in. 16-bit operands are
// widened in pieces.
#pragma once

#include <Eigen/Core>
#include <algorithm>

#include "cpu/gemm.h"

namespace flashmoe::cpu {

inline constexpr int64_t kWidenDepth = 256;  // k of one widened piece

namespace detail {

template <class T, int kOrder>
using StridedMatrix = Eigen::Map<const Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, kOrder>, 0,
                                 Eigen::OuterStride<>>;

template <class T, class A, class B>
void eigen_product(const A& a, const B& b, T* c, int64_t ldc, bool accumulate) {
  using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Eigen::Map<Matrix, 0, Eigen::OuterStride<>> out(c, a.rows(), b.cols(), Eigen::OuterStride<>(ldc));
  if (accumulate) {
    out.noalias() += a * b;
  } else {
    out.noalias() = a * b;
  }
}

// Calls f with an Eigen view of the matrix in its own storage order.
template <class T, class F>
void with_order(int64_t rows, int64_t cols, const MatrixView<T>& m, F&& f) {
  if (m.col_stride == 1) {
    f(StridedMatrix<T, Eigen::RowMajor>(m.data, rows, cols, Eigen::OuterStride<>(m.row_stride)));
  } else {
    f(StridedMatrix<T, Eigen::ColMajor>(m.data, rows, cols, Eigen::OuterStride<>(m.col_stride)));
  }
}

}  // namespace detail

template <class T>
void gemm_eigen(int64_t m, int64_t n, int64_t k, MatrixView<T> a, MatrixView<T> b, T* c,
                int64_t ldc, bool accumulate) {
  detail::with_order<T>(m, k, a, [&](const auto& av) {
    detail::with_order<T>(
        k, n, b, [&](const auto& bv) { detail::eigen_product<T>(av, bv, c, ldc, accumulate); });
  });
}

// Copies rows x cols of a 16-bit matrix into a row-major fp32 one.
template <class T>
void widen(int64_t rows, int64_t cols, MatrixView<T> from, float* to) {
  if (from.col_stride == 1) {
    for (int64_t i = 0; i < rows; ++i) convert(from.at(i, 0).data, to + i * cols, cols);
    return;
  }
  detail::with_order<T>(rows, cols, from, [&](const auto& view) {
    using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    Eigen::Map<Matrix>(to, rows, cols) = view.template cast<float>();
  });
}

}  // namespace flashmoe::cpu
