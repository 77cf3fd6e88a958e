// The regions of all ranks of a group, as one process sees them, and the word that stops them.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "cuda/config/ranks.h"
#include "cuda/fabric/device_region.h"
#include "cuda/launch/pinned.h"

namespace flashmoe::cuda {

class RankMemory {
 public:
  // regions: by rank, each of config::symmetric_table(world, capacity).total bytes or more, in the
  // reach of `device`. Throws FM_OUT_OF_MEMORY.
  RankMemory(const config::SymmetricCapacity& capacity, std::vector<DeviceRegion> regions,
             int32_t device);
  ~RankMemory();
  RankMemory(const RankMemory&) = delete;
  RankMemory& operator=(const RankMemory&) = delete;

  const config::SymmetricCapacity& capacity() const { return capacity_; }
  void* const* regions() const { return addresses_.data(); }
  int64_t bytes() const { return regions_.front().bytes(); }  // of one rank

  // Ends the waits of all ranks' launches, of those to come too: writes 1 + rank into every
  // region's abort word, and returns when it is there. Any thread; one of these at a time.
  void stop(int32_t rank) noexcept;

  // A graph holds its addresses: it has to outlive what replaces it.
  void keep() { is_kept_.store(true, std::memory_order_relaxed); }
  bool is_kept() const { return is_kept_.load(std::memory_order_relaxed); }

 private:
  config::SymmetricCapacity capacity_;
  std::vector<DeviceRegion> regions_;
  std::vector<void*> addresses_;
  int32_t device_;
  launch::PinnedPiece mark_;
  cudaStream_t stream_ = nullptr;  // of stop(): waits for no launch
  std::atomic<bool> is_kept_{false};
};

}  // namespace flashmoe::cuda
