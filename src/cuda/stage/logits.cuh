// The router's logits of 64 tokens: x w_router^T + bias, by the warps' matrix products.
//
// Products of 16-bit elements are exact in fp32. Sums of 64 k are the tensor core's (whose
// additions truncate); those are added in fp32 with rounding. fp32 weights are taken as three tf32
// parts, which is all of their bits, so that both kinds lose nothing but in sums.
#pragma once

#include "cuda/config/forward.h"
#include "cuda/kernel/forward.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/tile/strided.cuh"
#include "plan/routing.h"

namespace flashmoe::cuda::stage {

inline constexpr int32_t kTileTokens = static_cast<int32_t>(plan::kTileTokens);

// One step of the pipeline: 64 tokens and 128 experts by 64 k. Rows are padded by 16 bytes, so that
// neither matrix loads nor single words of eight rows share a bank.
struct LogitsLayout {
  static constexpr int32_t kExperts = 128;
  static constexpr int32_t kDepth = 64;
  static constexpr int32_t kStages = 4;
  static constexpr int32_t kTokenRowBytes = kDepth * config::kElementBytes + 16;
  static constexpr int32_t kTokenBytes = kTileTokens * kTokenRowBytes;
  static constexpr int32_t kWideRowBytes = kDepth * 4 + 16;
  static constexpr int32_t kStageBytes = kTokenBytes + kExperts * kWideRowBytes;
  static constexpr int32_t kBytes = kStages * kStageBytes;

  FM_DEVICE static int32_t weight_row_bytes(bool is_wide) {
    return is_wide ? kWideRowBytes : kTokenRowBytes;
  }
};

// What the CTA loads of a tile: tokens [first_token, ...) and experts [first_expert, ...).
struct LogitsTile {
  int32_t first_token;
  int32_t first_expert;
};

// Copies `num_rows` rows of kDepth elements; rows from `num_valid` on become zeros. All threads.
FM_DEVICE void copy_rows(uint32_t destination, int32_t row_bytes, const uint8_t* source,
                         int64_t source_row_bytes, int32_t chunks_of_row, int32_t num_rows,
                         int32_t num_valid) {
  for (int32_t i = ptx::thread_idx(); i < num_rows * chunks_of_row; i += config::kForwardThreads) {
    const int32_t row = i / chunks_of_row;
    const int32_t chunk = i - row * chunks_of_row;
    const bool is_valid = row < num_valid;
    const uint8_t* from = source + (is_valid ? row * source_row_bytes : 0) + chunk * 16;
    ptx::cp_async_16(destination + row * row_bytes + chunk * 16, from, is_valid ? 16 : 0);
  }
}

// Starts the copies of k step `step` into its stage; one group, also past the last step.
FM_DEVICE void copy_step(const kernel::ForwardParams& params, uint32_t arena,
                         const LogitsTile& tile, int32_t step, int32_t num_steps) {
  using Layout = LogitsLayout;
  if (step < num_steps) {
    const auto& router = params.router;
    const uint32_t stage = arena + step % Layout::kStages * Layout::kStageBytes;
    const int64_t depth = int64_t{step} * Layout::kDepth;
    const int64_t x_row_bytes = params.x_stride * config::kElementBytes;
    const auto* x = static_cast<const uint8_t*>(params.x) + tile.first_token * x_row_bytes;
    copy_rows(stage, Layout::kTokenRowBytes, x + depth * config::kElementBytes, x_row_bytes, 8,
              kTileTokens, params.sizes.tokens - tile.first_token);
    const int32_t weight_bytes = router.weight_is_wide ? 4 : config::kElementBytes;
    const int64_t row_bytes = router.weight_stride * weight_bytes;
    const auto* weight = static_cast<const uint8_t*>(router.weight) + tile.first_expert * row_bytes;
    copy_rows(stage + Layout::kTokenBytes, Layout::weight_row_bytes(router.weight_is_wide),
              weight + depth * weight_bytes, row_bytes, router.weight_is_wide ? 16 : 8,
              Layout::kExperts, params.sizes.num_experts - tile.first_expert);
  }
  ptx::cp_async_commit_group();
}

// A warp's 16 tokens by 32 experts: four products of 16 x 8, each thread four of their sums.
struct WarpSums {
  float values[4][4];

  FM_DEVICE void clear() {
    FM_UNROLL
    for (auto& product : values) {
      FM_UNROLL
      for (float& value : product) value = 0.0f;
    }
  }
  FM_DEVICE void add(const WarpSums& other) {
    FM_UNROLL
    for (int product = 0; product < 4; ++product) {
      FM_UNROLL
      for (int i = 0; i < 4; ++i) values[product][i] += other.values[product][i];
    }
  }
};

// tokens, weights: addresses of the warp's first row of either.
template <class Element>
FM_DEVICE void multiply_step(WarpSums& sums, uint32_t tokens, uint32_t weights) {
  using Layout = LogitsLayout;
  const int lane = ptx::lane_idx();
  // Matrices 0 and 1 are rows 0-7 and 8-15 of the first 8 k, 2 and 3 of the next.
  const uint32_t a_row = tokens + lane % 16 * Layout::kTokenRowBytes + lane / 16 * 16;
  // Matrices 0 and 1 are the two halves of 16 k of rows 0-7, 2 and 3 of rows 8-15.
  const uint32_t b_row =
      weights + (lane / 16 * 8 + lane % 8) * Layout::kTokenRowBytes + lane / 8 % 2 * 16;
  FM_UNROLL
  for (int k = 0; k < Layout::kDepth / 16; ++k) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, a_row + k * 32);
    FM_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_row + pair * 16 * Layout::kTokenRowBytes + k * 32);
      ptx::mma_m16n8k16<Element>(sums.values[2 * pair], a, b[0], b[1]);
      ptx::mma_m16n8k16<Element>(sums.values[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// The leading 11 bits of x, as the tensor core reads them.
FM_DEVICE uint32_t tf32_part(float x) { return __float_as_uint(x) & 0xFFFFE000u; }

// The same for fp32 weights. Any 16-bit element is a tf32 value.
template <class Element>
FM_DEVICE void multiply_wide_step(WarpSums& sums, const uint8_t* tokens, const uint8_t* weights) {
  using Layout = LogitsLayout;
  const int lane = ptx::lane_idx();
  const auto token = [&](int row, int k) {
    const auto* of_row = reinterpret_cast<const Element*>(tokens + row * Layout::kTokenRowBytes);
    return __float_as_uint(static_cast<float>(of_row[k]));
  };
  const auto weight = [&](int row, int k) {
    return reinterpret_cast<const float*>(weights + row * Layout::kWideRowBytes)[k];
  };
#pragma unroll 2
  for (int k = 0; k < Layout::kDepth; k += 8) {
    const int at = k + lane % 4;
    const int row = lane / 4;
    const uint32_t a[4] = {token(row, at), token(row + 8, at), token(row, at + 4),
                           token(row + 8, at + 4)};
    FM_UNROLL
    for (int product = 0; product < 4; ++product) {
      float b0 = weight(product * 8 + row, at);
      float b1 = weight(product * 8 + row, at + 4);
      FM_UNROLL
      for (int part = 0; part < 3; ++part) {
        const uint32_t part0 = tf32_part(b0);
        const uint32_t part1 = tf32_part(b1);
        ptx::mma_m16n8k8_tf32(sums.values[product], a, part0, part1);
        b0 -= __uint_as_float(part0);
        b1 -= __uint_as_float(part1);
      }
    }
  }
}

// Writes the warp's sums, with the bias, to the logits.
FM_DEVICE void write_logits(const kernel::ForwardParams& params, const LogitsTile& tile,
                            const WarpSums& sums) {
  const int lane = ptx::lane_idx();
  const int warp_idx = ptx::thread_idx() / 32;
  const int32_t experts = params.sizes.num_experts;
  FM_UNROLL
  for (int product = 0; product < 4; ++product) {
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int32_t token = tile.first_token + warp_idx % 4 * 16 + lane / 4 + i / 2 * 8;
      const int32_t expert =
          tile.first_expert + warp_idx / 4 * 32 + product * 8 + lane % 4 * 2 + i % 2;
      if (token >= params.sizes.tokens || expert >= experts) continue;
      const auto& bias = params.router.bias;
      const float added = bias.data == nullptr ? 0.0f : tile::read_real(bias, expert);
      params.router.logits[int64_t{token} * experts + expert] = sums.values[product][i] + added;
    }
  }
}

// Logits of 64 tokens and 128 experts. All threads of the CTA; arena: LogitsLayout::kBytes of
// shared memory.
template <class Element>
FM_DEVICE void compute_logits(const kernel::ForwardParams& params, uint8_t* arena,
                              const LogitsTile& tile) {
  using Layout = LogitsLayout;
  const int32_t num_steps = params.sizes.hidden / Layout::kDepth;
  const int warp_idx = ptx::thread_idx() / 32;
  const uint32_t base = ptx::shared_address(arena);
  const bool is_wide = params.router.weight_is_wide;
  const int32_t tokens_at = warp_idx % 4 * 16 * Layout::kTokenRowBytes;
  const int32_t weights_at =
      Layout::kTokenBytes + warp_idx / 4 * 32 * Layout::weight_row_bytes(is_wide);
  WarpSums sums;
  sums.clear();
  for (int step = 0; step < Layout::kStages - 1; ++step) {
    copy_step(params, base, tile, step, num_steps);
  }
  for (int32_t step = 0; step < num_steps; ++step) {
    ptx::cp_async_wait_group<Layout::kStages - 2>();
    __syncthreads();
    copy_step(params, base, tile, step + Layout::kStages - 1, num_steps);
    const int32_t stage = step % Layout::kStages * Layout::kStageBytes;
    WarpSums of_step;
    of_step.clear();
    if (is_wide) {
      multiply_wide_step<Element>(of_step, arena + stage + tokens_at, arena + stage + weights_at);
    } else {
      multiply_step<Element>(of_step, base + stage + tokens_at, base + stage + weights_at);
    }
    sums.add(of_step);
  }
  ptx::cp_async_wait_group<0>();
  write_logits(params, tile, sums);
  __syncthreads();
}

}  // namespace flashmoe::cuda::stage
