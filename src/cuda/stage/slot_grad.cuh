// Gradients of the slots' weights, and of the router's logits: the rules of cpu/router.cpp. A warp
// takes a token; lane j has slot j.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/stage/choose.cuh"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/strided.cuh"

namespace flashmoe::cuda::stage {

// The same in all lanes. Whole warp.
FM_DEVICE float warp_sum(float x) {
  FM_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}
FM_DEVICE float warp_max(float x) {
  FM_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

// <a, b> of two rows of 16-bit elements, on multiples of 16 bytes. Whole warp.
template <class Element>
FM_DEVICE float dot_rows(const uint16_t* a, const uint16_t* b, int32_t columns) {
  float sum = 0.0f;
#pragma unroll 2
  for (int32_t i = ptx::lane_idx() * kVector; i < columns; i += 32 * kVector) {
    const int4 left = *reinterpret_cast<const int4*>(a + i);
    const int4 right = *reinterpret_cast<const int4*>(b + i);
    const auto* x = reinterpret_cast<const uint32_t*>(&left);
    const auto* y = reinterpret_cast<const uint32_t*>(&right);
    FM_UNROLL
    for (int word = 0; word < 4; ++word) {
      const float2 p = Element::unpack(x[word]);
      const float2 q = Element::unpack(y[word]);
      sum = fmaf(p.x, q.x, sum);
      sum = fmaf(p.y, q.y, sum);
    }
  }
  return warp_sum(sum);
}

// Where a token of this rank has the rows that its slots' gradients are made of. Asked for where
// they are needed, to hold fewer registers.
struct OwnOperands {
  const kernel::BackwardParams& params;
  int32_t token;

  FM_DEVICE const uint16_t* x() const { return token_of(params.forward, token); }
  FM_DEVICE const uint16_t* grad_y() const {
    return static_cast<const uint16_t*>(params.grad_y) + token * params.grad_y_stride;
  }
};

// Share of a slot's weight gradient that is a product of two rows: <b_down[e], dY>, or with the
// weight on the input <x, dX of the row>. Whole warp.
template <class Element, class Operands>
FM_DEVICE float row_share(const kernel::BackwardParams& params, const Operands& token, int32_t row,
                          int32_t local_expert_idx) {
  const auto& forward = params.forward;
  const int32_t hidden = forward.sizes.hidden;
  if (params.sizes.weight_on_input) {
    return dot_rows<Element>(
        token.x(), static_cast<const uint16_t*>(forward.memory.rows) + int64_t{row} * hidden,
        hidden);
  }
  const auto& bias = params.routing.b_down;
  const uint16_t* grad_y = token.grad_y();
  float sum = 0.0f;
#pragma unroll 2
  for (int32_t i = ptx::lane_idx(); i < hidden; i += 32) {
    const float g = Element::unpack(grad_y[i]).x;
    sum = fmaf(g, tile::read_real(bias, local_expert_idx, i), sum);
  }
  return warp_sum(sum);
}

// The gradient of the weight of the lane's slot, from its row on this rank; 0 without one (below
// 0). Whole warp.
template <class Element, class Operands>
FM_DEVICE float gradient_of_row(const kernel::BackwardParams& params, const Operands& token,
                                int32_t row, int32_t local_expert_idx) {
  const int32_t lane = ptx::lane_idx();
  float sum = 0.0f;
  if (row >= 0 && !params.sizes.weight_on_input) {
    const float* part = params.parts + row;
#pragma unroll 8
    for (int32_t i = 0; i < params.sizes.hidden_tiles; ++i) {
      sum += part[int64_t{i} * params.sizes.max_rows];
    }
  }
  if (params.sizes.weight_on_input || params.routing.b_down.data != nullptr) {
    for (int32_t j = 0; j < params.forward.sizes.top_k; ++j) {
      const int32_t row_of_j = __shfl_sync(kAllLanes, row, j);
      if (row_of_j < 0) continue;
      const int32_t expert_of_j = __shfl_sync(kAllLanes, local_expert_idx, j);
      const float share = row_share<Element>(params, token, row_of_j, expert_of_j);
      if (lane == j) sum += share;
    }
  }
  return sum;
}

// The gradient of the weight of the lane's slot, of a rank alone. Whole warp.
template <class Element>
FM_DEVICE float slot_gradient(const kernel::BackwardParams& params, int32_t token) {
  const auto& forward = params.forward;
  const int32_t lane = ptx::lane_idx();
  const int64_t slot = int64_t{token} * forward.sizes.top_k + lane;
  const bool has_slot = lane < forward.sizes.top_k;
  const int32_t row = has_slot ? forward.memory.slot_row[slot] : kNoExpert;
  const int32_t expert_idx = has_slot ? forward.memory.ids[slot] : kNoExpert;
  const float sum = gradient_of_row<Element>(params, OwnOperands{params, token}, row, expert_idx);
  return row == kUndefined ? not_a_number() : sum;
}

// What the gating's derivative needs of all experts' logits: the softmax's largest and its sum.
// Whole warp.
struct SoftmaxOfAll {
  float top;
  float sum;

  FM_DEVICE SoftmaxOfAll(const float* logits, int32_t num_experts) : top(-infinity()), sum(0.0f) {
    for (int32_t e = ptx::lane_idx(); e < num_experts; e += 32) top = fmaxf(top, logits[e]);
    top = warp_max(top);
    for (int32_t e = ptx::lane_idx(); e < num_experts; e += 32) sum += expf(logits[e] - top);
    sum = warp_sum(sum);
  }
  FM_DEVICE float of(float logit) const { return divide(expf(logit - top), sum); }
};

// Weight of the lane's slot before renormalisation and scale; 0 without a slot. Whole warp.
FM_DEVICE float raw_weight(int32_t score, float logit, bool has_expert, const SoftmaxOfAll& all) {
  if (score == FM_SCORE_TOPK_SOFTMAX) {
    const float top = warp_max(has_expert ? logit : -infinity());
    const float value = has_expert ? expf(logit - top) : 0.0f;
    return divide(value, fmaxf(warp_sum(value), 1e-37f));
  }
  if (!has_expert) return 0.0f;
  if (score == FM_SCORE_SOFTMAX) return all.of(logit);
  return score == FM_SCORE_SIGMOID ? sigmoid(logit) : square_root(softplus(logit));
}

// What the lane's slot adds to its logit's gradient. dot: sum of raw times gradient over the slots.
FM_DEVICE float slope_of_score(int32_t score, float logit, float raw, float grad_raw, float dot) {
  switch (score) {
    case FM_SCORE_SOFTMAX:
      return raw * grad_raw;
    case FM_SCORE_TOPK_SOFTMAX:
      return raw * (grad_raw - dot);
    case FM_SCORE_SIGMOID:
      return raw * (1.0f - raw) * grad_raw;
    default:
      // Both vanish together at -inf.
      return raw > 0.0f ? divide(sigmoid(logit), 2.0f * raw) * grad_raw : 0.0f;
  }
}

// The token's gradients of logits as sums of two elements, which the router's tiles read; zeros
// behind the last expert. Whole warp.
template <class Element>
FM_DEVICE void split_logits(const kernel::BackwardParams& params, int32_t token,
                            const float* grad_logits) {
  const int32_t depth = config::router_depth(params.forward.sizes.num_experts);
  const int32_t padded_experts = config::router_padded(params.forward.sizes.num_experts);
  auto* parts = static_cast<uint32_t*>(params.grad_logit_terms) +
                int64_t{token} * config::kLogitTerms * (depth / 2);
  __syncwarp();
  for (int32_t pair = ptx::lane_idx(); pair < depth / 2; pair += 32) {
    float2 grad = {0.0f, 0.0f};
    if (2 * pair < padded_experts) grad = reinterpret_cast<const float2*>(grad_logits)[pair];
    const uint32_t high = Element::pack(grad.x, grad.y);
    const float2 taken = Element::unpack(high);
    parts[pair] = high;
    parts[depth / 2 + pair] = Element::pack(grad.x - taken.x, grad.y - taken.y);
  }
}

// grad_logits[token] from the gradient of the lane's slot weight. Whole warp.
template <class Element>
FM_DEVICE void differentiate_router(const kernel::BackwardParams& params, int32_t token,
                                    float grad_weight) {
  const auto& sizes = params.forward.sizes;
  const auto& router = params.forward.router;
  const auto& routing = params.routing;
  const int32_t lane = ptx::lane_idx();
  const float* logits = routing.logits + int64_t{token} * sizes.num_experts;
  const int32_t padded_experts = config::router_padded(sizes.num_experts);
  float* grad_logits = params.grad_logits + int64_t{token} * padded_experts;
  const bool has_slot = lane < sizes.top_k;
  const int32_t id =
      has_slot ? params.forward.memory.ids[int64_t{token} * sizes.top_k + lane] : kNoExpert;
  if (has_slot && routing.grad_weights.data != nullptr) {
    grad_weight += tile::read_real(routing.grad_weights, token, lane);
  }
  if (!has_slot) grad_weight = 0.0f;
  const float logit = id >= 0 ? logits[id] : -infinity();
  const SoftmaxOfAll all(logits, sizes.num_experts);
  const float raw = raw_weight(router.score, logit, id >= 0, all);
  float mean = 0.0f;  // subtracted first: with k = 1 the difference is exactly 0
  float sum = 1.0f;
  if (router.renormalize) {
    sum = warp_sum(raw) + kRenormalizeEps;
    mean = warp_sum(grad_weight * divide(raw, sum));
  }
  const float grad_raw = has_slot ? divide(router.scale * (grad_weight - mean), sum) : 0.0f;
  const float dot = warp_sum(raw * grad_raw);
  for (int32_t e = lane; e < padded_experts; e += 32) {
    float grad = 0.0f;
    if (e < sizes.num_experts) {
      if (routing.grad_logits.data != nullptr)
        grad = tile::read_real(routing.grad_logits, token, e);
      if (router.score == FM_SCORE_SOFTMAX) grad -= all.of(logits[e]) * dot;
    }
    grad_logits[e] = grad;
  }
  __syncwarp();
  if (id >= 0) grad_logits[id] += slope_of_score(router.score, logit, raw, grad_raw, dot);
  if (params.sizes.share_tokens > 0) split_logits<Element>(params, token, grad_logits);
}

// What becomes of the gradient of the lane's slot of a token of this rank. Whole warp.
template <class Element>
FM_DEVICE void finish_slots(const kernel::BackwardParams& params, int32_t token, float gradient) {
  if (params.routing.w_router != nullptr) {
    differentiate_router<Element>(params, token, gradient);
  } else if (ptx::lane_idx() < params.forward.sizes.top_k) {
    tile::write_real(params.routing.grad_topk_weights, token, ptx::lane_idx(), gradient);
  }
}

// Zeros for the tokens that grad_logits is rounded up by. Whole warp.
FM_DEVICE void clear_logit_padding(const kernel::BackwardParams& params) {
  const auto& sizes = params.forward.sizes;
  const int32_t stride = config::router_padded(sizes.num_experts);
  const int64_t end = int64_t{config::router_padded(sizes.tokens)} * stride;
  for (int64_t i = int64_t{sizes.tokens} * stride + ptx::lane_idx(); i < end; i += 32) {
    params.grad_logits[i] = 0.0f;
  }
}

// All tokens of a rank alone, dealt to num_workers warps. Whole warp.
template <class Element>
FM_DEVICE void differentiate_slots(const kernel::BackwardParams& params, int32_t worker_idx,
                                   int32_t num_workers) {
  if (!params.routing.any_slot()) return;
  for (int32_t token = worker_idx; token < params.forward.sizes.tokens; token += num_workers) {
    finish_slots<Element>(params, token, slot_gradient<Element>(params, token));
  }
}

}  // namespace flashmoe::cuda::stage
