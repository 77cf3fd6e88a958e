// Logits of fp32 router weights, by the warps' matrix products. All threads copy what they read.
#pragma once

#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/stage/logit_tiles.cuh"

namespace flashmoe::cuda::stage {

// One step of the pipeline. Rows are padded by 16 bytes, so that single words of eight rows share
// no bank.
struct WideLogitsLayout {
  static constexpr int32_t kStages = 4;
  static constexpr int32_t kWeightBytes = 4;
  static constexpr int32_t kPadding = 16;
  static constexpr int32_t kTokenRowBytes = kLogitDepth * config::kElementBytes + kPadding;
  static constexpr int32_t kTokenBytes = kTileTokens * kTokenRowBytes;
  static constexpr int32_t kRowBytes = kLogitDepth * kWeightBytes + kPadding;
  static constexpr int32_t kStageBytes = kTokenBytes + kLogitExperts * kRowBytes;
  static constexpr int32_t kBytes = kStages * kStageBytes;
};

// What one thread copies in every step: a 16-byte piece of one token's row, and of every
// kRowsApart-th expert's. Addresses are made once; rows that do not exist are zeros.
struct StepCopies {
  using Layout = WideLogitsLayout;
  static constexpr int32_t kWeightBytes = Layout::kWeightBytes;
  static constexpr int32_t kPieces = kLogitDepth * kWeightBytes / 16;  // of a weight row
  static constexpr int32_t kRowsApart = config::kForwardThreads / kPieces;
  static constexpr int32_t kCopies = kLogitExperts / kRowsApart;
  static constexpr int32_t kTokenPieces = kLogitDepth * config::kElementBytes / 16;
  static_assert(kTileTokens * kTokenPieces == config::kForwardThreads);

  const uint8_t* token;
  const uint8_t* weight;
  int64_t weight_step;  // bytes to the thread's next row
  uint32_t token_at;    // in a stage
  uint32_t weight_at;
  bool has_token;
  int32_t num_weights;  // rows of this thread that exist

  FM_DEVICE StepCopies(const kernel::ForwardParams& params, const LogitsTile& tile) {
    const int32_t thread = ptx::thread_idx();
    const int32_t token_row = thread / kTokenPieces;
    const int32_t token_piece = thread % kTokenPieces;
    has_token = tile.first_token + token_row < params.sizes.tokens;
    token = static_cast<const uint8_t*>(params.x) + token_piece * 16;
    if (has_token) {
      token += (tile.first_token + token_row) * params.x_stride * config::kElementBytes;
    }
    token_at = token_row * Layout::kTokenRowBytes + token_piece * 16;
    const int32_t weight_row = thread / kPieces;
    const int32_t weight_piece = thread % kPieces;
    const int32_t left = params.sizes.num_experts - tile.first_expert - weight_row;
    num_weights = min((left + kRowsApart - 1) / kRowsApart, kCopies);
    const int64_t row_bytes = params.router.weight_stride * kWeightBytes;
    weight = static_cast<const uint8_t*>(params.router.weight) + weight_piece * 16;
    if (num_weights > 0) weight += (tile.first_expert + weight_row) * row_bytes;
    weight_step = kRowsApart * row_bytes;
    weight_at = Layout::kTokenBytes + weight_row * Layout::kRowBytes + weight_piece * 16;
  }

  // Starts the copies of one step.
  FM_DEVICE void start(uint32_t stage, int32_t step) const {
    const int32_t depth = step * kLogitDepth;
    ptx::cp_async_16(stage + token_at, token + depth * config::kElementBytes, has_token ? 16 : 0);
    FM_UNROLL
    for (int32_t i = 0; i < kCopies; ++i) {
      const bool exists = i < num_weights;
      ptx::cp_async_16(stage + weight_at + i * kRowsApart * Layout::kRowBytes,
                       weight + (exists ? i * weight_step : 0) + depth * kWeightBytes,
                       exists ? 16 : 0);
    }
  }
};

// x as the sum of three values of 11 bits, as the tensor core reads them.
struct Tf32Parts {
  uint32_t values[3];

  FM_DEVICE explicit Tf32Parts(float x) {
    FM_UNROLL
    for (uint32_t& value : values) {
      value = __float_as_uint(x) & 0xFFFFE000u;
      x -= __uint_as_float(value);
    }
  }
};

// A warp's 16 tokens by 32 experts; tokens, weights: its first row of either. Any 16-bit element is
// a tf32 value.
template <class Element>
FM_DEVICE void multiply_wide_step(WarpSums& sums, const uint8_t* tokens, const uint8_t* weights) {
  using Layout = WideLogitsLayout;
  const int lane = ptx::lane_idx();
  const auto token = [&](int row, int k) {
    const auto* of_row = reinterpret_cast<const Element*>(tokens + row * Layout::kTokenRowBytes);
    return __float_as_uint(static_cast<float>(of_row[k]));
  };
  const auto weight = [&](int row, int k) {
    return reinterpret_cast<const float*>(weights + row * Layout::kRowBytes)[k];
  };
#pragma unroll 2
  for (int k = 0; k < kLogitDepth; k += 8) {
    const int at = k + lane % 4;
    const int row = lane / 4;
    const uint32_t a[4] = {token(row, at), token(row + 8, at), token(row, at + 4),
                           token(row + 8, at + 4)};
    FM_UNROLL
    for (int product = 0; product < 4; ++product) {
      const Tf32Parts b0(weight(product * 8 + row, at));
      const Tf32Parts b1(weight(product * 8 + row, at + 4));
      float parts[4] = {};  // the small ones first
      FM_UNROLL
      for (int part = 2; part >= 0; --part) {
        ptx::mma_m16n8k8_tf32(parts, a, b0.values[part], b1.values[part]);
      }
      add_to(sums.values[product], parts);
    }
  }
}

// The sums of a tile. All threads of the CTA; arena: WideLogitsLayout::kBytes of shared memory.
template <class Element>
FM_DEVICE void multiply_wide_tile(const kernel::ForwardParams& params, uint8_t* arena,
                                  const LogitsTile& tile, TileSums& sums) {
  using Layout = WideLogitsLayout;
  const int warp_idx = ptx::thread_idx() / 32;
  const uint32_t base = ptx::shared_address(arena);
  const int32_t tokens_at = warp_idx % 4 * 16 * Layout::kTokenRowBytes;
  const int32_t weights_at = Layout::kTokenBytes + warp_idx / 4 * 32 * Layout::kRowBytes;
  const StepCopies copies(params, tile);
  // One group a step, also past the last.
  int32_t next_step = tile.first_step;
  int32_t next_stage = 0;
  const auto start_next = [&] {
    if (next_step < tile.end_step) {
      copies.start(base + next_stage * Layout::kStageBytes, next_step);
    }
    ptx::cp_async_commit_group();
    ++next_step;
    next_stage = next_stage == Layout::kStages - 1 ? 0 : next_stage + 1;
  };
  for (int i = 0; i < Layout::kStages - 1; ++i) start_next();
  int32_t stage = 0;
  for (int32_t step = tile.first_step; step < tile.end_step; ++step) {
    ptx::cp_async_wait_group<Layout::kStages - 2>();
    __syncthreads();
    start_next();
    const uint8_t* at = arena + stage * Layout::kStageBytes;
    stage = stage == Layout::kStages - 1 ? 0 : stage + 1;
    multiply_wide_step<Element>(sums.segment(), at + tokens_at, at + weights_at);
    sums.end_step(step + 1 == tile.end_step);
  }
  ptx::cp_async_wait_group<0>();
}

// All logits of the fused router, or their parts. All threads of all CTAs; arena:
// WideLogitsLayout::kBytes of shared memory.
template <class Element>
FM_DEVICE void compute_wide_logits(const kernel::ForwardParams& params, uint8_t* arena) {
  const LogitItems items(params.sizes);
  const int32_t num_items = items.count();
  TileSums sums(params.sizes);
  for (int32_t n = 0; n < num_items; ++n) {
    const LogitsTile tile = items.at(n);
    sums.clear();
    multiply_wide_tile<Element>(params, arena, tile, sums);
    write_logits(params, tile, sums.total());
    __syncthreads();
  }
}

}  // namespace flashmoe::cuda::stage
