#include "cuda/fabric/rank_memory.h"

#include <cstddef>

#include "cuda/launch/check.h"
#include "cuda/launch/device_guard.h"

namespace flashmoe::cuda {

using launch::check;
using launch::DeviceGuard;

RankMemory::RankMemory(const config::SymmetricCapacity& capacity, std::vector<DeviceRegion> regions,
                       int32_t device)
    : capacity_(capacity), regions_(std::move(regions)), device_(device), mark_(device) {
  for (const DeviceRegion& region : regions_) addresses_.push_back(region.address());
  const DeviceGuard guard(device_);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
}

// At the end of a process the driver may be gone before us: nothing here is checked.
RankMemory::~RankMemory() {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  cudaStreamDestroy(stream_);
  regions_.clear();
  cudaSetDevice(before);
  cudaGetLastError();
}

void RankMemory::stop(int32_t rank) noexcept {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  auto* const mark = mark_.as<uint32_t>();
  *mark = static_cast<uint32_t>(rank) + 1;
  for (void* region : addresses_) {
    void* word = static_cast<std::byte*>(region) + offsetof(config::RankControl, abort);
    cudaMemcpyAsync(word, mark, sizeof(*mark), cudaMemcpyDefault, stream_);
  }
  cudaStreamSynchronize(stream_);
  cudaSetDevice(before);
  cudaGetLastError();
}

}  // namespace flashmoe::cuda
