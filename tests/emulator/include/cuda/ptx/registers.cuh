// src/cuda/ptx/registers.cuh for the emulator: registers are not counted.
#pragma once

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

template <int kRegisters>
void setmaxnreg_inc() {
  emulator::show(0);
}
template <int kRegisters>
void setmaxnreg_dec() {
  emulator::show(0);
}

}  // namespace flashmoe::cuda::ptx
