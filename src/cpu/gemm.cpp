#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/gemm_eigen.h"
#include "plan/math.h"
#if FLASHMOE_ONEDNN
#include "cpu/gemm_onednn.h"
#endif

namespace flashmoe::cpu {
namespace {

// Longest run of products that are summed up in a row. oneDNN and Eigen add along all of k in
// order; in pieces the error is that of MKL's blocked sums, for 1 to 4 % of the time
// (docs/perf-notes.md). An expert's single row, padded to kFewRows, is held against MKL's product
// of a vector, whose sums are of many more parts.
constexpr int64_t kSumDepth = 128;
constexpr int64_t kFewRows = 8;
constexpr int64_t kFewRowsSumDepth = 16;

// Calls multiply(depth, piece of a, piece of b, accumulate) for k in pieces.
template <class T, class Multiply>
void in_pieces(int64_t m, int64_t k, MatrixView<T> a, MatrixView<T> b, bool accumulate,
               const Multiply& multiply) {
  const int64_t most = m <= kFewRows ? kFewRowsSumDepth : kSumDepth;
  const int64_t depth = plan::align_up(plan::ceil_div(k, plan::ceil_div(k, most)), 16);
  for (int64_t k0 = 0; k0 < k; k0 += depth) {
    multiply(std::min(depth, k - k0), a.at(0, k0), b.at(k0, 0), accumulate || k0 > 0);
  }
}

// fp32 products by the best library of the build.
void gemm_f32(int64_t m, int64_t n, int64_t k, MatrixView<float> a, MatrixView<float> b, float* c,
              int64_t ldc, bool accumulate) {
  in_pieces(m, k, a, b, accumulate,
            [&](int64_t depth, MatrixView<float> left, MatrixView<float> right, bool adds) {
#if FLASHMOE_ONEDNN
              gemm_onednn(DnnType::kF32, m, n, depth, {left.data, left.row_stride, left.col_stride},
                          {right.data, right.row_stride, right.col_stride}, c, ldc, adds);
#else
              gemm_eigen<float>(m, n, depth, left, right, c, ldc, adds);
#endif
            });
}

void gemm_f64(int64_t m, int64_t n, int64_t k, MatrixView<double> a, MatrixView<double> b,
              double* c, int64_t ldc, bool accumulate) {
  in_pieces(m, k, a, b, accumulate,
            [&](int64_t depth, MatrixView<double> left, MatrixView<double> right, bool adds) {
              gemm_eigen<double>(m, n, depth, left, right, c, ldc, adds);
            });
}

// 16-bit operands widened to fp32 piece by piece along k, in a fixed order.
template <class T>
void gemm_widened(int64_t m, int64_t n, int64_t k, MatrixView<T> a, MatrixView<T> b, float* c,
                  int64_t ldc, bool accumulate) {
  thread_local std::vector<float> wide;
  for (int64_t k0 = 0; k0 < k; k0 += kWidenDepth) {
    const int64_t depth = std::min(kWidenDepth, k - k0);
    wide.resize(static_cast<size_t>(std::max<int64_t>((m + n) * depth, 1)));
    float* wide_a = wide.data();
    float* wide_b = wide.data() + m * depth;
    widen<T>(m, depth, a.at(0, k0), wide_a);
    widen<T>(n, depth, b.at(k0, 0).transposed(), wide_b);
    gemm_f32(m, n, depth, {wide_a, depth, 1}, {wide_b, 1, depth}, c, ldc, accumulate || k0 > 0);
  }
}

template <class T>
void clear(int64_t m, int64_t n, T* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) std::memset(c + i * ldc, 0, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace

template <class T>
void gemm(int64_t m, int64_t n, int64_t k, MatrixView<T> a, MatrixView<T> b, Acc<T>* c, int64_t ldc,
          bool accumulate) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (!accumulate) clear(m, n, c, ldc);
    return;
  }
  if constexpr (std::is_same_v<T, double>) {
    gemm_f64(m, n, k, a, b, c, ldc, accumulate);
  } else if constexpr (std::is_same_v<T, float>) {
    gemm_f32(m, n, k, a, b, c, ldc, accumulate);
  } else {
#if FLASHMOE_ONEDNN
    if (std::is_same_v<T, bf16> && onednn_has_bf16()) {
      gemm_onednn(DnnType::kBf16, m, n, k, {a.data, a.row_stride, a.col_stride},
                  {b.data, b.row_stride, b.col_stride}, c, ldc, accumulate);
      return;
    }
#endif
    gemm_widened<T>(m, n, k, a, b, c, ldc, accumulate);
  }
}

template void gemm<double>(int64_t, int64_t, int64_t, MatrixView<double>, MatrixView<double>,
                           double*, int64_t, bool);
template void gemm<float>(int64_t, int64_t, int64_t, MatrixView<float>, MatrixView<float>, float*,
                          int64_t, bool);
template void gemm<bf16>(int64_t, int64_t, int64_t, MatrixView<bf16>, MatrixView<bf16>, float*,
                         int64_t, bool);
template void gemm<fp16>(int64_t, int64_t, int64_t, MatrixView<fp16>, MatrixView<fp16>, float*,
                         int64_t, bool);

const char* gemm_library() {
#if FLASHMOE_ONEDNN
  return onednn_description();
#else
  return "Eigen";
#endif
}

#if FLASHMOE_ONEDNN
GemmThread::GemmThread() : previous_threads_(onednn_set_threads(1)) {}
GemmThread::~GemmThread() { onednn_set_threads(previous_threads_); }
#else
GemmThread::GemmThread() = default;
GemmThread::~GemmThread() = default;
#endif

}  // namespace flashmoe::cpu
