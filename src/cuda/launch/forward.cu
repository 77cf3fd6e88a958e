#include "cuda/launch/forward.h"

#include <algorithm>

#include "base/error.h"
#include "cuda/config/rank_limits.h"
#include "cuda/kernel/forward.h"
#include "cuda/launch/check.h"
#include "cuda/launch/operands.h"
#include "cuda/launch/pairs.h"
#include "cuda/launch/ranks.h"
#include "cuda/launch/tensor_map.h"
#include "cuda/launch/weights.h"
#include "plan/routing.h"

namespace flashmoe::cuda::launch {
namespace {

using config::ForwardScratch;
using config::Major;
using Operands = fm_forward_args;

Major major_of(const fm_tensor& weight) {
  return weight.stride[2] == 1 ? Major::kDepth : Major::kColumns;
}

GateOrder gate_order_of(const fm_layer& layer) {
  if (is_separate(layer)) return GateOrder::kSeparate;
  return layer.gate_layout == FM_GATE_INTERLEAVED ? GateOrder::kInterleaved
                                                  : GateOrder::kConcatenated;
}

config::Epilogue up_epilogue(const fm_layer& layer, Major major) {
  if (layer.gated == 0) return config::Epilogue::kActivate;
  const bool pairs = layer.gate_layout == FM_GATE_INTERLEAVED && major == Major::kColumns;
  return pairs ? config::Epilogue::kGatedPairs : config::Epilogue::kGated;
}

kernel::ForwardEntry kernel_for(const fm_layer& layer, const Operands& operands) {
  const Major up = major_of(operands.w_up);
  const Major down = major_of(operands.w_down);
  const config::Epilogue epilogue = up_epilogue(layer, up);
  if (element_of(layer) == config::Element::kBf16) {
    return up == Major::kDepth ? kernel::forward_bf16_depth(epilogue, down)
                               : kernel::forward_bf16_columns(epilogue, down);
  }
  return up == Major::kDepth ? kernel::forward_fp16_depth(epilogue, down)
                             : kernel::forward_fp16_columns(epilogue, down);
}

// A column block of the down product is combined while the next one runs. Wider ones leave more to
// combine at the end, narrower ones read the hidden rows more often, which costs experts with few
// rows most (docs/perf-notes.md).
// Of the most tokens of a rank: all ranks must choose the same.
int32_t choose_column_pairs(const plan::Problem& problem, int64_t token_cap) {
  constexpr int64_t kFewRows = 512;
  return token_cap * problem.top_k / problem.num_experts <= kFewRows ? 4 : 2;
}

config::ForwardSizes sizes_of(const fm_layer& layer, const Operands& operands,
                              const RankArguments& ranks, const config::Forward& config,
                              int32_t column_pairs) {
  const plan::Problem problem = problem_of(layer, operands.x.shape[0]);
  const auto pairs = [](int64_t columns, const config::GroupedProduct& product) {
    return static_cast<int32_t>(
        plan::ceil_div(columns, product.out_columns() * config::kClusterSize));
  };
  config::ForwardSizes sizes = routed_sizes(layer, problem);
  sizes.up_pairs = pairs(problem.intermediate, config.up());
  sizes.down_pairs = pairs(problem.hidden, config.down());
  sizes.column_pairs = std::min(
      column_pairs > 0 ? column_pairs
                       : choose_column_pairs(problem, token_cap_of(operands.x.shape[0], ranks)),
      sizes.down_pairs);
  sizes.column_blocks = tile::ColumnBlocks{sizes.down_pairs, sizes.column_pairs}.count();
  sizes.column_width = sizes.column_pairs * config.down().out_columns() * config::kClusterSize;
  sizes.row_groups =
      static_cast<int32_t>(rows_of(layer, operands.x.shape[0], ranks) / config::kRowGroup);
  sizes.source_groups = source_groups_of(layer, problem.tokens, ranks);
  sizes.local_experts = static_cast<int32_t>(problem.num_experts / ranks.world);
  sizes.has_few_slots = sizes.has_few_slots && ranks.world == 1;
  sizes.weight_on_input = layer.weight_on_input != 0;
  return sizes;
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

template <class T>
T* region(const ForwardArguments& arguments, const config::ForwardTable& table,
          ForwardScratch which) {
  return reinterpret_cast<T*>(static_cast<char*>(arguments.scratch) + table[which].offset);
}

kernel::ForwardMemory memory_of(const ForwardArguments& a, const config::ForwardTable& table) {
  auto* state = region<kernel::ForwardState>(a, table, ForwardScratch::kState);
  return {.state = state,
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

WeightOperand weight_operand(const fm_tensor& weight, int64_t columns, int64_t depth,
                             GateOrder gate_order) {
  const bool is_depth = major_of(weight) == Major::kDepth;
  return {.base = weight.data,
          .num_experts = static_cast<uint64_t>(weight.shape[0]),
          .columns = static_cast<uint64_t>(columns),
          .depth = static_cast<uint64_t>(depth),
          .expert_stride = static_cast<uint64_t>(weight.stride[0]),
          .line_stride = static_cast<uint64_t>(weight.stride[is_depth ? 1 : 2]),
          .gate_order = gate_order};
}

void set_weights(kernel::ForwardParams& params, const ForwardArguments& arguments,
                 const config::Forward& config) {
  const fm_layer& layer = arguments.layer;
  const Operands& o = arguments.operands;
  const config::Element element = config.element;
  const GateOrder order = gate_order_of(layer);
  const bool separate = is_separate(layer);
  const WeightOperand first =
      weight_operand(separate ? o.w_gate : o.w_up, layer.intermediate, layer.hidden, order);
  const WeightOperand down =
      weight_operand(o.w_down, layer.hidden, layer.intermediate, GateOrder::kConcatenated);
  params.up_weights[0] = encode(weights_view(first, config.up()), element, "w_up");
  if (separate) {
    const WeightOperand second = weight_operand(o.w_up, layer.intermediate, layer.hidden, order);
    params.up_weights[1] = encode(weights_view(second, config.up()), element, "w_up");
  }
  params.down_weights = encode(weights_view(down, config.down()), element, "w_down");
  params.separate_gate = separate;
  params.up_bias = bias_view(o.b_up.data, o.b_up.stride[0], first, config.up());
  params.down_bias = bias_view(o.b_down.data, o.b_down.stride[0], down, config.down());
}

void set_rows(kernel::ForwardParams& params, const ForwardArguments& arguments,
              const config::ForwardTable& table, const config::Forward& config) {
  const fm_layer& layer = arguments.layer;
  const int64_t rows = int64_t{params.sizes.row_groups} * config::kRowGroup;
  const void* sorted = region<void>(arguments, table, ForwardScratch::kRows);
  const void* hidden = region<void>(arguments, table, ForwardScratch::kHidden);
  for (int32_t steps = 1; steps <= config::kTokenMaps; ++steps) {
    const uint32_t half = steps * tile::kTokenStep / config::kClusterSize;
    const auto tokens = [&](const void* base, int64_t columns, const char* name) {
      return encode(rows_view(base, rows, columns, config::kDepthStep, half), config.element, name);
    };
    params.row_tokens[steps - 1] = tokens(sorted, layer.hidden, "rows");
    params.hidden_tokens[steps - 1] = tokens(hidden, layer.intermediate, "hidden rows");
  }
  const auto out = [&](const void* base, int64_t columns, const char* name) {
    return encode(window_view(base, rows, columns, config::kHalfRows, config::kStoreTokens),
                  config.element, name);
  };
  params.row_out = out(sorted, layer.hidden, "rows");
  params.hidden_out = out(hidden, layer.intermediate, "hidden rows");
  const fm_tensor& z = arguments.operands.z;
  params.keeps_z = present(z);
  params.z_is_interleaved = gate_order_of(layer) == GateOrder::kInterleaved && layer.gated != 0;
  if (present(z)) {
    // Of several ranks more rows may come than it has: a copy past the last one stores nothing.
    TensorView view =
        window_view(z.data, z.shape[0], z.stride[0], config::kHalfRows, config::kStoreTokens);
    view.sizes[0] = static_cast<uint64_t>(z.shape[1]);
    params.z_out = encode(view, config.element, "z");
  }
}

// Rows of a matrix whose columns are contiguous. One row may have any stride.
TensorView matrix_view(const fm_tensor& matrix, uint32_t box_rows) {
  TensorView view = rows_view(matrix.data, matrix.shape[0], matrix.shape[1],
                              static_cast<uint32_t>(config::kDepthStep), box_rows);
  if (matrix.shape[0] > 1) {
    view.strides[1] = static_cast<uint64_t>(matrix.stride[0]) * config::kElementBytes;
  }
  return view;
}

void set_logits(kernel::ForwardParams& params, const Operands& o, config::Element element) {
  if (!params.has_logit_maps()) return;
  params.logit_tokens =
      encode(matrix_view(o.x, static_cast<uint32_t>(plan::kTileTokens)), element, "x");
  params.logit_weights =
      encode(matrix_view(o.w_router, config::kLogitBoxExperts), element, "w_router");
}

kernel::ForwardParams make_params(const ForwardArguments& arguments,
                                  const config::Forward& config) {
  const Operands& o = arguments.operands;
  const config::ForwardTable table = table_of(arguments.layer, o, arguments.ranks);
  kernel::ForwardParams params{};
  params.sizes = sizes_of(arguments.layer, o, arguments.ranks, config, arguments.column_pairs);
  params.activation = activation_of(arguments.layer);
  params.router = router_of(arguments, table);
  params.memory = memory_of(arguments, table);
  set_weights(params, arguments, config);
  set_rows(params, arguments, table, config);
  set_logits(params, o, config.element);
  params.x = o.x.data;
  params.x_stride = o.x.stride[0];
  params.y = o.y.data;
  params.y_stride = o.y.stride[0];
  params.tokens_per_expert = static_cast<int64_t*>(o.tokens_per_expert.data);
  params.tokens_per_expert_stride = o.tokens_per_expert.stride[0];
  params.dropped = static_cast<int64_t*>(o.dropped.data);
  params.waits = waits_of(arguments.ranks, *arguments.reports, arguments.timeout_ns);
  params.notice = &arguments.reports->notice;
  params.ranks = rank_params(arguments.layer, o.x.shape[0], arguments.ranks,
                             int64_t{params.sizes.row_groups} * config::kRowGroup,
                             config::Direction::kForward);
  params.launch_id = arguments.launch_id;
  params.may_run_beside = arguments.max_sms > 0;
  return params;
}

std::string refuse_sizes(const fm_layer& layer, const Operands& operands,
                         const RankArguments& ranks) {
  for (const auto& [name, size] :
       {std::pair{"hidden", layer.hidden}, std::pair{"intermediate", layer.intermediate}}) {
    if (size < 64 || size % 64 != 0 || size > config::kMaxWidth) {
      return text_of(name, " is ", size, "; accepted on CUDA: multiples of 64 to ",
                     config::kMaxWidth);
    }
  }
  if (layer.num_experts > config::kMaxExperts) {
    return text_of("num_experts is ", layer.num_experts, "; accepted on CUDA: to ",
                   config::kMaxExperts);
  }
  if (layer.top_k > config::kMaxTopK) {
    return text_of("top_k is ", layer.top_k, "; accepted on CUDA: to ", config::kMaxTopK);
  }
  return refuse_tokens(layer, operands.x.shape[0], ranks);
}

// Why the kernels cannot run this layer on these operands, or an empty text.
std::string reason_to_refuse(const fm_layer& layer, const fm_forward_args& operands,
                             const RankArguments& ranks) {
  if (std::string reason = refuse_sizes(layer, operands, ranks); !reason.empty()) return reason;
  const int64_t router_bytes = operands.w_router.dtype == FM_F32 ? 4 : 2;
  const std::pair<const char*, const fm_tensor*> tensors[] = {
      {"x", &operands.x},           {"w_gate", &operands.w_gate}, {"w_up", &operands.w_up},
      {"w_down", &operands.w_down}, {"y", &operands.y},
  };
  for (const auto& [name, tensor] : tensors) {
    if (std::string reason = refuse_rows(name, *tensor, 2); !reason.empty()) return reason;
  }
  if (is_separate(layer) && major_of(operands.w_gate) != major_of(operands.w_up)) {
    return "w_gate and w_up differ in which dimension is contiguous; accepted on CUDA: the same";
  }
  if (std::string reason = refuse_z(layer, operands.x.shape[0], operands.z, ranks.world);
      !reason.empty()) {
    return reason;
  }
  return refuse_rows("w_router", operands.w_router, router_bytes);
}

}  // namespace

std::string refuse_z(const fm_layer& layer, int64_t tokens, const fm_tensor& z, int32_t world) {
  if (!present(z)) return {};
  const int64_t rows =
      world == 1 ? config::forward_rows(tokens * layer.top_k, layer.num_experts) : 0;
  if (z.shape[0] < rows) {
    return text_of("z has ", z.shape[0], " rows, expected ", rows, " (fm_z_rows)");
  }
  return refuse_rows("z", z, config::kElementBytes);
}

void check_supported(const fm_layer& layer, const fm_forward_args& operands,
                     const RankArguments& ranks) {
  const std::string reason = reason_to_refuse(layer, operands, ranks);
  if (!reason.empty()) fail(FM_UNSUPPORTED, "CUDA: ", reason);
}

config::ForwardTable forward_scratch(const fm_layer& layer, const fm_forward_args& operands,
                                     const RankArguments& ranks) {
  return table_of(layer, operands, ranks);
}

int64_t forward_scratch_bytes(const fm_layer& layer, const fm_forward_args& operands,
                              const RankArguments& ranks) {
  return table_of(layer, operands, ranks).total;
}

std::string describe_forward(const fm_layer& layer, const fm_forward_args& operands,
                             int32_t num_sms, const RankArguments& ranks) {
  check_supported(layer, operands, ranks);
  const kernel::ForwardEntry entry = kernel_for(layer, operands);
  const config::ForwardSizes sizes = sizes_of(layer, operands, ranks, entry.config, 0);
  const config::ForwardTable table = table_of(layer, operands, ranks);
  const config::GroupedProduct up = entry.config.up();
  std::ostringstream text;
  text << "up      " << config::describe(up) << "\n"
       << "down    " << config::describe(entry.config.down()) << "\n"
       << "grid    " << num_sms / config::kClusterSize * config::kClusterSize << " CTAs of "
       << config::kForwardThreads << " threads, " << entry.shared_bytes
       << " bytes of shared memory, registers " << up.load_registers << " + 2 x "
       << up.math_registers << " + " << config::kCommRegisters << "\n"
       << "columns " << sizes.column_blocks << " column blocks of " << sizes.column_width
       << ", combined by " << sizes.combine_tokens << " tokens\n"
       << "tiles   " << sizes.up_pairs << " weight pairs up, " << sizes.down_pairs << " down\n"
       << "scratch " << table.total << " bytes";
  if (ranks.world == 1) return text.str();
  const config::RankLayout layout{.sizes = rank_sizes_of(layer, ranks),
                                  .capacity = ranks.capacity,
                                  .rows = int64_t{sizes.row_groups} * config::kRowGroup,
                                  .source_groups = sizes.source_groups,
                                  .block_rows = up.max_tokens};
  return text.str() + "\n" + config::describe(layout);
}

void launch_forward(const ForwardArguments& arguments) {
  check_supported(arguments.layer, arguments.operands, arguments.ranks);
  const kernel::ForwardEntry entry = kernel_for(arguments.layer, arguments.operands);
  kernel::ForwardParams params = make_params(arguments, entry.config);
  launch_pairs({entry.function, entry.shared_bytes, config::kForwardThreads,
                "forward (" + config::describe(entry.config.up()) + ")"},
               &params, arguments.max_sms, true, arguments.stream);
}

}  // namespace flashmoe::cuda::launch
