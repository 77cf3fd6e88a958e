// The memory that a group's ranks share, as the group holds it: made late, replaced when it grows,
// and stopped from any thread. No CUDA: tested without a GPU.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/error.h"

namespace flashmoe::cuda {

// Memory: RankMemory. The lock guards pointers alone, so that stop() never waits for a call that
// makes memory.
template <class Memory>
class HeldMemory {
 public:
  std::shared_ptr<Memory> get() const {
    const std::lock_guard lock(mutex_);
    return memory_;
  }
  int64_t bytes() const {
    const auto memory = get();
    return memory == nullptr ? 0 : memory->bytes();
  }

  // What graphs hold stays. A stop() that came before, while this memory was being made, counts
  // for it too.
  void replace(std::shared_ptr<Memory> made) {
    const std::lock_guard lock(mutex_);
    if (stopped_by_) made->stop(*stopped_by_);
    if (memory_ != nullptr && memory_->is_kept()) retired_.push_back(memory_);
    memory_ = std::move(made);
  }

  // Ends all waits of all ranks' launches, of those to come too. The first one to stop is named.
  void stop(int32_t rank) noexcept {
    const std::lock_guard lock(mutex_);
    if (!stopped_by_) stopped_by_ = rank;
    if (memory_ != nullptr) memory_->stop(*stopped_by_);
    for (const auto& one : retired_) one->stop(*stopped_by_);
  }
  // The memory for a launch. Throws FM_ABORTED once stop() has been called.
  std::shared_ptr<Memory> running() const {
    const std::lock_guard lock(mutex_);
    if (!stopped_by_) return memory_;
    fail(FM_ABORTED, "the group was aborted by rank ", *stopped_by_, "; make a new group to go on");
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Memory> memory_;
  std::vector<std::shared_ptr<Memory>> retired_;
  std::optional<int32_t> stopped_by_;
};

}  // namespace flashmoe::cuda
