#include "cuda/launch/device.h"

#include "cuda/launch/check.h"

namespace flashmoe::cuda::launch {
namespace {

constexpr const char* kNeeds = "the CUDA engine needs a Hopper GPU (sm_90: H100, H200)";

[[noreturn]] void refuse(int32_t device, int major, int minor) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties(", device, ")");
  fail(FM_UNSUPPORTED, "CUDA device ", device, " is ", properties.name, " (sm_", major, minor,
       "); ", kNeeds);
}

}  // namespace

void check_device(int32_t device) {
  int num_devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status != cudaSuccess || num_devices == 0) {
    fail(FM_UNSUPPORTED, "no usable CUDA device: ",
         status == cudaSuccess ? "none found" : cudaGetErrorString(status), "; ", kNeeds,
         " and its driver");
  }
  if (device < 0 || device >= num_devices) {
    fail(FM_INVALID_VALUE, "device is ", device, ", expected 0..", num_devices - 1,
         " (CUDA devices of this process)");
  }
  const int major = attribute_of(device, cudaDevAttrComputeCapabilityMajor);
  const int minor = attribute_of(device, cudaDevAttrComputeCapabilityMinor);
  if (!has_kernels(major, minor)) refuse(device, major, minor);
}

int attribute_of(int32_t device, cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute(",
        static_cast<int>(which), ", ", device, ")");
  return value;
}

}  // namespace flashmoe::cuda::launch
