#include "cuda/engine/engine.h"

#include <cuda_runtime_api.h>

#include <map>

#include "base/error.h"
#include "cuda/engine/workspace.h"

namespace flashmoe::cuda {

struct Engine::State {
  std::map<int32_t, Workspace> workspaces;  // by device
  Workspace* last = nullptr;                // of the last launch

  Workspace& of(const fm_forward_args& args) {
    const auto stream = static_cast<cudaStream_t>(args.stream);
    return workspaces.try_emplace(args.device, args.device, stream).first->second;
  }
};

namespace {

// Runs `body`; if it fails, nobody else finds our error in the runtime.
template <class Body>
auto contained(Body&& body) {
  try {
    return body();
  } catch (const Error&) {
    cudaGetLastError();
    throw;
  }
}

}  // namespace

Engine::Engine() : state_(std::make_unique<State>()) {}
Engine::~Engine() = default;

void Engine::forward(const fm_layer& layer, const fm_forward_args& args,
                     const LaunchOptions& options) {
  contained([&] {
    state_->last = &state_->of(args);
    state_->last->forward(layer, args, options);
  });
}

void Engine::finish() {
  contained([&] {
    for (auto& [device, workspace] : state_->workspaces) workspace.finish();
  });
}

void Engine::time_last(fm_stats& stats) const {
  if (state_->last == nullptr) return;
  contained([&] { state_->last->time_last(stats); });
}

std::string Engine::explain(const fm_layer& layer, const fm_forward_args& args,
                            const LaunchOptions& options) {
  return contained([&] { return state_->of(args).explain(layer, args, options); });
}

int64_t Engine::scratch_bytes() const {
  int64_t bytes = 0;
  for (const auto& [device, workspace] : state_->workspaces) bytes += workspace.scratch_bytes();
  return bytes;
}

}  // namespace flashmoe::cuda
