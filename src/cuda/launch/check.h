// CUDA's status codes as the library's errors, and reasons as text.
#pragma once

#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#include "base/error.h"

namespace flashmoe::cuda::launch {

// what: the call and its operands, "cudaLaunchKernelExC(grouped_product bf16)".
template <class... Parts>
void check(cudaError_t status, const Parts&... what) {
  if (status == cudaSuccess) return;
  const fm_status kind = status == cudaErrorMemoryAllocation ? FM_OUT_OF_MEMORY : FM_INTERNAL;
  fail(kind, what..., ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
}

// text_of("depth is ", depth, "; accepted: ", most)
template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace flashmoe::cuda::launch
