// The CUDA runtime's functions about memory, over machine.h.
#include <cuda_runtime_api.h>

#include <cstring>
#include <stdexcept>

#include "machine.h"

// Memory of a pool is not kept: what is given back faults at once.
struct CUmemPoolHandle_st {};

using namespace flashmoe::emulator;

extern "C" {

// The library frees nothing so: it makes a device's context.
cudaError_t cudaFree(void* memory) {
  if (memory != nullptr) return remembered(cudaErrorInvalidValue);
  return remembered(is_device(current_device()) ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaHostAlloc(void** memory, std::size_t bytes, unsigned int) {
  *memory = take_memory(bytes);
  return remembered(*memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  if (!is_device(properties->location.id)) return remembered(cudaErrorInvalidDevice);
  *pool = new CUmemPoolHandle_st;
  return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  delete pool;
  return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t) {
  if (pool == nullptr || bytes == 0) return remembered(cudaErrorInvalidValue);
  *memory = take_memory(bytes);
  return remembered(*memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  const auto queue = queue_of(stream);
  if (queue == nullptr || memory == nullptr) return remembered(cudaErrorInvalidValue);
  queue->add([memory] {
    if (!release_memory(memory)) throw std::invalid_argument("cudaFreeAsync of no such memory");
  });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  const auto queue = queue_of(stream);
  if (queue == nullptr) return remembered(cudaErrorInvalidResourceHandle);
  queue->add([=] { std::memset(memory, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  const auto queue = queue_of(stream);
  if (queue == nullptr) return remembered(cudaErrorInvalidResourceHandle);
  queue->add([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

}  // extern "C"
