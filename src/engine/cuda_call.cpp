#include "engine/cuda_call.h"

#include "base/error.h"
#include "engine/check.h"

namespace flashmoe::engine {
namespace {

void check_supported(const fm_layer& layer) {
  if (layer.dtype != FM_BF16 && layer.dtype != FM_F16) {
    fail(FM_UNSUPPORTED, "x is ", layer.dtype == FM_F64 ? "float64" : "float32",
         " on a CUDA device, where bfloat16 and float16 are supported; the CPU takes all four");
  }
}

// The operands that both argument structs name alike, as they were checked.
template <class Args>
Args with_shared(Args args, const cpu::Operands& o) {
  args.x = o.x;
  args.w_router = o.w_router;
  args.router_bias = o.router_bias;
  args.selection_bias = o.selection_bias;
  args.topk_ids = o.topk_ids;
  args.topk_weights = o.topk_weights;
  args.w_gate = o.w_gate;
  args.w_up = o.w_up;
  args.w_down = o.w_down;
  args.b_up = o.b_up;
  args.b_down = o.b_down;
  args.logits = o.logits;
  args.z = o.z;
  return args;
}

}  // namespace

bool is_on_cuda(int32_t device_type) {
  if (device_type == FM_DEVICE_HOST || device_type == FM_DEVICE_CUDA) {
    return device_type == FM_DEVICE_CUDA;
  }
  fail(FM_INVALID_TYPE, "device_type is ", device_type, ", expected ",
       static_cast<int>(FM_DEVICE_HOST), " (host) or ", static_cast<int>(FM_DEVICE_CUDA),
       " (CUDA)");
}

fm_forward_args make_cuda_forward(const fabric::Group& group, const fm_layer& layer,
                                  const fm_forward_args& args) {
  const cpu::Operands o = make_forward_call(group, layer, args).operands;
  check_supported(layer);
  fm_forward_args checked = with_shared(args, o);
  checked.y = o.y;
  checked.tokens_per_expert = o.tokens_per_expert;
  checked.dropped = o.dropped;
  return checked;
}

fm_backward_args make_cuda_backward(const fabric::Group& group, const fm_layer& layer,
                                    const fm_backward_args& args) {
  const cpu::Operands o = make_backward_call(group, layer, args).operands;
  check_supported(layer);
  fm_backward_args checked = with_shared(args, o);
  checked.grad_y = o.grad_y;
  checked.grad_weights = o.grad_weights;
  checked.grad_logits = o.grad_logits;
  checked.grad_x = o.grad_x;
  checked.grad_topk_weights = o.grad_topk_weights;
  checked.grad_w_router = o.grad_w_router;
  checked.grad_router_bias = o.grad_router_bias;
  checked.grad_w_gate = o.grad_w_gate;
  checked.grad_w_up = o.grad_w_up;
  checked.grad_w_down = o.grad_w_down;
  checked.grad_b_up = o.grad_b_up;
  checked.grad_b_down = o.grad_b_down;
  return checked;
}

}  // namespace flashmoe::engine
