// src/cuda/ptx/wgmma.cuh for the emulator. A thread makes its own sums, when it waits for them: the
// operands must still be in shared memory then.
#pragma once

#include <type_traits>

#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tensor_copy.cuh"

namespace flashmoe::cuda::ptx {

inline void wgmma_fence() {}
inline void wgmma_commit_group() { emulator::self().products.commit(); }
template <int kPending>
void wgmma_wait_group() {
  emulator::self().products.wait(kPending);
  emulator::sync_lanes();  // an instruction of the warp, and the end of what it has read
}
template <int kCount>
void wgmma_settle(float (&)[kCount]) {}

// An operand by its descriptor (PTX ISA, "Matrix descriptor format" and "Canonical layouts"),
// 128-byte swizzle.
struct Operand {
  std::size_t start;
  std::size_t leading;
  std::size_t stride;

  explicit Operand(uint64_t descriptor)
      : start((descriptor & 0x3FFF) << 4),
        leading((descriptor >> 16 & 0x3FFF) << 4),
        stride((descriptor >> 32 & 0x3FFF) << 4) {}

  // Where element (m or n, k) is. K-major: groups of 8 rows of 64 k; else of 8 k of 64 rows.
  std::size_t place(int row, int k, bool is_transposed) const {
    const std::size_t logical =
        is_transposed ? row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                      : row / 8 * stride + row % 8 * 128 + k * 2;
    return swizzled(start + logical);
  }
};

template <class T>
float element_at(const std::byte* shared, std::size_t address) {
  T value;
  std::memcpy(&value, shared + address, sizeof(value));
  return static_cast<float>(value);
}

template <class T, int N, int kTransA, int kTransB = 0>
void wgmma(float* d, uint64_t a_descriptor, uint64_t b_descriptor, int accumulate) {
  const emulator::Thread& thread = emulator::self();
  const int row = static_cast<int>(thread.idx % 128 / 32 * 16 + thread.lane() / 4);
  const int column = static_cast<int>(thread.lane() % 4 * 2);
  const std::byte* shared = thread.cta->shared;
  emulator::self().products.add([=] {
    const Operand a(a_descriptor);
    const Operand b(b_descriptor);
    float of_a[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) {
        of_a[half][k] = element_at<T>(shared, a.place(row + half * 8, k, kTransA != 0));
      }
    }
    for (int block = 0; block < N / 8; ++block) {
      for (int i = 0; i < 2; ++i) {
        float sums[2] = {};
        for (int k = 0; k < 16; ++k) {
          const float of_b =
              element_at<T>(shared, b.place(block * 8 + column + i, k, kTransB != 0));
          sums[0] += of_a[0][k] * of_b;
          sums[1] += of_a[1][k] * of_b;
        }
        for (int half = 0; half < 2; ++half) {
          float& sum = d[block * 4 + half * 2 + i];
          sum = (accumulate != 0 ? sum : 0.0f) + sums[half];
        }
      }
    }
  });
}

}  // namespace flashmoe::cuda::ptx
