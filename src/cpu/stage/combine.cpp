#include <algorithm>
#include <type_traits>

#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

template <class T>
void wait_for_returns(const Launch<T>& launch, int64_t chunk) {
  const auto& p = launch.problem;
  const auto* flags =
      launch.template symmetric_at<std::atomic<uint32_t>>(p.rank, plan::Symmetric::kReturnFlags);
  for (int32_t owner = 0; owner < p.world; ++owner) {
    for (int64_t c = 0; c < launch.column_blocks; ++c) {
      const int64_t flag = plan::return_flag_index(launch.symmetric_shape, owner, c, chunk);
      launch.waiter.until_equal(flags[flag], launch.epoch,
                                {"partial sums", "combine", owner, launch.epoch});
    }
  }
}

// A rank alone: its return chunks are done when every column block says so.
template <class T>
void wait_for_own_returns(const Launch<T>& launch) {
  for (int64_t c = 0; c < launch.column_blocks; ++c) {
    launch.waiter.until_equal(launch.return_done[static_cast<size_t>(c)],
                              static_cast<uint32_t>(launch.space.return_chunks),
                              {"return chunks", "combine", -1, launch.epoch});
  }
}

// sum[H] = what the experts gave the token: the ranks' partials in rank order.
template <class T>
void sum_partials(const Launch<T>& launch, int64_t token_idx, Acc<T>* sum) {
  using A = Acc<T>;
  const auto& p = launch.problem;
  MutableArray<A> total(sum, p.hidden);
  if (p.world == 1) {
    convert(row_of<const T>(launch.call.operands.grad_x, token_idx), sum, p.hidden);
    return;
  }
  const uint64_t mask =
      launch.template route_at<uint64_t>(plan::RouteScratch::kDestinations)[token_idx];
  const T* partials = launch.template symmetric_at<T>(p.rank, plan::Symmetric::kPartial);
  total.setZero();
  for (int32_t owner = 0; owner < p.world; ++owner) {
    if (((mask >> owner) & 1) == 0) continue;
    const T* row = partials + (owner * launch.symmetric_shape.token_cap + token_idx) * p.hidden;
    total += ArrayView<T>(row, p.hidden).template cast<A>();
  }
}

// Gradient of slot weight (t, j) from the experts; 0 for a slot that was not routed or was dropped.
template <class T>
class SlotGradients {
 public:
  explicit SlotGradients(const Launch<T>& launch)
      : launch_(launch),
        capacity_(plan::expert_capacity(launch.call.layer.capacity_factor, launch.problem)),
        ranks_(launch.template route_at<int32_t>(plan::RouteScratch::kSlotRanks)) {}

  Acc<T> operator()(int64_t slot_idx) const {
    using A = Acc<T>;
    if (!plan::is_kept(ranks_[slot_idx], capacity_)) return A(0);
    const int32_t rank = launch_.problem.rank;
    if (launch_.problem.world > 1) {
      return launch_.template symmetric_at<A>(rank, plan::Symmetric::kSlotGrad)[slot_idx];
    }
    const int32_t row = launch_.template rows_at<int32_t>(plan::RowScratch::kSlotRow)[slot_idx];
    const A* parts = launch_.template rows_at<A>(plan::RowScratch::kWeightParts);
    return ArrayView<A>(parts + row * launch_.weight_parts, launch_.weight_parts).sum();
  }

 private:
  const Launch<T>& launch_;
  int64_t capacity_;
  const int32_t* ranks_;
};

// grad_logits[E] of a token, with what arrives at the returned weights and logits added in.
template <class T>
void differentiate_router(const Launch<T>& launch, const SlotGradients<T>& slots, int64_t token_idx,
                          Acc<T>* grad_logits, void* panel) {
  using A = Acc<T>;
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  Panel memory(panel);
  A* grad_weights = memory.take<A>(p.top_k);
  A* logits = memory.take<A>(p.num_experts);
  A* work = memory.take<A>(2 * p.num_experts);
  for (int64_t j = 0; j < p.top_k; ++j) {
    grad_weights[j] = slots(token_idx * p.top_k + j);
    if (present(ops.grad_weights)) {
      grad_weights[j] += static_cast<A>(read_real(ops.grad_weights, token_idx, j));
    }
  }
  for (int64_t e = 0; e < p.num_experts; ++e) {
    logits[e] = static_cast<A>(read_real(ops.logits, token_idx, e));
    grad_logits[e] =
        present(ops.grad_logits) ? static_cast<A>(read_real(ops.grad_logits, token_idx, e)) : A(0);
  }
  const int32_t* ids = launch.template route_at<int32_t>(plan::RouteScratch::kIds);
  route_token_backward<A>(launch.call.router, logits, ids + token_idx * p.top_k, grad_weights,
                          grad_logits, work);
}

template <class T>
const Acc<T>* router_weight(const Launch<T>& launch, int64_t& row_stride) {
  const fm_tensor& weight = launch.call.operands.w_router;
  if (weight.dtype == DtypeOf<Acc<T>>::value) {
    row_stride = weight.stride[0];
    return static_cast<const Acc<T>*>(weight.data);
  }
  row_stride = launch.problem.hidden;
  return launch.template route_at<Acc<T>>(plan::RouteScratch::kRouterWeight);
}

// The router's share of grad x: grad_logits[count][E] w_router[E][H].
template <class T>
void router_share(const Launch<T>& launch, const Acc<T>* grad_logits, int64_t count, Acc<T>* out) {
  const auto& p = launch.problem;
  int64_t row_stride = 0;
  const Acc<T>* weight = router_weight(launch, row_stride);
  gemm<Acc<T>>(count, p.hidden, p.num_experts, {grad_logits, p.num_experts, 1},
               {weight, row_stride, 1}, out, p.hidden, false);
}

template <class T>
void combine_forward(const Launch<T>& launch, int64_t begin, int64_t end, void* panel) {
  Acc<T>* sum = Panel(panel).take<Acc<T>>(launch.problem.hidden);
  for (int64_t t = begin; t < end; ++t) {
    sum_partials(launch, t, sum);
    convert(sum, row_of<T>(launch.call.operands.y, t), launch.problem.hidden);
  }
}

template <class T>
void combine_backward(const Launch<T>& launch, int64_t begin, int64_t end, void* panel) {
  using A = Acc<T>;
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  const SlotGradients<T> slots(launch);
  Panel memory(panel);
  A* sum = memory.take<A>(p.hidden);
  A* share = memory.take<A>(plan::kTileTokens * p.hidden);
  void* rest = memory.take<A>(0);
  A* grad_logits = launch.template route_at<A>(plan::RouteScratch::kGradLogits);
  const bool fused = launch.call.fused_router();
  if (fused) {
    for (int64_t t = begin; t < end; ++t) {
      differentiate_router(launch, slots, t, grad_logits + t * p.num_experts, rest);
    }
    router_share(launch, grad_logits + begin * p.num_experts, end - begin, share);
  } else if (present(ops.grad_topk_weights)) {
    for (int64_t s = begin * p.top_k; s < end * p.top_k; ++s) {
      write_real(ops.grad_topk_weights, s / p.top_k, s % p.top_k, slots(s));
    }
  }
  if (p.world == 1 && !fused) return;
  for (int64_t t = begin; t < end; ++t) {
    sum_partials(launch, t, sum);
    if (fused)
      MutableArray<A>(sum, p.hidden) += ArrayView<A>(share + (t - begin) * p.hidden, p.hidden);
    convert(sum, row_of<T>(ops.grad_x, t), p.hidden);
  }
}

}  // namespace

template <class T>
void combine_chunk(Launch<T>& launch, int64_t chunk, void* panel) {
  const int64_t begin = chunk * plan::kTileTokens;
  const int64_t end = std::min(begin + plan::kTileTokens, launch.problem.tokens);
  if (launch.problem.world > 1) {
    wait_for_returns(launch, chunk);
  } else {
    wait_for_own_returns(launch);
  }
  if (launch.call.backward) {
    combine_backward(launch, begin, end, panel);
  } else {
    combine_forward(launch, begin, end, panel);
  }
  launch.combined.fetch_add(1, std::memory_order_acq_rel);
}

template <class T>
void router_tile(Launch<T>& launch, int64_t index, void* panel) {
  using A = Acc<T>;
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  launch.waiter.until_equal(launch.combined, static_cast<uint32_t>(launch.space.combine_chunks),
                            {"combine chunks", "router gradient", -1, launch.epoch});
  const int64_t first = index * launch.tiles.router_experts;
  const int64_t count = std::min(launch.tiles.router_experts, p.num_experts - first);
  const A* grad_logits = launch.template route_at<A>(plan::RouteScratch::kGradLogits) + first;
  Panel memory(panel);
  A* sums = memory.take<A>(launch.tiles.router_experts * p.hidden);
  A* wide = memory.take<A>(plan::kTileTokens * p.hidden);
  std::fill_n(sums, count * p.hidden, A(0));
  for (int64_t t = 0; t < p.tokens; t += plan::kTileTokens) {
    const int64_t depth = std::min(plan::kTileTokens, p.tokens - t);
    for (int64_t i = 0; i < depth; ++i) {
      convert(row_of<const T>(ops.x, t + i), wide + i * p.hidden, p.hidden);
    }
    gemm<A>(count, p.hidden, depth, {grad_logits + t * p.num_experts, 1, p.num_experts},
            {wide, p.hidden, 1}, sums, p.hidden, true);
  }
  for (int64_t e = 0; e < count; ++e) {
    double bias = 0;
    for (int64_t t = 0; t < p.tokens; ++t) {
      bias += static_cast<double>(grad_logits[t * p.num_experts + e]);
    }
    if (present(ops.grad_router_bias)) write_real(ops.grad_router_bias, first + e, 0, bias);
    if (!present(ops.grad_w_router)) continue;
    for (int64_t h = 0; h < p.hidden; ++h) {
      write_real(ops.grad_w_router, first + e, h, sums[e * p.hidden + h]);
    }
  }
}

#define FM_INSTANTIATE(T)                                     \
  template void combine_chunk<T>(Launch<T>&, int64_t, void*); \
  template void router_tile<T>(Launch<T>&, int64_t, void*);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
