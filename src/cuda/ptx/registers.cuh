// Moves registers between the warpgroups of a CTA.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// All warps of a warpgroup, once, at the start of a role, sm_90a. The kernel needs
// __launch_bounds__ with a minimum of one block, or the compiler ignores both.
template <int kRegisters>
FM_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
FM_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

}  // namespace flashmoe::cuda::ptx
