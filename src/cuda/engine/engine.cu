#include "cuda/engine/engine.h"

#include <cuda_runtime_api.h>

#include <map>
#include <new>

#include "base/error.h"
#include "cuda/engine/workspace.h"

namespace flashmoe::cuda {

struct Engine::State {
  int32_t rank = 0;
  std::shared_ptr<RankGroup> ranks;         // null: alone
  std::map<int32_t, Workspace> workspaces;  // by device
  Workspace* last = nullptr;                // of the last launch
  plan::Epoch epoch = 0;
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
      cudaGetLastError();
      throw;
    } catch (const Error&) {
      note_failure();
      throw;
    } catch (const std::bad_alloc&) {
      note_failure();
      fail(FM_OUT_OF_MEMORY, "no host memory for what a launch on CUDA needs");
    }
  }

  // body(workspace, view): makes a launch of these operands, which is then the last one.
  template <class Args, class Body>
  void launch(const Args& args, Body&& body) {
    contained([&] {
      last = &of(args);
      const Workspace::Launched made = body(*last, RankView{rank, ranks.get()});
      if (!made.captured) epoch = plan::next_epoch(epoch);
      if (made.notice) throw HarmlessError(*made.notice);
    });
  }

  void note_failure() {
    breaks_group = ranks != nullptr;
    cudaGetLastError();
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
  state_->launch(args, [&](Workspace& workspace, const RankView& view) {
    return workspace.forward(layer, args, options, view);
  });
}

void Engine::backward(const fm_layer& layer, const fm_backward_args& args,
                      const LaunchOptions& options) {
  state_->launch(args, [&](Workspace& workspace, const RankView& view) {
    return workspace.backward(layer, args, options, view);
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
  return state_->contained([&] {
    const RankView view{state_->rank, state_->ranks.get()};
    return state_->of(args).explain(layer, args, options, view);
  });
}

void Engine::reserve(const RankNeeds& needs) {
  state_->contained([&] { state_->ranks->reserve(state_->rank, needs); });
}

void Engine::set_epoch(plan::Epoch epoch) {
  state_->ranks->set_epoch(state_->rank, epoch);
  state_->epoch = epoch;
}

RankGroup& Engine::ranks() const { return *state_->ranks; }

plan::Epoch Engine::epoch() const { return state_->epoch; }

int64_t Engine::scratch_bytes() const {
  int64_t bytes = 0;
  for (const auto& [device, workspace] : state_->workspaces) bytes += workspace.scratch_bytes();
  return bytes;
}

int64_t Engine::symmetric_bytes() const {
  return state_->ranks == nullptr ? 0 : state_->ranks->bytes();
}

}  // namespace flashmoe::cuda
