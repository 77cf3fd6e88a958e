// Activation functions with their slopes, and a gated or plain layer's derivatives.
#pragma once

#include <limits>

#include "cuda/tile/activation.cuh"

namespace flashmoe::cuda::tile {

struct ValueSlope {
  float value;
  float slope;
};

FM_DEVICE float sigmoid_of(float x) { return ptx::rcp(1.0f + exp_of_minus(x)); }

// kClamps: whether the layer's limit and offset are asked for. A third of the instructions of most
// layers' elements would go into those that they do not have.
template <bool kWithClamps>
struct SiluSlope {
  static constexpr bool kClamps = kWithClamps;
  float alpha;
  FM_DEVICE ValueSlope operator()(float x) const {
    const float s = sigmoid_of(alpha * x);
    const float value = x * s;
    return {value, fmaf(alpha * value, 1.0f - s, s)};
  }
};
struct GeluTanhSlope {
  static constexpr bool kClamps = true;
  // (1 + tanh(u)) / 2 is sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
  FM_DEVICE ValueSlope operator()(float x) const {
    constexpr float kTwiceScale = 1.59576912160573071f;  // 2 sqrt(2 / pi)
    const float bent = kTwiceScale * 0.044715f * x * x;
    const float s = sigmoid_of(x * (kTwiceScale + bent));
    const float value = x * s;
    return {value, fmaf(value * (1.0f - s), fmaf(3.0f, bent, kTwiceScale), s)};
  }
};
struct GeluErfSlope {
  static constexpr bool kClamps = true;
  FM_DEVICE ValueSlope operator()(float x) const {
    constexpr float kSqrtHalf = 0.70710678118654752f;
    constexpr float kInverseSqrtTwoPi = 0.39894228040143268f;
    const float density = kInverseSqrtTwoPi * exp_of_minus(0.5f * x * x);
    const float cdf = 0.5f * (1.0f + erf_of(x, kSqrtHalf));
    return {x * cdf, fmaf(x, density, cdf)};
  }
};
// relu, its square, and the identity.
struct PowerSlope {
  static constexpr bool kClamps = true;
  bool is_square;
  bool is_linear;
  FM_DEVICE ValueSlope operator()(float x) const {
    const bool passes = is_linear || x > 0.0f;
    const float slope = is_square ? 2.0f * x : 1.0f;
    return {passes ? (is_square ? x * x : x) : 0.0f * x, passes ? slope : 0.0f};
  }
};

// Calls use(function) with the activation that the launch asks for.
template <class Use>
FM_DEVICE void with_slope(const config::Activation& activation, const Use& use) {
  if (activation.kind == FM_SILU) {
    if (activation.limit < std::numeric_limits<float>::infinity() || activation.up_offset != 0.0f) {
      return use(SiluSlope<true>{activation.alpha});
    }
    return use(SiluSlope<false>{activation.alpha});
  }
  if (activation.kind == FM_GELU_TANH) return use(GeluTanhSlope{});
  if (activation.kind == FM_GELU_ERF) return use(GeluErfSlope{});
  use(PowerSlope{activation.kind == FM_RELU2, activation.kind == FM_IDENTITY});
}

// What one hidden element gives: A, and what its gradient sends to gate (or x) and up.
struct HiddenSlopes {
  float activated;
  float grad_gate;
  float grad_up;
};

// grad: at A. The clamp passes gradients on the bound itself, as torch.clamp does.
template <bool kGated, class Function>
FM_DEVICE HiddenSlopes differentiate(const config::Activation& activation, const Function& function,
                                     float gate, float up, float grad) {
  if constexpr (kGated && !Function::kClamps) {
    const ValueSlope at_gate = function(gate);
    return {at_gate.value * up, grad * up * at_gate.slope, grad * at_gate.value};
  }
  const float limit = activation.limit;
  const ValueSlope at_gate = function(at_most(gate, limit));
  const float slope = gate > limit ? 0.0f : at_gate.slope;
  if constexpr (!kGated) return {at_gate.value, grad * slope, 0.0f};
  const float factor = at_least(at_most(up, limit), -limit) + activation.up_offset;
  const float to_up = fabsf(up) > limit ? 0.0f : grad * at_gate.value;
  return {at_gate.value * factor, grad * factor * slope, to_up};
}

}  // namespace flashmoe::cuda::tile
