#include "base/error.h"
#include "cuda/engine/engine.h"

namespace flashmoe::cuda {
namespace {

[[noreturn]] void refuse() {
  fail(FM_UNSUPPORTED,
       "operands are on a CUDA device, but this flashmoe was built without CUDA: build it with "
       "FLASHMOE_CUDA=ON, or move them to the CPU");
}

}  // namespace

struct Engine::State {};

Engine::Engine() = default;
Engine::~Engine() = default;

void Engine::forward(const fm_layer&, const fm_forward_args&, const LaunchOptions&) { refuse(); }

void Engine::backward(const fm_layer&, const fm_backward_args&, const LaunchOptions&) { refuse(); }

void Engine::raise_reports() {}

std::string Engine::explain(const fm_layer&, const fm_forward_args&, const LaunchOptions&) {
  refuse();
}

int64_t Engine::scratch_bytes() const { return 0; }

}  // namespace flashmoe::cuda
