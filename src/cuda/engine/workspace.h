// The memory of one group's launches on one device, and the order among them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda/engine/engine.h"
#include "cuda/engine/failure.h"
#include "cuda/launch/device_pool.h"
#include "cuda/launch/forward.h"
#include "cuda/launch/launch_times.h"
#include "cuda/launch/pinned.h"

namespace flashmoe::cuda {

// The rank that a launch is of.
struct RankView {
  int32_t rank = 0;
  RankGroup* ranks = nullptr;  // null: alone

  int32_t world() const { return ranks == nullptr ? 1 : ranks->world(); }
};

class Workspace {
 public:
  // Throws FM_UNSUPPORTED when `device` has no kernels in this build, naming what it is, and
  // FM_INVALID_VALUE when `stream` is being captured: nothing can be allocated then.
  Workspace(int32_t device, cudaStream_t stream);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // What came of a call that has launched.
  struct Launched {
    bool captured;
    std::optional<Error> notice;  // what an earlier launch has reported, to be thrown now
  };

  // Throws what an earlier launch has reported. Of several ranks a notice waits until the launches
  // so far have ended, and comes after this launch, which the others make too: no call waits for a
  // launch that may itself wait for a call of this thread.
  Launched forward(const fm_layer& layer, const fm_forward_args& args, const LaunchOptions& options,
                   const RankView& view);
  Launched backward(const fm_layer& layer, const fm_backward_args& args,
                    const LaunchOptions& options, const RankView& view);

  // Waits for the last launch that was not captured, then throws what a launch has reported:
  // HarmlessError where it is a notice alone. After a failure a rank alone can go on; of several
  // ranks nothing is raised any more, and whoever catches it stops the group. Does not wait for
  // launches of several ranks where one has failed already.
  void finish(const RankView& view);

  // Where the time of the last launch went: seconds and phase_seconds. That launch has ended.
  void time_last(fm_stats& stats) const;

  std::string explain(const fm_layer& layer, const fm_forward_args& args,
                      const LaunchOptions& options, const RankView& view) const;
  int64_t scratch_bytes() const;

 private:
  struct Scratch {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool captured = false;  // a graph holds its address
  };

  // What launches have reported, and whether that is more than a notice.
  struct Verdict {
    bool failed;
    Error error;
  };

  bool is_time_to_raise(const RankView& view, bool capturing) const;
  // Reads the pinned words. Of a rank alone, waits for its launches and leaves scratch and reports
  // as new; of several ranks only a notice is wiped away: launches that a failure has stopped may
  // still run out, and their group is at its end. Capturing: all stays as it is.
  Verdict take_reports(const RankView& view, bool capturing);
  void wait_for_end() const;
  void clean_scratch();
  bool is_captured() const;
  // Of a launch: its ranks and the memory that they share, null for a rank alone.
  struct Ranks {
    launch::RankArguments arguments;
    std::shared_ptr<RankMemory> memory;
  };

  // The notice of an earlier launch, which comes after the one to be made; throws what comes
  // before.
  std::optional<Error> raise_earlier(const RankView& view, bool capturing);
  template <class Args>
  Ranks join(const fm_layer& layer, const Args& args, const LaunchOptions& options,
             const RankView& view, bool capturing);
  // The part of forward() and backward() that is the same: Arguments of the launch, their scratch.
  template <class Arguments, class Args, class Bytes, class Launch>
  Launched run(const fm_layer& layer, const Args& args, const LaunchOptions& options,
               const RankView& view, const Bytes& scratch_bytes, const Launch& launch);
  // Makes room and puts the launch behind those before it.
  void begin_launch(int64_t scratch_bytes, cudaStream_t stream, const LaunchOptions& options,
                    bool capturing, bool is_alone);
  void end_launch(cudaStream_t stream, bool capturing);
  void reserve(int64_t bytes, cudaStream_t stream, bool capturing, bool is_alone);
  void follow_last(cudaStream_t stream) const;
  void record_last(cudaStream_t stream);
  sync::LaunchReports& reports() const { return *reports_.as<sync::LaunchReports>(); }
  void release() noexcept;

  int32_t device_;
  int32_t num_sms_ = 0;
  launch::PinnedPiece reports_;  // sync::LaunchReports
  launch::DevicePool pool_;
  cudaStream_t own_stream_ = nullptr;  // of what waits for no launch
  Scratch scratch_;
  std::vector<Scratch> retired_;  // grown out of, but captured
  cudaEvent_t last_ = nullptr;    // end of the last use of scratch that was not captured
  unsigned long long last_stream_ = 0;
  bool has_last_ = false;
  bool has_joined_ = false;       // others in a launch
  bool has_failed_ = false;       // of several ranks: told once, no launch follows
  uint32_t launch_id_ = 0;        // of the last launch
  double timeout_seconds_ = 0;    // likewise
  launch::LaunchKind last_kind_;  // likewise
};

}  // namespace flashmoe::cuda
