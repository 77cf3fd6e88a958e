#include "cuda/launch/decode.h"

#include <sstream>

#include "cuda/kernel/decode.h"
#include "cuda/launch/forward_params.h"
#include "cuda/launch/operands.h"
#include "cuda/launch/pairs.h"

namespace flashmoe::cuda::launch {
namespace {

using config::Decode;
using config::ForwardScratch;

// Rows of a weight as boxes read them: every `row_step`-th one from first_row on.
struct BoxRows {
  uint64_t first_row;
  uint64_t row_step;
  uint64_t num_rows;
};

// Coordinates (k, row, chunk of 64 k, expert): a box has a few chunks of its rows, one after the
// other.
TensorView box_view(const WeightOperand& weight, const BoxRows& rows, uint32_t box_rows,
                    uint32_t box_chunks) {
  const uint64_t line_bytes = weight.line_stride * config::kElementBytes;
  return {.base = static_cast<const char*>(weight.base) + rows.first_row * line_bytes,
          .num_dims = 4,
          .sizes = {config::kDepthStep, rows.num_rows, weight.depth / config::kDepthStep,
                    weight.num_experts},
          .strides = {config::kElementBytes, rows.row_step * line_bytes, Decode::kLineBytes,
                      weight.expert_stride * config::kElementBytes},
          .box = {config::kDepthStep, box_rows, box_chunks, 1}};
}

// Of the first and the second box of a stage: gate rows and up rows, or neighbours where there are
// no gates.
struct UpBoxes {
  WeightOperand weights[Decode::kBoxes];
  BoxRows rows[Decode::kBoxes];
};

UpBoxes up_boxes(const fm_layer& layer, const fm_forward_args& operands) {
  const auto columns = static_cast<uint64_t>(layer.intermediate);
  const GateOrder order = gate_order_of(layer);
  const auto operand = [&](const fm_tensor& weight) {
    return weight_operand(weight, layer.intermediate, layer.hidden, order);
  };
  const WeightOperand up = operand(operands.w_up);
  if (layer.gated == 0) {
    constexpr uint64_t kNext = Decode::kUpRows;
    return {{up, up}, {{0, 1, columns}, {kNext, 1, columns - kNext}}};
  }
  switch (order) {
    case GateOrder::kSeparate:
      return {{operand(operands.w_gate), up}, {{0, 1, columns}, {0, 1, columns}}};
    case GateOrder::kInterleaved:
      return {{up, up}, {{0, 2, columns}, {1, 2, columns}}};
    default:
      return {{up, up}, {{0, 1, columns}, {columns, 1, columns}}};
  }
}

void set_weights(kernel::DecodeParams& params, const fm_layer& layer,
                 const fm_forward_args& operands) {
  const config::Element element = element_of(layer);
  const UpBoxes boxes = up_boxes(layer, operands);
  const char* first = is_separate(layer) ? "w_gate" : "w_up";
  for (int32_t i = 0; i < Decode::kBoxes; ++i) {
    params.forward.up_weights[i] =
        encode(box_view(boxes.weights[i], boxes.rows[i], Decode::kUpRows, Decode::kUpChunks),
               element, i == 0 ? first : "w_up");
  }
  const WeightOperand down =
      weight_operand(operands.w_down, layer.hidden, layer.intermediate, GateOrder::kConcatenated);
  const BoxRows all{0, 1, static_cast<uint64_t>(layer.hidden)};
  params.forward.down_weights =
      encode(box_view(down, all, Decode::kDownRows, Decode::kDownChunks), element, "w_down");
  params.is_gated = layer.gated != 0;
  // Biases are in the order that the tiles' products have them in, too.
  const config::GroupedProduct up_product{
      .epilogue = params.is_gated ? config::Epilogue::kGated : config::Epilogue::kActivate};
  params.forward.up_bias =
      bias_view(operands.b_up.data, operands.b_up.stride[0], boxes.weights[0], up_product);
  params.forward.down_bias = bias_view(operands.b_down.data, operands.b_down.stride[0], down, {});
}

kernel::DecodeEntry kernel_for(const fm_layer& layer) {
  return element_of(layer) == config::Element::kBf16 ? kernel::decode_bf16()
                                                     : kernel::decode_fp16();
}

}  // namespace

bool is_decode(const fm_layer& layer, const fm_forward_args& operands, const RankArguments& ranks) {
  const int64_t tokens = operands.x.shape[0];
  return ranks.world == 1 && tokens > 0 && tokens <= Decode::kTokens &&
         major_of(operands.w_up) == config::Major::kDepth &&
         major_of(operands.w_down) == config::Major::kDepth && layer.weight_on_input == 0 &&
         !present(operands.z);
}

std::string describe_decode(const fm_layer& layer, const fm_forward_args& operands,
                            int32_t num_sms) {
  std::ostringstream text;
  text << "decode  " << Decode::kTokens << " tokens a product, " << Decode::kStages << " stages of "
       << Decode::kStageBytes << " bytes\n"
       << "grid    " << num_sms / config::kClusterSize * config::kClusterSize << " CTAs of "
       << config::kForwardThreads << " threads, " << kernel_for(layer).shared_bytes
       << " bytes of shared memory\n"
       << "scratch " << forward_scratch(layer, operands).total << " bytes";
  return text.str();
}

void launch_decode(const ForwardArguments& arguments) {
  const fm_layer& layer = arguments.layer;
  const config::ForwardTable table = table_of(layer, arguments.operands, arguments.ranks);
  kernel::DecodeParams params{};
  params.forward = common_params(arguments, table);
  params.forward.sizes = routed_sizes(layer, problem_of(layer, arguments.operands.x.shape[0]));
  params.forward.ranks.world = 1;
  params.hidden = region<void>(arguments, table, ForwardScratch::kHidden);
  set_weights(params, layer, arguments.operands);
  const kernel::DecodeEntry entry = kernel_for(layer);
  launch_pairs({entry.function, entry.shared_bytes, config::kForwardThreads, "decode"}, &params,
               arguments.max_sms, true, arguments.stream);
}

}  // namespace flashmoe::cuda::launch
