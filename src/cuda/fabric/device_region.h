// Device memory by CUDA's virtual memory management: physical memory of one device that several
// devices and processes map, each at an address of its own. What is mapped stays as long as anybody
// maps it: the end of the process that made it takes nothing from its peers. Multicast is not used.
#pragma once

#include <cstdint>
#include <vector>

#include "base/file.h"

namespace flashmoe::cuda {

class DeviceRegion {
 public:
  DeviceRegion() = default;
  DeviceRegion(DeviceRegion&& other) noexcept { *this = std::move(other); }
  DeviceRegion& operator=(DeviceRegion&& other) noexcept;
  ~DeviceRegion();

  // New memory of `device`, zero, for `users` (devices of this process) to load and store in; at
  // least `bytes`, rounded up to what the driver gives. `exportable`: to other processes. Throws
  // FM_UNSUPPORTED where the device or the driver has no such memory or a user cannot reach it, and
  // FM_OUT_OF_MEMORY.
  static DeviceRegion create(int32_t device, int64_t bytes, bool exportable,
                             const std::vector<int32_t>& users);

  // What another process exported, of the size that create() gives for `bytes` on `user`, for the
  // device `user` of this process. `rank`: whose it is, for errors.
  static DeviceRegion import(const File& file, int64_t bytes, int32_t user, int32_t rank);

  // Copies bytes of the host to an offset, and returns when they are there; waits for no launch.
  void write(int64_t offset, const void* from, int64_t bytes) const;

  // A file that stands for the memory in other processes.
  File export_file() const;

  void* address() const { return reinterpret_cast<void*>(address_); }
  int64_t bytes() const { return bytes_; }

 private:
  void map(unsigned long long handle, const std::vector<int32_t>& users);

  unsigned long long address_ = 0;
  int64_t bytes_ = 0;
  unsigned long long handle_ = 0;  // of the physical memory, while it can be exported
  bool is_mapped_ = false;
};

}  // namespace flashmoe::cuda
