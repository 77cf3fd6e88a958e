#include "cuda/launch/forward.h"

#include <algorithm>

#include "base/error.h"
#include "cuda/config/rank_limits.h"
#include "cuda/kernel/forward.h"
#include "cuda/launch/check.h"
#include "cuda/launch/decode.h"
#include "cuda/launch/forward_params.h"
#include "cuda/launch/operands.h"
#include "cuda/launch/pairs.h"
#include "cuda/launch/ranks.h"
#include "cuda/launch/tensor_map.h"

namespace flashmoe::cuda::launch {
namespace {

using config::ForwardScratch;
using config::Major;
using Operands = fm_forward_args;

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

kernel::ForwardParams make_params(const ForwardArguments& arguments,
                                  const config::Forward& config) {
  const Operands& o = arguments.operands;
  const config::ForwardTable table = table_of(arguments.layer, o, arguments.ranks);
  kernel::ForwardParams params = common_params(arguments, table);
  params.sizes = sizes_of(arguments.layer, o, arguments.ranks, config, arguments.column_pairs);
  set_weights(params, arguments, config);
  set_rows(params, arguments, table, config);
  params.ranks = rank_params(arguments.layer, o.x.shape[0], arguments.ranks,
                             int64_t{params.sizes.row_groups} * config::kRowGroup,
                             config::Direction::kForward);
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
  if (is_decode(layer, operands, ranks)) return describe_decode(layer, operands, num_sms);
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
  if (is_decode(arguments.layer, arguments.operands, arguments.ranks)) {
    launch_decode(arguments);
    return;
  }
  const kernel::ForwardEntry entry = kernel_for(arguments.layer, arguments.operands);
  kernel::ForwardParams params = make_params(arguments, entry.config);
  launch_pairs({entry.function, entry.shared_bytes, config::kForwardThreads,
                "forward (" + config::describe(entry.config.up()) + ")"},
               &params, arguments.max_sms, true, arguments.stream);
}

}  // namespace flashmoe::cuda::launch
