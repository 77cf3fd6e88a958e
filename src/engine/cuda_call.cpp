#include "engine/cuda_call.h"

#include "base/error.h"
#include "engine/check.h"

namespace flashmoe::engine {
namespace {

void check_supported(const fm_layer& layer, const cpu::Operands& operands) {
  if (layer.dtype != FM_BF16 && layer.dtype != FM_F16) {
    fail(FM_UNSUPPORTED, "x is ", layer.dtype == FM_F64 ? "float64" : "float32",
         " on a CUDA device, where bfloat16 and float16 are supported; the CPU takes all four");
  }
  if (cpu::present(operands.z)) {
    fail(FM_UNSUPPORTED,
         "z (save_z) is not written on a CUDA device yet: leave it out (save_z=False)");
  }
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
  check_supported(layer, o);
  fm_forward_args checked = args;
  checked.x = o.x;
  checked.w_router = o.w_router;
  checked.router_bias = o.router_bias;
  checked.selection_bias = o.selection_bias;
  checked.topk_ids = o.topk_ids;
  checked.topk_weights = o.topk_weights;
  checked.w_gate = o.w_gate;
  checked.w_up = o.w_up;
  checked.w_down = o.w_down;
  checked.b_up = o.b_up;
  checked.b_down = o.b_down;
  checked.y = o.y;
  checked.logits = o.logits;
  checked.tokens_per_expert = o.tokens_per_expert;
  checked.dropped = o.dropped;
  return checked;
}

void refuse_cuda_backward() {
  fail(FM_UNSUPPORTED,
       "the backward of CUDA tensors does not exist yet: run the layer under torch.no_grad(), or "
       "train on the CPU");
}

}  // namespace flashmoe::engine
