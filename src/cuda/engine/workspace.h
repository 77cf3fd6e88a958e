// The memory of one group's launches on one device, and the order among them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "cuda/engine/engine.h"
#include "cuda/engine/failure.h"
#include "cuda/launch/forward.h"

namespace flashmoe::cuda {

// The rank that a launch is of.
struct RankView {
  int32_t rank = 0;
  RankGroup* ranks = nullptr;  // null: alone

  int32_t world() const { return ranks == nullptr ? 1 : ranks->world(); }
};

// An earlier launch's failure that has left all ranks in step.
class HarmlessError : public Error {
 public:
  using Error::Error;
};

class Workspace {
 public:
  // Throws FM_UNSUPPORTED when `device` has no kernels in this build, naming what it is, and
  // FM_INVALID_VALUE when `stream` is being captured: nothing can be allocated then.
  Workspace(int32_t device, cudaStream_t stream);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Of several ranks, throws a harmless report of an earlier launch only after this one: the others
  // make theirs too.
  void forward(const fm_layer& layer, const fm_forward_args& args, const LaunchOptions& options,
               const RankView& view);
  // Of a rank alone.
  void backward(const fm_layer& layer, const fm_backward_args& args, const LaunchOptions& options);

  // Waits for the last launch that was not captured, then throws what a launch has reported:
  // HarmlessError where is_harmless(). Makes scratch and report as new, so that the next launch
  // finds them clean.
  void finish(const RankView& view);

  // Where the time of the last launch went: seconds and phase_seconds. That launch has ended.
  void time_last(fm_stats& stats) const;

  std::string explain(const fm_layer& layer, const fm_forward_args& args,
                      const LaunchOptions& options) const;
  int64_t scratch_bytes() const;

 private:
  struct Scratch {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool captured = false;  // a graph holds its address
  };

  void raise_report(const RankView& view);
  bool has_report() const;
  // The report, then cleared with all that the launch may have left. Capturing: as it is.
  Error take_report(const RankView& view, bool capturing);
  void launch(const fm_layer& layer, const fm_forward_args& args, const LaunchOptions& options,
              const RankView& view, bool capturing);
  void begin_launch(int64_t scratch_bytes, cudaStream_t stream, const LaunchOptions& options,
                    bool capturing);
  void end_launch(cudaStream_t stream, bool capturing);
  void reserve(int64_t bytes, cudaStream_t stream, bool capturing);
  void follow_last(cudaStream_t stream) const;
  void record_last(cudaStream_t stream);
  void release() noexcept;

  int32_t device_;
  int32_t num_sms_ = 0;
  Scratch scratch_;
  std::vector<Scratch> retired_;               // grown out of, but captured
  sync::WaitReport* report_ = nullptr;         // host's address
  sync::WaitReport* device_report_ = nullptr;  // device's address of the same
  cudaEvent_t last_ = nullptr;  // end of the last use of scratch that was not captured
  unsigned long long last_stream_ = 0;
  bool has_last_ = false;
  uint32_t launch_id_ = 0;      // of the last launch
  double timeout_seconds_ = 0;  // likewise
};

}  // namespace flashmoe::cuda
