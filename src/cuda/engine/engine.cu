#include "cuda/engine/engine.h"

#include <cuda_runtime_api.h>

#include <map>

#include "base/error.h"
#include "cuda/engine/workspace.h"

namespace flashmoe::cuda {

struct Engine::State {
  int32_t rank = 0;
  std::shared_ptr<RankGroup> ranks;         // null: alone
  std::map<int32_t, Workspace> workspaces;  // by device
  Workspace* last = nullptr;                // of the last launch
  uint32_t launches = 0;
  bool breaks_group = false;

  template <class Args>
  Workspace& of(const Args& args) {
    const auto stream = static_cast<cudaStream_t>(args.stream);
    return workspaces.try_emplace(args.device, args.device, stream).first->second;
  }

  // Runs `body`; if it fails, nobody else finds our error in the runtime.
  template <class Body>
  auto contained(Body&& body) {
    breaks_group = false;
    try {
      return body();
    } catch (const HarmlessError&) {
      throw;
    } catch (const Error&) {
      breaks_group = ranks != nullptr;
      cudaGetLastError();
      throw;
    }
  }
};

Engine::Engine() : state_(std::make_unique<State>()) {}
Engine::Engine(int32_t rank, std::shared_ptr<RankGroup> ranks) : Engine() {
  state_->rank = rank;
  state_->ranks = std::move(ranks);
}
Engine::~Engine() = default;

void Engine::forward(const fm_layer& layer, const fm_forward_args& args,
                     const LaunchOptions& options) {
  state_->contained([&] {
    const RankView view{state_->rank, state_->ranks.get()};
    state_->last = &state_->of(args);
    state_->last->forward(layer, args, options, view);
    ++state_->launches;
  });
}

void Engine::backward(const fm_layer& layer, const fm_backward_args& args,
                      const LaunchOptions& options) {
  state_->contained([&] {
    state_->last = &state_->of(args);
    state_->last->backward(layer, args, options);
    ++state_->launches;
  });
}

void Engine::finish() {
  state_->contained([&] {
    const RankView view{state_->rank, state_->ranks.get()};
    for (auto& [device, workspace] : state_->workspaces) workspace.finish(view);
  });
}

void Engine::time_last(fm_stats& stats) const {
  if (state_->last == nullptr) return;
  state_->contained([&] { state_->last->time_last(stats); });
}

bool Engine::breaks_group() const { return state_->breaks_group; }

std::string Engine::explain(const fm_layer& layer, const fm_forward_args& args,
                            const LaunchOptions& options) {
  return state_->contained([&] { return state_->of(args).explain(layer, args, options); });
}

RankGroup& Engine::ranks() const { return *state_->ranks; }

uint32_t Engine::launches() const { return state_->launches; }

int64_t Engine::scratch_bytes() const {
  int64_t bytes = 0;
  for (const auto& [device, workspace] : state_->workspaces) bytes += workspace.scratch_bytes();
  return bytes;
}

int64_t Engine::symmetric_bytes() const {
  return state_->ranks == nullptr ? 0 : state_->ranks->bytes();
}

}  // namespace flashmoe::cuda
