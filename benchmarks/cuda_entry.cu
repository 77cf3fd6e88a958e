// A C entry to the CUDA building blocks, for the benchmark and test scripts (ctypes): the layer's
// own interface is include/flashmoe/c_api.h.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "cuda/launch/forward.h"
#include "cuda/launch/grouped_product.h"
#include "plan/routing.h"
#include "plan/rows.h"

namespace {

using namespace flashmoe;

// Field by field as GroupedProductArguments; benchmarks/cuda_products.py has the same order.
struct Call {
  const void* tokens;
  const void* weights;
  void* out;
  const int64_t* expert_begin;
  const int64_t* expert_rows;
  const void* bias;
  void* workspace;
  void* stream;
  int64_t num_rows;
  int64_t num_experts;
  int64_t depth;
  int64_t columns;
  int64_t timeout_ns;
  int32_t element;
  int32_t major;
  int32_t epilogue;
  int32_t gate_order;
  int32_t activation;
  float alpha;
  float limit;
  float up_offset;
};

// What a forward runs with besides the layer and its operands.
struct Launch {
  void* scratch;
  void* reports;
  void* stream;
  int64_t timeout_ns;
  int32_t max_sms;
  int32_t column_pairs;
};

cuda::launch::GroupedProductArguments arguments_of(const Call& call) {
  return {.tokens = call.tokens,
          .weights = call.weights,
          .out = call.out,
          .expert_begin = call.expert_begin,
          .expert_rows = call.expert_rows,
          .bias = call.bias,
          .num_rows = call.num_rows,
          .num_experts = call.num_experts,
          .depth = call.depth,
          .columns = call.columns,
          .element = static_cast<cuda::config::Element>(call.element),
          .major = static_cast<cuda::config::Major>(call.major),
          .epilogue = static_cast<cuda::config::Epilogue>(call.epilogue),
          .gate_order = static_cast<cuda::launch::GateOrder>(call.gate_order),
          .activation = {.kind = static_cast<fm_activation>(call.activation),
                         .alpha = call.alpha,
                         .limit = call.limit,
                         .up_offset = call.up_offset},
          .workspace = static_cast<cuda::kernel::Workspace*>(call.workspace),
          .timeout_ns = static_cast<uint64_t>(call.timeout_ns),
          .stream = static_cast<cudaStream_t>(call.stream)};
}

void copy_text(const std::string& text, char* buffer, int64_t capacity) {
  const std::size_t length = std::min<std::size_t>(text.size(), capacity - 1);
  std::memcpy(buffer, text.data(), length);
  buffer[length] = '\0';
}

// The plan of src/plan of one rank's slots, in the CPU engine's own steps (cpu/stage/plan.cpp).
int64_t slot_rows_of(const plan::Problem& problem, double capacity_factor, const int32_t* ids,
                     int32_t* slot_row) {
  const int64_t tiles = plan::num_chunks(problem.tokens);
  const int64_t tile_slots = plan::kTileTokens * problem.top_k;
  const auto num_experts = static_cast<std::size_t>(problem.num_experts);
  std::vector<int32_t> histograms(tiles * num_experts), counts(num_experts), ranks(problem.slots());
  const auto each_tile = [&](auto&& visit) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = tile * tile_slots;
      visit(first, std::min(tile_slots, problem.slots() - first), &histograms[tile * num_experts]);
    }
  };
  each_tile([&](int64_t first, int64_t num_slots, int32_t* histogram) {
    plan::tile_histogram(ids + first, num_slots, problem.num_experts, histogram);
  });
  plan::scan_histograms(histograms.data(), tiles, problem.num_experts, counts.data());
  each_tile([&](int64_t first, int64_t num_slots, int32_t* cursor) {
    plan::rank_slots(ids + first, num_slots, problem.num_experts, cursor, &ranks[first]);
  });
  const int64_t capacity = plan::expert_capacity(capacity_factor, problem);
  for (int32_t& count : counts) {
    count = static_cast<int32_t>(std::min<int64_t>(count, capacity));
  }
  std::vector<int64_t> begin(num_experts + 1), rows(num_experts), segments(num_experts);
  const int64_t num_rows = plan::place_rows(problem, counts.data(), cuda::config::kRowGroup,
                                            begin.data(), rows.data(), segments.data());
  for (int64_t s = 0; s < problem.slots(); ++s) {
    const bool is_kept = plan::is_kept(ranks[s], capacity);
    slot_row[s] = is_kept ? static_cast<int32_t>(segments[ids[s]] + ranks[s]) : -1;
  }
  return num_rows;
}

}  // namespace

extern "C" {

// Launches; returns an fm_status, its text in `text`.
__attribute__((visibility("default"))) int32_t fm_cuda_grouped_product(const Call* call, char* text,
                                                                       int64_t capacity) {
  try {
    cuda::launch::launch_grouped_product(arguments_of(*call));
    copy_text("", text, capacity);
    return FM_OK;
  } catch (const Error& error) {
    copy_text(error.what(), text, capacity);
    return error.status();
  }
}

// What the configuration that a call would run looks like.
__attribute__((visibility("default"))) void fm_cuda_grouped_product_config(const Call* call,
                                                                           char* text,
                                                                           int64_t capacity) {
  copy_text(cuda::launch::describe_grouped_product(arguments_of(*call)), text, capacity);
}

// The layer's forward by itself, without an engine around it: scratch and report are the caller's.
__attribute__((visibility("default"))) int32_t fm_cuda_forward(const fm_layer* layer,
                                                               const fm_forward_args* operands,
                                                               const Launch* launch, char* text,
                                                               int64_t capacity) {
  try {
    cuda::launch::launch_forward(
        {.layer = *layer,
         .operands = *operands,
         .scratch = launch->scratch,
         .reports = static_cast<cuda::sync::LaunchReports*>(launch->reports),
         .timeout_ns = static_cast<uint64_t>(launch->timeout_ns),
         .max_sms = launch->max_sms,
         .column_pairs = launch->column_pairs,
         .stream = static_cast<cudaStream_t>(launch->stream)});
    copy_text("", text, capacity);
    return FM_OK;
  } catch (const Error& error) {
    copy_text(error.what(), text, capacity);
    return error.status();
  }
}

__attribute__((visibility("default"))) int64_t fm_cuda_forward_scratch_bytes(
    const fm_layer* layer, const fm_forward_args* operands) {
  return cuda::launch::forward_scratch_bytes(*layer, *operands);
}

// Where a region of that scratch begins, by its name in the region table, and its bytes; -1 if it
// has none of this name.
__attribute__((visibility("default"))) int64_t fm_cuda_forward_region(
    const fm_layer* layer, const fm_forward_args* operands, const char* name, int64_t* bytes) {
  const auto table = cuda::launch::forward_scratch(*layer, *operands);
  for (const plan::Region& region : table.regions) {
    if (std::strcmp(region.name, name) != 0) continue;
    *bytes = region.bytes;
    return region.offset;
  }
  return -1;
}

// slot_row [T * k]: the row that the CPU engine's plan gives each slot of ids [T * k], -1 none,
// with experts at multiples of the CUDA engine's row group. Returns the number of rows.
__attribute__((visibility("default"))) int64_t fm_plan_slot_rows(const fm_layer* layer,
                                                                 int64_t tokens, const int32_t* ids,
                                                                 int32_t* slot_row) {
  plan::Problem problem;
  problem.tokens = tokens;
  problem.num_experts = layer->num_experts;
  problem.top_k = layer->top_k;
  return slot_rows_of(problem, layer->capacity_factor, ids, slot_row);
}

// Bytes of a workspace, and where its wait report (four 32-bit words) begins.
__attribute__((visibility("default"))) int64_t fm_cuda_workspace_bytes() {
  return sizeof(cuda::kernel::Workspace);
}
__attribute__((visibility("default"))) int64_t fm_cuda_report_offset() {
  return offsetof(cuda::kernel::Workspace, report);
}
__attribute__((visibility("default"))) const char* fm_cuda_wait_name(uint32_t tag) {
  return cuda::sync::name_of(static_cast<cuda::sync::WaitTag>(tag));
}

}  // extern "C"
