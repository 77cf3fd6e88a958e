// The instructions a kernel may use, under one name: the toolkit's own wrappers (<cuda/ptx>), and
// beside this file what those lack. All inline assembly of the project is in this directory.
#pragma once

#include <cstdint>
#include <cuda/ptx>

#define FM_DEVICE __device__ __forceinline__
#define FM_UNROLL _Pragma("unroll")
// Declares the CTA's dynamic shared memory.
#define FM_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

namespace flashmoe::cuda::ptx {

using namespace ::cuda::ptx;

// Address of shared memory in its own 32-bit window, as the instructions of this directory take it.
FM_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A kernel's address as launches take it.
template <class Params>
const void* kernel_address(void (*kernel)(Params)) {
  return reinterpret_cast<const void*>(kernel);
}

// threadIdx.x, read where it stands. The compiler keeps the ordinary one, and what follows from it,
// in registers across a whole kernel; one whose roles have few registers then spills.
FM_DEVICE int32_t thread_idx() {
  int32_t idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}
// The compiler forgets how the pointer was made, and so cannot make all that follows from it
// in front of a loop, for which roles with few registers have none.
FM_DEVICE void forget(uint8_t*& pointer) { asm volatile("" : "+l"(pointer)); }

FM_DEVICE int32_t lane_idx() { return thread_idx() % 32; }
// blockIdx.x, likewise.
FM_DEVICE int32_t block_idx() {
  int32_t idx;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(idx));
  return idx;
}
// gridDim.x, likewise.
FM_DEVICE int32_t num_blocks() {
  int32_t count;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(count));
  return count;
}

// True in one lane. The compiler then knows that it is one, which a comparison of threadIdx.x does
// not tell it, and puts no loop over lanes round instructions that take uniform registers. Whole
// warp, converged, sm_90.
FM_DEVICE bool elect_one() {
  uint32_t is_elected;
  asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xFFFFFFFF;\n\tselp.u32 %0, 1, 0, p;\n\t}"
               : "=r"(is_elected));
  return is_elected != 0;
}

}  // namespace flashmoe::cuda::ptx
