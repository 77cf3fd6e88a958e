// 8 x 8 matrices between registers and shared memory.
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

// The same of two; lanes 0 to 15 give the addresses. Whole warp, sm_90.
FM_DEVICE void stmatrix_x2_trans(uint32_t row_address, const uint32_t (&matrices)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
               :
               : "r"(row_address), "r"(matrices[0]), "r"(matrices[1])
               : "memory");
}

// The reverse of stmatrix_x4_trans: matrices 0 and 1, then 2 and 3. Whole warp, sm_75.
FM_DEVICE void ldmatrix_x4_trans(uint32_t row_address, uint32_t (&first)[2],
                                 uint32_t (&second)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(first[0]), "=r"(first[1]), "=r"(second[0]), "=r"(second[1])
               : "r"(row_address)
               : "memory");
}

// The reverse of stmatrix_x2_trans. Whole warp, sm_75.
FM_DEVICE void ldmatrix_x2_trans(uint32_t row_address, uint32_t (&matrices)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrices[0]), "=r"(matrices[1])
               : "r"(row_address)
               : "memory");
}

// A word of shared memory. Any thread, sm_70.
FM_DEVICE uint32_t ld_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
FM_DEVICE void st_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" : : "r"(address), "r"(value) : "memory");
}

}  // namespace flashmoe::cuda::ptx
