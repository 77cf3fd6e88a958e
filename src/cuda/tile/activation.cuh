// What happens to a tile's sums before they are stored: bias, clamp, activation, gate times up.
#pragma once

#include <type_traits>

#include "cuda/config/activation.h"
#include "cuda/ptx/exp2.cuh"
#include "cuda/tile/element.cuh"

namespace flashmoe::cuda::tile {

// e^-x.
FM_DEVICE float exp_of_minus(float x) {
  constexpr float kLog2E = 1.44269504088896341f;
  return ptx::ex2(-kLog2E * x);
}

// x * sigmoid(x * slope), within 2 ulp of fp32. Minus infinity gives NaN, as the plain form does.
FM_DEVICE float times_sigmoid(float x, float slope) {
  return __fdividef(x, 1.0f + exp_of_minus(slope * x));
}

// erf(scale x) within 2e-7, scale > 0: log2(erfc(t)) over [0, 4] as a polynomial, fitted by least
// squares weighted with erfc. The compiler's erff keeps seven coefficients in registers, which the
// epilogue does not have.
FM_DEVICE float erf_of(float x, float scale = 1.0f) {
  constexpr float kCoefficients[] = {-1.6279086f,    -0.91841638f,    -0.14848162f,
                                     0.028253688f,   -0.00077463558f, -0.0014894385f,
                                     0.00044550683f, -4.5358524e-05f};
  const float t = fminf(fabsf(x) * scale, 4.0f);
  float sum = kCoefficients[7];
  FM_UNROLL
  for (int i = 6; i >= 0; --i) sum = fmaf(sum, t, kCoefficients[i]);
  const float erf = copysignf(1.0f - ptx::ex2(sum * t), x);
  return x == x ? erf : x;  // fminf drops a NaN
}

// The activation functions of c_api.h's fm_activation, in fp32. NaN stays NaN.
struct Silu {
  float alpha;
  FM_DEVICE float operator()(float x) const { return times_sigmoid(x, alpha); }
};
struct GeluErf {
  FM_DEVICE float operator()(float x) const {
    constexpr float kSqrtHalf = 0.70710678118654752f;
    return 0.5f * x * (1.0f + erf_of(x, kSqrtHalf));
  }
};
struct GeluTanh {
  // (1 + tanh(u)) / 2 is sigmoid(2 u).
  FM_DEVICE float operator()(float x) const {
    constexpr float kTwiceScale = 1.59576912160573071f;  // 2 sqrt(2 / pi)
    return times_sigmoid(x, kTwiceScale * (1.0f + 0.044715f * x * x));
  }
};
struct Relu {
  FM_DEVICE float operator()(float x) const { return x > 0.0f ? x : 0.0f * x; }
};
struct ReluSquared {
  FM_DEVICE float operator()(float x) const { return x > 0.0f ? x * x : 0.0f * x; }
};
struct Identity {
  FM_DEVICE float operator()(float x) const { return x; }
};

// Selects, not fminf: a NaN must stay one.
FM_DEVICE float at_most(float x, float limit) { return x > limit ? limit : x; }
FM_DEVICE float at_least(float x, float limit) { return x < limit ? limit : x; }

// Calls use(function) with the activation function of a launch.
template <class Use>
FM_DEVICE void with_function(const config::Activation& activation, const Use& use) {
  switch (activation.kind) {
    case FM_SILU:
      return use(Silu{activation.alpha});
    case FM_GELU_ERF:
      return use(GeluErf{});
    case FM_GELU_TANH:
      return use(GeluTanh{});
    case FM_RELU:
      return use(Relu{});
    case FM_RELU2:
      return use(ReluSquared{});
    default:
      return use(Identity{});
  }
}

// What a gate and its up value become.
template <class Function>
FM_DEVICE float gated_value(const Function& function, const config::Activation& activation,
                            float gate, float up) {
  const float limit = activation.limit;
  const float clamped = at_least(at_most(up, limit), -limit);
  return function(at_most(gate, limit)) * (clamped + activation.up_offset);
}

// Bias of this thread's weight rows: it has rows lane / 4 and lane / 4 + 8 of its warp's 16, in
// either half of the tile. Zeros where there is none.
struct RowBias {
  float values[2][2];  // [half][row]

  // Sums 0 and 1 of four belong to the first row, 2 and 3 to the second.
  FM_DEVICE float of(int half, int i) const { return values[half][i / 2 % 2]; }
};

template <class Config>
FM_DEVICE RowBias load_bias(const config::BiasView& bias, int32_t local_expert_idx,
                            int32_t weight_tile_idx) {
  using Element = typename ElementOf<Config::value.element>::Type;
  const int32_t thread = ptx::thread_idx() % config::kWarpgroup;
  const int32_t column =
      weight_tile_idx * Config::value.weight_step() + thread / 32 * 16 + thread % 32 / 4;
  const auto* of_expert = static_cast<const Element*>(bias.data);
  if (of_expert != nullptr) of_expert += local_expert_idx * bias.expert_stride;
  RowBias result;
  FM_UNROLL
  for (int half = 0; half < 2; ++half) {
    FM_UNROLL
    for (int row = 0; row < 2; ++row) {
      const int64_t at = int64_t{column + 8 * row} * bias.column_stride + half * bias.half_offset;
      const bool exists = of_expert != nullptr && at < bias.per_expert;
      result.values[half][row] = exists ? static_cast<float>(of_expert[at]) : 0.0f;
    }
  }
  return result;
}

// What is stored for the sums of a tile, computed where it is read: sums that were changed in place
// would make ptxas serialise the products (C7515).
template <class Config, class Function>
struct Results {
  const float* sums;
  RowBias bias;
  config::Activation activation;
  Function function;

  FM_DEVICE float biased(int half, int i) const {
    return sums[half * (Config::value.max_tokens / 2) + i] + bias.of(half, i);
  }
  FM_DEVICE float combine(float gate, float up) const {
    return gated_value(function, activation, gate, up);
  }
  // Of the half's i-th sum; gated, of a gate and its up sum (half 0 only).
  FM_DEVICE float operator()(int half, int i) const {
    if constexpr (Config::value.epilogue == config::Epilogue::kStore) return biased(half, i);
    if constexpr (Config::value.gated()) return combine(biased(0, i), biased(1, i));
    return function(at_most(biased(half, i), activation.limit));
  }
  // Where gate and up rows alternate. Thread row t = lane / 4 has weight rows t (sum i) and t + 8
  // (sum i + 2) of its warp's 16; out column t of 8 needs rows 2 t and 2 t + 1. Two exchanges serve
  // all: even thread rows have gates and send row t first, odd ones ups and send row t + 8 first.
  // Whole warp.
  FM_DEVICE float of_pair(int half, int i) const {
    constexpr uint32_t kAll = 0xFFFFFFFF;
    const int lane = ptx::lane_idx();
    const int row = lane / 4;
    const bool is_odd = row % 2 != 0;
    const bool is_low = row < 4;
    const float here = biased(half, i);
    const float below = biased(half, i + 2);
    const int even_lane = row % 4 * 8 + lane % 4;
    const float first = __shfl_sync(kAll, is_odd ? below : here, even_lane + (is_low ? 0 : 4));
    const float second = __shfl_sync(kAll, is_odd ? here : below, even_lane + (is_low ? 4 : 0));
    return is_low ? combine(first, second) : combine(second, first);
  }
};

// Calls use(results) with the results that the launch asks for.
template <class Config, class Use>
FM_DEVICE void with_results(const float* sums, const config::Activation& activation,
                            const RowBias& bias, const Use& use) {
  const auto use_function = [&](const auto& function) {
    use(Results<Config, std::decay_t<decltype(function)>>{sums, bias, activation, function});
  };
  if constexpr (Config::value.epilogue == config::Epilogue::kStore) {
    use_function(Identity{});
    return;
  }
  with_function(activation, use_function);
}

}  // namespace flashmoe::cuda::tile
