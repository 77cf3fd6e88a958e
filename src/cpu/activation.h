// The expert's activation and its derivative on spans of one row.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace flashmoe::cpu {

struct ActivationSpec {
  int32_t kind = FM_SILU;  // fm_activation
  bool gated = true;
  double alpha = 1.0;      // silu: x * sigmoid(alpha * x)
  double limit = 0.0;      // > 0: gate = min(gate, limit), up = clamp(up, -limit, limit)
  double up_offset = 0.0;  // added to the clamped up value
};

// Pre-activations of one row: element i at gate[i * stride] and up[i * stride]; up is unused by a
// plain (not gated) activation.
template <class A>
struct PreActivation {
  const A* gate;
  const A* up;
  int64_t stride;
};

// out[i] = act(gate_i) * (up_i + offset), or act(gate_i). count elements.
template <class A>
void activate(const ActivationSpec& spec, const PreActivation<A>& z, A* out, int64_t count);

// As activate(), and grad_gate[i], grad_up[i] (same stride as z) = d out / d z times grad_out[i].
template <class A>
void activate_backward(const ActivationSpec& spec, const PreActivation<A>& z, const A* grad_out,
                       A* out, A* grad_gate, A* grad_up, int64_t count);

}  // namespace flashmoe::cpu
