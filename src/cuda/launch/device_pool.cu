#include "cuda/launch/device_pool.h"

#include "cuda/launch/check.h"
#include "cuda/launch/device_guard.h"

namespace flashmoe::cuda::launch {

DevicePool::DevicePool(int32_t device) {
  const DeviceGuard guard(device);
  cudaMemPoolProps wanted{};
  wanted.allocType = cudaMemAllocationTypePinned;
  wanted.location.type = cudaMemLocationTypeDevice;
  wanted.location.id = device;
  check(cudaMemPoolCreate(&pool_, &wanted), "cudaMemPoolCreate on device ", device);
}

DevicePool::~DevicePool() { cudaMemPoolDestroy(pool_); }

void* DevicePool::take(int64_t bytes, cudaStream_t stream) {
  void* memory = nullptr;
  const cudaError_t status =
      cudaMallocFromPoolAsync(&memory, static_cast<size_t>(bytes), pool_, stream);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return nullptr;
  }
  check(status, "cudaMallocFromPoolAsync of ", bytes, " bytes");
  return memory;
}

void DevicePool::give(void* memory, cudaStream_t stream) noexcept {
  if (memory != nullptr) cudaFreeAsync(memory, stream);
}

}  // namespace flashmoe::cuda::launch
