#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/stage/stages.h"

namespace flashmoe::cpu {
namespace {

template <class T>
struct TileRange {
  int64_t begin, count;
  TileRange(const Launch<T>& launch, int64_t tile)
      : begin(tile * plan::kTileTokens),
        count(plan::min_of(plan::kTileTokens, launch.problem.tokens - begin)) {}
};

// logits[count][E] = x w_router^T, summed in fp64 and rounded once.
template <class T>
void wide_logits(const Launch<T>& launch, const TileRange<T>& range, Acc<T>* logits, void* panel) {
  const auto& p = launch.problem;
  const double* weight = launch.template route_at<double>(plan::RouteScratch::kRouterWeight);
  Panel memory(panel);
  double* x = memory.take<double>(plan::kTileTokens * p.hidden);
  double* sums = memory.take<double>(plan::kTileTokens * p.num_experts);
  for (int64_t t = 0; t < range.count; ++t) {
    convert(row_of<const T>(launch.call.operands.x, range.begin + t), x + t * p.hidden, p.hidden);
  }
  gemm<double>(range.count, p.num_experts, p.hidden, {x, p.hidden, 1}, {weight, 1, p.hidden}, sums,
               p.num_experts, false);
  convert(sums, logits, range.count * p.num_experts);
}

// logits[count][E] of the tile. They decide the routing, and their product is a small part of the
// layer: their sums are fp64 for every dtype.
template <class T>
void compute_logits(const Launch<T>& launch, const TileRange<T>& range, Acc<T>* logits,
                    void* panel) {
  const auto& p = launch.problem;
  const auto& ops = launch.call.operands;
  const int64_t experts = p.num_experts;
  if (launch.route[plan::RouteScratch::kRouterWeight].bytes > 0) {
    wide_logits(launch, range, logits, panel);
  } else {
    gemm<T>(range.count, experts, p.hidden,
            {row_of<const T>(ops.x, range.begin), ops.x.stride[0], 1},
            {static_cast<const T*>(ops.w_router.data), 1, ops.w_router.stride[0]}, logits, experts,
            false);
  }
  if (!present(ops.router_bias)) return;
  for (int64_t t = 0; t < range.count; ++t) {
    for (int64_t e = 0; e < experts; ++e) {
      logits[t * experts + e] += static_cast<Acc<T>>(read_real(ops.router_bias, e));
    }
  }
}

template <class T>
void choose_experts(const Launch<T>& launch, const TileRange<T>& range, const Acc<T>* logits,
                    void* panel) {
  using A = Acc<T>;
  const auto& ops = launch.call.operands;
  const int64_t experts = launch.problem.num_experts, k = launch.problem.top_k;
  int32_t* ids = launch.template route_at<int32_t>(plan::RouteScratch::kIds);
  A* weights = launch.template route_at<A>(plan::RouteScratch::kWeights);
  Panel memory(panel);
  A* work = memory.take<A>(2 * experts);
  A* bias = present(ops.selection_bias) ? memory.take<A>(experts) : nullptr;
  for (int64_t e = 0; bias != nullptr && e < experts; ++e) {
    bias[e] = static_cast<A>(read_real(ops.selection_bias, e));
    if (std::isnan(bias[e])) {
      fail(FM_ROUTING, "selection_bias[", e, "] of rank ", launch.problem.rank, " is NaN");
    }
  }
  for (int64_t t = range.begin; t < range.begin + range.count; ++t) {
    const A* row = logits + (t - range.begin) * experts;
    if (!route_token<A>(launch.call.router, row, bias, ids + t * k, weights + t * k, work)) {
      fail(FM_ROUTING, "router logits of token ", t, " of rank ", launch.problem.rank,
           " hold NaN, +inf or nothing finite; the router needs finite logits (-inf masks an "
           "expert)");
    }
    for (int64_t j = 0; j < k; ++j) {
      write_index(ops.topk_ids, t, j, ids[t * k + j]);
      write_real(ops.topk_weights, t, j, weights[t * k + j]);
    }
  }
}

// Ids and weights that the caller gave. A slot without an expert has weight 0, whatever was given.
template <class T>
void read_routing(const Launch<T>& launch, const TileRange<T>& range) {
  using A = Acc<T>;
  const auto& ops = launch.call.operands;
  const int64_t k = launch.problem.top_k;
  int32_t* ids = launch.template route_at<int32_t>(plan::RouteScratch::kIds);
  A* weights = launch.template route_at<A>(plan::RouteScratch::kWeights);
  for (int64_t t = range.begin; t < range.begin + range.count; ++t) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t id = read_index(ops.topk_ids, t, j);
      if (id < -1) {
        fail(FM_ROUTING, "topk_ids[", t, ", ", j, "] of rank ", launch.problem.rank, " is ", id,
             "; accepted are 0..", launch.problem.num_experts - 1,
             " and, for no expert, -1 or anything from ", launch.problem.num_experts, " up");
      }
      const bool routed = plan::is_routed(id, launch.problem.num_experts);
      ids[t * k + j] = routed ? static_cast<int32_t>(id) : -1;
      weights[t * k + j] = routed ? static_cast<A>(read_real(ops.topk_weights, t, j)) : A(0);
    }
  }
}

template <class T>
void route_fused(const Launch<T>& launch, const TileRange<T>& range, void* panel) {
  using A = Acc<T>;
  const auto& ops = launch.call.operands;
  const int64_t experts = launch.problem.num_experts;
  A* logits = launch.template route_at<A>(plan::RouteScratch::kLogits) + range.begin * experts;
  compute_logits(launch, range, logits, panel);
  choose_experts(launch, range, logits, panel);
  if (!present(ops.logits)) return;
  for (int64_t t = 0; t < range.count; ++t) {
    std::memcpy(row_of<A>(ops.logits, range.begin + t), logits + t * experts,
                static_cast<size_t>(experts) * sizeof(A));
  }
}

}  // namespace

template <class T>
void route_tile(Launch<T>& launch, int64_t tile, void* panel) {
  const TileRange<T> range(launch, tile);
  const auto& p = launch.problem;
  if (launch.call.fused_router() && !launch.call.backward) {
    route_fused(launch, range, panel);
  } else {
    read_routing(launch, range);
  }
  const int32_t* ids = launch.template route_at<int32_t>(plan::RouteScratch::kIds);
  int32_t* histograms = launch.template route_at<int32_t>(plan::RouteScratch::kHistograms);
  plan::tile_histogram(ids + range.begin * p.top_k, range.count * p.top_k, p.num_experts,
                       histograms + tile * p.num_experts);
  launch.routed.fetch_add(1, std::memory_order_acq_rel);
}

#define FM_INSTANTIATE(T) template void route_tile<T>(Launch<T>&, int64_t, void*);
FM_FOR_EACH_DTYPE(FM_INSTANTIATE)

}  // namespace flashmoe::cpu
