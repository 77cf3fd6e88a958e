// The current device of a thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch/check.h"

namespace flashmoe::cuda::launch {

// Makes `device` the current one, until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) : device_(device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device_), "cudaSetDevice(", device_, ")");
  }
  ~DeviceGuard() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  int device_;
};

}  // namespace flashmoe::cuda::launch
