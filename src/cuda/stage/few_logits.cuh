// The router's logits of few tokens (kernel/decode.cuh), in parts: by vector products, for what
// counts is that all of the router's weights are on their way at once. A warp has one expert's sum
// over one of the config::kLogitSegments parts of k (stage/logits.cuh), for all tokens.
//
// Products are exact in fp32 or rounded once with the sum that they are added to.
#pragma once

#include "cuda/config/decode.h"
#include "cuda/stage/choose.cuh"
#include "cuda/stage/logits.cuh"

namespace flashmoe::cuda::stage {

// Neighbours along k, of a lane.
template <class T>
struct Piece {
  static constexpr int kElements = 8;
  uint4 words[kElements * sizeof(T) / 16];

  // Those that begin at `from`; zeros where they do not exist.
  FM_DEVICE Piece(const T* from, bool exists) {
    FM_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(words) / 16); ++i) {
      words[i] = exists ? reinterpret_cast<const uint4*>(from)[i] : uint4{};
    }
  }
  FM_DEVICE float value(int i) const {
    return static_cast<float>(reinterpret_cast<const T*>(words)[i]);
  }
};

// The lane's parts of an expert's sums over [begin, end) of k: sums[t] of token t. All loads of a
// step are under way together; tokens that do not exist repeat the last one.
template <class Element, class Weight>
FM_DEVICE void multiply_expert(const kernel::ForwardParams& params, int32_t expert_idx,
                               int32_t begin, int32_t end, float (&sums)[config::Decode::kTokens]) {
  constexpr int kPiece = Piece<Element>::kElements;
  const Weight* weights =
      static_cast<const Weight*>(params.router.weight) + expert_idx * params.router.weight_stride;
  const auto* x = static_cast<const Element*>(params.x);
#pragma unroll 1
  for (int32_t first = begin; first < end; first += 32 * kPiece) {
    const int32_t k = first + ptx::lane_idx() * kPiece;
    const Piece<Weight> weight(weights + k, k < end);
    FM_UNROLL
    for (int t = 0; t < config::Decode::kTokens; ++t) {
      const Piece<Element> token(x + min(t, params.sizes.tokens - 1) * params.x_stride + k,
                                 k < end);
      FM_UNROLL
      for (int i = 0; i < kPiece; ++i) sums[t] = fmaf(weight.value(i), token.value(i), sums[t]);
    }
  }
}

// Parts of all tokens' logits. All threads of all CTAs.
template <class Element>
FM_DEVICE void compute_few_logits(const kernel::ForwardParams& params) {
  const auto& sizes = params.sizes;
  const int32_t depth = steps_of_segment(sizes) * config::kDepthStep;
  const int32_t num_items = sizes.num_experts * config::kLogitSegments;
  const int32_t num_ctas = ptx::num_blocks();
  for (int32_t item = ptx::thread_idx() / 32 * num_ctas + ptx::block_idx(); item < num_items;
       item += config::kForwardWarps * num_ctas) {
    const int32_t part = item % config::kLogitSegments;
    const int32_t expert_idx = item / config::kLogitSegments;
    const int32_t begin = min(part * depth, sizes.hidden);
    const int32_t end = min(begin + depth, sizes.hidden);
    float sums[config::Decode::kTokens] = {};
    if (params.router.weight_is_wide) {
      multiply_expert<Element, float>(params, expert_idx, begin, end, sums);
    } else {
      multiply_expert<Element, Element>(params, expert_idx, begin, end, sums);
    }
    float* out = params.memory.logit_parts + part * part_size(sizes) + expert_idx;
    FM_UNROLL
    for (int t = 0; t < config::Decode::kTokens; ++t) {
      if (t >= sizes.tokens) break;
      const float sum = team_sum<32>(sums[t]);
      if (ptx::lane_idx() == 0) out[t * sizes.num_experts] = sum;
    }
  }
}

}  // namespace flashmoe::cuda::stage
