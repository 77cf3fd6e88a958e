// The layer's forward on one GPU: router, plan, products and combine as one cooperative launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "cuda/config/forward.h"
#include "cuda/launch/ranks.h"
#include "cuda/sync/report.h"
#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

// What one forward runs with. The engine has checked shapes, dtypes and strides of `operands` as
// for the CPU (engine/cuda_call.h); every data pointer is memory of the current device.
struct ForwardArguments {
  fm_layer layer;
  fm_forward_args operands;
  // forward_scratch_bytes() or more, on a multiple of 256 bytes; zero when it is first used and
  // left as launches leave it after that. One launch at a time.
  void* scratch = nullptr;
  // Pinned host memory that the device can write; zero when made. A launch that fails on the device
  // fills it: the host looks at it before the next launch or after a synchronisation.
  sync::LaunchReports* reports = nullptr;
  uint64_t timeout_ns = ~uint64_t{0};  // of every wait in the kernel
  int32_t max_sms = 0;                 // most SMs to use, 0: all
  RankArguments ranks{};
  int32_t column_pairs = 0;  // 256 columns each of a column block; 0: chosen
  uint32_t launch_id = 2;    // of this scratch, see sync/holder.h
  cudaStream_t stream = nullptr;
};

// Why the kernels cannot write or read a z of so many tokens, or an empty text. Of several ranks it
// may have any number of rows.
std::string refuse_z(const fm_layer& layer, int64_t tokens, const fm_tensor& z, int32_t world);

// Throws FM_UNSUPPORTED with the reason if the kernels cannot run this layer on these operands.
// Looks at sizes, strides and addresses only; never at a device.
void check_supported(const fm_layer& layer, const fm_forward_args& operands,
                     const RankArguments& ranks = {});

// The regions of a launch's scratch.
config::ForwardTable forward_scratch(const fm_layer& layer, const fm_forward_args& operands,
                                     const RankArguments& ranks = {});
// Their total; grows with the tokens.
int64_t forward_scratch_bytes(const fm_layer& layer, const fm_forward_args& operands,
                              const RankArguments& ranks = {});

// The configuration that a launch on `num_sms` SMs runs with, a line for each fact. Throws as
// check_supported() does. Reads no region of `ranks`.
std::string describe_forward(const fm_layer& layer, const fm_forward_args& operands,
                             int32_t num_sms, const RankArguments& ranks = {});

// Launches one kernel on the current device. Throws Error: FM_UNSUPPORTED as check_supported() does
// or on a device without these instructions.
void launch_forward(const ForwardArguments& arguments);

}  // namespace flashmoe::cuda::launch
