// The router's logits of 64 tokens: x w_router^T + bias, by the warpgroups' matrix products (by the
// warps' for fp32 weights).
//
// Products of 16-bit elements are exact in fp32. Sums of 16 k are the tensor core's (whose
// additions truncate); those are added in fp32 with rounding. fp32 weights are taken as three tf32
// parts, which is all of their bits, so that both kinds lose nothing but in sums.
//
// The sum is one of config::kLogitSegments sums over parts of k. One CTA makes all of a tile's, or,
// of few tiles, each a part's, which the choice adds in the same order.
#pragma once

#include "cuda/config/forward.h"
#include "cuda/kernel/forward.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/strided.cuh"
#include "plan/routing.h"

namespace flashmoe::cuda::stage {

inline constexpr int32_t kTileTokens = static_cast<int32_t>(plan::kTileTokens);

inline constexpr int32_t kLogitExperts = 128;  // that a CTA works on at a time

// One step of the pipeline: 64 tokens and 128 experts by 64 k. Rows of 16-bit elements are as the
// warpgroups' products read them (tile/descriptor.cuh): 128 bytes whose pieces of 16 are swizzled.
// kWide: fp32 weights, whose rows and their tokens' are padded by 16 bytes, so that single words of
// eight rows share no bank.
template <bool kWide>
struct LogitsLayout {
  static constexpr int32_t kExperts = kLogitExperts;
  static constexpr int32_t kDepth = 64;
  static constexpr int32_t kStages = kWide ? 4 : 7;
  static constexpr int32_t kWeightBytes = kWide ? 4 : config::kElementBytes;
  static constexpr int32_t kPadding = kWide ? 16 : 0;
  static constexpr int32_t kTokenRowBytes = kDepth * config::kElementBytes + kPadding;
  static constexpr int32_t kTokenBytes = kTileTokens * kTokenRowBytes;
  static constexpr int32_t kRowBytes = kDepth * kWeightBytes + kPadding;
  static constexpr int32_t kStageBytes = kTokenBytes + kExperts * kRowBytes;
  static constexpr int32_t kBytes = kStages * kStageBytes;

  // Where in a row its `piece`-th 16 bytes are.
  FM_DEVICE static int32_t place_of(int32_t row, int32_t piece) {
    return (kWide ? piece : piece ^ row % 8) * 16;
  }
};

FM_DEVICE float read_bias(const kernel::StridedView& bias, int32_t expert_idx) {
  return bias.data == nullptr ? 0.0f : tile::read_real(bias, expert_idx);
}

// Values of one part of few tokens' logits.
FM_DEVICE int64_t part_size(const config::ForwardSizes& sizes) {
  return int64_t{sizes.tokens} * sizes.num_experts;
}

// What the CTA makes at a time: logits of tokens [first_token, ...) and experts [first_expert,
// ...), summed over steps [first_step, end_step).
struct LogitsTile {
  int32_t first_token;
  int32_t first_expert;
  int32_t first_step;
  int32_t end_step;
};

FM_DEVICE int32_t logit_steps(const config::ForwardSizes& sizes) {
  return sizes.hidden / LogitsLayout<false>::kDepth;
}
FM_DEVICE int32_t steps_of_segment(const config::ForwardSizes& sizes) {
  return (logit_steps(sizes) + config::kLogitSegments - 1) / config::kLogitSegments;
}

// What one thread copies in every step: a 16-byte piece of one token's row, and of every
// kRowsApart-th expert's. Addresses are made once; rows that do not exist are zeros.
template <bool kWide>
struct StepCopies {
  using Layout = LogitsLayout<kWide>;
  static constexpr int32_t kWeightBytes = Layout::kWeightBytes;
  static constexpr int32_t kPieces = Layout::kDepth * kWeightBytes / 16;  // of a weight row
  static constexpr int32_t kRowsApart = config::kForwardThreads / kPieces;
  static constexpr int32_t kCopies = Layout::kExperts / kRowsApart;
  static constexpr int32_t kTokenPieces = Layout::kDepth * config::kElementBytes / 16;
  static_assert(kTileTokens * kTokenPieces == config::kForwardThreads);
  static_assert(kRowsApart % 8 == 0);  // a thread's pieces have one place in their rows

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
    token_at = token_row * Layout::kTokenRowBytes + Layout::place_of(token_row, token_piece);
    const int32_t weight_row = thread / kPieces;
    const int32_t weight_piece = thread % kPieces;
    const int32_t left = params.sizes.num_experts - tile.first_expert - weight_row;
    num_weights = min((left + kRowsApart - 1) / kRowsApart, kCopies);
    const int64_t row_bytes = params.router.weight_stride * kWeightBytes;
    weight = static_cast<const uint8_t*>(params.router.weight) + weight_piece * 16;
    if (num_weights > 0) weight += (tile.first_expert + weight_row) * row_bytes;
    weight_step = kRowsApart * row_bytes;
    weight_at = Layout::kTokenBytes + weight_row * Layout::kRowBytes +
                Layout::place_of(weight_row, weight_piece);
  }

  // Starts the copies of one step.
  FM_DEVICE void start(uint32_t stage, int32_t step) const {
    const int32_t depth = step * Layout::kDepth;
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

FM_DEVICE void add_to(float (&sums)[4], const float (&values)[4]) {
  FM_UNROLL
  for (int i = 0; i < 4; ++i) sums[i] += values[i];
}

// A warp's 16 tokens by 32 experts: four blocks of 16 x 8, each thread four of their sums. The
// warps of a warpgroup have its 64 tokens.
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
    for (int product = 0; product < 4; ++product) add_to(values[product], other.values[product]);
  }
};

// A warpgroup's 64 tokens by 32 experts. tokens, weights: addresses of its first row of either. The
// sums of 16 k are new ones each.
template <class Element>
FM_DEVICE void multiply_step(WarpSums& sums, uint32_t tokens, uint32_t weights) {
  constexpr int kProducts = LogitsLayout<false>::kDepth / 16;
  const uint64_t a = tile::operand_descriptor(tokens);
  const uint64_t b = tile::operand_descriptor(weights);
  float products[kProducts][16];
  ptx::wgmma_fence();
  FM_UNROLL
  for (int k = 0; k < kProducts; ++k) {
    const int step = k * tile::kDepthMajorStep;
    ptx::wgmma<Element, 32, 0>(products[k], a + step, b + step, 0);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  FM_UNROLL
  for (auto& product : products) {
    ptx::wgmma_settle(product);
    FM_UNROLL
    for (int i = 0; i < 16; ++i) sums.values[i / 4][i % 4] += product[i];
  }
}

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

// The same for fp32 weights. Any 16-bit element is a tf32 value.
template <class Element>
FM_DEVICE void multiply_wide_step(WarpSums& sums, const uint8_t* tokens, const uint8_t* weights) {
  using Layout = LogitsLayout<true>;
  const int lane = ptx::lane_idx();
  const auto token = [&](int row, int k) {
    const auto* of_row = reinterpret_cast<const Element*>(tokens + row * Layout::kTokenRowBytes);
    return __float_as_uint(static_cast<float>(of_row[k]));
  };
  const auto weight = [&](int row, int k) {
    return reinterpret_cast<const float*>(weights + row * Layout::kRowBytes)[k];
  };
#pragma unroll 2
  for (int k = 0; k < Layout::kDepth; k += 8) {
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

// Writes the warp's sums of a tile: logits, with the bias, or part `part` of few tiles' sums.
FM_DEVICE void write_logits(const kernel::ForwardParams& params, const LogitsTile& tile,
                            const WarpSums& sums, int32_t part) {
  const bool is_part = params.sizes.has_few_tiles;
  float* out =
      is_part ? params.memory.logit_parts + part * part_size(params.sizes) : params.router.logits;
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
      const float added = is_part ? 0.0f : read_bias(params.router.bias, expert);
      out[int64_t{token} * experts + expert] = sums.values[product][i] + added;
    }
  }
}

// The sums of a tile, step by step. All threads of the CTA; arena: LogitsLayout::kBytes of shared
// memory.
template <class Element, bool kWide>
FM_DEVICE void multiply_tile(const kernel::ForwardParams& params, uint8_t* arena,
                             const LogitsTile& tile, WarpSums& sums) {
  using Layout = LogitsLayout<kWide>;
  const int warp_idx = ptx::thread_idx() / 32;
  const uint32_t base = ptx::shared_address(arena);
  const int32_t weights_at = Layout::kTokenBytes + warp_idx / 4 * 32 * Layout::kRowBytes;
  const StepCopies<kWide> copies(params, tile);
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
  const int32_t steps_each = steps_of_segment(params.sizes);
  int32_t left = steps_each;
  int32_t stage = 0;
  WarpSums segment;
  segment.clear();
  for (int32_t step = tile.first_step; step < tile.end_step; ++step) {
    ptx::cp_async_wait_group<Layout::kStages - 2>();
    if constexpr (!kWide) ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    start_next();
    const int32_t at = stage * Layout::kStageBytes;
    stage = stage == Layout::kStages - 1 ? 0 : stage + 1;
    if constexpr (kWide) {
      const int32_t tokens_at = at + warp_idx % 4 * 16 * Layout::kTokenRowBytes;
      multiply_wide_step<Element>(segment, arena + tokens_at, arena + at + weights_at);
    } else {
      multiply_step<Element>(segment, base + at, base + at + weights_at);
    }
    if (--left > 0 && step + 1 < tile.end_step) continue;
    sums.add(segment);
    segment.clear();
    left = steps_each;
  }
  ptx::cp_async_wait_group<0>();
}

// What all CTAs make, as items: a tile of tokens, a block of experts and (of few tiles) a segment
// of the sum. Few are dealt one by one; else a CTA makes all of the tiles that it then routes
// itself.
struct LogitItems {
  int32_t expert_blocks;
  int32_t num_parts;
  bool is_dealt;

  FM_DEVICE explicit LogitItems(const config::ForwardSizes& sizes)
      : expert_blocks((sizes.num_experts + kLogitExperts - 1) / kLogitExperts),
        num_parts(sizes.has_few_tiles ? config::kLogitSegments : 1),
        is_dealt(sizes.has_few_tiles) {}

  FM_DEVICE int32_t of_tile() const { return expert_blocks * num_parts; }
  // The CTA's n-th item.
  FM_DEVICE int32_t item(int32_t n) const {
    const auto num_ctas = static_cast<int32_t>(gridDim.x);
    const auto cta = ptx::block_idx();
    if (is_dealt) return cta + n * num_ctas;
    return (cta + n / of_tile() * num_ctas) * of_tile() + n % of_tile();
  }
};

// Logits of the fused router, or their parts. All threads of all CTAs; arena: LogitsLayout::kBytes
// of shared memory.
template <class Element>
FM_DEVICE void compute_logits(const kernel::ForwardParams& params, uint8_t* arena) {
  const auto& sizes = params.sizes;
  const LogitItems items(sizes);
  const int32_t num_items = sizes.route_tiles * items.of_tile();
  const int32_t steps = items.is_dealt ? steps_of_segment(sizes) : logit_steps(sizes);
  for (int32_t n = 0, item = items.item(0); item < num_items; item = items.item(++n)) {
    const int32_t part = item % items.num_parts;
    const int32_t block = item / items.num_parts;
    const LogitsTile tile{block / items.expert_blocks * kTileTokens,
                          block % items.expert_blocks * kLogitExperts, part * steps,
                          min((part + 1) * steps, logit_steps(sizes))};
    WarpSums sums;
    sums.clear();
    if (params.router.weight_is_wide) {
      multiply_tile<Element, true>(params, arena, tile, sums);
    } else {
      multiply_tile<Element, false>(params, arena, tile, sums);
    }
    write_logits(params, tile, sums, part);
    __syncthreads();
  }
}

// A token's logit from its parts, without the bias.
FM_DEVICE float sum_parts(const kernel::ForwardParams& params, int32_t token, int32_t expert) {
  const auto& sizes = params.sizes;
  const int64_t apart = part_size(sizes);
  const float* part = params.memory.logit_parts + int64_t{token} * sizes.num_experts + expert;
  float parts[config::kLogitSegments];
  FM_UNROLL
  for (int i = 0; i < config::kLogitSegments; ++i) parts[i] = part[i * apart];
  float sum = 0.0f;
  FM_UNROLL
  for (float value : parts) sum += value;
  return sum;
}

}  // namespace flashmoe::cuda::stage
