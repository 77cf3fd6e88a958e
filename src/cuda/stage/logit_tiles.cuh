// How the router's logits are cut. A CTA makes those of 64 tokens and 128 experts at a time, each
// of its four warpgroups of 32 experts, in steps of 64 k.
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
#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/strided.cuh"
#include "plan/routing.h"

namespace flashmoe::cuda::stage {

inline constexpr int32_t kTileTokens = static_cast<int32_t>(plan::kTileTokens);
inline constexpr int32_t kLogitWarpgroups = config::kForwardThreads / config::kWarpgroup;
inline constexpr int32_t kLogitExperts = kLogitWarpgroups * config::kLogitBoxExperts;
inline constexpr int32_t kLogitDepth = config::kDepthStep;

FM_DEVICE float read_bias(const kernel::StridedView& bias, int32_t expert_idx) {
  return bias.data == nullptr ? 0.0f : tile::read_real(bias, expert_idx);
}

// Values of one part of few tokens' logits.
FM_DEVICE int64_t part_size(const config::ForwardSizes& sizes) {
  return int64_t{sizes.tokens} * sizes.num_experts;
}

FM_DEVICE int32_t logit_steps(const config::ForwardSizes& sizes) {
  return sizes.hidden / kLogitDepth;
}
FM_DEVICE int32_t steps_of_segment(const config::ForwardSizes& sizes) {
  return (logit_steps(sizes) + config::kLogitSegments - 1) / config::kLogitSegments;
}

// What the CTA makes at a time: logits of tokens [first_token, ...) and experts [first_expert,
// ...), or part `part` of them, summed over steps [first_step, end_step).
struct LogitsTile {
  int32_t first_token;
  int32_t first_expert;
  int32_t first_step;
  int32_t end_step;
  int32_t part;
};

// What a CTA makes, as items: a tile of tokens, a block of experts and (of few tiles) a segment of
// the sum. Few are dealt one by one. Else a CTA makes all of the tiles that it then routes itself,
// and both CTAs of a pair as many: one may lie past the last token.
class LogitItems {
 public:
  FM_DEVICE explicit LogitItems(const config::ForwardSizes& sizes) : sizes_(sizes) {}

  FM_DEVICE int32_t count() const {
    if (is_dealt()) return count_from(ptx::block_idx(), sizes_.route_tiles * of_tile());
    const int32_t leader = ptx::block_idx() / config::kClusterSize * config::kClusterSize;
    return count_from(leader, sizes_.route_tiles) * of_tile();
  }
  // The CTA's n-th.
  FM_DEVICE LogitsTile at(int32_t n) const {
    const int32_t item =
        is_dealt()
            ? ptx::block_idx() + n * ptx::num_blocks()
            : (ptx::block_idx() + n / of_tile() * ptx::num_blocks()) * of_tile() + n % of_tile();
    const int32_t steps = is_dealt() ? steps_of_segment(sizes_) : logit_steps(sizes_);
    const int32_t part = item % num_parts();
    const int32_t block = item / num_parts();
    return {.first_token = block / expert_blocks() * kTileTokens,
            .first_expert = block % expert_blocks() * kLogitExperts,
            .first_step = part * steps,
            .end_step = min((part + 1) * steps, logit_steps(sizes_)),
            .part = part};
  }

 private:
  FM_DEVICE bool is_dealt() const { return sizes_.has_few_tiles; }
  FM_DEVICE int32_t num_parts() const { return is_dealt() ? config::kLogitSegments : 1; }
  FM_DEVICE int32_t expert_blocks() const {
    return (sizes_.num_experts + kLogitExperts - 1) / kLogitExperts;
  }
  FM_DEVICE int32_t of_tile() const { return expert_blocks() * num_parts(); }
  // Of `total`, those from `first` on that are as far apart as there are CTAs.
  FM_DEVICE static int32_t count_from(int32_t first, int32_t total) {
    return (total - first + ptx::num_blocks() - 1) / ptx::num_blocks();
  }

  const config::ForwardSizes& sizes_;
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

// A warp's sums of a tile: steps are added to the segment's, segments to the tile's.
class TileSums {
 public:
  FM_DEVICE explicit TileSums(const config::ForwardSizes& sizes)
      : steps_each_(steps_of_segment(sizes)) {}

  FM_DEVICE void clear() {
    total_.clear();
    segment_.clear();
    left_ = steps_each_;
  }
  FM_DEVICE WarpSums& segment() { return segment_; }
  // After each step's products.
  FM_DEVICE void end_step(bool is_last) {
    if (--left_ > 0 && !is_last) return;
    total_.add(segment_);
    segment_.clear();
    left_ = steps_each_;
  }
  FM_DEVICE const WarpSums& total() const { return total_; }

 private:
  WarpSums total_;
  WarpSums segment_;
  int32_t steps_each_;
  int32_t left_;
};

// Writes the warp's sums of a tile: logits, with the bias, or a part of few tiles'.
FM_DEVICE void write_logits(const kernel::ForwardParams& params, const LogitsTile& tile,
                            const WarpSums& sums) {
  const bool is_part = params.sizes.has_few_tiles;
  float* out = is_part ? params.memory.logit_parts + tile.part * part_size(params.sizes)
                       : params.router.logits;
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
