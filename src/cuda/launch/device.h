// The devices that the kernels run on.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashmoe::cuda::launch {

// The kernels are compiled for sm_90a, whose instructions exist on this architecture alone.
constexpr bool has_kernels(int major, int minor) { return major == 9 && minor == 0; }

// Throws FM_UNSUPPORTED, naming what was found, unless CUDA has a device of this number and it has
// the kernels; FM_INVALID_VALUE for a number that this process has no device of.
void check_device(int32_t device);

// Throws FM_INTERNAL if CUDA does not tell.
int attribute_of(int32_t device, cudaDeviceAttr which);

}  // namespace flashmoe::cuda::launch
