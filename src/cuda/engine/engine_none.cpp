#include "base/error.h"
#include "cuda/engine/engine.h"

namespace flashmoe::cuda {
namespace {

[[noreturn]] void refuse() {
  fail(FM_UNSUPPORTED,
       "operands are on a CUDA device, but this flashmoe was built without CUDA: build it with "
       "FLASHMOE_CUDA=ON, or move them to the CPU");
}

class NoRanks final : public RankGroup {
 public:
  explicit NoRanks(int32_t world) : world_(world) {}

  int32_t world() const override { return world_; }
  std::shared_ptr<RankMemory> memory(const RankPlace&, const RankNeeds&) override { refuse(); }
  // Noted, as with CUDA, until a call comes.
  void reserve(int32_t, const RankNeeds&) override {}
  RankNeeds planned(const RankNeeds& needs) override { return needs; }
  void set_device(int32_t, int32_t) override {}
  void set_epoch(int32_t, uint32_t) override {}
  void stop(int32_t) noexcept override {}
  int64_t bytes() override { return 0; }

 private:
  int32_t world_;
};

}  // namespace

struct Engine::State {
  std::shared_ptr<RankGroup> ranks;
};

Engine::Engine() : state_(std::make_unique<State>()) {}
Engine::Engine(int32_t, std::shared_ptr<RankGroup> ranks) : Engine() {
  state_->ranks = std::move(ranks);
}
Engine::~Engine() = default;

void Engine::forward(const fm_layer&, const fm_forward_args&, const LaunchOptions&) { refuse(); }

void Engine::backward(const fm_layer&, const fm_backward_args&, const LaunchOptions&) { refuse(); }

void Engine::finish() {}

void Engine::time_last(fm_stats&) const {}

bool Engine::breaks_group() const { return state_->ranks != nullptr; }

std::string Engine::explain(const fm_layer&, const fm_forward_args&, const LaunchOptions&) {
  refuse();
}

void Engine::reserve(const RankNeeds&) {}

void Engine::set_epoch(plan::Epoch) {}

RankGroup& Engine::ranks() const { return *state_->ranks; }

plan::Epoch Engine::epoch() const { return 0; }

int64_t Engine::scratch_bytes() const { return 0; }

int64_t Engine::symmetric_bytes() const { return 0; }

std::shared_ptr<RankGroup> make_local_ranks(int32_t world) {
  return std::make_shared<NoRanks>(world);
}

std::shared_ptr<RankGroup> make_process_ranks(std::unique_ptr<Peers> peers) {
  return std::make_shared<NoRanks>(peers->world());
}

}  // namespace flashmoe::cuda
