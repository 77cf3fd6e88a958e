#include "cuda/launch/grouped_product.h"

#include <algorithm>
#include <limits>

#include "cuda/launch/check.h"
#include "cuda/launch/tensor_map.h"

namespace flashmoe::cuda::launch {
namespace {

using config::kDepthStep;
using config::kElementBytes;
using config::kHalfRows;

constexpr uint64_t kBlock = kHalfRows;  // weight rows of a box, once or twice

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

// An expert's weight rows as the kernel takes them: `halves` sets (gate rows and up rows, or all)
// of `rows`, `stride` apart; half_offset leads from a tile's first 64 rows to its second.
struct WeightRows {
  uint64_t halves;
  uint64_t rows;
  uint64_t stride;
  uint64_t half_offset;
};

WeightRows weight_rows(const GroupedProductArguments& arguments,
                       const config::GroupedProduct& config) {
  const uint64_t columns = arguments.columns;
  if (!config.halves_are_gates()) return {1, (config.gated() ? 2 : 1) * columns, 1, kBlock};
  if (is_interleaved(arguments)) return {2, columns, 2, 1};
  return {2, columns, 1, columns};
}

// Coordinates (k, row of 64, block of 64 rows, gate or up, expert), the first two swapped where
// columns are contiguous. A box is what a CTA takes of a k-block: 128 rows, or 64 gate rows and
// their 64 up rows.
TensorView weights_view(const GroupedProductArguments& arguments,
                        const config::GroupedProduct& config) {
  const WeightRows weights = weight_rows(arguments, config);
  const uint64_t depth = arguments.depth;
  const uint64_t all_rows = weights.rows * weights.halves;
  const uint64_t blocks_of_box = 2 / weights.halves;
  TensorView view{};
  view.base = arguments.weights;
  view.num_dims = 5;
  const auto set = [&view](int dim, uint64_t size, uint64_t stride, uint64_t box) {
    view.sizes[dim] = size;
    view.strides[dim] = stride * kElementBytes;
    view.box[dim] = static_cast<uint32_t>(box);
  };
  if (arguments.major == config::Major::kDepth) {
    const uint64_t row_stride = weights.stride * depth;
    set(0, depth, 1, kDepthStep);
    set(1, kBlock, row_stride, kBlock);
    set(2, weights.rows / kBlock, kBlock * row_stride, blocks_of_box);
    set(3, weights.halves, weights.half_offset * depth, weights.halves);
  } else {
    set(0, kBlock, 1, kBlock);
    set(1, depth, all_rows, kDepthStep);
    set(2, weights.rows / kBlock, kBlock, blocks_of_box);
    set(3, weights.halves, weights.half_offset, weights.halves);
  }
  set(4, arguments.num_experts, all_rows * depth, 1);
  return view;
}

config::BiasView bias_view(const GroupedProductArguments& arguments,
                           const config::GroupedProduct& config) {
  const WeightRows weights = weight_rows(arguments, config);
  return {.data = arguments.bias,
          .per_expert = static_cast<int64_t>(weights.rows * weights.halves),
          .column_stride = static_cast<int32_t>(weights.stride),
          .half_offset = static_cast<int32_t>(weights.half_offset)};
}

kernel::GroupedProductParams make_params(const GroupedProductArguments& arguments,
                                         const config::GroupedProduct& config) {
  kernel::GroupedProductParams params{};
  params.weights = encode(weights_view(arguments, config), arguments.element, "weights");
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
  params.bias = bias_view(arguments, config);
  params.activation = arguments.activation;
  params.expert_begin = arguments.expert_begin;
  params.expert_rows = arguments.expert_rows;
  params.workspace = arguments.workspace;
  params.timeout_ns = arguments.timeout_ns;
  params.num_experts = static_cast<int32_t>(arguments.num_experts);
  params.num_k_blocks = static_cast<int32_t>(arguments.depth / kDepthStep);
  params.num_weight_pairs = static_cast<int32_t>(plan::ceil_div(arguments.columns, pair_columns));
  return params;
}

// One CTA an SM, in pairs. Not cooperative: a pair waits for nothing but itself, and Nsight Compute
// (2025.3) cannot profile a cooperative launch of clusters.
cudaLaunchConfig_t launch_config(const kernel::KernelEntry& entry, cudaLaunchAttribute& cluster) {
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {config::kClusterSize, 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(config::kClusterSize);
  launch.blockDim = dim3(config::kThreads);
  launch.dynamicSmemBytes = entry.shared_bytes;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  return launch;
}

// Clusters that fit on the current device at once. Asked for each launch: the answer depends on
// what else holds the device (MPS, green contexts), and costs microseconds.
int max_clusters(const kernel::KernelEntry& entry, const cudaLaunchConfig_t& launch) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  int major = 0;
  int minor = 0;
  int shared_limit = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "device");
  if (major != 9 || minor != 0) {
    fail(FM_UNSUPPORTED, "device ", device, " is sm_", major, minor,
         "; the CUDA kernels need sm_90 (H100, H200)");
  }
  if (entry.shared_bytes > static_cast<std::size_t>(shared_limit)) {
    fail(FM_UNSUPPORTED, "device ", device, " gives a block ", shared_limit,
         " bytes of shared memory; ", config::describe(entry.config), " needs ",
         entry.shared_bytes);
  }
  check(cudaFuncSetAttribute(entry.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(entry.shared_bytes)),
        "cudaFuncSetAttribute(", config::describe(entry.config), ")");
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, entry.function, &launch),
        "cudaOccupancyMaxActiveClusters(", config::describe(entry.config), ")");
  if (clusters < 1) fail(FM_UNSUPPORTED, "no pair of SMs is free for a cluster of two CTAs");
  return clusters;
}

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
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
  if (arguments.num_rows < 0 || arguments.num_rows > kMost - 192) {
    return text_of("num_rows is ", arguments.num_rows, "; accepted: 0 to ", kMost - 192);
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
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t launch = launch_config(entry, cluster);
  launch.gridDim = dim3(config::kClusterSize * max_clusters(entry, launch));
  launch.stream = arguments.stream;
  kernel::GroupedProductParams params = make_params(arguments, entry.config);
  void* operands[] = {&params};
  check(cudaLaunchKernelExC(&launch, entry.function, operands), "launch of ",
        config::describe(entry.config));
}

}  // namespace flashmoe::cuda::launch
