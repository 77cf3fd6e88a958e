// The CUDA engine as the rest of the library sees it. Needs no CUDA header: a build without CUDA
// has the same class, whose launches say so.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "flashmoe/c_api.h"

namespace flashmoe::cuda {

struct LaunchOptions {
  double timeout_seconds = 60;  // of every wait in a kernel; 0: no bound
  int32_t max_sms = 0;          // most SMs of a launch; 0: all
};

// One rank's launches and their memory: on each device that it has used, scratch that grows to the
// largest launch, and the report of a launch that failed on the device. One call at a time.
class Engine {
 public:
  Engine();
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Queues one kernel on args.stream of args.device and returns. Allocates, and then waits for the
  // device, only in the first call of a size. Launches on different streams follow one another;
  // replays of a captured graph are ordered by whoever replays it, among themselves and with these
  // launches, and end before the engine does: they use its scratch.
  // Throws Error: what an earlier launch reported (raise_reports), FM_UNSUPPORTED without a device
  // that has the kernels or with the reason why they do not take the layer, FM_OUT_OF_MEMORY.
  void forward(const fm_layer& layer, const fm_forward_args& args, const LaunchOptions& options);
  // The same for a backward; both kinds share scratch and order.
  void backward(const fm_layer& layer, const fm_backward_args& args, const LaunchOptions& options);

  // Throws the failure of an earlier launch, once; the engine can be used again afterwards.
  void raise_reports();

  // How forward() would run, a line for each fact. Throws FM_UNSUPPORTED as forward() does.
  std::string explain(const fm_layer& layer, const fm_forward_args& args,
                      const LaunchOptions& options);

  // What it holds on all devices.
  int64_t scratch_bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flashmoe::cuda
