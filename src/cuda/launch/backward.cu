#include "cuda/launch/backward.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "base/error.h"
#include "cuda/kernel/backward.h"
#include "cuda/launch/check.h"
#include "cuda/launch/forward.h"
#include "cuda/launch/operands.h"
#include "cuda/launch/pairs.h"
#include "cuda/launch/ranks.h"
#include "cuda/launch/tensor_map.h"
#include "cuda/tile/window.h"
#include "plan/routing.h"

namespace flashmoe::cuda::launch {
namespace {

using config::BackwardScratch;
using Operands = fm_backward_args;

int64_t up_columns_of(const fm_layer& layer) {
  return (layer.gated != 0 ? 2 : 1) * layer.intermediate;
}

int32_t pairs_of(int64_t columns) {
  return static_cast<int32_t>(plan::ceil_div(columns, config::kWeightRows * config::kClusterSize));
}

int32_t clamped(int64_t size) {
  return static_cast<int32_t>(std::min<int64_t>(size, std::numeric_limits<int32_t>::max()));
}

// Whether the last dimension of a weight, or of its gradient, is the contiguous one.
bool has_contiguous_rows(const fm_tensor& tensor) { return tensor.stride[2] == 1; }

// The forward's sizes, whose down product is the input gradient; weight_on_input says what the
// combine weighs, which is the reverse here.
config::ForwardSizes forward_sizes(const fm_layer& layer, const Operands& operands,
                                   const RankArguments& ranks) {
  const plan::Problem problem = problem_of(layer, operands.x.shape[0]);
  config::ForwardSizes sizes = routed_sizes(layer, problem);
  sizes.down_pairs = pairs_of(problem.hidden);
  // One column block: the gradients of w_up, behind it, hide the combination of all of it.
  sizes.column_pairs = sizes.down_pairs;
  sizes.column_blocks = 1;
  sizes.column_width = sizes.column_pairs * config::kWeightRows * config::kClusterSize;
  sizes.row_groups =
      static_cast<int32_t>(rows_of(layer, problem.tokens, ranks) / config::kRowGroup);
  sizes.local_experts = sizes.num_experts / ranks.world;
  sizes.source_groups = source_groups_of(layer, problem.tokens, ranks);
  sizes.has_few_slots = sizes.has_few_slots && ranks.world == 1;
  sizes.weight_on_input = layer.weight_on_input == 0;
  return sizes;
}

int64_t num_counters(const config::ForwardSizes& sizes) {
  return int64_t{4} * sizes.row_groups + 3 * sizes.num_experts + sizes.column_blocks + 8;
}

// Elements from a row to the next one; where there is one row, its stride may be anything.
int64_t row_stride_of(const fm_tensor& tensor) {
  return tensor.shape[0] > 1 ? tensor.stride[0] : tensor.shape[1];
}

// Whether the router's share of grad x and its weight's gradient are tiles of the math warpgroups:
// operands that the copy engine reaches, and gradients of logits that are sums of two elements
// (fp16 has not their range). Else warps make them.
bool routes_by_tiles(const fm_layer& layer, const Operands& operands) {
  constexpr int64_t kMostStride = int64_t{1} << 32;
  const auto is_reached = [&](const fm_tensor& rows) {
    const int64_t stride = row_stride_of(rows);
    return rows.stride[1] == 1 && stride >= layer.hidden && stride < kMostStride;
  };
  return element_of(layer) == config::Element::kBf16 && present(operands.w_router) &&
         operands.w_router.dtype == FM_BF16 && is_reached(operands.w_router) &&
         is_reached(operands.grad_x) && is_reached(operands.x);
}

int64_t row_bytes_of(const fm_tensor& tensor) {
  return tensor.stride[0] * (tensor.dtype == FM_F32 ? 4 : config::kElementBytes);
}

// The router's products multiply rows by words.
std::string refuse_distant_rows(const char* name, const fm_tensor& tensor) {
  const int64_t most = std::numeric_limits<uint32_t>::max();
  if (tensor.shape[0] <= 1 || row_bytes_of(tensor) <= most) return {};
  return text_of(name, " has rows ", row_bytes_of(tensor),
                 " bytes apart; accepted on CUDA with a router's gradient: to ", most);
}

config::BackwardTable table_of(const fm_layer& layer, const Operands& operands,
                               const RankArguments& ranks) {
  return config::backward_table(
      {.tokens = operands.x.shape[0],
       .hidden = layer.hidden,
       .intermediate = layer.intermediate,
       .up_columns = up_columns_of(layer),
       .num_experts = layer.num_experts,
       .top_k = layer.top_k,
       .rows = rows_of(layer, operands.x.shape[0], ranks),
       .rank_slots = rank_slots_of(layer, ranks),
       .state_bytes = sizeof(kernel::ForwardState),
       .num_counters = num_counters(forward_sizes(layer, operands, ranks)),
       .has_router = present(operands.w_router),
       .routes_by_tiles = routes_by_tiles(layer, operands)});
}

// A launch's parameters as they are filled in.
class Builder {
 public:
  explicit Builder(const BackwardArguments& arguments)
      : a_(arguments),
        o_(arguments.operands),
        layer_(arguments.layer),
        element_(element_of(arguments.layer)),
        table_(table_of(arguments.layer, arguments.operands, arguments.ranks)) {}

  kernel::BackwardParams build() {
    p_.forward.sizes = forward_sizes(layer_, o_, a_.ranks);
    set_sizes();
    set_memory();
    set_counters();
    set_forward();
    set_copies();
    set_weights();
    set_rows();
    set_weight_grads();
    set_routing();
    return p_;
  }

 private:
  template <class T>
  T* region(BackwardScratch which) const {
    return reinterpret_cast<T*>(static_cast<char*>(a_.scratch) + table_[which].offset);
  }

  void set_sizes() {
    config::BackwardSizes& sizes = p_.sizes;
    const int64_t up = up_columns_of(layer_);
    sizes.up_columns = static_cast<int32_t>(up);
    const bool is_alone = a_.ranks.world == 1;
    sizes.pre_activation_pairs = is_alone && present(o_.z) ? 0 : pairs_of(up);
    sizes.z_rows = !is_alone && present(o_.z) ? clamped(o_.z.shape[0]) : -1;
    sizes.hidden_pairs = pairs_of(layer_.intermediate);
    sizes.hidden_tiles =
        static_cast<int32_t>(plan::ceil_div(layer_.intermediate, config::kWeightRows));
    sizes.max_rows = p_.forward.sizes.row_groups * config::kRowGroup;
    sizes.share_tokens = routes_by_tiles(layer_, o_) ? p_.forward.sizes.tokens : 0;
    sizes.gated = layer_.gated != 0;
    sizes.interleaved = sizes.gated && layer_.gate_layout == FM_GATE_INTERLEAVED;
    sizes.separate = is_separate(layer_);
    sizes.weight_on_input = layer_.weight_on_input != 0;
  }

  void set_memory() {
    kernel::ForwardMemory& memory = p_.forward.memory;
    memory.state = region<kernel::ForwardState>(BackwardScratch::kState);
    memory.tickets = &memory.state->tickets;
    memory.combine = &memory.state->combine;
    memory.ids = region<int32_t>(BackwardScratch::kIds);
    memory.weights = region<float>(BackwardScratch::kWeights);
    memory.slot_ranks = region<int32_t>(BackwardScratch::kSlotRanks);
    memory.histograms = region<int32_t>(BackwardScratch::kHistograms);
    memory.totals = region<int32_t>(BackwardScratch::kTotals);
    memory.experts = region<int32_t>(BackwardScratch::kExperts);
    memory.row_token = region<int32_t>(BackwardScratch::kRowToken);
    memory.row_weight = region<float>(BackwardScratch::kRowWeight);
    memory.slot_row = region<int32_t>(BackwardScratch::kSlotRow);
    memory.slot_owner = region<int32_t>(BackwardScratch::kSlotOwner);
    memory.rows = region<void>(BackwardScratch::kRows);
    p_.parts = region<float>(BackwardScratch::kParts);
    p_.grad_logits = region<float>(BackwardScratch::kGradLogits);
    p_.grad_logit_terms = region<void>(BackwardScratch::kGradLogitTerms);
    p_.router_parts = region<float>(BackwardScratch::kRouterParts);
    p_.grad_z = region<void>(BackwardScratch::kGradZ);
  }

  void set_counters() {
    const config::ForwardSizes& sizes = p_.forward.sizes;
    kernel::BackwardCounters& counters = p_.counters;
    uint32_t* next = region<uint32_t>(BackwardScratch::kCounters);
    counters.first = next;
    counters.count = static_cast<int32_t>(num_counters(sizes));
    const auto take = [&next](int64_t count) {
      return std::exchange(next, next + count);
    };
    counters.grad_y_ready = take(sizes.row_groups);
    counters.x_ready = take(sizes.row_groups);
    counters.z_done = take(sizes.row_groups);
    counters.hidden_done = take(sizes.row_groups);
    counters.x_of_expert = take(sizes.num_experts);
    counters.hidden_of_expert = take(sizes.num_experts);
    counters.down_of_expert = take(sizes.num_experts);
    p_.forward.memory.down_done = take(sizes.column_blocks);
    counters.hidden_of_all = take(1);
    counters.logits_done = take(1);
    counters.shares_taken = take(1);
    counters.shares_done = take(1);
    counters.sums_taken = take(1);
    counters.sums_done = take(1);
    counters.reductions_taken = take(1);
    counters.left = take(1);
    const int64_t taken = next - counters.first;
    if (taken != counters.count) {
      fail(FM_INTERNAL, "backward: ", taken, " counters in room for ", counters.count);
    }
  }

  void set_forward() {
    kernel::ForwardParams& forward = p_.forward;
    forward.activation = activation_of(layer_);
    kernel::RouterParams& router = forward.router;  // without a weight: routing that is given
    router.score = layer_.score;
    router.renormalize = layer_.renormalize != 0;
    router.scale = static_cast<float>(layer_.scale);
    router.num_groups = 1;
    router.ids = strided(o_.topk_ids);
    router.weights = strided(o_.topk_weights);
    forward.up_bias = {.data = o_.b_up.data,
                       .per_expert = up_columns_of(layer_),
                       .expert_stride = o_.b_up.stride[0],
                       .column_stride = 1,
                       .half_offset = config::kHalfRows};
    forward.x = o_.x.data;
    forward.x_stride = o_.x.stride[0];
    forward.y = o_.grad_x.data;
    forward.y_stride = o_.grad_x.stride[0];
    forward.notice = &a_.reports->notice;
    forward.waits = waits_of(a_.ranks, *a_.reports, a_.timeout_ns);
    forward.ranks = rank_params(layer_, o_.x.shape[0], a_.ranks, p_.sizes.max_rows,
                                config::Direction::kBackward);
    forward.ranks.header.tokens_first = present(o_.z) ? 0 : 1;
    forward.launch_id = a_.launch_id;
    forward.may_run_beside = a_.max_sms > 0;
    p_.grad_y = o_.grad_y.data;
    p_.grad_y_stride = o_.grad_y.stride[0];
  }

  void set_copies() {
    set_copy({.kind = config::RowKind::kToken,
              .from = o_.x.data,
              .stride = o_.x.stride[0],
              .to = region<void>(BackwardScratch::kXRows),
              .of_block = p_.counters.x_ready,
              .of_expert = p_.counters.x_of_expert,
              .is_weighted = layer_.weight_on_input != 0});
    set_copy({.kind = config::RowKind::kGrad,
              .from = o_.grad_y.data,
              .stride = o_.grad_y.stride[0],
              .to = region<void>(BackwardScratch::kRows),
              .of_block = p_.counters.grad_y_ready,
              .of_expert = nullptr,
              .is_weighted = false});
  }
  void set_copy(const kernel::RowCopy& copy) { p_.copies[static_cast<int>(copy.kind)] = copy; }

  // Boxes of 64 by 64 at (contiguous dimension, other dimension, expert).
  CUtensorMap weight_map(const fm_tensor& weight, const char* name) const {
    const int along = weight.stride[2] == 1 ? 2 : 1;
    const int across = 3 - along;
    TensorView view{};
    view.base = weight.data;
    view.num_dims = 3;
    const int dims[3] = {along, across, 0};
    for (int i = 0; i < 3; ++i) {
      view.sizes[i] = static_cast<uint64_t>(weight.shape[dims[i]]);
      view.strides[i] = static_cast<uint64_t>(weight.stride[dims[i]]) * config::kElementBytes;
      view.box[i] = i < 2 ? config::kBoxColumns : 1;
    }
    return encode(view, element_, name);
  }

  void set_weights() {
    const bool separate = is_separate(layer_);
    p_.up_weights[0] = weight_map(separate ? o_.w_gate : o_.w_up, "w_up");
    if (separate) p_.up_weights[1] = weight_map(o_.w_up, "w_up");
    p_.down_weights = weight_map(o_.w_down, "w_down");
    p_.up_is_hidden_major = has_contiguous_rows(o_.w_up);
    p_.down_is_hidden_major = !has_contiguous_rows(o_.w_down);
  }

  void set_rows() {
    const int64_t rows = p_.sizes.max_rows;
    const int64_t up = p_.sizes.up_columns;
    const void* x_rows = region<void>(BackwardScratch::kXRows);
    const void* grad_rows = region<void>(BackwardScratch::kRows);
    const void* grad_z = region<void>(BackwardScratch::kGradZ);
    for (int32_t steps = 1; steps <= config::kTokenMaps; ++steps) {
      const uint32_t half = steps * tile::kTokenStep / config::kClusterSize;
      const auto tokens = [&](const void* base, int64_t columns, const char* name) {
        return encode(rows_view(base, rows, columns, config::kDepthStep, half), element_, name);
      };
      p_.forward.row_tokens[steps - 1] = tokens(x_rows, layer_.hidden, "x rows");
      p_.grad_y_tokens[steps - 1] = tokens(grad_rows, layer_.hidden, "grad y rows");
      p_.grad_z_tokens[steps - 1] = tokens(grad_z, up, "grad z");
    }
    p_.forward.row_out = window(grad_rows, layer_.hidden, config::kStoreTokens);
    p_.pre_activation_out = window(grad_z, up, config::kStoreTokens);
    p_.grad_z_out =
        encode(with_halves(window_view(grad_z, rows, up, config::kBoxColumns, config::kHiddenRows)),
               element_, "grad z");
    p_.hidden_out =
        window(region<void>(BackwardScratch::kHidden), layer_.intermediate, config::kHiddenRows);
    TensorView z = rows_view(grad_z, rows, up, config::kHalfRows, config::kHiddenRows);
    set_z(1, z);
    if (present(o_.z)) {
      z.base = o_.z.data;
      z.sizes[1] = static_cast<uint64_t>(std::max<int64_t>(o_.z.shape[0], 1));
      z.strides[1] = static_cast<uint64_t>(o_.z.stride[0]) * config::kElementBytes;
      set_z(0, z);
    }
  }
  // is_made: by this launch.
  void set_z(int is_made, TensorView z) {
    p_.z_in[is_made] = encode(with_halves(z), element_, "z");
    z.box[1] = config::Backward{}.product(config::Major::kDepth).max_tokens;
    p_.z_ahead[is_made] = encode(z, element_, "z");
  }
  // A view of Z with a last dimension that goes from a chunk's first buffer to its second: from
  // gates to ups, or (interleaved) 64 columns on.
  TensorView with_halves(TensorView z) const {
    const uint32_t halves = p_.sizes.gated ? 2 : 1;
    const bool interleaved = p_.sizes.interleaved;
    const int64_t step = interleaved ? config::kHalfRows : layer_.intermediate;
    if (!interleaved) z.sizes[0] = static_cast<uint64_t>(layer_.intermediate);
    z.sizes[z.num_dims] = halves;
    z.strides[z.num_dims] = static_cast<uint64_t>(step) * config::kElementBytes;
    z.box[z.num_dims] = halves;
    ++z.num_dims;
    return z;
  }
  CUtensorMap window(const void* base, int64_t columns, uint32_t box_rows) const {
    return encode(window_view(base, p_.sizes.max_rows, columns, config::kBoxColumns, box_rows),
                  element_, "rows");
  }

  // M runs along what is contiguous in the gradient, N along the other dimension.
  void set_weight_grads() {
    const bool separate = is_separate(layer_);
    const int32_t up = static_cast<int32_t>(separate ? layer_.intermediate : up_columns_of(layer_));
    const fm_tensor& first = separate ? o_.grad_w_gate : o_.grad_w_up;
    const bool down_along_i = !present(o_.grad_w_down) || has_contiguous_rows(o_.grad_w_down);
    set_operands(0, BackwardScratch::kRows, layer_.hidden, BackwardScratch::kHidden,
                 layer_.intermediate, down_along_i);
    add_gradient(0, o_.grad_w_down, down_along_i, 0, FM_ACCUMULATE_W_DOWN);
    // Both tensors of a separate layer have the same operands: the second follows the first, by the
    // threads where its strides differ.
    const fm_tensor& chooser = present(first) ? first : o_.grad_w_up;
    const bool up_along_h = !present(chooser) || has_contiguous_rows(chooser);
    set_operands(1, BackwardScratch::kGradZ, p_.sizes.up_columns, BackwardScratch::kXRows,
                 layer_.hidden, up_along_h);
    add_gradient(1, first, up_along_h, 0, separate ? FM_ACCUMULATE_W_GATE : FM_ACCUMULATE_W_UP);
    if (separate) add_gradient(2, o_.grad_w_up, up_along_h, up, FM_ACCUMULATE_W_UP);
  }

  // Rows of `rows` are the first dimension of the gradient, those of `columns` the second.
  void set_operands(int which, BackwardScratch rows, int64_t num_rows, BackwardScratch columns,
                    int64_t num_columns, bool m_is_second) {
    const auto view = [&](BackwardScratch operand, int64_t size) {
      return window_view(region<void>(operand), p_.sizes.max_rows, size, config::kBoxColumns,
                         config::kGradDepth);
    };
    const TensorView of_rows = view(rows, num_rows);
    const TensorView of_columns = view(columns, num_columns);
    set_m(which, m_is_second ? of_columns : of_rows);
    set_n(which, m_is_second ? of_rows : of_columns);
  }
  // Maps of the operands of a sum over rows, from windows of kGradDepth rows.
  void set_m(int which, const TensorView& rows) {
    constexpr uint32_t kBoxes = config::kWeightRows / config::kBoxColumns;
    p_.grad_m[which] = encode(with_boxes(rows, kBoxes), element_, "rows");
  }
  void set_n(int which, TensorView rows) {
    rows.box[1] = config::kGradDepth / config::kClusterSize;
    for (uint32_t boxes = 1; boxes <= config::kMaxColumnBoxes; ++boxes) {
      p_.grad_n[which][boxes - 1] = encode(with_boxes(rows, boxes), element_, "rows");
    }
  }
  // Of a window: its columns as 64 of a box and as boxes side by side, the last dimension.
  static TensorView with_boxes(TensorView view, uint32_t num_boxes) {
    view.num_dims = 5;
    view.sizes[4] = view.sizes[0] / config::kBoxColumns;
    view.strides[4] = config::kBoxColumns * config::kElementBytes;
    view.box[4] = num_boxes;
    view.sizes[0] = config::kBoxColumns;
    return view;
  }

  // row_offset: of the gradient's first row in its operand.
  void add_gradient(int which, const fm_tensor& gradient, bool m_is_second, int32_t row_offset,
                    uint32_t flag) {
    if (!present(gradient)) return;
    const int m_dim = m_is_second ? 2 : 1;
    const int n_dim = 3 - m_dim;
    kernel::WeightGradOut& out = p_.weight_grad_out[which];
    out.data = gradient.data;
    out.expert_stride = gradient.stride[0];
    out.n_stride = gradient.stride[n_dim];
    out.m_stride = gradient.stride[m_dim];
    out.m_columns = static_cast<int32_t>(gradient.shape[m_dim]);
    out.m_offset = m_is_second ? 0 : row_offset;
    out.n_offset = m_is_second ? row_offset : 0;
    out.is_wide = gradient.dtype == FM_F32;
    out.is_accumulated = (o_.flags & flag) != 0;
    out.is_direct =
        out.is_wide || out.is_accumulated || out.m_stride != 1 || !is_for_copies(gradient, out);
    p_.sizes.weight_grads[which] = {.m_pairs = pairs_of(gradient.shape[m_dim]),
                                    .n_columns = static_cast<int32_t>(gradient.shape[n_dim])};
    if (!out.is_direct) p_.weight_grads[which] = gradient_map(gradient, out, n_dim);
  }
  static bool is_for_copies(const fm_tensor& gradient, const kernel::WeightGradOut& out) {
    constexpr int64_t kUnit = 16 / config::kElementBytes;
    constexpr int64_t kMostLine = int64_t{1} << 32;
    constexpr int64_t kMostStride = int64_t{1} << 38;
    return reinterpret_cast<uintptr_t>(gradient.data) % 16 == 0 && out.n_stride % kUnit == 0 &&
           out.expert_stride % kUnit == 0 && out.n_stride < kMostLine &&
           out.expert_stride < kMostStride;
  }
  CUtensorMap gradient_map(const fm_tensor& gradient, const kernel::WeightGradOut& out,
                           int n_dim) const {
    TensorView view = window_view(gradient.data, gradient.shape[n_dim], out.n_stride,
                                  config::kBoxColumns, config::kGradStoreColumns);
    view.sizes[0] = static_cast<uint64_t>(out.m_columns);
    view.num_dims = 5;
    view.sizes[4] = static_cast<uint64_t>(gradient.shape[0]);
    view.strides[4] = static_cast<uint64_t>(out.expert_stride) * config::kElementBytes;
    view.box[4] = 1;
    return encode(view, element_, "weight gradient");
  }

  void set_routing() {
    kernel::RoutingGrads& routing = p_.routing;
    routing.w_router = o_.w_router.data;
    routing.w_router_is_wide = o_.w_router.dtype == FM_F32;
    routing.logits = static_cast<const float*>(o_.logits.data);
    routing.grad_weights = strided(o_.grad_weights);
    routing.grad_logits = strided(o_.grad_logits);
    routing.grad_topk_weights = strided(o_.grad_topk_weights);
    routing.grad_w_router = strided(o_.grad_w_router);
    routing.grad_router_bias = strided(o_.grad_router_bias);
    routing.b_down = strided(o_.b_down);
    routing.grad_b_up = strided(o_.grad_b_up);
    routing.grad_b_down = strided(o_.grad_b_down);
    if (routing.w_router != nullptr) set_router(routing);
  }

  void set_router(const kernel::RoutingGrads& routing) {
    const config::ForwardSizes& sizes = p_.forward.sizes;
    p_.router_runs = tile::RouterRuns(
        sizes.tokens, sizes.hidden, sizes.num_experts, routing.grad_w_router.data != nullptr,
        routing.grad_router_bias.data != nullptr, p_.sizes.share_tokens > 0);
    p_.router_strides = {
        .grad_logits = static_cast<uint32_t>(config::router_padded(sizes.num_experts) * 4),
        .w_router = static_cast<uint32_t>(row_bytes_of(o_.w_router)),
        .x = static_cast<uint32_t>(row_bytes_of(o_.x))};
    if (p_.sizes.share_tokens == 0) return;
    set_share();
    if (routing.grad_w_router.data != nullptr) set_router_grad();
  }

  // The router's share of grad x as tiles.
  void set_share() {
    const int64_t tokens = p_.sizes.share_tokens;
    const int64_t depth = config::kLogitTerms * config::router_depth(layer_.num_experts);
    for (int32_t steps = 1; steps <= config::kTokenMaps; ++steps) {
      const uint32_t half = steps * tile::kTokenStep / config::kClusterSize;
      p_.grad_logit_tokens[steps - 1] =
          encode(rows_view(p_.grad_logit_terms, tokens, depth, config::kDepthStep, half), element_,
                 "grad logit terms");
    }
    TensorView weights = rows_view(o_.w_router.data, layer_.num_experts, row_stride_of(o_.w_router),
                                   config::kBoxColumns, config::kDepthStep);
    weights.sizes[0] = static_cast<uint64_t>(layer_.hidden);
    p_.router_weights = encode(weights, element_, "w_router");
    TensorView out = window_view(o_.grad_x.data, tokens, row_stride_of(o_.grad_x),
                                 config::kBoxColumns, config::kStoreTokens);
    out.sizes[0] = static_cast<uint64_t>(layer_.hidden);
    p_.share_out = encode(out, element_, "grad x");
  }
  // The gradient of the router's weight as tiles: [2 parts, experts, H] of each range of tokens.
  void set_router_grad() {
    constexpr int kWhich = tile::kRouterGradIdx;
    constexpr int kOperands = tile::kRouterOperandsIdx;
    const int64_t tokens = p_.sizes.share_tokens;
    const int64_t columns = config::kLogitTerms * config::router_depth(layer_.num_experts);
    TensorView x = window_view(o_.x.data, tokens, row_stride_of(o_.x), config::kBoxColumns,
                               config::kGradDepth);
    x.sizes[0] = static_cast<uint64_t>(layer_.hidden);
    set_m(kOperands, x);
    set_n(kOperands, window_view(p_.grad_logit_terms, tokens, columns, config::kBoxColumns,
                                 config::kGradDepth));
    kernel::WeightGradOut& out = p_.weight_grad_out[kWhich];
    out.data = p_.router_parts;
    out.expert_stride = config::router_part_words(layer_.num_experts, layer_.hidden, true);
    out.n_stride = layer_.hidden;
    out.m_stride = 1;
    out.m_columns = static_cast<int32_t>(layer_.hidden);
    out.is_wide = out.is_direct = true;
    p_.sizes.weight_grads[kWhich] = {.m_pairs = pairs_of(layer_.hidden),
                                     .n_columns = static_cast<int32_t>(columns)};
    set_logit_ranges();
  }
  void set_logit_ranges() {
    const config::ForwardSizes& sizes = p_.forward.sizes;
    const tile::RouterWalk<tile::RouterProduct::kGradWeight> walk{sizes.tokens, sizes.hidden,
                                                                  sizes.num_experts};
    p_.sizes.logit_segments = walk.num_segments();
    p_.sizes.logit_range = walk.segment_tokens();
  }

  const BackwardArguments& a_;
  const Operands& o_;
  const fm_layer& layer_;
  config::Element element_;
  config::BackwardTable table_;
  kernel::BackwardParams p_{};
};

// What the forward's kernels ask of the operands that both have.
fm_forward_args shared_operands(const Operands& operands) {
  fm_forward_args shared{};
  shared.x = operands.x;
  shared.w_gate = operands.w_gate;
  shared.w_up = operands.w_up;
  shared.w_down = operands.w_down;
  shared.w_router = operands.w_router;
  return shared;
}

}  // namespace

void check_supported(const fm_layer& layer, const fm_backward_args& operands,
                     const RankArguments& ranks) {
  check_supported(layer, shared_operands(operands), ranks);
  std::string reason = refuse_rows("grad_y", operands.grad_y, config::kElementBytes);
  if (reason.empty()) reason = refuse_rows("grad_x", operands.grad_x, config::kElementBytes);
  if (reason.empty()) {
    reason = refuse_z(layer, operands.x.shape[0], operands.z, ranks.world);
  }
  if (reason.empty() && present(operands.w_router)) {
    reason = refuse_distant_rows("x", operands.x);
    if (reason.empty()) reason = refuse_distant_rows("w_router", operands.w_router);
  }
  if (!reason.empty()) fail(FM_UNSUPPORTED, "CUDA: ", reason);
}

int64_t backward_scratch_bytes(const fm_layer& layer, const fm_backward_args& operands,
                               const RankArguments& ranks) {
  return table_of(layer, operands, ranks).total;
}

void load_backward() {
  for (const kernel::BackwardEntry& entry : {kernel::backward_bf16(), kernel::backward_fp16()}) {
    cudaFuncAttributes unused{};
    check(cudaFuncGetAttributes(&unused, entry.function), "cudaFuncGetAttributes(backward)");
  }
}

void launch_backward(const BackwardArguments& arguments) {
  check_supported(arguments.layer, arguments.operands, arguments.ranks);
  const kernel::BackwardEntry entry = element_of(arguments.layer) == config::Element::kBf16
                                          ? kernel::backward_bf16()
                                          : kernel::backward_fp16();
  kernel::BackwardParams params = Builder(arguments).build();
  launch_pairs({entry.function, entry.shared_bytes, config::kForwardThreads,
                std::string("backward (") + config::name_of(entry.config.element) + ")"},
               &params, arguments.max_sms, true, arguments.stream);
}

}  // namespace flashmoe::cuda::launch
