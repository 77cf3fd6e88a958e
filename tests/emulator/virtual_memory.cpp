#include "virtual_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "machine.h"

namespace flashmoe::emulator {
namespace {

constexpr std::size_t kUnit = std::size_t{2} << 20;

void* pointer_of(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

// A handle is the file's descriptor and one: 0 is none.
CUmemGenericAllocationHandle handle_of(int descriptor) {
  return static_cast<CUmemGenericAllocationHandle>(descriptor) + 1;
}
int descriptor_of(CUmemGenericAllocationHandle handle) { return static_cast<int>(handle) - 1; }

// What memory holds that nobody has written.
bool poison(int descriptor, std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) return false;
  std::memset(memory, kPoison, bytes);
  munmap(memory, bytes);
  return true;
}

bool is_whole(std::size_t bytes) { return bytes > 0 && bytes % kUnit == 0; }

// Addresses that fault, of `bytes` at `address`, or anywhere for null.
void* without_access(void* address, std::size_t bytes) {
  const int where = address != nullptr ? MAP_FIXED : 0;
  return mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | where, -1,
              0);
}

}  // namespace

CUresult device_attribute(int* value, CUdevice_attribute which, CUdevice device) {
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  if (which != CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED &&
      which != CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *value = 1;
  return CUDA_SUCCESS;
}

CUresult memory_granularity(std::size_t* bytes, const CUmemAllocationProp* properties,
                            CUmemAllocationGranularity_flags) {
  if (!is_device(properties->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = kUnit;
  return CUDA_SUCCESS;
}

CUresult create_memory(CUmemGenericAllocationHandle* handle, std::size_t bytes,
                       const CUmemAllocationProp* properties, unsigned long long) {
  if (!is_device(properties->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  if (!is_whole(bytes)) return CUDA_ERROR_INVALID_VALUE;
  if (bytes > kMemoryBytes) return CUDA_ERROR_OUT_OF_MEMORY;
  const int descriptor = memfd_create("flashmoe_emulated", MFD_CLOEXEC);
  if (descriptor < 0) return CUDA_ERROR_OUT_OF_MEMORY;
  if (ftruncate(descriptor, static_cast<off_t>(bytes)) != 0 || !poison(descriptor, bytes)) {
    close(descriptor);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  *handle = handle_of(descriptor);
  return CUDA_SUCCESS;
}

// Mappings keep the memory.
CUresult release_handle(CUmemGenericAllocationHandle handle) {
  return close(descriptor_of(handle)) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult export_handle(void* descriptor, CUmemGenericAllocationHandle handle,
                       CUmemAllocationHandleType type, unsigned long long) {
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
  const int made = fcntl(descriptor_of(handle), F_DUPFD_CLOEXEC, 0);
  if (made < 0) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(descriptor, &made, sizeof(made));
  return CUDA_SUCCESS;
}

CUresult import_handle(CUmemGenericAllocationHandle* handle, void* descriptor,
                       CUmemAllocationHandleType type) {
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
  const int given = static_cast<int>(reinterpret_cast<intptr_t>(descriptor));
  const int made = fcntl(given, F_DUPFD_CLOEXEC, 0);
  if (made < 0) return CUDA_ERROR_INVALID_VALUE;
  *handle = handle_of(made);
  return CUDA_SUCCESS;
}

CUresult reserve_addresses(CUdeviceptr* address, std::size_t bytes, std::size_t, CUdeviceptr wanted,
                           unsigned long long) {
  if (!is_whole(bytes) || wanted != 0) return CUDA_ERROR_INVALID_VALUE;
  void* found = without_access(nullptr, bytes);
  if (found == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = reinterpret_cast<CUdeviceptr>(found);
  return CUDA_SUCCESS;
}

CUresult free_addresses(CUdeviceptr address, std::size_t bytes) {
  return munmap(pointer_of(address), bytes) == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult map_memory(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                    CUmemGenericAllocationHandle handle, unsigned long long) {
  struct stat file {};
  if (fstat(descriptor_of(handle), &file) != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!is_whole(bytes) || offset != 0 || bytes > static_cast<std::size_t>(file.st_size)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  void* mapped =
      mmap(pointer_of(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, descriptor_of(handle), 0);
  return mapped != MAP_FAILED ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult unmap_memory(CUdeviceptr address, std::size_t bytes) {
  void* left = without_access(pointer_of(address), bytes);
  return left != MAP_FAILED ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Every device reaches every other: there is one access for all of them.
CUresult set_access(CUdeviceptr address, std::size_t bytes, const CUmemAccessDesc* users,
                    std::size_t num_users) {
  if (num_users == 0) return CUDA_ERROR_INVALID_VALUE;
  for (std::size_t i = 0; i < num_users; ++i) {
    if (!is_device(users[i].location.id)) return CUDA_ERROR_INVALID_DEVICE;
  }
  return mprotect(pointer_of(address), bytes, PROT_READ | PROT_WRITE) == 0
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace flashmoe::emulator
