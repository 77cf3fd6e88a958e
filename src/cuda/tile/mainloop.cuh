// The products of one tile: 128 weight rows by N tokens, by one math warpgroup.
#pragma once

#include "cuda/ptx/wgmma.cuh"
#include "cuda/sync/ring.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/schedule.h"

namespace flashmoe::cuda::tile {

// sums[0, N / 2): the first 64 rows, sums[max_tokens / 2, ...): the second. One group of products
// stays in flight; before_last_wait() runs while the last one does.
template <class Config, int kTokens, class Stage, class BeforeLastWait>
FM_DEVICE void multiply(float* sums, const Stage* ring,
                        sync::StageReader<Config::value.num_stages>& stages, int num_k_blocks,
                        sync::Waiter& waiter, const BeforeLastWait& before_last_wait) {
  using Element = typename ElementOf<Config::value.element>::Type;
  constexpr bool kDepthMajor = Config::value.major == config::Major::kDepth;
  constexpr int kWeightStep = kDepthMajor ? kDepthMajorStep : kColumnMajorStep;
  constexpr int kTransposed = kDepthMajor ? 0 : 1;
  constexpr int kSecondHalf = Config::value.max_tokens / 2;
  int previous = 0;
#pragma unroll 1
  for (int k_block = 0; k_block < num_k_blocks; ++k_block) {
    stages.wait(waiter);
    const Stage& stage = ring[stages.slot()];
    const uint64_t weights = operand_descriptor(ptx::shared_address(stage.weights));
    const uint64_t tokens = operand_descriptor(ptx::shared_address(stage.tokens));
    ptx::wgmma_fence();
    FM_UNROLL
    for (int step = 0; step < config::kDepthStep / 16; ++step) {
      const uint64_t a = weights + step * kWeightStep;
      const uint64_t b = tokens + step * kDepthMajorStep;
      const int accumulate = (k_block | step) != 0;
      ptx::wgmma<Element, kTokens, kTransposed>(sums, a, b, accumulate);
      ptx::wgmma<Element, kTokens, kTransposed>(sums + kSecondHalf, a + kHalfStep, b, accumulate);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    if (k_block > 0) stages.release(previous);
    previous = stages.slot();
    stages.advance();
  }
  before_last_wait();
  ptx::wgmma_wait_group<0>();
  stages.release(previous);
}

// multiply() of the width that num_steps asks for: the number of tokens of a product is a constant
// of the instruction.
template <class Config, int kSteps = 1, class... Operands>
FM_DEVICE void multiply_steps(int num_steps, Operands&&... operands) {
  if constexpr (kSteps == Config::value.max_steps()) {
    multiply<Config, kSteps * kTokenStep>(operands...);
  } else if (num_steps == kSteps) {
    multiply<Config, kSteps * kTokenStep>(operands...);
  } else {
    multiply_steps<Config, kSteps + 1>(num_steps, operands...);
  }
}

}  // namespace flashmoe::cuda::tile
