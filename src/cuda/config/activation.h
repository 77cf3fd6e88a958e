// What a launch does to sums before it stores them: runtime values, on host and device.
#pragma once

#include <cstdint>
#include <limits>

#include "flashmoe/c_api.h"

namespace flashmoe::cuda::config {

// act(x) of kind `kind`; gated: act(gate) * (up + up_offset). The limit clamps what goes in: gate
// (or x) from above, up from both sides.
struct Activation {
  fm_activation kind = FM_SILU;
  float alpha = 1.0f;  // silu: x * sigmoid(alpha * x)
  float limit = std::numeric_limits<float>::infinity();
  float up_offset = 0.0f;
};

// Bias [num_experts, per_expert] of the products' element type, added to the sums; data may be
// null, expert_stride leads from one expert's to the next. Out column c has its bias at c *
// column_stride; half_offset leads from the first half of a tile to the second (to the next 64
// columns, or from gate to up).
struct BiasView {
  const void* data;
  int64_t per_expert;
  int64_t expert_stride;
  int32_t column_stride;
  int32_t half_offset;
};

}  // namespace flashmoe::cuda::config
