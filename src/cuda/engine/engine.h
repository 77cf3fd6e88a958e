// The CUDA engine as the rest of the library sees it. Needs no CUDA header: a build without CUDA
// has the same class, whose launches say so.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cuda/engine/ranks.h"
#include "flashmoe/c_api.h"
#include "plan/flags.h"

namespace flashmoe::cuda {

struct LaunchOptions {
  double timeout_seconds = 60;  // of every wait in a kernel; 0: no bound
  int32_t max_sms = 0;          // most SMs of a launch; 0: all
};

// One rank's launches and their memory: on each device that it has used, scratch that grows to the
// largest launch, and the report of a launch that failed on the device. One call at a time.
class Engine {
 public:
  // A rank alone.
  Engine();
  // One of several ranks: `rank` of `ranks`.
  Engine(int32_t rank, std::shared_ptr<RankGroup> ranks);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Queues one kernel on args.stream of args.device and returns. Allocates, and then waits for the
  // device, only in the first call of a size. Launches on different streams follow one another;
  // replays of a captured graph are ordered by whoever replays it, among themselves and with these
  // launches, and end before the engine does: they use its scratch. One that starts beside another
  // launch, which leaves it multiprocessors (max_sms), does nothing but report FM_UNSUPPORTED.
  // Of several ranks: all make the same calls in the same order; a call waits for no other rank,
  // but for the first one among processes, which makes their memory together.
  // Throws Error: what an earlier launch reported, FM_UNSUPPORTED without a device
  // that has the kernels or with the reason why they do not take the layer, FM_OUT_OF_MEMORY, what
  // RankGroup::memory() throws.
  void forward(const fm_layer& layer, const fm_forward_args& args, const LaunchOptions& options);
  // The same for a backward; both kinds share scratch, order and epochs.
  void backward(const fm_layer& layer, const fm_backward_args& args, const LaunchOptions& options);

  // Waits for the launches of forward() (not for replays), then throws the failure of one, once;
  // the engine can be used again afterwards, unless it was one that stopped the group.
  void finish();
  // After an Error of forward(), backward(), finish() or reserve(): whether this rank has left a
  // launch, or not made one, that the others still wait for. An error that left all ranks in step
  // does not.
  bool breaks_group() const;

  // After finish(): where the time of the last launch went, seconds and phase_seconds.
  void time_last(fm_stats& stats) const;

  // How forward() would run, a line for each fact. Throws FM_UNSUPPORTED as forward() does.
  std::string explain(const fm_layer& layer, const fm_forward_args& args,
                      const LaunchOptions& options);

  // Several ranks only: RankGroup::reserve() and set_epoch() of this rank.
  void reserve(const RankNeeds& needs);
  void set_epoch(plan::Epoch epoch);
  // Several ranks only: set_device() and stop().
  RankGroup& ranks() const;

  // Of several ranks: the epoch of the last launch that was not captured. The kernels count replays
  // too, and begin anew where the memory grows.
  plan::Epoch epoch() const;
  // What it holds on all devices.
  int64_t scratch_bytes() const;
  // Memory that peers write, 0 for a rank alone.
  int64_t symmetric_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flashmoe::cuda
