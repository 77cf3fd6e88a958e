// The memory of one rank's launches: two arenas, each exactly as large as the largest region table
// asked of it, shared by all layers of the group.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace flashmoe::cpu {

class Arena {
 public:
  // At least `bytes`, aligned to a page; the old contents are gone when it had to grow.
  std::byte* reserve(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;  // stands if the next line throws
      memory_.reset(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), kAlign)));
      bytes_ = bytes;
    }
    return memory_.get();
  }
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr std::align_val_t kAlign{4096};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlign); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  int64_t bytes_ = 0;
};

struct Workspace {
  Arena route;
  Arena rows;
};

}  // namespace flashmoe::cpu
