#include "cuda/engine/engine.h"

#include <cuda_runtime_api.h>

#include <map>

#include "base/error.h"
#include "cuda/engine/workspace.h"

namespace flashmoe::cuda {

struct Engine::State {
  std::map<int32_t, Workspace> workspaces;  // by device

  template <class Args>
  Workspace& of(const Args& args) {
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
  contained([&] { state_->of(args).forward(layer, args, options); });
}

void Engine::backward(const fm_layer& layer, const fm_backward_args& args,
                      const LaunchOptions& options) {
  contained([&] { state_->of(args).backward(layer, args, options); });
}

void Engine::raise_reports() {
  contained([&] {
    for (auto& [device, workspace] : state_->workspaces) workspace.raise_report(false);
  });
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
