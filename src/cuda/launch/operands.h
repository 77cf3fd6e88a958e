// What the launches of both directions read of a layer and its operands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/config/activation.h"
#include "cuda/kernel/forward.h"
#include "cuda/launch/check.h"
#include "flashmoe/c_api.h"
#include "plan/layout.h"
#include "plan/problem.h"
#include "plan/routing.h"

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

// What routing, plan and combine need; blocks and column blocks are the direction's own.
inline config::ForwardSizes routed_sizes(const fm_layer& layer, const plan::Problem& problem) {
  config::ForwardSizes sizes{};
  sizes.tokens = static_cast<int32_t>(problem.tokens);
  sizes.hidden = static_cast<int32_t>(problem.hidden);
  sizes.intermediate = static_cast<int32_t>(problem.intermediate);
  sizes.num_experts = static_cast<int32_t>(problem.num_experts);
  sizes.top_k = static_cast<int32_t>(problem.top_k);
  sizes.route_tiles = static_cast<int32_t>(plan::num_chunks(problem.tokens));
  sizes.capacity = static_cast<int32_t>(plan::expert_capacity(layer.capacity_factor, problem));
  sizes.combine_tokens = choose_combine_tokens(problem.tokens);
  sizes.has_few_tiles = sizes.route_tiles <= config::kFewTiles;
  sizes.has_few_slots = sizes.has_few_tiles && problem.slots() <= config::kFewSlots;
  return sizes;
}

// Sixteen-byte accesses: base and strides of rows. A tensor map's strides are under 2^40 bytes.
inline std::string refuse_rows(const char* name, const fm_tensor& tensor, int64_t element_bytes) {
  const int64_t unit = 16 / element_bytes;
  const int64_t most = (int64_t{1} << 40) / element_bytes - unit;
  if (!present(tensor) || tensor.shape[0] == 0) return {};
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0) {
    return text_of(name, " starts at ", tensor.data, "; accepted: multiples of 16 bytes");
  }
  for (int32_t dim = 0; dim < tensor.ndim; ++dim) {
    if (tensor.stride[dim] == 1 || tensor.shape[dim] == 1) continue;
    const int64_t stride = tensor.stride[dim];
    if (stride < 0 || stride > most || stride % unit != 0) {
      return text_of(name, " has stride ", stride, " in dimension ", dim,
                     "; accepted on CUDA: multiples of ", unit, " from 0 to ", most);
    }
  }
  return {};
}

}  // namespace flashmoe::cuda::launch
