// How the forward of few tokens (kernel/decode.cuh) is cut, on host and device.
//
// With so few tokens the layer is a walk through the weights of the chosen experts: what counts is
// how fast they come. They come in boxes of 4 KB through a ring that holds most of a CTA's shared
// memory, and a warp multiplies a stage of two boxes with all tokens, which are the N of one
// product.
#pragma once

#include <cstdint>

#include "cuda/config/forward.h"

namespace flashmoe::cuda::config {

struct Decode {
  static constexpr int32_t kTokens = 8;  // most of a launch
  static constexpr int32_t kSlots = kTokens * static_cast<int32_t>(kMaxTopK);

  // A box is 32 lines of 128 bytes: of kUpRows rows and kUpChunks chunks of 64 k, or of kDownRows
  // and kDownChunks.
  static constexpr int32_t kUpRows = 16;
  static constexpr int32_t kUpChunks = 2;
  static constexpr int32_t kDownRows = 8;
  static constexpr int32_t kDownChunks = 4;
  static constexpr int32_t kLineBytes = kDepthStep * kElementBytes;
  static constexpr int32_t kBoxBytes = kUpRows * kUpChunks * kLineBytes;
  static_assert(kBoxBytes == kDownRows * kDownChunks * kLineBytes);

  // A stage is two boxes: of gate rows and of their up rows (ungated: of neighbouring rows) for the
  // up product; two that follow each other, of one chosen expert or of two, for the down product.
  static constexpr int32_t kBoxes = 2;
  static constexpr int32_t kStageBytes = kBoxes * kBoxBytes;
  static constexpr int32_t kStages = 22;
  static constexpr int32_t kTicketSlots = 4;

  // One warp loads.
  static constexpr int32_t kMathWarps = kForwardWarps - 1;
  static constexpr int32_t kMathThreads = 32 * kMathWarps;
};

}  // namespace flashmoe::cuda::config
