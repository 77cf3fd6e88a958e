// src/cuda/ptx/matrix.cuh for the emulator.
#pragma once

#include <cstring>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// Row `row`, element `column` of the matrix whose rows' addresses lanes 8 matrix .. have.
inline uint16_t* matrix_element(const uint32_t (*addresses)[emulator::kExchangeWords], int matrix,
                                int row, int column) {
  return reinterpret_cast<uint16_t*>(emulator::at_shared(addresses[matrix * 8 + row][0])) + column;
}

// Transposed: a lane has elements 2 (lane % 4) and the next of column lane / 4.
template <int kMatrices>
void store_transposed(uint32_t row_address, const uint32_t* matrices) {
  const auto* addresses = emulator::show(row_address);
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    for (int i = 0; i < 2; ++i) {
      *matrix_element(addresses, matrix, lane_idx() % 4 * 2 + i, lane_idx() / 4) =
          static_cast<uint16_t>(matrices[matrix] >> 16 * i);
    }
  }
  emulator::show(0);
}
template <int kMatrices>
void load_transposed(uint32_t row_address, uint32_t* matrices) {
  const auto* addresses = emulator::show(row_address);
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    matrices[matrix] = 0;
    for (int i = 0; i < 2; ++i) {
      matrices[matrix] |=
          uint32_t{*matrix_element(addresses, matrix, lane_idx() % 4 * 2 + i, lane_idx() / 4)}
          << 16 * i;
    }
  }
  emulator::show(0);
}

inline void stmatrix_x4_trans(uint32_t row_address, const uint32_t (&matrices)[4]) {
  store_transposed<4>(row_address, matrices);
}
inline void stmatrix_x2_trans(uint32_t row_address, const uint32_t (&matrices)[2]) {
  store_transposed<2>(row_address, matrices);
}
inline void ldmatrix_x4_trans(uint32_t row_address, uint32_t (&first)[2], uint32_t (&second)[2]) {
  uint32_t matrices[4];
  load_transposed<4>(row_address, matrices);
  std::memcpy(first, matrices, sizeof(first));
  std::memcpy(second, matrices + 2, sizeof(second));
}
inline void ldmatrix_x2_trans(uint32_t row_address, uint32_t (&matrices)[2]) {
  load_transposed<2>(row_address, matrices);
}
inline uint32_t ld_shared(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, emulator::at_shared(address), sizeof(value));
  return value;
}
inline void st_shared(uint32_t address, uint32_t value) {
  std::memcpy(emulator::at_shared(address), &value, sizeof(value));
}

}  // namespace flashmoe::cuda::ptx
