// Ranks as threads of one process; with world 1 also the fabric of a rank alone.
#include <cstring>
#include <mutex>
#include <new>

#include "fabric/fabric.h"

namespace flashmoe::fabric {
namespace {

constexpr std::align_val_t kAlign{4096};

struct FreeAligned {
  void operator()(std::byte* memory) const { ::operator delete(memory, kAlign); }
};
using Memory = std::unique_ptr<std::byte, FreeAligned>;

Memory allocate_zeroed(int64_t bytes) {
  Memory memory(static_cast<std::byte*>(::operator new(static_cast<size_t>(bytes), kAlign)));
  std::memset(memory.get(), 0, static_cast<size_t>(bytes));
  return memory;
}

// What the ranks share: a control block and the data part of each, and its address. A rank that has
// left its last launch may be destroyed while a slower peer still raises flags in its memory: the
// hub keeps all of it until the last rank goes.
struct Hub {
  explicit Hub(int32_t world) : controls(world), owned(world), data(world) {
    for (auto& control : controls) control = std::make_unique<ControlBlock>();
    for (auto& base : data) base.store(nullptr);
  }
  std::vector<std::unique_ptr<ControlBlock>> controls;
  std::vector<Memory> owned;  // each element is touched by its rank alone
  std::vector<std::atomic<std::byte*>> data;
};

class ThreadFabric final : public Fabric {
 public:
  ThreadFabric(std::shared_ptr<Hub> hub, int32_t rank) : hub_(std::move(hub)), rank_(rank) {}

  const char* name() const override { return hub_->controls.size() == 1 ? "self" : "threads"; }
  ControlBlock* control(int32_t rank) const override { return hub_->controls[rank].get(); }
  std::byte* data(int32_t rank) const override {
    return hub_->data[rank].load(std::memory_order_acquire);
  }

  void allocate(int64_t bytes, uint32_t) override {
    grown_ = allocate_zeroed(bytes);
    hub_->data[rank_].store(grown_.get(), std::memory_order_release);
  }
  void map_peers(int64_t, uint32_t) override {}
  void retire() override { hub_->owned[rank_] = std::move(grown_); }

 private:
  std::shared_ptr<Hub> hub_;
  int32_t rank_;
  Memory grown_;  // until all peers use it
};

}  // namespace

std::vector<std::unique_ptr<Fabric>> make_thread_fabrics(int32_t world) {
  auto hub = std::make_shared<Hub>(world);
  std::vector<std::unique_ptr<Fabric>> fabrics;
  for (int32_t rank = 0; rank < world; ++rank) {
    introduce(*hub->controls[rank], world);
    fabrics.push_back(std::make_unique<ThreadFabric>(hub, rank));
  }
  return fabrics;
}

}  // namespace flashmoe::fabric
