// The router's products in the backward, by the warps' matrix products (mma.sync) of the
// communication warps, while the tiles run:
//
//   grad_x += grad_logits W_router        grad_W_router = grad_logits^T X        bias: column sums
//
// Gradients of logits are fp32 and taken as two tf32 parts, 22 bits, as W_router is if it is fp32;
// 16-bit elements are tf32 as they are. The sum over tokens is one of at most
// config::kRouterSegments sums over ranges, whoever makes them, added in their order. The share of
// grad_x is written there; the combine adds the experts' rows to it.
//
// Operands go from global memory to registers (tile/router_walk.h), a few steps ahead of the
// products: one warp a scheduler waits for memory, not for the tensor core.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/ptx/mma.cuh"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/router_walk.h"
#include "cuda/tile/strided.cuh"

namespace flashmoe::cuda::stage {

using tile::RouterProduct;
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

// The products of a warp's unit. kWide: the N side is fp32.
template <class Element, RouterProduct kProduct, bool kWide>
class RouterMultiplier {
  static constexpr bool kIsX = kProduct == RouterProduct::kGradX;
  static constexpr int32_t kBytes = kWide ? 4 : config::kElementBytes;
  static constexpr int32_t kColumns = tile::kRouterLaneColumns;
  using Lane = tile::RouterLane<kProduct>;
  using Vector = std::conditional_t<kWide, uint4, uint2>;  // kColumns of the N side

 public:
  FM_DEVICE explicit RouterMultiplier(const kernel::BackwardParams& params) : params_(params) {}

  // The unit's sums over depth [begin, end). Whole warp.
  FM_DEVICE void multiply(const RouterUnit& unit, int32_t begin, int32_t end) {
    constexpr int kStages = kWide ? 1 : 2;  // steps under way: more take more than 64 registers
    FM_UNROLL
    for (auto& product : sums_) {
      FM_UNROLL
      for (float& value : product) value = 0.0f;
    }
    const Lane lane{ptx::lane_idx()};
    const int32_t column = unit.n + lane.operand_column(0);
    const float* m_from = m_at(unit.m + lane.row(0), begin + lane.depth(0));
    const int32_t num_steps = plan::ceil_div(end - begin, tile::kRouterDepth);
    int32_t depth = begin + lane.depth(0);
    Step steps[kStages];
    const auto load = [&](Step& step, int32_t ahead, int32_t left) {
      if (ahead < left) step.load(*this, m_from, ahead, depth, end - 1, column);
    };
    FM_UNROLL
    for (int i = 0; i < kStages; ++i) load(steps[i], i, num_steps);
#pragma unroll 1
    for (int32_t left = num_steps; left > 0; left -= kStages) {
      FM_UNROLL
      for (int i = 0; i < kStages; ++i) {
        if (i >= left) break;
        steps[i].multiply(sums_);
        load(steps[i], kStages + i, left);
      }
      m_from += kStages * step_stride();
      depth += kStages * tile::kRouterDepth;
    }
  }

  // The i-th of 2 * kColumns sums of the lane, of one of its two rows: at columns from
  // first_column() on.
  FM_DEVICE float sum(int32_t row_half, int32_t i) const {
    return sums_[i % kColumns][2 * row_half + i / kColumns];
  }
  FM_DEVICE static int32_t first_column() { return Lane{ptx::lane_idx()}.sum_column(0, 0); }
  FM_DEVICE static int32_t row(int32_t half) { return Lane{ptx::lane_idx()}.row(half); }

 private:
  // A lane's operands of one product's depth.
  struct Step {
    float2 m[2];  // of two rows at two depths, or the other way round
    Vector n[2];  // of two depths

    // m_from, depth: the lane's first element of step 0. Past the last depth grad_logits is zero,
    // and W_router or X is read at the last one.
    FM_DEVICE void load(const RouterMultiplier& of, const float* m_from, int32_t step,
                        int32_t depth, int32_t last, int32_t column) {
      m_from += step * of.step_stride();
      FM_UNROLL
      for (int half = 0; half < 2; ++half) {
        m[half] = *reinterpret_cast<const float2*>(m_from + half * of.half_stride());
        const int32_t at = min(depth + step * tile::kRouterDepth + half, last);
        n[half] = __ldg(reinterpret_cast<const Vector*>(of.n_at(at, column)));
      }
    }
    FM_DEVICE void multiply(float (&sums)[kColumns][4]) const {
      uint32_t high[4], low[4];
      FM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Tf32Pair first(m[half].x), second(m[half].y);
        const int i = kIsX ? half : 2 * half;
        const int j = kIsX ? half + 2 : 2 * half + 1;
        high[i] = first.high;
        low[i] = first.low;
        high[j] = second.high;
        low[j] = second.low;
      }
      FM_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const Tf32Pair b0(n_value(0, j));
        const Tf32Pair b1(n_value(1, j));
        ptx::mma_m16n8k8_tf32(sums[j], low, b0.high, b1.high);
        if constexpr (kWide) ptx::mma_m16n8k8_tf32(sums[j], high, b0.low, b1.low);
        ptx::mma_m16n8k8_tf32(sums[j], high, b0.high, b1.high);
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

  // grad_logits of an M row (token, or expert) at a depth (expert, or token).
  FM_DEVICE int32_t m_stride() const {
    return config::router_padded(params_.forward.sizes.num_experts);
  }
  FM_DEVICE const float* m_at(int32_t m, int32_t depth) const {
    return params_.grad_logits +
           (kIsX ? int64_t{m} * m_stride() + depth : int64_t{depth} * m_stride() + m);
  }
  // From a lane's elements of a step to the next one's, and to its other two of the step.
  FM_DEVICE int32_t step_stride() const { return tile::kRouterDepth * (kIsX ? 1 : m_stride()); }
  FM_DEVICE int32_t half_stride() const { return (kIsX ? 8 : 1) * m_stride(); }

  FM_DEVICE const uint8_t* n_at(int32_t depth, int32_t n) const {
    const void* base = kIsX ? params_.routing.w_router : params_.forward.x;
    const int64_t stride = kIsX ? params_.routing.w_router_stride : params_.forward.x_stride;
    return static_cast<const uint8_t*>(base) + (depth * stride + n) * kBytes;
  }

  const kernel::BackwardParams& params_;
  float sums_[kColumns][4];
};

// As a product of a launch is cut.
template <RouterProduct kProduct>
FM_DEVICE tile::RouterWalk<kProduct> router_walk(const config::ForwardSizes& sizes) {
  return {.tokens = sizes.tokens, .hidden = sizes.hidden, .num_experts = sizes.num_experts};
}

// The router's share of grad_x, in grad_x. Whole warp.
template <class Element, bool kWide>
FM_DEVICE void multiply_router_x(const kernel::BackwardParams& params, int32_t worker_idx,
                                 int32_t num_workers) {
  using Multiplier = RouterMultiplier<Element, RouterProduct::kGradX, kWide>;
  const auto& forward = params.forward;
  const auto walk = router_walk<RouterProduct::kGradX>(forward.sizes);
  const tile::RouterRun run(walk.num_units(), worker_idx, num_workers);
  RouterUnit unit = run.count > 0 ? walk.unit_at(run.first) : RouterUnit{};
#pragma unroll 1
  for (int32_t left = run.count; left > 0; --left) {
    Multiplier multiplier(params);
    multiplier.multiply(unit, walk.depth_begin(unit), walk.depth_end(unit));
    FM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t token = unit.m + Multiplier::row(half);
      if (token >= forward.sizes.tokens) continue;
      const auto pair = [&](int i) {
        return static_cast<int>(
            Element::pack(multiplier.sum(half, i), multiplier.sum(half, i + 1)));
      };
      *reinterpret_cast<int4*>(static_cast<uint16_t*>(forward.y) + token * forward.y_stride +
                               unit.n +
                               Multiplier::first_column()) = {pair(0), pair(2), pair(4), pair(6)};
    }
    unit = walk.after(unit);
  }
}

// The segments' sums of grad_W_router, in scratch. Their additions are the tensor core's, which
// truncate: two for eight tokens, an error of at most tokens / 32 * 2^-23. Whole warp.
template <class Element>
FM_DEVICE void multiply_router_weight(const kernel::BackwardParams& params, int32_t worker_idx,
                                      int32_t num_workers) {
  using Multiplier = RouterMultiplier<Element, RouterProduct::kGradWeight, false>;
  const auto& sizes = params.forward.sizes;
  const auto walk = router_walk<RouterProduct::kGradWeight>(sizes);
  const tile::RouterRun run(walk.num_units(), worker_idx, num_workers);
  RouterUnit unit = run.count > 0 ? walk.unit_at(run.first) : RouterUnit{};
#pragma unroll 1
  for (int32_t left = run.count; left > 0; --left) {
    Multiplier multiplier(params);
    multiplier.multiply(unit, walk.depth_begin(unit), walk.depth_end(unit));
    FM_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int32_t expert = unit.m + Multiplier::row(half);
      if (expert >= sizes.num_experts) continue;
      auto* to = reinterpret_cast<float4*>(
          params.router_parts +
          unit.segment * config::router_part_words(sizes.num_experts, sizes.hidden) +
          int64_t{expert} * sizes.hidden + unit.n + Multiplier::first_column());
      FM_UNROLL
      for (int i = 0; i < 2; ++i) {
        to[i] = {multiplier.sum(half, 4 * i), multiplier.sum(half, 4 * i + 1),
                 multiplier.sum(half, 4 * i + 2), multiplier.sum(half, 4 * i + 3)};
      }
    }
    unit = walk.after(unit);
  }
}

// The segments' column sums of grad_logits, in fp64: a lane takes an expert. Whole warp.
FM_DEVICE void sum_router_bias(const kernel::BackwardParams& params, int32_t worker_idx,
                               int32_t num_workers) {
  const auto& sizes = params.forward.sizes;
  const auto walk = router_walk<RouterProduct::kGradWeight>(sizes);
  const int32_t of_segment = plan::ceil_div(sizes.num_experts, 32);
  const int32_t stride = config::router_padded(sizes.num_experts);
#pragma unroll 1
  for (int32_t i = worker_idx; i < walk.num_segments() * of_segment; i += num_workers) {
    const RouterUnit unit{.m = i % of_segment * 32, .n = 0, .segment = i / of_segment};
    const int32_t expert = unit.m + ptx::lane_idx();
    if (expert >= sizes.num_experts) continue;
    const float* column = params.grad_logits + expert;
    double sum = 0.0;
#pragma unroll 8
    for (int32_t token = walk.depth_begin(unit); token < walk.depth_end(unit); ++token) {
      sum += static_cast<double>(column[int64_t{token} * stride]);
    }
    params.router_parts[unit.segment * config::router_part_words(sizes.num_experts, sizes.hidden) +
                        int64_t{sizes.num_experts} * sizes.hidden + expert] =
        static_cast<float>(sum);
  }
}

// All that is made of the gradients of the logits, dealt to num_workers warps: neighbours have the
// same columns, those of a CTA share them in the first-level cache. Whole warp.
template <class Element>
FM_DEVICE void multiply_router(const kernel::BackwardParams& params, int32_t worker_idx,
                               int32_t num_workers) {
  const auto& routing = params.routing;
  if (routing.grad_router_bias.data != nullptr) {
    sum_router_bias(params, num_workers - 1 - worker_idx, num_workers);
  }
  if (routing.grad_w_router.data != nullptr) {
    multiply_router_weight<Element>(params, worker_idx, num_workers);
  }
  if (routing.w_router_is_wide) {
    multiply_router_x<Element, true>(params, worker_idx, num_workers);
  } else {
    multiply_router_x<Element, false>(params, worker_idx, num_workers);
  }
}

// Adds the segments of grad_w_router and of the bias's gradient, dealt to num_workers warps.
FM_DEVICE void reduce_router(const kernel::BackwardParams& params, int32_t worker_idx,
                             int32_t num_workers) {
  const auto& sizes = params.forward.sizes;
  const auto& routing = params.routing;
  const int32_t of_weight = sizes.num_experts * sizes.hidden;
  const int32_t first = routing.grad_w_router.data == nullptr ? of_weight : 0;
  const int32_t last =
      of_weight + (routing.grad_router_bias.data == nullptr ? 0 : sizes.num_experts);
  const int32_t num_segments = router_walk<RouterProduct::kGradWeight>(sizes).num_segments();
  const int64_t of_segment = config::router_part_words(sizes.num_experts, sizes.hidden);
  for (int32_t i = first + worker_idx * 32 + ptx::lane_idx(); i < last; i += num_workers * 32) {
    float parts[config::kRouterSegments];
    FM_UNROLL
    for (int segment = 0; segment < config::kRouterSegments; ++segment) {
      parts[segment] =
          segment < num_segments ? __ldcg(params.router_parts + segment * of_segment + i) : 0.0f;
    }
    float sum = 0.0f;
    FM_UNROLL
    for (const float part : parts) sum += part;
    if (i < of_weight) {
      const int32_t e = i / sizes.hidden;
      tile::write_real(routing.grad_w_router, e, i - e * sizes.hidden, sum);
    } else {
      tile::write_real(routing.grad_router_bias, i - of_weight, 0, sum);
    }
  }
}

}  // namespace flashmoe::cuda::stage
