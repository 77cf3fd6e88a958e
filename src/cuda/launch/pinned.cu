#include "cuda/launch/pinned.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <mutex>
#include <vector>

#include "cuda/launch/check.h"
#include "cuda/launch/device_guard.h"

namespace flashmoe::cuda::launch {
namespace {

struct Store {
  std::mutex mutex;
  std::vector<void*> free_pieces;
  std::size_t num_pieces = 0;  // those in use too
};

// It outlives every static object that may give a piece back.
Store& store() {
  static Store* const made = new Store;
  return *made;
}

void add_page(Store& to, int32_t device) {
  constexpr std::size_t kPage = 4096;
  constexpr std::size_t kPieces = kPage / PinnedPiece::kBytes;
  to.free_pieces.reserve(to.num_pieces + kPieces);
  const DeviceGuard guard(device);
  void* page = nullptr;
  check(cudaHostAlloc(&page, kPage, cudaHostAllocPortable | cudaHostAllocMapped),
        "cudaHostAlloc of ", kPage, " bytes");
  to.num_pieces += kPieces;
  for (std::size_t i = 0; i < kPieces; ++i) {
    to.free_pieces.push_back(static_cast<char*>(page) + i * PinnedPiece::kBytes);
  }
}

}  // namespace

PinnedPiece::PinnedPiece(int32_t device) {
  Store& from = store();
  const std::lock_guard lock(from.mutex);
  if (from.free_pieces.empty()) add_page(from, device);
  memory_ = from.free_pieces.back();
  from.free_pieces.pop_back();
  std::memset(memory_, 0, kBytes);
}

// The list has had room for every piece since its page was made: nothing is allocated here.
PinnedPiece::~PinnedPiece() {
  Store& to = store();
  const std::lock_guard lock(to.mutex);
  to.free_pieces.push_back(memory_);
}

}  // namespace flashmoe::cuda::launch
