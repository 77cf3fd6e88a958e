// src/cuda/ptx/mma.cuh for the emulator: products of a warp, from the fragments of all its lanes
// (PTX ISA, "Matrix fragments for mma.m16n8k8" and "mma.m16n8k16").
#pragma once

#include <type_traits>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

template <class T>
float element_of(uint32_t pair, int i) {
  const auto half = static_cast<uint16_t>(pair >> 16 * i);
  return static_cast<float>(std::bit_cast<T>(half));
}

inline float tf32_of(uint32_t word) { return __uint_as_float(word & 0xFFFFE000u); }

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* lanes = emulator::exchange(words, 6);
  for (int i = 0; i < 4; ++i) {
    const int row = lane_idx() / 4 + i / 2 * 8;
    const int column = lane_idx() % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 8; ++k) {
      const uint32_t of_a = lanes[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2];
      const uint32_t of_b = lanes[column * 4 + k % 4][4 + k / 4];
      sum += double{tf32_of(of_a)} * tf32_of(of_b);
    }
    d[i] += static_cast<float>(sum);
  }
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto* lanes = emulator::exchange(words, 6);
  for (int i = 0; i < 4; ++i) {
    const int row = lane_idx() / 4 + i / 2 * 8;
    const int column = lane_idx() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const uint32_t of_a = lanes[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t of_b = lanes[column * 4 + k % 8 / 2][4 + k / 8];
      sum += element_of<T>(of_a, k % 2) * element_of<T>(of_b, k % 2);
    }
    d[i] += sum;
  }
}

}  // namespace flashmoe::cuda::ptx
