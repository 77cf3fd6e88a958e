// Matrix products of the CPU engine: one thread, one call, a library underneath.
//
// The engine's parallelism is its tasks, so a product never starts threads. Each product of given
// sizes and strides always gives the same bits.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace flashmoe::cpu {

// A matrix in place: element (i, j) at data[i * row_stride + j * col_stride]; one stride is 1.
template <class T>
struct MatrixView {
  const T* data;
  int64_t row_stride;
  int64_t col_stride;

  MatrixView transposed() const { return {data, col_stride, row_stride}; }
  MatrixView at(int64_t row, int64_t col) const {
    return {data + row * row_stride + col * col_stride, row_stride, col_stride};
  }
};

// c[m][n] (row stride ldc) = a[m][k] b[k][n], or += with accumulate. Products are summed in Acc<T>.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, MatrixView<T> a, MatrixView<T> b, Acc<T>* c, int64_t ldc,
          bool accumulate);

// The library and instruction set in use, for reports.
const char* gemm_library();

// Held by each thread while it makes products: keeps a library that brings its own threads to one,
// and puts the thread's setting back.
class GemmThread {
 public:
  GemmThread();
  ~GemmThread();
  GemmThread(const GemmThread&) = delete;
  GemmThread& operator=(const GemmThread&) = delete;

 private:
  int previous_threads_ = 0;
};

}  // namespace flashmoe::cpu
