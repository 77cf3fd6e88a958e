#include "cuda/launch/grouped_product.h"

#include <algorithm>
#include <limits>

#include "cuda/launch/check.h"
#include "cuda/launch/pairs.h"
#include "cuda/launch/tensor_map.h"

namespace flashmoe::cuda::launch {
namespace {

using config::kDepthStep;
using config::kHalfRows;

bool is_interleaved(const GroupedProductArguments& arguments) {
  return arguments.epilogue == config::Epilogue::kGated &&
         arguments.gate_order == GateOrder::kInterleaved;
}

kernel::KernelEntry kernel_for(const GroupedProductArguments& arguments) {
  const bool pairs = is_interleaved(arguments) && arguments.major == config::Major::kColumns;
  const config::Epilogue epilogue = pairs ? config::Epilogue::kGatedPairs : arguments.epilogue;
  return arguments.element == config::Element::kBf16
             ? kernel::grouped_product_bf16(arguments.major, epilogue)
             : kernel::grouped_product_fp16(arguments.major, epilogue);
}

WeightOperand weight_operand(const GroupedProductArguments& arguments) {
  const uint64_t gates = arguments.epilogue == config::Epilogue::kGated ? 2 : 1;
  const uint64_t rows = gates * arguments.columns;
  const bool is_depth = arguments.major == config::Major::kDepth;
  return {.base = arguments.weights,
          .num_experts = static_cast<uint64_t>(arguments.num_experts),
          .columns = static_cast<uint64_t>(arguments.columns),
          .depth = static_cast<uint64_t>(arguments.depth),
          .expert_stride = rows * arguments.depth,
          .line_stride = is_depth ? arguments.depth : rows,
          .gate_order = arguments.gate_order};
}

kernel::GroupedProductParams make_params(const GroupedProductArguments& arguments,
                                         const config::GroupedProduct& config) {
  kernel::GroupedProductParams params{};
  const WeightOperand weights = weight_operand(arguments);
  params.weights = encode(weights_view(weights, config), arguments.element, "weights");
  params.out = encode(window_view(arguments.out, arguments.num_rows, arguments.columns, kHalfRows,
                                  config::kStoreTokens),
                      arguments.element, "out");
  for (int32_t steps = 1; steps <= config.max_steps(); ++steps) {
    const uint32_t half = steps * tile::kTokenStep / config::kClusterSize;
    params.tokens[steps - 1] =
        encode(rows_view(arguments.tokens, arguments.num_rows, arguments.depth, kDepthStep, half),
               arguments.element, "tokens");
  }
  const int64_t pair_columns = config.out_columns() * config::kClusterSize;
  const auto bias_stride = static_cast<int64_t>(config.gated() ? 2 : 1) * arguments.columns;
  params.bias = bias_view(arguments.bias, bias_stride, weights, config);
  params.activation = arguments.activation;
  params.expert_begin = arguments.expert_begin;
  params.expert_rows = arguments.expert_rows;
  params.workspace = arguments.workspace;
  const uint32_t bound = sync::microseconds(arguments.timeout_ns);
  params.waits = {&arguments.workspace->report, bound, bound, nullptr, 0};
  params.num_experts = static_cast<int32_t>(arguments.num_experts);
  params.num_k_blocks = static_cast<int32_t>(arguments.depth / kDepthStep);
  params.num_weight_pairs = static_cast<int32_t>(plan::ceil_div(arguments.columns, pair_columns));
  return params;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

std::string reason_to_refuse(const GroupedProductArguments& arguments) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  // Strides of a tensor map are under 2^40 bytes, those of the clipping window under 2^34.
  constexpr int64_t kMaxColumns = int64_t{1} << 24;
  if (arguments.depth < kDepthStep || arguments.depth % kDepthStep != 0) {
    return text_of("depth is ", arguments.depth, "; accepted: multiples of ", kDepthStep);
  }
  if (arguments.columns < kHalfRows || arguments.columns % kHalfRows != 0) {
    return text_of("columns is ", arguments.columns, "; accepted: multiples of ", kHalfRows);
  }
  if (std::max(arguments.columns, arguments.depth) > kMaxColumns) {
    return text_of("depth is ", arguments.depth, ", columns ", arguments.columns, "; accepted: to ",
                   kMaxColumns);
  }
  constexpr int64_t kMaxRows = kMost - config::kMaxTokens;
  if (arguments.num_rows < 0 || arguments.num_rows > kMaxRows) {
    return text_of("num_rows is ", arguments.num_rows, "; accepted: 0 to ", kMaxRows);
  }
  if (arguments.num_experts < 1 || arguments.num_experts > 65536) {
    return text_of("num_experts is ", arguments.num_experts, "; accepted: 1 to 65536");
  }
  if (arguments.epilogue == config::Epilogue::kGatedPairs) {
    return "epilogue: ask for kGated, and say by gate_order how gate and up rows lie";
  }
  if (arguments.activation.kind < FM_SILU || arguments.activation.kind > FM_IDENTITY) {
    return text_of("activation.kind is ", static_cast<int>(arguments.activation.kind),
                   "; accepted: the values of fm_activation");
  }
  const void* operands[] = {arguments.tokens, arguments.weights, arguments.out};
  if (!std::all_of(std::begin(operands), std::end(operands), is_aligned)) {
    return "tokens, weights and out must start at multiples of 16 bytes";
  }
  return {};
}

std::string describe_grouped_product(const GroupedProductArguments& arguments) {
  return config::describe(kernel_for(arguments).config);
}

void launch_grouped_product(const GroupedProductArguments& arguments) {
  if (const std::string reason = reason_to_refuse(arguments); !reason.empty()) {
    fail(FM_INVALID_VALUE, "grouped product: ", reason);
  }
  if (arguments.num_rows == 0) return;
  const kernel::KernelEntry entry = kernel_for(arguments);
  kernel::GroupedProductParams params = make_params(arguments, entry.config);
  // Not cooperative: a pair waits for nothing but itself, and Nsight Compute (2025.3) cannot
  // profile a cooperative launch of clusters.
  launch_pairs(
      {entry.function, entry.shared_bytes, config::kThreads, config::describe(entry.config)},
      &params, 0, false, arguments.stream);
}

}  // namespace flashmoe::cuda::launch
