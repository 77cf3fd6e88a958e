// Gradients of the experts' biases: sums over an expert's rows, in row order (source after source
// where they have rows apart) and fp64 (a long fp32 sum would be less exact than the blocked sums
// of a plain layer). A warp takes 256 columns.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/stage/slot_exchange.cuh"
#include "cuda/tile/backward_walk.h"
#include "cuda/tile/element.cuh"
#include "cuda/tile/strided.cuh"

namespace flashmoe::cuda::stage {

// A lane's eight columns.
struct WideSums {
  double values[kVector];

  FM_DEVICE WideSums() : values{} {}
  template <class Element>
  FM_DEVICE void add(const int4& row, float weight) {
    const auto* words = reinterpret_cast<const uint32_t*>(&row);
    FM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float2 pair = Element::unpack(words[i]);
      values[2 * i] += static_cast<double>(weight * pair.x);
      values[2 * i + 1] += static_cast<double>(weight * pair.y);
    }
  }
};

inline constexpr int32_t kBiasColumns = 32 * kVector;

// Sums row(r), weight(r) over the expert's rows into `out`. Whole warp.
template <class Element, class Row, class Weight>
FM_DEVICE void sum_rows(const kernel::StridedView& out, const tile::ExpertParts& expert,
                        int32_t column, int32_t columns, const Row& row, const Weight& weight) {
  const int32_t mine = column + ptx::lane_idx() * kVector;
  if (mine >= columns) return;
  WideSums sums;
#pragma unroll 1
  for (int32_t e = expert.local_expert_idx; e < expert.experts.num_experts;
       e += expert.local_experts) {
    const int32_t end = expert.experts.begin(e) + expert.experts.rows(e);
#pragma unroll 4
    for (int32_t r = expert.experts.begin(e); r < end; ++r) {
      sums.template add<Element>(*reinterpret_cast<const int4*>(row(r) + mine), weight(r));
    }
  }
  FM_UNROLL
  for (int i = 0; i < kVector; ++i) {
    tile::write_real(out, expert.local_expert_idx, mine + i, static_cast<float>(sums.values[i]));
  }
}

// Both biases of all experts, dealt to num_workers() warps. Whole warp.
template <class Element, class Index, class Count>
FM_DEVICE void sum_biases(const kernel::BackwardParams& params, const tile::ExpertTable& experts,
                          const Index& worker_idx, const Count& num_workers) {
  const auto& routing = params.routing;
  const auto& memory = params.forward.memory;
  const int32_t hidden = params.forward.sizes.hidden;
  const int32_t up = params.sizes.up_columns;
  const bool on_input = params.sizes.weight_on_input;
  const auto pieces = [](const kernel::StridedView& out, int32_t columns) {
    return out.data == nullptr ? 0 : (columns + kBiasColumns - 1) / kBiasColumns;
  };
  const int32_t of_up = pieces(routing.grad_b_up, up);
  const int32_t of_expert = of_up + pieces(routing.grad_b_down, hidden);
  const int32_t local_experts = params.forward.sizes.local_experts;
#pragma unroll 1
  for (int32_t unit = worker_idx(); unit < local_experts * of_expert; unit += num_workers()) {
    const tile::ExpertParts expert{experts, local_experts, unit / of_expert};
    const int32_t piece = unit - expert.local_expert_idx * of_expert;
    if (piece < of_up) {
      const auto* grad_z = static_cast<const uint16_t*>(params.grad_z);
      sum_rows<Element>(
          routing.grad_b_up, expert, piece * kBiasColumns, up,
          [&](int32_t r) { return grad_z + int64_t{r} * up; }, [](int32_t) { return 1.0f; });
    } else {
      const OwnGrads grads{params};
      const auto weight = [&](int32_t r) {
        return on_input ? 1.0f : memory.row_weight[r];
      };
      const int32_t column = (piece - of_up) * kBiasColumns;
      if (is_alone(params.forward)) {
        sum_rows<Element>(
            routing.grad_b_down, expert, column, hidden,
            [&](int32_t r) { return grads.row(memory.row_token[r]); }, weight);
      } else {
        sum_rows<Element>(
            routing.grad_b_down, expert, column, hidden,
            [&](int32_t r) { return row_by_word(params.forward, grads, memory.row_token[r]); },
            weight);
      }
    }
  }
}

}  // namespace flashmoe::cuda::stage
