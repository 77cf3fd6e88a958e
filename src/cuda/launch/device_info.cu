#include "cuda/launch/device_info.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <string>

#include "cuda/launch/device.h"

namespace flashmoe::cuda {
namespace {

bool usable(const cudaDeviceProp& device) {
  return launch::has_kernels(device.major, device.minor);
}

// "NVIDIA H200 (sm_90, 132 SMs, 139 GiB)"
std::string describe(const cudaDeviceProp& device) {
  std::string text = device.name;
  text += " (sm_" + std::to_string(device.major) + std::to_string(device.minor) + ", ";
  text += std::to_string(device.multiProcessorCount) + " SMs, ";
  text += std::to_string(device.totalGlobalMem >> 30) + " GiB)";
  return usable(device) ? text : text + " unsupported";
}

}  // namespace

int device_info(char* text, std::size_t capacity) {
  int num_devices = 0;
  cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess) {
    std::snprintf(text, capacity, "none: %s", cudaGetErrorString(error));
    return 0;
  }
  int num_usable = 0;
  std::string all;
  std::string previous;
  int num_alike = 0;
  // Devices of one kind are listed once, with their number.
  for (int device_idx = 0; device_idx <= num_devices; ++device_idx) {
    std::string current;
    if (device_idx < num_devices) {
      cudaDeviceProp device{};
      error = cudaGetDeviceProperties(&device, device_idx);
      current = error == cudaSuccess ? describe(device) : cudaGetErrorString(error);
      num_usable += error == cudaSuccess && usable(device) ? 1 : 0;
    }
    if (current != previous && num_alike > 0) {
      all += (all.empty() ? "" : ", ") + previous;
      if (num_alike > 1) all += " x " + std::to_string(num_alike);
      num_alike = 0;
    }
    previous = current;
    ++num_alike;
  }
  std::snprintf(text, capacity, "%s", num_devices > 0 ? all.c_str() : "none: no device");
  return num_usable;
}

}  // namespace flashmoe::cuda
