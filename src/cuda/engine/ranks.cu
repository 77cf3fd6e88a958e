#include "cuda/engine/ranks.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <sstream>

#include "cuda/fabric/rank_memory.h"
#include "cuda/launch/check.h"
#include "cuda/launch/device.h"
#include "cuda/launch/device_guard.h"

namespace flashmoe::cuda {
namespace {

using launch::check;

// Tokens are reserved in units of this: the first call is seldom the largest.
constexpr int64_t kTokenUnit = 1024;

RankNeeds larger_of(const RankNeeds& a, const RankNeeds& b) {
  return {.tokens = std::max(a.tokens, b.tokens),
          .hidden = std::max(a.hidden, b.hidden),
          .top_k = std::max(a.top_k, b.top_k),
          .local_experts = std::max(a.local_experts, b.local_experts)};
}

bool is_within(const RankNeeds& needs, const RankNeeds& has) {
  return needs.tokens <= has.tokens && needs.hidden <= has.hidden && needs.top_k <= has.top_k &&
         needs.local_experts <= has.local_experts;
}

RankNeeds rounded(RankNeeds needs) {
  needs.tokens = std::max(plan::align_up(needs.tokens, kTokenUnit), kTokenUnit);
  return needs;
}

config::SymmetricCapacity capacity_of(int32_t world, const RankNeeds& needs) {
  return config::needed_capacity(world, needs.tokens, needs.hidden, needs.top_k,
                                 needs.local_experts);
}

[[noreturn]] void refuse_beyond(int32_t world, const RankNeeds& needs, const RankNeeds& has) {
  const RankNeeds wanted = larger_of(needs, has);
  fail(FM_INVALID_VALUE, "the call needs room for ", needs.tokens, " tokens of ", needs.hidden,
       " elements, top_k ", needs.top_k, " and ", needs.local_experts * world,
       " experts; the group's memory was made for ", has.tokens, " tokens of ", has.hidden,
       ", top_k ", has.top_k, " and ", has.local_experts * world,
       " experts by its first call: before that call, or between calls, let all ranks call "
       "group.reserve(max_tokens=",
       wanted.tokens, ", hidden=", wanted.hidden, ", top_k=", wanted.top_k,
       ", num_experts=", wanted.local_experts * world, ")");
}

[[noreturn]] void refuse_capture() {
  fail(FM_INVALID_VALUE,
       "the stream is being captured, and the memory of the group's ranks has still to be made: "
       "run the layer once on all ranks before capturing it");
}

// Ranks on one device wait for each other inside their launches, so all of them must be resident.
void check_share(const RankPlace& place, int32_t sharers) {
  if (sharers <= 1) return;
  const int32_t most =
      launch::attribute_of(place.device, cudaDevAttrMultiProcessorCount) / sharers / 2 * 2;
  if (place.max_sms > 0 && place.max_sms <= most) return;
  fail(FM_UNSUPPORTED, sharers, " ranks share CUDA device ", place.device,
       " and would wait for each other's multiprocessors: give each rank a GPU of its own, or let "
       "each of them take a part, group.set(\"max_sms\", ",
       most, "), and launch on a stream of its own");
}

void check_reach(int32_t from, int32_t to) {
  if (from == to) return;
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, from, to), "cudaDeviceCanAccessPeer(", from, ", ", to, ")");
  if (can != 0) return;
  fail(
      FM_UNSUPPORTED, "CUDA device ", from, " cannot reach the memory of CUDA device ", to,
      ": several ranks need NVLink or PCIe peer access between their GPUs (nvidia-smi topo -p2p n; "
      "switch off PCIe ACS and the IOMMU where they block it)");
}

// What both kinds of groups hold. The small lock guards the pointer alone, so that stop() never
// waits for a call that makes memory.
class SharedMemory {
 public:
  std::shared_ptr<RankMemory> get() {
    const std::lock_guard lock(mutex_);
    return memory_;
  }
  void replace(std::shared_ptr<RankMemory> made) {
    const std::lock_guard lock(mutex_);
    if (memory_ != nullptr && memory_->is_kept()) retired_.push_back(memory_);
    memory_ = std::move(made);
  }
  void stop(int32_t rank) noexcept {
    const std::lock_guard lock(mutex_);
    if (memory_ != nullptr) memory_->stop(rank);
    for (const auto& one : retired_) one->stop(rank);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<RankMemory> memory_;
  std::vector<std::shared_ptr<RankMemory>> retired_;  // graphs hold their addresses
};

class LocalRanks final : public RankGroup {
 public:
  explicit LocalRanks(int32_t world) : devices_(static_cast<size_t>(world)) {
    for (int32_t rank = 0; rank < world; ++rank) devices_[static_cast<size_t>(rank)] = rank;
  }

  int32_t world() const override { return static_cast<int32_t>(devices_.size()); }

  std::shared_ptr<RankMemory> memory(const RankPlace& place, const RankNeeds& needs) override {
    const std::lock_guard lock(mutex_);
    check_place(place);
    if (auto made = memory_.get()) {
      if (!is_within(needs, has_)) refuse_beyond(world(), needs, has_);
      return made;
    }
    if (place.capturing) refuse_capture();
    make(larger_of(needs, wanted_));
    return memory_.get();
  }

  void reserve(int32_t, const RankNeeds& needs) override {
    const std::lock_guard lock(mutex_);
    wanted_ = larger_of(wanted_, needs);
    if (memory_.get() == nullptr || is_within(wanted_, has_)) return;
    for (const int32_t device : devices_) {
      const launch::DeviceGuard guard(device);
      check(cudaDeviceSynchronize(), "cudaDeviceSynchronize before the ranks' memory grows");
    }
    make(larger_of(wanted_, has_));
  }

  void set_device(int32_t rank, int32_t device) override {
    const std::lock_guard lock(mutex_);
    if (memory_.get() != nullptr) {
      fail(FM_INVALID_VALUE, "device: can only be set before the group's first CUDA call");
    }
    devices_[static_cast<size_t>(rank)] = device;
  }

  void stop(int32_t rank) noexcept override { memory_.stop(rank); }
  bool has_memory() override { return memory_.get() != nullptr; }
  int64_t bytes() override {
    const auto made = memory_.get();
    return made == nullptr ? 0 : made->bytes();
  }

 private:
  void check_place(const RankPlace& place) const {
    const int32_t own = devices_[static_cast<size_t>(place.rank)];
    if (place.device != own) {
      fail(FM_INVALID_VALUE, "the operands of rank ", place.rank, " are on CUDA device ",
           place.device, ", but the rank's device is ", own,
           ": move them there, or say local_group(..., devices=[...])");
    }
    check_share(place, static_cast<int32_t>(std::count(devices_.begin(), devices_.end(), own)));
  }

  void make(const RankNeeds& needs) {
    const RankNeeds has = rounded(needs);
    const config::SymmetricCapacity capacity = capacity_of(world(), has);
    const int64_t bytes = config::symmetric_table(world(), capacity).total;
    for (const int32_t device : devices_) launch::check_device(device);
    for (const int32_t from : devices_) {
      for (const int32_t to : devices_) check_reach(from, to);
    }
    std::vector<int32_t> users = devices_;
    std::sort(users.begin(), users.end());
    users.erase(std::unique(users.begin(), users.end()), users.end());
    for (const int32_t device : users) {
      const launch::DeviceGuard guard(device);
      check(cudaFree(nullptr), "the context of CUDA device ", device);
    }
    std::vector<DeviceRegion> regions;
    for (const int32_t device : devices_) {
      regions.push_back(DeviceRegion::create(device, bytes, false, users));
    }
    memory_.replace(std::make_shared<RankMemory>(capacity, std::move(regions), devices_.front()));
    has_ = has;
  }

  std::mutex mutex_;  // held while memory is made
  std::vector<int32_t> devices_;
  RankNeeds wanted_, has_;
  SharedMemory memory_;
};

// What a rank says of itself before the memory is made.
struct Introduction {
  RankNeeds needs;
  cudaUUID_t device;
};

class ProcessRanks final : public RankGroup {
 public:
  explicit ProcessRanks(std::unique_ptr<Peers> peers) : peers_(std::move(peers)) {}

  int32_t world() const override { return peers_->world(); }

  std::shared_ptr<RankMemory> memory(const RankPlace& place, const RankNeeds& needs) override {
    if (auto made = memory_.get()) {
      if (place.device != device_) {
        fail(FM_INVALID_VALUE, "the operands are on CUDA device ", place.device,
             ", but this rank of the group began on device ", device_,
             ": a rank keeps its device; use another group for another one");
      }
      check_share(place, sharers_);
      if (!is_within(needs, has_)) refuse_beyond(world(), needs, has_);
      return made;
    }
    if (place.capturing) refuse_capture();
    make(place.device, larger_of(needs, wanted_));
    check_share(place, sharers_);
    return memory_.get();
  }

  void reserve(int32_t, const RankNeeds& needs) override {
    wanted_ = larger_of(wanted_, needs);
    if (memory_.get() != nullptr) make(device_, larger_of(wanted_, has_));
  }

  void set_device(int32_t, int32_t) override {
    fail(FM_INVALID_VALUE,
         "device: a rank that is a process has the device of the operands of its first call");
  }

  void stop(int32_t rank) noexcept override { memory_.stop(rank); }
  bool has_memory() override { return memory_.get() != nullptr; }
  int64_t bytes() override {
    const auto made = memory_.get();
    return made == nullptr ? 0 : made->bytes();
  }

 private:
  // Collective: memory for what all ranks need; nothing where there is enough of it.
  void make(int32_t device, const RankNeeds& needs) {
    launch::check_device(device);
    const launch::DeviceGuard guard(device);
    check(cudaFree(nullptr), "the context of CUDA device ", device);
    const RankNeeds has = rounded(agree(device, needs));
    if (memory_.get() != nullptr) {
      if (is_within(has, has_)) return;
      check(cudaDeviceSynchronize(), "cudaDeviceSynchronize before the ranks' memory grows");
    }
    const config::SymmetricCapacity capacity = capacity_of(world(), has);
    const int64_t bytes = config::symmetric_table(world(), capacity).total;
    DeviceRegion own = DeviceRegion::create(device, bytes, true, {device});
    const std::vector<File> files = peers_->exchange(own.export_file());
    std::vector<DeviceRegion> regions;
    for (int32_t rank = 0; rank < world(); ++rank) {
      regions.push_back(
          rank == peers_->rank()
              ? std::move(own)
              : DeviceRegion::import(files[static_cast<size_t>(rank)], bytes, device, rank));
    }
    // In place before the last gather: an abort from now on finds its words.
    memory_.replace(std::make_shared<RankMemory>(capacity, std::move(regions), device));
    device_ = device;
    has_ = has;
    peers_->gather({});  // all have mapped all, and every region is zero
  }

  // The largest needs of any rank; learns who shares this rank's device.
  RankNeeds agree(int32_t device, const RankNeeds& needs) {
    cudaDeviceProp own{};
    check(cudaGetDeviceProperties(&own, device), "cudaGetDeviceProperties(", device, ")");
    Introduction introduction{.needs = needs, .device = own.uuid};
    Peers::Message message{};
    static_assert(sizeof(introduction) <= sizeof(message));
    std::memcpy(message.data(), &introduction, sizeof(introduction));
    RankNeeds largest = needs;
    sharers_ = 0;
    for (const Peers::Message& told : peers_->gather(message)) {
      std::memcpy(&introduction, told.data(), sizeof(introduction));
      largest = larger_of(largest, introduction.needs);
      if (std::memcmp(&introduction.device, &own.uuid, sizeof(own.uuid)) == 0) ++sharers_;
      check_reach_of(device, introduction.device);
    }
    return largest;
  }

  // A device that this process does not see (CUDA_VISIBLE_DEVICES) is judged by the mapping.
  static void check_reach_of(int32_t device, const cudaUUID_t& other) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    for (int32_t candidate = 0; candidate < count; ++candidate) {
      cudaDeviceProp found{};
      check(cudaGetDeviceProperties(&found, candidate), "cudaGetDeviceProperties(", candidate, ")");
      if (std::memcmp(&found.uuid, &other, sizeof(other)) == 0) check_reach(device, candidate);
    }
  }

  std::unique_ptr<Peers> peers_;
  RankNeeds wanted_, has_;
  int32_t device_ = 0;
  int32_t sharers_ = 1;
  SharedMemory memory_;
};

}  // namespace

std::shared_ptr<RankGroup> make_local_ranks(int32_t world) {
  return std::make_shared<LocalRanks>(world);
}

std::shared_ptr<RankGroup> make_process_ranks(std::unique_ptr<Peers> peers) {
  return std::make_shared<ProcessRanks>(std::move(peers));
}

}  // namespace flashmoe::cuda
