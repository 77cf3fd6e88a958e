// The CUDA driver's virtual memory: physical memory is a file in memory, which processes can give
// to each other as CUDA's do.
#pragma once

#include <cuda.h>

#include <cstddef>

namespace flashmoe::emulator {

CUresult device_attribute(int* value, CUdevice_attribute which, CUdevice device);
CUresult memory_granularity(std::size_t* bytes, const CUmemAllocationProp* properties,
                            CUmemAllocationGranularity_flags which);
CUresult create_memory(CUmemGenericAllocationHandle* handle, std::size_t bytes,
                       const CUmemAllocationProp* properties, unsigned long long flags);
CUresult release_handle(CUmemGenericAllocationHandle handle);
CUresult export_handle(void* descriptor, CUmemGenericAllocationHandle handle,
                       CUmemAllocationHandleType type, unsigned long long flags);
CUresult import_handle(CUmemGenericAllocationHandle* handle, void* descriptor,
                       CUmemAllocationHandleType type);

// Addresses fault until they are mapped and their access is set.
CUresult reserve_addresses(CUdeviceptr* address, std::size_t bytes, std::size_t alignment,
                           CUdeviceptr wanted, unsigned long long flags);
CUresult free_addresses(CUdeviceptr address, std::size_t bytes);
CUresult map_memory(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                    CUmemGenericAllocationHandle handle, unsigned long long flags);
CUresult unmap_memory(CUdeviceptr address, std::size_t bytes);
CUresult set_access(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* users,
                    std::size_t num_users);

}  // namespace flashmoe::emulator
