// Stores of 8 x 8 matrices from registers to shared memory.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// Four 8 x 8 matrices of 16-bit elements, each transposed; lane l gives the row address of row
// l % 8 of matrix l / 8. Whole warp, sm_90.
FM_DEVICE void stmatrix_x4_trans(uint32_t row_address, const uint32_t (&matrices)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(row_address), "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]),
                 "r"(matrices[3])
               : "memory");
}

}  // namespace flashmoe::cuda::ptx
