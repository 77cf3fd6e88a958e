// The memory of one group's launches on one device, and the order among them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/engine/engine.h"
#include "cuda/sync/report.h"

namespace flashmoe::cuda {

// The current device, until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  int device_;
};

class Workspace {
 public:
  // Throws FM_UNSUPPORTED when `device` has no kernels in this build, naming what it is, and
  // FM_INVALID_VALUE when `stream` is being captured: nothing can be allocated then.
  Workspace(int32_t device, cudaStream_t stream);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void forward(const fm_layer& layer, const fm_forward_args& args, const LaunchOptions& options);
  void backward(const fm_layer& layer, const fm_backward_args& args, const LaunchOptions& options);

  // Throws what a launch has left in the report. Unless `capturing`, waits for the device first and
  // makes scratch and report as new, so that the next launch finds them clean.
  void raise_report(bool capturing);

  std::string explain(const fm_layer& layer, const fm_forward_args& args,
                      const LaunchOptions& options) const;
  int64_t scratch_bytes() const;

 private:
  struct Scratch {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool captured = false;  // a graph holds its address
  };

  // Reserves scratch, orders the launch after the last one that used it, and calls it.
  template <class Launch>
  void run(cudaStream_t stream, int64_t scratch_bytes, const Launch& launch);
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
};

}  // namespace flashmoe::cuda
