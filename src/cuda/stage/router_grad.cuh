// The router's products in the backward, by the warps' matrix products (mma.sync) of the math
// warps:
//
//   grad_x += grad_logits W_router        grad_W_router = grad_logits^T X        bias: column sums
//
// Gradients of logits are fp32 and taken as two tf32 parts, 22 bits; 16-bit elements are tf32 as
// they are. The sum over tokens is one of config::kRouterSegments sums over ranges, whoever makes
// them, added in their order.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/ptx/mma.cuh"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/strided.cuh"

namespace flashmoe::cuda::stage {

// One step: 64 of M and 128 of N by 64 of depth, as fp32 in shared memory, depth outermost. Rows
// are padded by eight words, so that a product's loads meet no bank twice.
struct RouterLayout {
  static constexpr int32_t kM = 64;
  static constexpr int32_t kN = 128;
  static constexpr int32_t kDepth = 64;
  static constexpr int32_t kThreads = config::kMathWarps * 32;
  static constexpr int32_t kMStride = kM + 8;
  static constexpr int32_t kNStride = kN + 8;
  static constexpr int32_t kWords = kDepth * (kMStride + kNStride);
  static constexpr int32_t kBytes = kWords * 4;
  static constexpr int32_t kMLoads = kM * kDepth / kThreads;              // words of a thread
  static constexpr int32_t kNLoads = kN * kDepth / (kVector * kThreads);  // vectors of a thread
};

// Which product a tile belongs to decides what its operands are.
enum class RouterProduct { kGradX, kGradWeight };

struct RouterTile {
  int32_t m;  // first token or expert
  int32_t n;  // first hidden column
  int32_t depth_begin;
  int32_t depth_end;
};

// One step's operands on their way from global to shared memory.
template <class Element, RouterProduct kProduct, bool kWide>
struct RouterStep {
  using Layout = RouterLayout;
  static constexpr int kWords = kWide ? 2 : 1;  // 16-byte words of eight elements
  float m_values[Layout::kMLoads];
  int4 n_values[Layout::kNLoads][kWords];

  // Place of a thread's i-th word: lanes run along what is contiguous in grad_logits.
  FM_DEVICE static void m_place(int i, int32_t& m, int32_t& k) {
    const int32_t idx = i * Layout::kThreads + (ptx::thread_idx() - config::kWarpgroup);
    if constexpr (kProduct == RouterProduct::kGradX) {
      k = idx % 8 + idx / 32 % 8 * 8;
      m = idx / 8 % 4 + idx / 256 * 4;
    } else {
      m = idx % Layout::kM;
      k = idx / Layout::kM;
    }
  }
  FM_DEVICE static void n_place(int i, int32_t& n, int32_t& k) {
    const int32_t idx = i * Layout::kThreads + (ptx::thread_idx() - config::kWarpgroup);
    n = idx % (Layout::kN / kVector) * kVector;
    k = idx / (Layout::kN / kVector);
  }

  FM_DEVICE void load(const kernel::BackwardParams& params, const RouterTile& tile, int32_t depth) {
    const auto& sizes = params.forward.sizes;
    const int32_t experts = sizes.num_experts;
    constexpr bool kIsX = kProduct == RouterProduct::kGradX;
    FM_UNROLL
    for (int i = 0; i < Layout::kMLoads; ++i) {
      int32_t m, k;
      m_place(i, m, k);
      const int32_t token = kIsX ? tile.m + m : depth + k;
      const int32_t expert = kIsX ? depth + k : tile.m + m;
      const bool exists = depth + k < tile.depth_end && token < sizes.tokens && expert < experts;
      m_values[i] = exists ? params.grad_logits[int64_t{token} * experts + expert] : 0.0f;
    }
    const auto* base =
        static_cast<const uint8_t*>(kIsX ? params.routing.w_router : params.forward.x);
    const int64_t stride = kIsX ? params.routing.w_router_stride : params.forward.x_stride;
    constexpr int kBytes = kWide ? 4 : config::kElementBytes;
    FM_UNROLL
    for (int i = 0; i < Layout::kNLoads; ++i) {
      int32_t n, k;
      n_place(i, n, k);
      const bool exists = depth + k < tile.depth_end && tile.n + n < sizes.hidden;
      const auto* from =
          reinterpret_cast<const int4*>(base + ((depth + k) * stride + tile.n + n) * kBytes);
      FM_UNROLL
      for (int word = 0; word < kWords; ++word) {
        n_values[i][word] = exists ? __ldg(from + word) : int4{};
      }
    }
  }

  FM_DEVICE void store(float* arena) const {
    FM_UNROLL
    for (int i = 0; i < Layout::kMLoads; ++i) {
      int32_t m, k;
      m_place(i, m, k);
      arena[k * Layout::kMStride + m] = m_values[i];
    }
    float* n_arena = arena + Layout::kDepth * Layout::kMStride;
    FM_UNROLL
    for (int i = 0; i < Layout::kNLoads; ++i) {
      int32_t n, k;
      n_place(i, n, k);
      auto* to = reinterpret_cast<float4*>(n_arena + k * Layout::kNStride + n);
      FM_UNROLL
      for (int half = 0; half < 2; ++half) {
        if constexpr (kWide) {
          to[half] = *reinterpret_cast<const float4*>(&n_values[i][half]);
        } else {
          const auto* words = reinterpret_cast<const uint32_t*>(&n_values[i][0]) + 2 * half;
          const float2 low = Element::unpack(words[0]);
          const float2 high = Element::unpack(words[1]);
          to[half] = {low.x, low.y, high.x, high.y};
        }
      }
    }
  }
};

// x as the sum of two values of 11 bits, as the tensor core reads them.
struct Tf32Pair {
  uint32_t high;
  uint32_t low;

  FM_DEVICE explicit Tf32Pair(float x) {
    high = __float_as_uint(x) & 0xFFFFE000u;
    low = __float_as_uint(x - __uint_as_float(high)) & 0xFFFFE000u;
  }
};

inline constexpr int32_t kRouterSums = 8;  // products of 16 x 8 of a warp: 16 of M, 64 of N

// One step's products, added to `sums`.
template <bool kWide>
FM_DEVICE void multiply_router_step(const float* arena, float (&sums)[kRouterSums][4]) {
  using Layout = RouterLayout;
  const int lane = ptx::lane_idx();
  const int warp = ptx::thread_idx() / 32 - config::kWarpgroup / 32;
  const float* m_at = arena + lane % 4 * Layout::kMStride + warp % 4 * 16 + lane / 4;
  const float* n_at = arena + Layout::kDepth * Layout::kMStride + lane % 4 * Layout::kNStride +
                      warp / 4 * 64 + lane / 4;
  float step[kRouterSums][4] = {};
#pragma unroll 2
  for (int k = 0; k < Layout::kDepth; k += 8) {
    uint32_t high[4], low[4];
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Tf32Pair pair(m_at[(k + i / 2 * 4) * Layout::kMStride + i % 2 * 8]);
      high[i] = pair.high;
      low[i] = pair.low;
    }
    FM_UNROLL
    for (int product = 0; product < kRouterSums; ++product) {
      const Tf32Pair b0(n_at[k * Layout::kNStride + product * 8]);
      const Tf32Pair b1(n_at[(k + 4) * Layout::kNStride + product * 8]);
      ptx::mma_m16n8k8_tf32(step[product], low, b0.high, b1.high);
      if constexpr (kWide) ptx::mma_m16n8k8_tf32(step[product], high, b0.low, b1.low);
      ptx::mma_m16n8k8_tf32(step[product], high, b0.high, b1.high);
    }
  }
  FM_UNROLL
  for (int product = 0; product < kRouterSums; ++product) {
    FM_UNROLL
    for (int i = 0; i < 4; ++i) sums[product][i] += step[product][i];
  }
}

// The sums of a tile, and of the thread's column of grad_logits if it has one. All math threads;
// barrier_idx: theirs.
template <class Element, RouterProduct kProduct, bool kWide>
FM_DEVICE double multiply_router_tile(const kernel::BackwardParams& params, float* arena,
                                      const RouterTile& tile, int barrier_idx,
                                      float (&sums)[kRouterSums][4]) {
  using Layout = RouterLayout;
  const int thread = ptx::thread_idx() - config::kWarpgroup;
  FM_UNROLL
  for (auto& product : sums) {
    FM_UNROLL
    for (float& value : product) value = 0.0f;
  }
  double column = 0.0;
  RouterStep<Element, kProduct, kWide> step;
  step.load(params, tile, tile.depth_begin);
#pragma unroll 1
  for (int32_t depth = tile.depth_begin; depth < tile.depth_end; depth += Layout::kDepth) {
    ptx::barrier_sync(barrier_idx, Layout::kThreads);
    step.store(arena);
    ptx::barrier_sync(barrier_idx, Layout::kThreads);
    if (depth + Layout::kDepth < tile.depth_end) step.load(params, tile, depth + Layout::kDepth);
    multiply_router_step<kWide>(arena, sums);
    if (kProduct == RouterProduct::kGradWeight && tile.n == 0 && thread < Layout::kM) {
#pragma unroll 4
      for (int k = 0; k < Layout::kDepth; ++k) {
        column += static_cast<double>(arena[k * Layout::kMStride + thread]);
      }
    }
  }
  return column;
}

// A thread's i-th sum of a product of a tile: its row (of M) and column (of N).
struct RouterPlace {
  int32_t m;
  int32_t n;

  FM_DEVICE RouterPlace(const RouterTile& tile, int product, int row) {
    const int lane = ptx::lane_idx();
    const int warp = ptx::thread_idx() / 32 - config::kWarpgroup / 32;
    m = tile.m + warp % 4 * 16 + lane / 4 + row * 8;
    n = tile.n + warp / 4 * 64 + product * 8 + lane % 4 * 2;
  }
};

// Adds a tile of the router's share to grad_x.
template <class Element>
FM_DEVICE void add_to_grad_x(const kernel::ForwardParams& forward, const RouterTile& tile,
                             const float (&sums)[kRouterSums][4]) {
  FM_UNROLL
  for (int product = 0; product < kRouterSums; ++product) {
    FM_UNROLL
    for (int row = 0; row < 2; ++row) {
      const RouterPlace place(tile, product, row);
      if (place.m >= forward.sizes.tokens || place.n >= forward.sizes.hidden) continue;
      auto* at = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(forward.y) +
                                             place.m * forward.y_stride + place.n);
      const float2 before = Element::unpack(*at);
      *at = Element::pack(before.x + sums[product][2 * row], before.y + sums[product][2 * row + 1]);
    }
  }
}

// Tiles of both products, dealt to the CTAs; the segments' sums of the weight's go to scratch. All
// math threads; arena: RouterLayout::kBytes.
template <class Element>
FM_DEVICE void multiply_router(const kernel::BackwardParams& params, float* arena,
                               int barrier_idx) {
  using Layout = RouterLayout;
  const auto& sizes = params.forward.sizes;
  const int32_t n_tiles = (sizes.hidden + Layout::kN - 1) / Layout::kN;
  const int32_t of_x = (sizes.tokens + Layout::kM - 1) / Layout::kM * n_tiles;
  const int32_t of_segment = (sizes.num_experts + Layout::kM - 1) / Layout::kM * n_tiles;
  const int32_t segment_tokens =
      (sizes.tokens + config::kRouterSegments - 1) / config::kRouterSegments;
  const int32_t num_tiles = of_x + config::kRouterSegments * of_segment;
  float sums[kRouterSums][4];
  // The weight's first: they are the longer ones.
  for (int32_t i = blockIdx.x; i < num_tiles; i += gridDim.x) {
    const int32_t weight_tile = i;
    const int32_t x_tile = i - config::kRouterSegments * of_segment;
    if (x_tile >= 0) {
      const RouterTile tile{x_tile / n_tiles * Layout::kM, x_tile % n_tiles * Layout::kN, 0,
                            sizes.num_experts};
      if (params.routing.w_router_is_wide) {
        multiply_router_tile<Element, RouterProduct::kGradX, true>(params, arena, tile, barrier_idx,
                                                                   sums);
      } else {
        multiply_router_tile<Element, RouterProduct::kGradX, false>(params, arena, tile,
                                                                    barrier_idx, sums);
      }
      add_to_grad_x<Element>(params.forward, tile, sums);
      continue;
    }
    const int32_t segment = weight_tile / of_segment;
    const int32_t place = weight_tile - segment * of_segment;
    const RouterTile tile{place / n_tiles * Layout::kM, place % n_tiles * Layout::kN,
                          segment * segment_tokens,
                          min((segment + 1) * segment_tokens, sizes.tokens)};
    const double column = multiply_router_tile<Element, RouterProduct::kGradWeight, false>(
        params, arena, tile, barrier_idx, sums);
    const int32_t thread = ptx::thread_idx() - config::kWarpgroup;
    float* part =
        params.router_parts + segment * config::router_part_words(sizes.num_experts, sizes.hidden);
    if (tile.n == 0 && thread < Layout::kM && tile.m + thread < sizes.num_experts) {
      part[int64_t{sizes.num_experts} * sizes.hidden + tile.m + thread] =
          static_cast<float>(column);
    }
    FM_UNROLL
    for (int product = 0; product < kRouterSums; ++product) {
      FM_UNROLL
      for (int row = 0; row < 2; ++row) {
        const RouterPlace at(tile, product, row);
        if (at.m >= sizes.num_experts || at.n >= sizes.hidden) continue;
        *reinterpret_cast<float2*>(part + int64_t{at.m} * sizes.hidden + at.n) = {
            sums[product][2 * row], sums[product][2 * row + 1]};
      }
    }
  }
}

// Adds the segments of grad_w_router and of the bias's gradient. All math threads of all CTAs.
FM_DEVICE void reduce_router(const kernel::BackwardParams& params) {
  const auto& sizes = params.forward.sizes;
  const auto& routing = params.routing;
  const int32_t of_weight = sizes.num_experts * sizes.hidden;
  const int64_t of_segment = config::router_part_words(sizes.num_experts, sizes.hidden);
  const int32_t thread =
      blockIdx.x * RouterLayout::kThreads + ptx::thread_idx() - config::kWarpgroup;
  for (int32_t i = thread; i < of_weight + sizes.num_experts;
       i += gridDim.x * RouterLayout::kThreads) {
    float parts[config::kRouterSegments];
    FM_UNROLL
    for (int segment = 0; segment < config::kRouterSegments; ++segment) {
      parts[segment] = params.router_parts[segment * of_segment + i];
    }
    float sum = 0.0f;
    FM_UNROLL
    for (const float part : parts) sum += part;
    if (i < of_weight) {
      if (routing.grad_w_router.data == nullptr) continue;
      const int32_t e = i / sizes.hidden;
      tile::write_real(routing.grad_w_router, e, i - e * sizes.hidden, sum);
    } else if (routing.grad_router_bias.data != nullptr) {
      tile::write_real(routing.grad_router_bias, i - of_weight, 0, sum);
    }
  }
}

}  // namespace flashmoe::cuda::stage
