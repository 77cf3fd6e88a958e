// What the CUDA part of this build sees on this machine.
#pragma once

#include <cstddef>

namespace flashmoe::cuda {

// Writes one line into text (at most capacity bytes, always terminated) and returns the number of
// usable devices: "NVIDIA H200 (sm_90, 132 SMs, 139 GiB) x 2", or "none: " and the reason. A device
// that this build has no kernels for is listed, but not counted.
int device_info(char* text, std::size_t capacity);

}  // namespace flashmoe::cuda
