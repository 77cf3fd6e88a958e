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
struct PlainSiluSlope {  // of alpha 1
  static constexpr bool kClamps = false;
  FM_DEVICE ValueSlope operator()(float x) const {
    const float s = sigmoid_of(x);
    const float value = x * s;
    return {value, fmaf(value, 1.0f - s, s)};
  }
};
struct SiluSlope {
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
struct ReluSlope {
  FM_DEVICE ValueSlope operator()(float x) const {
    return {x > 0.0f ? x : 0.0f * x, x > 0.0f ? 1.0f : 0.0f};
  }
};
struct ReluSquaredSlope {
  FM_DEVICE ValueSlope operator()(float x) const {
    return {x > 0.0f ? x * x : 0.0f * x, x > 0.0f ? 2.0f * x : 0.0f};
  }
};
struct IdentitySlope {
  FM_DEVICE ValueSlope operator()(float x) const { return {x, 1.0f}; }
};

// A function behind the layer's clamp.
template <class Function>
struct ClampedSlope {
  static constexpr bool kClamps = true;
  Function function;
  float limit;
  FM_DEVICE ValueSlope operator()(float x) const {
    const ValueSlope at = function(at_most(x, limit));
    return {at.value, x > limit ? 0.0f : at.slope};
  }
};

// Calls use(function) with the activation that the launch asks for.
template <class Use>
FM_DEVICE void with_slope(const config::Activation& activation, const Use& use) {
  const auto use_clamped = [&](const auto& function) {
    use(ClampedSlope<std::decay_t<decltype(function)>>{function, activation.limit});
  };
  if (activation.kind == FM_SILU) {
    const bool clamps = activation.limit < std::numeric_limits<float>::infinity();
    if (!clamps && activation.up_offset == 0.0f && activation.alpha == 1.0f) {
      return use(PlainSiluSlope{});
    }
    return use_clamped(SiluSlope{activation.alpha});
  }
  if (activation.kind == FM_GELU_TANH) return use_clamped(GeluTanhSlope{});
  if (activation.kind == FM_GELU_ERF) return use_clamped(GeluErfSlope{});
  if (activation.kind == FM_RELU) return use_clamped(ReluSlope{});
  if (activation.kind == FM_RELU2) return use_clamped(ReluSquaredSlope{});
  use_clamped(IdentitySlope{});
}

// What one hidden element gives: A, and what its gradient sends to gate (or x) and up.
struct HiddenSlopes {
  float activated;
  float grad_gate;
  float grad_up;
};

// at_gate: of the gate (or x), clamped where the function does so; grad: at A. The clamp passes
// gradients on the bound itself, as torch.clamp does.
template <bool kGated, class Function>
FM_DEVICE HiddenSlopes differentiate(const config::Activation& activation, ValueSlope at_gate,
                                     float up, float grad) {
  if constexpr (!kGated) return {at_gate.value, grad * at_gate.slope, 0.0f};
  if constexpr (!Function::kClamps) {
    return {at_gate.value * up, grad * up * at_gate.slope, grad * at_gate.value};
  }
  const float limit = activation.limit;
  const float factor = at_least(at_most(up, limit), -limit) + activation.up_offset;
  const float to_up = fabsf(up) > limit ? 0.0f : grad * at_gate.value;
  return {at_gate.value * factor, grad * factor * at_gate.slope, to_up};
}

}  // namespace flashmoe::cuda::tile
