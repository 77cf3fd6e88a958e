// What the launches of both directions read of a layer and its operands.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/config/activation.h"
#include "cuda/kernel/forward.h"
#include "flashmoe/c_api.h"
#include "plan/problem.h"

namespace flashmoe::cuda::launch {

inline bool present(const fm_tensor& tensor) { return tensor.data != nullptr; }

inline kernel::StridedView strided(const fm_tensor& tensor) {
  return {tensor.data, tensor.stride[0], tensor.ndim > 1 ? tensor.stride[1] : 0, tensor.dtype};
}

inline bool is_separate(const fm_layer& layer) {
  return layer.gated != 0 && layer.gate_layout == FM_GATE_SEPARATE;
}

inline config::Element element_of(const fm_layer& layer) {
  return layer.dtype == FM_BF16 ? config::Element::kBf16 : config::Element::kFp16;
}

inline config::Activation activation_of(const fm_layer& layer) {
  config::Activation activation;
  activation.kind = static_cast<fm_activation>(layer.activation);
  activation.alpha = static_cast<float>(layer.act_alpha);
  if (layer.act_limit > 0) activation.limit = static_cast<float>(layer.act_limit);
  activation.up_offset = static_cast<float>(layer.up_offset);
  return activation;
}

inline plan::Problem problem_of(const fm_layer& layer, int64_t tokens) {
  plan::Problem problem;
  problem.tokens = tokens;
  problem.hidden = layer.hidden;
  problem.intermediate = layer.intermediate;
  problem.num_experts = layer.num_experts;
  problem.top_k = layer.top_k;
  problem.gates = layer.gated != 0 ? 2 : 1;
  return problem;
}

// Every warp of 132 SMs has a few units of a column block, and a unit is at most eight tokens.
inline int32_t choose_combine_tokens(int64_t tokens) {
  constexpr int64_t kUnits = 4096;
  return static_cast<int32_t>(std::clamp<int64_t>(tokens / kUnits, 1, 8));
}

}  // namespace flashmoe::cuda::launch
