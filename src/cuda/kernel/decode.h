// What host and device share of the forward of few tokens.
#pragma once

#include "cuda/config/decode.h"
#include "cuda/kernel/forward.h"

namespace flashmoe::cuda::kernel {

struct DecodeParams {
  // Of its maps only those of weights, all of them in boxes of config::Decode with coordinates (k,
  // row, chunk of 64 k, expert): up_weights[0] of a stage's first box, [1] of its second.
  ForwardParams forward;
  void* hidden;  // T [chosen experts][kTokens][I]
  bool is_gated;
};

struct DecodeEntry {
  const void* function;
  std::size_t shared_bytes;
};

DecodeEntry decode_bf16();
DecodeEntry decode_fp16();

}  // namespace flashmoe::cuda::kernel
