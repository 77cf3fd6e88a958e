// The layer's backward on one GPU: all gradients as one cooperative launch. Of several ranks, this
// one's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch/ranks.h"
#include "cuda/sync/report.h"
#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

// What one backward runs with. The engine has checked shapes, dtypes and strides of `operands` as
// for the CPU (engine/cuda_call.h); every data pointer is memory of the current device.
struct BackwardArguments {
  fm_layer layer;
  fm_backward_args operands;
  // backward_scratch_bytes() or more; as ForwardArguments::scratch, with which it may be shared.
  void* scratch = nullptr;
  sync::LaunchReports* reports = nullptr;  // as ForwardArguments::reports
  uint64_t timeout_ns = ~uint64_t{0};      // of every wait in the kernel
  int32_t max_sms = 0;                     // most SMs to use, 0: all
  RankArguments ranks{};
  uint32_t launch_id = 2;  // as ForwardArguments::launch_id
  cudaStream_t stream = nullptr;
};

// Throws FM_UNSUPPORTED with the reason if the kernels cannot run this layer on these operands.
// Looks at sizes, strides and addresses only; never at a device.
void check_supported(const fm_layer& layer, const fm_backward_args& operands,
                     const RankArguments& ranks = {});

// Scratch of a launch; grows with the tokens.
int64_t backward_scratch_bytes(const fm_layer& layer, const fm_backward_args& operands,
                               const RankArguments& ranks = {});

// Loads the kernels on the current device, which may wait for its launches: before a launch that
// waits for another rank.
void load_backward();

// Launches one kernel on the current device. Throws Error: FM_UNSUPPORTED as check_supported() does
// or on a device without these instructions.
void launch_backward(const BackwardArguments& arguments);

}  // namespace flashmoe::cuda::launch
