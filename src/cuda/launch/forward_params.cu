#include "cuda/launch/forward_params.h"

#include <algorithm>

#include "cuda/launch/operands.h"

namespace flashmoe::cuda::launch {
namespace {

using config::ForwardScratch;
using Operands = fm_forward_args;

kernel::ForwardMemory memory_of(const ForwardArguments& a, const config::ForwardTable& table) {
  auto* state = region<kernel::ForwardState>(a, table, ForwardScratch::kState);
  return {.state = state,
          .tickets = &state->tickets,
          .combine = &state->combine,
          .rows_ready = region<uint32_t>(a, table, ForwardScratch::kRowsReady),
          .up_done = region<uint32_t>(a, table, ForwardScratch::kUpDone),
          .down_done = region<uint32_t>(a, table, ForwardScratch::kDownDone),
          .ids = region<int32_t>(a, table, ForwardScratch::kIds),
          .weights = region<float>(a, table, ForwardScratch::kWeights),
          .slot_ranks = region<int32_t>(a, table, ForwardScratch::kSlotRanks),
          .histograms = region<int32_t>(a, table, ForwardScratch::kHistograms),
          .totals = region<int32_t>(a, table, ForwardScratch::kTotals),
          .experts = region<int32_t>(a, table, ForwardScratch::kExperts),
          .row_token = region<int32_t>(a, table, ForwardScratch::kRowToken),
          .row_weight = a.layer.weight_on_input != 0
                            ? region<float>(a, table, ForwardScratch::kRowWeight)
                            : nullptr,
          .slot_row = region<int32_t>(a, table, ForwardScratch::kSlotRow),
          .slot_owner = region<int32_t>(a, table, ForwardScratch::kSlotOwner),
          .logit_parts = region<float>(a, table, ForwardScratch::kLogitParts),
          .rows = region<void>(a, table, ForwardScratch::kRows)};
}

kernel::RouterParams router_of(const ForwardArguments& arguments,
                               const config::ForwardTable& table) {
  const fm_layer& layer = arguments.layer;
  const Operands& o = arguments.operands;
  kernel::RouterParams router{};
  router.weight = o.w_router.data;
  router.weight_stride = o.w_router.stride[0];
  router.weight_is_wide = o.w_router.dtype == FM_F32;
  router.bias = strided(o.router_bias);
  router.selection_bias = strided(o.selection_bias);
  router.logits = present(o.logits) ? static_cast<float*>(o.logits.data)
                                    : region<float>(arguments, table, ForwardScratch::kLogits);
  router.score = layer.score;
  router.renormalize = layer.renormalize != 0;
  router.scale = static_cast<float>(layer.scale);
  router.num_groups = static_cast<int32_t>(layer.num_groups);
  router.top_groups = static_cast<int32_t>(layer.top_groups);
  router.group_top = static_cast<int32_t>(std::min<int64_t>(layer.group_top, layer.num_experts));
  router.ids = strided(o.topk_ids);
  router.weights = strided(o.topk_weights);
  return router;
}

}  // namespace

config::Major major_of(const fm_tensor& weight) {
  return weight.stride[2] == 1 ? config::Major::kDepth : config::Major::kColumns;
}

GateOrder gate_order_of(const fm_layer& layer) {
  if (is_separate(layer)) return GateOrder::kSeparate;
  return layer.gate_layout == FM_GATE_INTERLEAVED ? GateOrder::kInterleaved
                                                  : GateOrder::kConcatenated;
}

WeightOperand weight_operand(const fm_tensor& weight, int64_t columns, int64_t depth,
                             GateOrder gate_order) {
  const bool is_depth = major_of(weight) == config::Major::kDepth;
  return {.base = weight.data,
          .num_experts = static_cast<uint64_t>(weight.shape[0]),
          .columns = static_cast<uint64_t>(columns),
          .depth = static_cast<uint64_t>(depth),
          .expert_stride = static_cast<uint64_t>(weight.stride[0]),
          .line_stride = static_cast<uint64_t>(weight.stride[is_depth ? 1 : 2]),
          .gate_order = gate_order};
}

config::ForwardTable table_of(const fm_layer& layer, const Operands& operands,
                              const RankArguments& ranks) {
  return config::forward_table(
      {.tokens = operands.x.shape[0],
       .hidden = layer.hidden,
       .intermediate = layer.intermediate,
       .num_experts = layer.num_experts,
       .top_k = layer.top_k,
       .rows = rows_of(layer, operands.x.shape[0], ranks),
       .rank_slots = rank_slots_of(layer, ranks),
       .state_bytes = sizeof(kernel::ForwardState),
       .has_router = present(operands.w_router),
       .own_logits = present(operands.w_router) && !present(operands.logits),
       .weight_on_input = layer.weight_on_input != 0});
}

kernel::ForwardParams common_params(const ForwardArguments& arguments,
                                    const config::ForwardTable& table) {
  const Operands& o = arguments.operands;
  kernel::ForwardParams params{};
  params.activation = activation_of(arguments.layer);
  params.router = router_of(arguments, table);
  params.memory = memory_of(arguments, table);
  params.x = o.x.data;
  params.x_stride = o.x.stride[0];
  params.y = o.y.data;
  params.y_stride = o.y.stride[0];
  params.tokens_per_expert = static_cast<int64_t*>(o.tokens_per_expert.data);
  params.tokens_per_expert_stride = o.tokens_per_expert.stride[0];
  params.dropped = static_cast<int64_t*>(o.dropped.data);
  params.waits = waits_of(arguments.ranks, *arguments.reports, arguments.timeout_ns);
  params.notice = &arguments.reports->notice;
  params.launch_id = arguments.launch_id;
  params.may_run_beside = arguments.max_sms > 0;
  return params;
}

}  // namespace flashmoe::cuda::launch
