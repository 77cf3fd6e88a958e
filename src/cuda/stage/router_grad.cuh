// What warps make of the gradients of the logits: sums over tokens for the bias, the additions of
// all sums, and, where they are not tiles of the math warpgroups (fp16, an fp32 router), the
// router's products, by the warps' matrix products (mma.sync): of the communication warps, while
// the tiles run, and of math warps that have no tile left:
//
//   grad_x += grad_logits W_router        grad_W_router = grad_logits^T X        bias: column sums
//
// Gradients of logits are fp32 and taken as two tf32 parts, 22 bits, as W_router is if it is fp32;
// 16-bit elements are tf32 as they are. The sum over tokens is one of at most
// config::kRouterSegments sums over ranges, whoever makes them, added in their order. The share of
// grad_x is written there; the combine adds the experts' rows to it.
//
// Warps take runs of it by tickets (tile/router_walk.h): no result depends on who makes which.
// Operands go from global memory to registers, a few steps ahead of the products: one warp a
// scheduler waits for memory, not for the tensor core.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/ptx/mma.cuh"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/router_walk.h"
#include "cuda/tile/strided.cuh"

namespace flashmoe::cuda::stage {

using tile::RouterProduct;
using tile::RouterRun;
using tile::RouterTask;
using tile::RouterUnit;

// x as the sum of two values of 11 bits, as the tensor core reads them.
struct Tf32Pair {
  uint32_t high;
  uint32_t low;

  FM_DEVICE explicit Tf32Pair(float x) {
    high = __float_as_uint(x) & 0xFFFFE000u;
    low = __float_as_uint(x - __uint_as_float(high)) & 0xFFFFE000u;
  }
};

// The products of a warp's unit. kWide: the N side is fp32; kStages: steps of loads under way.
template <class Element, RouterProduct kProduct, bool kWide, int kStages>
class RouterMultiplier {
  static constexpr bool kIsX = kProduct == RouterProduct::kGradX;
  static constexpr int32_t kBytes = kWide ? 4 : config::kElementBytes;
  static constexpr int32_t kColumns = tile::kRouterLaneColumns;
  using Lane = tile::RouterLane<kProduct>;
  using Vector = std::conditional_t<kWide, uint4, uint2>;  // kColumns of the N side

 public:
  // The unit's sums. Whole warp.
  FM_DEVICE void multiply(const kernel::BackwardParams& params, const RouterUnit& unit,
                          const tile::RouterDepth& depth) {
    FM_UNROLL
    for (auto& product : sums_) {
      FM_UNROLL
      for (float& value : product) value = 0.0f;
    }
    Reader reader(params, unit, depth);
    int32_t left = depth.num_steps;
    Step steps[kStages] = {};  // else ptxas keeps their registers from unit to unit
    FM_UNROLL
    for (int i = 0; i < kStages; ++i) {
      if (i < left) reader.read(steps[i]);
    }
#pragma unroll 1
    for (; left > 0; left -= kStages) {
      FM_UNROLL
      for (int i = 0; i < kStages; ++i) {
        if (i >= left) break;
        steps[i].multiply(sums_);
        if (kStages + i < left) reader.read(steps[i]);
      }
    }
  }

  // Calls store(row and column of the unit, kSumColumns sums) for each of the lane's rows.
  template <class Store>
  FM_DEVICE void store(const Store& store_row) const {
    const Lane lane{ptx::lane_idx()};
    FM_UNROLL
    for (int i = 0; i < Lane::kSumRows; ++i) {
      float sums[Lane::kSumColumns];
      FM_UNROLL
      for (int j = 0; j < Lane::kSumColumns; ++j) {
        constexpr auto at = Lane::sum_at;
        sums[j] = sums_[at(i, j).product][at(i, j).index];
      }
      store_row(lane.sum_row(i), lane.sum_column(0), sums);
    }
  }

 private:
  // A lane's operands of one depth of the products.
  struct Step {
    float2 m[2];  // of two rows at two depths, or the other way round
    Vector n[2];  // of two depths

    // Two products side by side: one waits for the product before it into the same sums.
    FM_DEVICE void multiply(float (&sums)[tile::kRouterProducts][4]) const {
      const Tf32Pair m_values[2][2] = {{Tf32Pair(m[0].x), Tf32Pair(m[0].y)},
                                       {Tf32Pair(m[1].x), Tf32Pair(m[1].y)}};
      FM_UNROLL
      for (int j = 0; j < kColumns; j += 2) {
        const Tf32Pair n_values[2][2] = {{Tf32Pair(n_value(0, j)), Tf32Pair(n_value(0, j + 1))},
                                         {Tf32Pair(n_value(1, j)), Tf32Pair(n_value(1, j + 1))}};
        add(sums[j], sums[j + 1], &Tf32Pair::low, m_values, &Tf32Pair::high, n_values);
        if constexpr (kWide) {
          add(sums[j], sums[j + 1], &Tf32Pair::high, m_values, &Tf32Pair::low, n_values);
        }
        add(sums[j], sums[j + 1], &Tf32Pair::high, m_values, &Tf32Pair::high, n_values);
      }
    }
    // Two products of one part of each side's elements.
    using Part = uint32_t Tf32Pair::*;
    FM_DEVICE static void add(float (&first)[4], float (&second)[4], Part m_part,
                              const Tf32Pair (&m)[2][2], Part n_part, const Tf32Pair (&n)[2][2]) {
      const Tf32Pair(&a)[2][2] = kIsX ? n : m;
      const Part a_part = kIsX ? n_part : m_part;
      const uint32_t a_values[4] = {a[0][0].*a_part, a[0][1].*a_part, a[1][0].*a_part,
                                    a[1][1].*a_part};
      if constexpr (kIsX) {
        ptx::mma_m16n8k8_tf32(first, a_values, m[0][0].*m_part, m[0][1].*m_part);
        ptx::mma_m16n8k8_tf32(second, a_values, m[1][0].*m_part, m[1][1].*m_part);
      } else {
        ptx::mma_m16n8k8_tf32(first, a_values, n[0][0].*n_part, n[1][0].*n_part);
        ptx::mma_m16n8k8_tf32(second, a_values, n[0][1].*n_part, n[1][1].*n_part);
      }
    }
    FM_DEVICE float n_value(int half, int j) const {
      const auto* words = reinterpret_cast<const uint32_t*>(&n[half]);
      if constexpr (kWide) {
        return __uint_as_float(words[j]);
      } else {
        const float2 pair = Element::widen(words[j / 2]);
        return j % 2 == 0 ? pair.x : pair.y;
      }
    }
  };

  // Reads the lane's operands step after step. Past the last depth grad_logits is zero, and
  // W_router or X is read at the last one.
  class Reader {
   public:
    FM_DEVICE Reader(const kernel::BackwardParams& params, const RouterUnit& unit,
                     const tile::RouterDepth& depths)
        : params_(params) {
      const Lane lane{ptx::lane_idx()};
      const int32_t depth = depths.begin + lane.depth(0);
      const int32_t row = min(depth, depths.end - 1);
      const int32_t m = unit.m + lane.row(0);
      m_ = bytes(params.grad_logits) + int64_t{kIsX ? m : depth} * m_stride() +
           (kIsX ? depth : m) * int32_t{sizeof(float)};
      n_ = bytes(kIsX ? params.routing.w_router : params.forward.x) + int64_t{row} * n_stride() +
           (unit.n + lane.column(0)) * kBytes;
      rows_left_ = depths.end - 1 - row;
    }
    FM_DEVICE void read(Step& step) {
      constexpr uint32_t kDepth = tile::kRouterDepth;
      step.m[0] = *reinterpret_cast<const float2*>(m_);
      step.m[1] = *reinterpret_cast<const float2*>(m_ + (kIsX ? 8 : 1) * m_stride());
      m_ += kDepth * (kIsX ? sizeof(float) : m_stride());
      step.n[0] = __ldg(reinterpret_cast<const Vector*>(n_));
      step.n[1] = __ldg(reinterpret_cast<const Vector*>(n_ + min(rows_left_, 1u) * n_stride()));
      const uint32_t rows = min(rows_left_, kDepth);
      n_ += rows * n_stride();
      rows_left_ -= rows;
    }

   private:
    FM_DEVICE static const uint8_t* bytes(const void* base) {
      return static_cast<const uint8_t*>(base);
    }
    // Multiplied by a word: one instruction, which adds the address, too.
    FM_DEVICE uint64_t m_stride() const { return params_.router_strides.grad_logits; }
    FM_DEVICE uint64_t n_stride() const {
      return kIsX ? params_.router_strides.w_router : params_.router_strides.x;
    }
    const kernel::BackwardParams& params_;
    // Of the next step: its elements of grad_logits, its first row or the last one there is, and
    // how many rows there are behind that.
    const uint8_t* m_;
    const uint8_t* n_;
    uint32_t rows_left_;
  };

  float sums_[tile::kRouterProducts][4];
};

// As a product of a launch is cut.
template <RouterProduct kProduct>
FM_DEVICE tile::RouterWalk<kProduct> router_walk(const config::ForwardSizes& sizes) {
  return {.tokens = sizes.tokens, .hidden = sizes.hidden, .num_experts = sizes.num_experts};
}

// Of a range's sums: words of the weight's, and of all.
FM_DEVICE int64_t weight_words(const kernel::BackwardParams& params) {
  const auto& sizes = params.forward.sizes;
  return config::router_weight_words(sizes.num_experts, sizes.hidden,
                                     params.sizes.share_tokens > 0);
}
FM_DEVICE int64_t part_words(const kernel::BackwardParams& params) {
  const auto& sizes = params.forward.sizes;
  return config::router_part_words(sizes.num_experts, sizes.hidden, params.sizes.share_tokens > 0);
}

// The router's share of grad_x, in grad_x. Whole warp.
template <class Element, bool kWide, int kStages>
FM_DEVICE void multiply_router_x(const kernel::BackwardParams& params, int32_t run_idx) {
  using Multiplier = RouterMultiplier<Element, RouterProduct::kGradX, kWide, kStages>;
  const auto& forward = params.forward;
  auto walk = router_walk<RouterProduct::kGradX>(forward.sizes);
  walk.run_rows = params.router_runs.x_run_rows();
  RouterUnit unit = walk.run_at(run_idx);
#pragma unroll 1
  do {
    Multiplier multiplier;
    multiplier.multiply(params, unit, params.router_runs.x_depth());  // no register holds it
    multiplier.store([&](int32_t row, int32_t column, const float(&sums)[4]) {
      const int32_t token = unit.m + row;
      if (token >= forward.sizes.tokens) return;
      auto* to = static_cast<uint16_t*>(forward.y) + token * forward.y_stride + (unit.n + column);
      *reinterpret_cast<uint2*>(to) = {Element::pack(sums[0], sums[1]),
                                       Element::pack(sums[2], sums[3])};
    });
  } while (walk.advance(unit));
}

// A segment's sums of a unit of grad_W_router, in scratch. Their additions are the tensor core's,
// which truncate: two for eight tokens, an error of at most tokens / 32 * 2^-23. Whole warp.
template <class Element, int kStages>
FM_DEVICE void multiply_router_weight(const kernel::BackwardParams& params, int32_t run_idx) {
  using Multiplier = RouterMultiplier<Element, RouterProduct::kGradWeight, false, kStages>;
  const auto& sizes = params.forward.sizes;
  const auto walk = router_walk<RouterProduct::kGradWeight>(sizes);
  const RouterUnit unit = walk.run_at(run_idx);
  Multiplier multiplier;
  multiplier.multiply(params, unit, walk.depth(unit));
  multiplier.store([&](int32_t row, int32_t column, const float(&sums)[8]) {
    const int32_t expert = unit.m + row;
    if (expert >= sizes.num_experts) return;
    auto* to = reinterpret_cast<float4*>(params.router_parts + unit.segment * part_words(params) +
                                         int64_t{expert} * sizes.hidden + unit.n + column);
    to[0] = {sums[0], sums[1], sums[2], sums[3]};
    to[1] = {sums[4], sums[5], sums[6], sums[7]};
  });
}

// A segment's column sums of grad_logits, in fp64: a lane takes an expert. Whole warp.
FM_DEVICE void sum_router_bias(const kernel::BackwardParams& params, int32_t run_idx) {
  const auto& sizes = params.forward.sizes;
  const auto walk = router_walk<RouterProduct::kGradWeight>(sizes);
  const int32_t of_segment = plan::ceil_div(sizes.num_experts, tile::kRouterBiasExperts);
  const RouterUnit unit{.m = run_idx % of_segment * tile::kRouterBiasExperts,
                        .n = 0,
                        .segment = run_idx / of_segment};
  const int32_t expert = unit.m + ptx::lane_idx();
  if (expert >= sizes.num_experts) return;
  const int32_t stride = config::router_padded(sizes.num_experts);
  const float* column = params.grad_logits + expert;
  const tile::RouterDepth depth = walk.depth(unit);
  double sum = 0.0;
#pragma unroll 8
  for (int32_t token = depth.begin; token < depth.end; ++token) {
    sum += static_cast<double>(column[int64_t{token} * stride]);
  }
  params.router_parts[unit.segment * part_words(params) + weight_words(params) + expert] =
      static_cast<float>(sum);
}

// A word of the first segment of the sums over tokens, added to those of all others.
FM_DEVICE float sum_of_segments(const kernel::BackwardParams& params, int64_t word) {
  const auto& sizes = params.forward.sizes;
  const int32_t num_segments = router_walk<RouterProduct::kGradWeight>(sizes).num_segments();
  const int64_t of_segment = part_words(params);
  float parts[config::kRouterSegments];
  FM_UNROLL
  for (int segment = 0; segment < config::kRouterSegments; ++segment) {
    parts[segment] =
        segment < num_segments ? __ldcg(params.router_parts + segment * of_segment + word) : 0.0f;
  }
  float sum = 0.0f;
  FM_UNROLL
  for (const float part : parts) sum += part;
  return sum;
}

// Adds the segments of words of grad_W_router and of the bias's gradient. Whole warp.
FM_DEVICE void reduce_router(const kernel::BackwardParams& params, int32_t run_idx) {
  const auto& sizes = params.forward.sizes;
  const auto& routing = params.routing;
  const int32_t of_weight = sizes.num_experts * sizes.hidden;
  const int64_t words = weight_words(params);
  const int32_t end = params.router_runs.words_end(run_idx);
  for (int32_t i = params.router_runs.words_begin(run_idx) + ptx::lane_idx(); i < end; i += 32) {
    if (i >= of_weight) {
      const int32_t e = i - of_weight;
      tile::write_real(routing.grad_router_bias, e, 0, sum_of_segments(params, words + e));
      continue;
    }
    float sum = sum_of_segments(params, i);
    if (params.sizes.share_tokens > 0) {
      sum += sum_of_segments(params, i + words / config::kLogitTerms);
    }
    const int32_t e = i / sizes.hidden;
    tile::write_real(routing.grad_w_router, e, i - e * sizes.hidden, sum);
  }
}

// A run of the router's share of grad x. Whole warp.
template <class Element, config::RouterStages kStages>
FM_DEVICE void make_router_share(const kernel::BackwardParams& params, int32_t idx) {
  if (params.routing.w_router_is_wide) {
    multiply_router_x<Element, true, kStages.num_wide_steps>(params, idx);
  } else {
    multiply_router_x<Element, false, kStages.num_steps>(params, idx);
  }
}

// A run of the sums over tokens. Whole warp.
template <class Element, config::RouterStages kStages>
FM_DEVICE void make_router_sum(const kernel::BackwardParams& params, int32_t idx) {
  const tile::RouterRun run = params.router_runs.run_at(idx);
  if (run.task == RouterTask::kBias) {
    sum_router_bias(params, run.idx);
  } else {
    multiply_router_weight<Element, kStages.num_steps>(params, run.idx);
  }
}

}  // namespace flashmoe::cuda::stage
