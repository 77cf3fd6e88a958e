// Pinned host memory that all devices of the process read and write.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashmoe::cuda::launch {

// A piece of it, zero when it is taken, of 128 bytes and on a multiple of them. What is given back
// is used again and never freed: freeing pinned memory may wait for all launches of the process,
// of which one may wait for a rank that this very thread has still to call.
class PinnedPiece {
 public:
  static constexpr std::size_t kBytes = 128;

  // device: one whose context this process has or shall have. Throws FM_OUT_OF_MEMORY.
  explicit PinnedPiece(int32_t device);
  ~PinnedPiece();
  PinnedPiece(const PinnedPiece&) = delete;
  PinnedPiece& operator=(const PinnedPiece&) = delete;

  // The host's address of a T in it; the devices' is the same.
  template <class T>
  T* as() const {
    static_assert(sizeof(T) <= kBytes);
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
};

}  // namespace flashmoe::cuda::launch
