// An EP group as one rank sees it: the fabric, the epoch, the symmetric memory and its capacity.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "fabric/fabric.h"
#include "fabric/wait.h"
#include "plan/layout.h"

namespace flashmoe::fabric {

enum class Operation : uint32_t { kForward = 1, kBackward = 2 };

// Test and tuning knobs (fm_group_set).
struct GroupOptions {
  double timeout_seconds = 60;
  int num_threads = 0;   // 0: automatic
  int max_sms = 0;       // CUDA: most SMs of a launch; 0: all
  double jitter_us = 0;  // tests: random delay before each task, up to this
  // tests: fm_phase + 1 at whose first task of this rank the process stops itself (SIGSTOP), once;
  // 0: never
  int stop_in_phase = 0;

  bool disturbed() const { return jitter_us > 0 || stop_in_phase > 0; }
};

class Group {
 public:
  Group(std::unique_ptr<Fabric> fabric, int32_t rank, int32_t world, GroupOptions options);

  int32_t rank() const { return rank_; }
  int32_t world() const { return world_; }
  const Fabric& fabric() const { return *fabric_; }
  const plan::SymmetricCapacity& capacity() const { return capacity_; }
  GroupOptions& options() { return options_; }

  // Makes the memory of the group; collective. Separate from the constructor because ranks that are
  // threads do it later, each in its own first launch.
  void connect(const Waiter& waiter);

  // Held during a launch of this rank (LaunchTurn) and while its options or statistics are used.
  std::mutex& launch_mutex() { return launch_mutex_; }

  // For the waits of one launch, bounded as the options say.
  Waiter waiter() const { return Waiter(*fabric_, rank_, options_.timeout_seconds); }

  plan::Epoch epoch() const { return epoch_; }
  plan::Epoch begin_epoch() { return epoch_ = plan::next_epoch(epoch_); }
  void set_epoch(plan::Epoch epoch);

  ControlBlock& own_control() const { return *fabric_->control(rank_); }
  ControlBlock& control(int32_t rank) const { return *fabric_->control(rank); }

  // Writes `header` into every rank's bank of this epoch, own included; the flags are raised apart,
  // after the metadata (publish_metadata).
  void write_header(plan::Epoch epoch, const CallHeader& header);
  void wait_for_credit(plan::Epoch epoch, const Waiter& waiter) const;
  void publish_metadata(plan::Epoch epoch);
  void wait_for_metadata(plan::Epoch epoch, const Waiter& waiter) const;
  const CallHeader& header_of(plan::Epoch epoch, int32_t rank) const {
    return own_control().header[plan::bank_of(epoch)][rank];
  }
  // Tells all ranks that this one has left the launch.
  void finish_epoch(plan::Epoch epoch);

  // Collective: all ranks have agreed (by their headers) on the new capacity. A rank that can not
  // leaves its peers in the middle of it: the group is aborted.
  void grow(const plan::SymmetricCapacity& capacity, const Waiter& waiter);

  // Collective: every rank gives a message and gets those of all, by rank. A rank that can not, or
  // that waits longer than the waiter's bound, aborts the group. Throws as a wait does.
  std::vector<Message> gather(const Message& own, const Waiter& waiter);

  // Stops every rank's waits. The first reason stands. Any thread.
  void abort(fm_status status, const std::string& reason);
  // Called at the end of every abort() of this rank, by its thread; set before the group is used.
  void on_abort(std::function<void()> hook) { abort_hook_ = std::move(hook); }

 private:
  friend class LaunchTurn;
  void grow_together(const plan::SymmetricCapacity& capacity, const Waiter& waiter);
  std::vector<Message> gather_together(const Message& own, const Waiter& waiter);

  std::unique_ptr<Fabric> fabric_;
  int32_t rank_;
  int32_t world_;
  GroupOptions options_;
  std::mutex launch_mutex_;
  std::atomic<bool> launching_{false};
  int owner_process_;
  plan::Epoch epoch_ = 0;
  uint32_t generation_ = 0;
  uint32_t gathers_ = 0;
  std::function<void()> abort_hook_;
  bool connected_ = false;
  plan::SymmetricCapacity capacity_;
};

// The right to launch, for as long as it lives. A second thread waits for its turn on a group of
// one rank. On a larger one the ranks might serve two threads in different orders, and so mix their
// tokens: the group is aborted and FM_UNSUPPORTED thrown; the same, without the abort, in a child
// process that inherited the group.
class LaunchTurn {
 public:
  explicit LaunchTurn(Group& group);
  ~LaunchTurn();
  LaunchTurn(const LaunchTurn&) = delete;
  LaunchTurn& operator=(const LaunchTurn&) = delete;

 private:
  Group& group_;
  std::unique_lock<std::mutex> lock_;
};

// Throws FM_MISMATCH naming the rank and the field when two headers of a launch disagree, or when a
// peer refused.
void check_headers(const Group& group, plan::Epoch epoch);

}  // namespace flashmoe::fabric
