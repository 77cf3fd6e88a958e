// Device memory in the order of a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashmoe::cuda::launch {

// A pool of its own on one device. Neither taking nor giving waits for a launch, as cudaFree does
// for all of the device, of which one may wait for a rank that this very thread has still to call;
// and no use of memory waits for what another pool's memory is used by. Memory that is not given
// back stays.
class DevicePool {
 public:
  explicit DevicePool(int32_t device);
  ~DevicePool();
  DevicePool(const DevicePool&) = delete;
  DevicePool& operator=(const DevicePool&) = delete;

  // Memory for what comes later on the stream; null when the device has not that much.
  void* take(int64_t bytes, cudaStream_t stream);
  // After what came before on the stream. At the end of a process the driver may be gone before us:
  // nothing is checked.
  void give(void* memory, cudaStream_t stream) noexcept;

 private:
  cudaMemPool_t pool_ = nullptr;
};

}  // namespace flashmoe::cuda::launch
