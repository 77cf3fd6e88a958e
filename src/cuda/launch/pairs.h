// Launches of cluster pairs, one CTA an SM.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

namespace flashmoe::cuda::launch {

struct PairKernel {
  const void* function;
  std::size_t shared_bytes;
  int num_threads;  // of a CTA
  std::string name;
};

// Launches the kernel on every pair of SMs that is free, at most max_sms SMs (0: all). cooperative:
// all CTAs are resident, or the launch fails. Throws Error: FM_UNSUPPORTED on a device without
// these instructions or without room.
void launch_pairs(const PairKernel& kernel, void* params, int max_sms, bool cooperative,
                  cudaStream_t stream);

}  // namespace flashmoe::cuda::launch
