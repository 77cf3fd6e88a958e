#include "cuda/fabric/device_region.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/launch/check.h"
#include "cuda/launch/device.h"
#include "cuda/launch/device_guard.h"

namespace flashmoe::cuda {
namespace {

using launch::check;

// The driver's functions of CUDA 12.0 and before; libcuda is not linked.
struct Driver {
  decltype(&cuGetErrorString) error_string;
  decltype(&cuDeviceGetAttribute) attribute;
  decltype(&cuMemGetAllocationGranularity) granularity;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) free;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
  decltype(&cuMemExportToShareableHandle) export_handle;
  decltype(&cuMemImportFromShareableHandle) import_handle;
};

template <class Function>
void find(Function& function, const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  if (result != cudaDriverEntryPointSuccess || found == nullptr) {
    fail(FM_UNSUPPORTED, "the CUDA driver has no ", name, ": 525 or newer is needed");
  }
  function = reinterpret_cast<Function>(found);
}

const Driver& driver() {
  static const Driver found = [] {
    Driver d{};
    find(d.error_string, "cuGetErrorString");
    find(d.attribute, "cuDeviceGetAttribute");
    find(d.granularity, "cuMemGetAllocationGranularity");
    find(d.create, "cuMemCreate");
    find(d.release, "cuMemRelease");
    find(d.reserve, "cuMemAddressReserve");
    find(d.free, "cuMemAddressFree");
    find(d.map, "cuMemMap");
    find(d.unmap, "cuMemUnmap");
    find(d.set_access, "cuMemSetAccess");
    find(d.export_handle, "cuMemExportToShareableHandle");
    find(d.import_handle, "cuMemImportFromShareableHandle");
    return d;
  }();
  return found;
}

// what: the call and its operands, and what to do about it.
template <class... Parts>
void check_driver(CUresult status, const Parts&... what) {
  if (status == CUDA_SUCCESS) return;
  const char* text = nullptr;
  driver().error_string(status, &text);
  const fm_status kind = status == CUDA_ERROR_OUT_OF_MEMORY ? FM_OUT_OF_MEMORY : FM_UNSUPPORTED;
  fail(kind, what..., ": ", text == nullptr ? "unknown error" : text, " (",
       static_cast<int>(status), ")");
}

void check_attribute(int32_t device, CUdevice_attribute which, const char* what) {
  int value = 0;
  check_driver(driver().attribute(&value, which, device), "cuDeviceGetAttribute(", device, ")");
  if (value == 0) {
    fail(FM_UNSUPPORTED, "CUDA device ", device, " has no ", what,
         ", which several ranks need for their memory");
  }
}

CUmemAllocationProp properties(int32_t device, bool exportable) {
  CUmemAllocationProp made{};
  made.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  made.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  made.location.id = device;
  if (exportable) made.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return made;
}

int64_t rounded(int64_t bytes, const CUmemAllocationProp& of) {
  size_t unit = 0;
  check_driver(driver().granularity(&unit, &of, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
               "cuMemGetAllocationGranularity of device ", of.location.id);
  const auto step = static_cast<int64_t>(unit);
  return (bytes + step - 1) / step * step;
}

// Runs `queue(stream)` on a stream of its own to its end: no launch of anybody is waited for.
template <class Queue>
void run_apart(Queue&& queue, const char* what, int64_t bytes) {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const cudaError_t queued = queue(stream);
  const cudaError_t done = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check(queued, what, " of ", bytes, " symmetric bytes");
  check(done, "cudaStreamSynchronize after ", what, " of ", bytes, " symmetric bytes");
}

}  // namespace

DeviceRegion& DeviceRegion::operator=(DeviceRegion&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  std::swap(handle_, other.handle_);
  std::swap(is_mapped_, other.is_mapped_);
  return *this;
}

// At the end of a process the driver may be gone before us: nothing here is checked.
DeviceRegion::~DeviceRegion() {
  const auto size = static_cast<size_t>(bytes_);
  if (is_mapped_) driver().unmap(address_, size);
  if (address_ != 0) driver().free(address_, size);
  if (handle_ != 0) driver().release(handle_);
}

void DeviceRegion::map(unsigned long long handle, const std::vector<int32_t>& users) {
  const auto size = static_cast<size_t>(bytes_);
  check_driver(driver().reserve(&address_, size, 0, 0, 0), "cuMemAddressReserve of ", bytes_,
               " bytes");
  check_driver(driver().map(address_, size, 0, handle, 0), "cuMemMap of ", bytes_, " bytes");
  is_mapped_ = true;
  std::vector<CUmemAccessDesc> access;
  for (const int32_t user : users) {
    access.push_back({.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = user},
                      .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE});
  }
  check_driver(driver().set_access(address_, size, access.data(), access.size()),
               "cuMemSetAccess of ", bytes_, " bytes for ", users.size(),
               " device(s), the first of them ", users.front(),
               " (ranks need GPUs that reach each other: nvidia-smi topo -p2p n)");
}

DeviceRegion DeviceRegion::create(int32_t device, int64_t bytes, bool exportable,
                                  const std::vector<int32_t>& users) {
  const launch::DeviceGuard guard(device);
  check_attribute(device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                  "virtual memory management");
  if (exportable) {
    check_attribute(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                    "memory handles that are file descriptors");
  }
  const CUmemAllocationProp wanted = properties(device, exportable);
  DeviceRegion made;
  made.bytes_ = rounded(bytes, wanted);
  check_driver(driver().create(&made.handle_, static_cast<size_t>(made.bytes_), &wanted, 0),
               "device ", device, " gives no ", made.bytes_,
               " bytes of memory that ranks share: use fewer tokens, or give memory back "
               "(torch.cuda.empty_cache())");
  made.map(made.handle_, users);
  run_apart(
      [&](cudaStream_t stream) {
        return cudaMemsetAsync(made.address(), 0, static_cast<size_t>(made.bytes_), stream);
      },
      "cudaMemsetAsync", made.bytes_);
  return made;
}

void DeviceRegion::write(int64_t offset, const void* from, int64_t bytes) const {
  run_apart(
      [&](cudaStream_t stream) {
        void* to = static_cast<char*>(address()) + offset;
        return cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream);
      },
      "cudaMemcpyAsync", bytes);
}

DeviceRegion DeviceRegion::import(const File& file, int64_t bytes, int32_t user, int32_t rank) {
  const launch::DeviceGuard guard(user);
  DeviceRegion made;
  made.bytes_ = rounded(bytes, properties(user, true));
  void* descriptor = reinterpret_cast<void*>(static_cast<intptr_t>(file.get()));
  check_driver(
      driver().import_handle(&made.handle_, descriptor, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
      "cuMemImportFromShareableHandle of rank ", rank, "'s memory on device ", user);
  made.map(made.handle_, {user});
  return made;
}

File DeviceRegion::export_file() const {
  int descriptor = -1;
  check_driver(
      driver().export_handle(&descriptor, handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
      "cuMemExportToShareableHandle of ", bytes_, " bytes");
  return File(descriptor);
}

}  // namespace flashmoe::cuda
