#include "cuda/engine/ranks.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <vector>

#include "cuda/engine/agreement.h"
#include "cuda/engine/held_memory.h"
#include "cuda/fabric/rank_memory.h"
#include "cuda/launch/check.h"
#include "cuda/launch/device.h"
#include "cuda/launch/device_guard.h"

namespace flashmoe::cuda {
namespace {

using launch::check;

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

// What both kinds of groups have.
class HeldRanks : public RankGroup {
 public:
  void stop(int32_t rank) noexcept override { memory_.stop(rank); }
  int64_t bytes() override { return memory_.bytes(); }

 protected:
  RankNeeds planned_here(const RankNeeds& needs) const {
    return memory_.get() != nullptr ? has_ : rounded(world(), larger_of(needs, wanted_));
  }
  // Of an option that the memory is made with.
  void check_early(const char* option) const {
    if (memory_.get() == nullptr) return;
    fail(FM_INVALID_VALUE, option, ": can only be set before the group's first CUDA call");
  }
  int64_t bytes_for(const RankNeeds& needs) const {
    return config::symmetric_table(world(), capacity_for(needs)).total;
  }
  config::SymmetricCapacity capacity_for(const RankNeeds& needs) const {
    return config::needed_capacity(sizes_of(world(), needs));
  }

  RankNeeds wanted_;  // noted by reserve()
  RankNeeds has_;     // what the memory was made for
  HeldMemory<RankMemory> memory_;
};

// New memory of a rank, whose first launch follows this epoch.
DeviceRegion make_region(int32_t device, int64_t bytes, bool exportable,
                         const std::vector<int32_t>& users, plan::Epoch epoch) {
  DeviceRegion made = DeviceRegion::create(device, bytes, exportable, users);
  if (epoch != 0) made.write(offsetof(config::RankControl, epoch), &epoch, sizeof(epoch));
  return made;
}

class LocalRanks final : public HeldRanks {
 public:
  explicit LocalRanks(int32_t world)
      : devices_(static_cast<size_t>(world)), epochs_(static_cast<size_t>(world)), owed_(world) {
    for (int32_t rank = 0; rank < world; ++rank) devices_[static_cast<size_t>(rank)] = rank;
  }

  int32_t world() const override { return static_cast<int32_t>(devices_.size()); }

  std::shared_ptr<RankMemory> memory(const RankPlace& place, const RankNeeds& needs) override {
    const std::lock_guard lock(mutex_);
    check_place(place);
    if (const auto owed = owed_.take(place.rank)) throw HarmlessError(*owed);
    if (memory_.get() != nullptr) {
      if (!is_within(needs, has_)) refuse_beyond(world(), needs, has_);
      return memory_.running();
    }
    if (place.capturing) refuse_capture();
    if (const auto failure = attempt([&] { make(larger_of(needs, wanted_)); })) {
      owed_.add(place.rank, *failure);
      throw HarmlessError(*failure);
    }
    return memory_.running();
  }

  void reserve(int32_t, const RankNeeds& needs) override {
    const std::lock_guard lock(mutex_);
    if (memory_.get() == nullptr) {
      wanted_ = larger_of(wanted_, needs);
      return;
    }
    if (is_within(needs, has_)) return;
    const auto failure = attempt([&] {
      for (const int32_t device : devices_) {
        const launch::DeviceGuard guard(device);
        check(cudaDeviceSynchronize(), "cudaDeviceSynchronize before the ranks' memory grows");
      }
      make(larger_of(needs, has_));
    });
    if (failure) throw HarmlessError(*failure);
  }

  RankNeeds planned(const RankNeeds& needs) override {
    const std::lock_guard lock(mutex_);
    return planned_here(needs);
  }

  void set_device(int32_t rank, int32_t device) override {
    const std::lock_guard lock(mutex_);
    check_early("device");
    devices_[static_cast<size_t>(rank)] = device;
  }
  void set_epoch(int32_t rank, uint32_t epoch) override {
    const std::lock_guard lock(mutex_);
    check_early("epoch");
    epochs_[static_cast<size_t>(rank)] = epoch;
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
    check_limits(world(), needs);
    const RankNeeds has = rounded(world(), needs);
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
    for (size_t rank = 0; rank < devices_.size(); ++rank) {
      regions.push_back(make_region(devices_[rank], bytes_for(has), false, users, epochs_[rank]));
    }
    memory_.replace(
        std::make_shared<RankMemory>(capacity_for(has), std::move(regions), devices_.front()));
    has_ = has;
  }

  std::mutex mutex_;  // held while memory is made
  std::vector<int32_t> devices_;
  std::vector<plan::Epoch> epochs_;
  OwedErrors owed_;
};

// What a rank says of itself before the memory is made.
struct Introduction {
  RankNeeds needs;
  cudaUUID_t device;
};

class ProcessRanks final : public HeldRanks {
 public:
  explicit ProcessRanks(std::unique_ptr<Peers> peers) : peers_(std::move(peers)) {}

  int32_t world() const override { return peers_->world(); }

  std::shared_ptr<RankMemory> memory(const RankPlace& place, const RankNeeds& needs) override {
    if (memory_.get() != nullptr) {
      if (place.device != device_) {
        fail(FM_INVALID_VALUE, "the operands are on CUDA device ", place.device,
             ", but this rank of the group began on device ", device_,
             ": a rank keeps its device; use another group for another one");
      }
      check_share(place, sharers_);
      if (!is_within(needs, has_)) refuse_beyond(world(), needs, has_);
      return memory_.running();
    }
    if (place.capturing) refuse_capture();
    make(place.device, larger_of(needs, wanted_));
    check_share(place, sharers_);
    return memory_.running();
  }

  void reserve(int32_t, const RankNeeds& needs) override {
    if (memory_.get() == nullptr) {
      wanted_ = larger_of(wanted_, needs);
    } else {
      make(device_, larger_of(needs, has_));
    }
  }

  RankNeeds planned(const RankNeeds& needs) override { return planned_here(needs); }

  void set_device(int32_t, int32_t) override {
    fail(FM_INVALID_VALUE,
         "device: a rank that is a process has the device of the operands of its first call");
  }
  void set_epoch(int32_t, uint32_t epoch) override {
    check_early("epoch");
    epoch_ = epoch;
  }

 private:
  // Collective: memory for what all ranks need; nothing where there is enough of it. What one rank
  // cannot do ends it on all of them.
  void make(int32_t device, const RankNeeds& needs) {
    launch::check_device(device);
    const launch::DeviceGuard guard(device);
    check(cudaFree(nullptr), "the context of CUDA device ", device);
    const std::vector<Introduction> ranks = introduce(device, needs);
    RankNeeds largest = needs;
    for (const Introduction& one : ranks) largest = larger_of(largest, one.needs);
    if (const auto refused = attempt([&] { check_limits(world(), largest); })) {
      throw HarmlessError(*refused);
    }
    const RankNeeds has = rounded(world(), largest);
    if (memory_.get() != nullptr && is_within(has, has_)) return;
    DeviceRegion own;
    File exported;
    agree(*peers_, attempt([&] {
      for (const Introduction& one : ranks) check_reach_of(device, one.device);
      if (memory_.get() != nullptr) {
        check(cudaDeviceSynchronize(), "cudaDeviceSynchronize before the memory grows");
      }
      own = make_region(device, bytes_for(has), true, {device}, epoch_);
      exported = own.export_file();
    }));
    const std::vector<File> files = peers_->exchange(exported);
    std::shared_ptr<RankMemory> made;
    agree(*peers_, attempt([&] { made = map(device, has, std::move(own), files); }));
    memory_.replace(std::move(made));  // all have mapped all
    device_ = device;
    has_ = has;
  }

  // All ranks' memory, from this rank's own and the files of the others.
  std::shared_ptr<RankMemory> map(int32_t device, const RankNeeds& has, DeviceRegion own,
                                  const std::vector<File>& files) const {
    std::vector<DeviceRegion> regions;
    for (int32_t rank = 0; rank < world(); ++rank) {
      regions.push_back(rank == peers_->rank()
                            ? std::move(own)
                            : DeviceRegion::import(files[static_cast<size_t>(rank)], bytes_for(has),
                                                   device, rank));
    }
    return std::make_shared<RankMemory>(capacity_for(has), std::move(regions), device);
  }

  // What every rank says of itself; learns who shares this rank's device.
  std::vector<Introduction> introduce(int32_t device, const RankNeeds& needs) {
    cudaDeviceProp own{};
    check(cudaGetDeviceProperties(&own, device), "cudaGetDeviceProperties(", device, ")");
    Introduction introduction{.needs = needs, .device = own.uuid};
    Peers::Message message{};
    static_assert(sizeof(introduction) <= sizeof(message));
    std::memcpy(message.data(), &introduction, sizeof(introduction));
    std::vector<Introduction> ranks;
    sharers_ = 0;
    for (const Peers::Message& told : peers_->gather(message)) {
      std::memcpy(&introduction, told.data(), sizeof(introduction));
      ranks.push_back(introduction);
      if (std::memcmp(&introduction.device, &own.uuid, sizeof(own.uuid)) == 0) ++sharers_;
    }
    return ranks;
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
  int32_t device_ = 0;
  int32_t sharers_ = 1;
  plan::Epoch epoch_ = 0;
};

}  // namespace

std::shared_ptr<RankGroup> make_local_ranks(int32_t world) {
  return std::make_shared<LocalRanks>(world);
}

std::shared_ptr<RankGroup> make_process_ranks(std::unique_ptr<Peers> peers) {
  return std::make_shared<ProcessRanks>(std::move(peers));
}

}  // namespace flashmoe::cuda
