#include "engine/check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "base/error.h"

namespace flashmoe::engine {
namespace {

constexpr int64_t kMostSlots = (int64_t{1} << 31) - 1;  // slot and row indices are 32-bit
// Bounds that no machine reaches, so that no product of sizes overflows below them.
constexpr int64_t kMostColumns = (int64_t{1} << 31) - 1;  // of hidden and intermediate
constexpr int64_t kMostElements = int64_t{1} << 47;       // that a tensor spans

const char* dtype_name(int32_t dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16", "int32", "int64"};
  return dtype >= 0 && dtype < 6 ? kNames[dtype] : "an unknown dtype";
}

fm_dtype acc_dtype(const fm_layer& layer) { return layer.dtype == FM_F64 ? FM_F64 : FM_F32; }
fm_dtype layer_dtype(const fm_layer& layer) { return static_cast<fm_dtype>(layer.dtype); }

std::string shape_text(const int64_t* shape, int32_t ndim) {
  std::string text = "[";
  for (int32_t i = 0; i < ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void check_dtype(const char* name, const fm_tensor& tensor,
                 std::initializer_list<fm_dtype> accepted) {
  std::string names;
  for (const fm_dtype dtype : accepted) {
    if (tensor.dtype == dtype) return;
    const std::string next = dtype_name(dtype);
    if (names.find(next) == std::string::npos) names += (names.empty() ? "" : " or ") + next;
  }
  fail(FM_INVALID_TYPE, name, " is ", dtype_name(tensor.dtype), ", expected ", names);
}

// The tensor lies within an address space: later arithmetic on its strides does not overflow.
void check_span(const char* name, const fm_tensor& tensor) {
  double span = 1;
  for (int32_t i = 0; i < tensor.ndim; ++i) {
    span += std::max(0.0, static_cast<double>(tensor.shape[i]) - 1) *
            std::abs(static_cast<double>(tensor.stride[i]));
  }
  if (span <= static_cast<double>(kMostElements)) return;
  fail(FM_INVALID_VALUE, name, " has shape ", shape_text(tensor.shape, tensor.ndim),
       " and strides ", shape_text(tensor.stride, tensor.ndim),
       ": it spans more elements than memory can hold");
}

// Presence, number of dimensions and shape; gives size-1 dimensions their canonical strides, which
// callers leave arbitrary.
void check_shape(const char* name, fm_tensor& tensor, std::initializer_list<int64_t> shape) {
  const auto ndim = static_cast<int32_t>(shape.size());
  const std::string expected = shape_text(shape.begin(), ndim);
  if (tensor.ndim != ndim) {
    fail(FM_INVALID_VALUE, name, " has ", tensor.ndim, " dimensions, expected ", ndim, ": ",
         expected);
  }
  int64_t elements = 1;
  for (int32_t i = ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != shape.begin()[i]) {
      fail(FM_INVALID_VALUE, name, " has shape ", shape_text(tensor.shape, ndim), ", expected ",
           expected);
    }
    if (tensor.shape[i] == 1) tensor.stride[i] = elements;
    if (elements < kMostElements) elements *= std::max<int64_t>(tensor.shape[i], 1);
  }
  check_span(name, tensor);
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  if (address % static_cast<uintptr_t>(cpu::dtype_bytes(tensor.dtype)) != 0) {
    fail(FM_INVALID_VALUE, name, " is not aligned to its element size of ",
         cpu::dtype_bytes(tensor.dtype), " bytes");
  }
}

void require(const char* name, const fm_tensor& tensor) {
  if (tensor.data == nullptr && (tensor.ndim == 0 || tensor.shape[0] != 0)) {
    fail(FM_INVALID_VALUE, name, " is missing");
  }
}

void check_rows_contiguous(const char* name, const fm_tensor& tensor) {
  const bool dense =
      tensor.stride[1] == 1 && (tensor.shape[0] <= 1 || tensor.stride[0] >= tensor.shape[1]);
  if (dense) return;
  fail(FM_INVALID_VALUE, name, " has strides ", shape_text(tensor.stride, tensor.ndim),
       ", expected contiguous rows (last stride 1): call .contiguous()");
}

// One of the two matrix dimensions is contiguous and rows do not overlap. A single row or column
// with gaps is a matrix whose other dimension, of size 1, counts as the contiguous one.
void check_matrix_strides(const char* name, fm_tensor& t) {
  if (t.shape[1] == 1 && t.stride[2] != 1) t.stride[1] = 1;
  if (t.shape[2] == 1 && t.stride[1] != 1) t.stride[2] = 1;
  const bool row_major = t.stride[2] == 1 && (t.shape[1] == 1 || t.stride[1] >= t.shape[2]);
  const bool col_major = t.stride[1] == 1 && (t.shape[2] == 1 || t.stride[2] >= t.shape[1]);
  if (row_major || col_major) return;
  fail(FM_INVALID_VALUE, name, " has strides ", shape_text(t.stride, t.ndim),
       ", expected one of the last two dimensions contiguous");
}

// The experts' matrices of an output do not share an element.
void check_experts_apart(const char* name, const fm_tensor& t) {
  const int64_t extent = (t.shape[1] - 1) * t.stride[1] + (t.shape[2] - 1) * t.stride[2] + 1;
  if (t.shape[0] == 1 || t.stride[0] >= extent) return;
  fail(FM_INVALID_VALUE, name, " has strides ", shape_text(t.stride, t.ndim),
       ": the experts' gradients would overlap");
}

void check_dense(const char* name, const fm_tensor& tensor) {
  const bool dense =
      tensor.ndim == 1
          ? tensor.stride[0] == 1
          : tensor.stride[1] == 1 && (tensor.shape[0] <= 1 || tensor.stride[0] == tensor.shape[1]);
  if (!dense) fail(FM_INVALID_VALUE, name, " must be contiguous");
}

void check_overlap(const char* out_name, const fm_tensor& out, const char* in_name,
                   const fm_tensor& in) {
  if (!cpu::present(out) || !cpu::present(in)) return;
  const auto range = [](const fm_tensor& t) {
    int64_t last = 1;
    for (int32_t i = 0; i < t.ndim; ++i) {
      if (t.shape[i] == 0) return std::pair<uintptr_t, uintptr_t>{0, 0};
      last += (t.shape[i] - 1) * t.stride[i];
    }
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    return std::pair{begin, begin + static_cast<uintptr_t>(last * cpu::dtype_bytes(t.dtype))};
  };
  const auto [out_begin, out_end] = range(out);
  const auto [in_begin, in_end] = range(in);
  if (out_begin < in_end && in_begin < out_end) {
    fail(FM_INVALID_VALUE, out_name, " shares memory with ", in_name, "; outputs need their own");
  }
}

void check_number(const char* name, bool good, double given, const char* accepted) {
  if (!good) fail(FM_INVALID_VALUE, name, " is ", given, ", expected ", accepted);
}

void check_router(const fm_layer& layer) {
  check_number("score", layer.score >= FM_SCORE_SOFTMAX && layer.score <= FM_SCORE_SQRT_SOFTPLUS,
               layer.score, "an fm_score");
  check_number("scale", std::isfinite(layer.scale), layer.scale, "a finite number");
  const int64_t groups = std::max<int64_t>(layer.num_groups, 1);
  if (layer.num_experts % groups != 0) {
    fail(FM_INVALID_VALUE, "num_groups is ", groups, ", expected a divisor of num_experts, ",
         layer.num_experts);
  }
  if (groups == 1) return;
  check_number("top_groups", layer.top_groups >= 1 && layer.top_groups <= groups,
               static_cast<double>(layer.top_groups), "1..num_groups");
  check_number("group_top", layer.group_top >= 1, static_cast<double>(layer.group_top),
               "at least 1");
  check_number("top_k", layer.top_k <= layer.top_groups * (layer.num_experts / groups),
               static_cast<double>(layer.top_k), "at most the experts of top_groups groups");
}

// The operands shared by both directions, checked in place.
class Checker {
 public:
  Checker(const fabric::Group& group, const fm_layer& layer, int32_t device_type, bool backward)
      : device_type_(device_type) {
    call_.layer = layer;
    call_.backward = backward;
    auto& p = call_.problem;
    p.world = group.world();
    p.rank = group.rank();
    p.hidden = layer.hidden;
    p.intermediate = layer.intermediate;
    p.num_experts = layer.num_experts;
    p.top_k = layer.top_k;
    p.gates = layer.gated != 0 ? 2 : 1;
    call_.activation = {layer.activation, layer.gated != 0, layer.act_alpha, layer.act_limit,
                        layer.up_offset};
    call_.router = {layer.score,      layer.renormalize != 0,
                    layer.scale,      layer.num_experts,
                    layer.top_k,      std::max<int64_t>(layer.num_groups, 1),
                    layer.top_groups, layer.group_top};
  }

  void check_shared() {
    auto& o = call_.operands;
    check_tokens(o.x);
    check_weights();
    if (cpu::present(o.w_router)) check_router_operands();
    check_topk();
    if (cpu::present(o.z)) check_z();
  }

  void check_forward() {
    auto& o = call_.operands;
    rows("y", o.y);
    check_overlap("y", o.y, "x", o.x);
    if (cpu::present(o.logits)) check_logits("logits", o.logits);
    if (cpu::present(o.tokens_per_expert)) {
      check_dtype("tokens_per_expert", o.tokens_per_expert, {FM_I64});
      check_shape("tokens_per_expert", o.tokens_per_expert, {p().num_experts});
    }
    if (cpu::present(o.dropped)) {
      check_dtype("dropped", o.dropped, {FM_I64});
      check_shape("dropped", o.dropped, {1});
    }
  }

  void check_backward() {
    auto& o = call_.operands;
    rows("grad_y", o.grad_y);
    rows("grad_x", o.grad_x);
    check_overlap("grad_x", o.grad_x, "x", o.x);
    check_overlap("grad_x", o.grad_x, "grad_y", o.grad_y);
    check_router_gradients();
    const bool separate = cpu::present(o.w_gate);
    const int64_t up = separate ? p().intermediate : p().up_rows();
    if (separate) weight("grad_w_gate", o.grad_w_gate, p().intermediate, p().hidden, true);
    weight("grad_w_up", o.grad_w_up, up, p().hidden, true);
    weight("grad_w_down", o.grad_w_down, p().hidden, p().intermediate, true);
    check_overlap("grad_w_gate", o.grad_w_gate, "w_gate", o.w_gate);
    check_overlap("grad_w_up", o.grad_w_up, "w_up", o.w_up);
    check_overlap("grad_w_down", o.grad_w_down, "w_down", o.w_down);
    bias("grad_b_up", o.grad_b_up, p().up_rows(), true);
    bias("grad_b_down", o.grad_b_down, p().hidden, true);
  }

  cpu::Call& call() { return call_; }

 private:
  plan::Problem& p() { return call_.problem; }
  const fm_layer& layer() const { return call_.layer; }

  void check_tokens(fm_tensor& x) {
    require("x", x);
    if (x.ndim != 2) fail(FM_INVALID_VALUE, "x has ", x.ndim, " dimensions, expected 2: [T, H]");
    engine::check_tokens(x.shape[0], p().top_k);
    p().tokens = x.shape[0];
    rows("x", x);
  }

  void rows(const char* name, fm_tensor& tensor) {
    require(name, tensor);
    check_dtype(name, tensor, {layer_dtype(layer())});
    check_shape(name, tensor, {p().tokens, p().hidden});
    check_rows_contiguous(name, tensor);
  }

  void weight(const char* name, fm_tensor& tensor, int64_t row_count, int64_t cols,
              bool gradient = false) {
    if (gradient && !cpu::present(tensor)) return;
    require(name, tensor);
    if (gradient) {
      check_dtype(name, tensor, {layer_dtype(layer()), acc_dtype(layer())});
    } else {
      check_dtype(name, tensor, {layer_dtype(layer())});
    }
    check_shape(name, tensor, {p().local_experts(), row_count, cols});
    check_matrix_strides(name, tensor);
    if (gradient) check_experts_apart(name, tensor);
  }

  void bias(const char* name, fm_tensor& tensor, int64_t cols, bool gradient = false) {
    if (!cpu::present(tensor)) return;
    if (gradient) {
      check_dtype(name, tensor, {layer_dtype(layer()), acc_dtype(layer())});
    } else {
      check_dtype(name, tensor, {layer_dtype(layer())});
    }
    check_shape(name, tensor, {p().local_experts(), cols});
    check_rows_contiguous(name, tensor);
  }

  void check_weights() {
    auto& o = call_.operands;
    const bool separate = layer().gate_layout == FM_GATE_SEPARATE && layer().gated != 0;
    if (separate) {
      weight("w_gate", o.w_gate, p().intermediate, p().hidden);
    } else if (cpu::present(o.w_gate)) {
      fail(FM_INVALID_VALUE, "w_gate was given, but the gate layout is not separate");
    }
    weight("w_up", o.w_up, separate ? p().intermediate : p().up_rows(), p().hidden);
    weight("w_down", o.w_down, p().hidden, p().intermediate);
    bias("b_up", o.b_up, p().up_rows());
    bias("b_down", o.b_down, p().hidden);
  }

  void check_router_operands() {
    auto& o = call_.operands;
    check_dtype("w_router", o.w_router, {layer_dtype(layer()), acc_dtype(layer())});
    check_shape("w_router", o.w_router, {p().num_experts, p().hidden});
    check_rows_contiguous("w_router", o.w_router);
    if (cpu::present(o.router_bias)) {
      check_dtype("router_bias", o.router_bias, {static_cast<fm_dtype>(o.w_router.dtype)});
      check_shape("router_bias", o.router_bias, {p().num_experts});
    }
    if (cpu::present(o.selection_bias)) {
      check_dtype("selection_bias", o.selection_bias, {acc_dtype(layer())});
      check_shape("selection_bias", o.selection_bias, {p().num_experts});
    }
  }

  void check_topk() {
    auto& o = call_.operands;
    require("topk_ids", o.topk_ids);
    require("topk_weights", o.topk_weights);
    check_dtype("topk_ids", o.topk_ids, {FM_I32, FM_I64});
    check_shape("topk_ids", o.topk_ids, {p().tokens, p().top_k});
    check_dtype("topk_weights", o.topk_weights, {acc_dtype(layer()), layer_dtype(layer())});
    check_shape("topk_weights", o.topk_weights, {p().tokens, p().top_k});
  }

  void check_z() {
    fm_tensor& z = call_.operands.z;
    if (p().world > 1 && device_type_ != FM_DEVICE_CUDA) {
      fail(FM_UNSUPPORTED, "z with ", p().world,
           " ranks: accepted on CUDA; let the backward recompute it");
    }
    check_dtype("z", z, {layer_dtype(layer())});
    check_shape("z", z, {z.shape[0], p().up_rows()});
    check_rows_contiguous("z", z);
  }

  void check_logits(const char* name, fm_tensor& tensor) {
    check_dtype(name, tensor, {acc_dtype(layer())});
    check_shape(name, tensor, {p().tokens, p().num_experts});
    check_dense(name, tensor);
  }

  void check_router_gradients() {
    auto& o = call_.operands;
    const auto acc = acc_dtype(layer());
    if (cpu::present(o.grad_topk_weights)) {
      check_dtype("grad_topk_weights", o.grad_topk_weights, {acc, layer_dtype(layer())});
      check_shape("grad_topk_weights", o.grad_topk_weights, {p().tokens, p().top_k});
    }
    if (!cpu::present(o.w_router)) return;
    require("logits", o.logits);
    if (cpu::present(o.logits)) check_logits("logits", o.logits);
    if (cpu::present(o.grad_weights)) {
      check_dtype("grad_weights", o.grad_weights, {acc, layer_dtype(layer())});
      check_shape("grad_weights", o.grad_weights, {p().tokens, p().top_k});
    }
    if (cpu::present(o.grad_logits)) {
      check_dtype("grad_logits", o.grad_logits, {acc});
      check_shape("grad_logits", o.grad_logits, {p().tokens, p().num_experts});
    }
    if (cpu::present(o.grad_w_router)) {
      check_dtype("grad_w_router", o.grad_w_router, {acc, layer_dtype(layer())});
      check_shape("grad_w_router", o.grad_w_router, {p().num_experts, p().hidden});
      check_rows_contiguous("grad_w_router", o.grad_w_router);
    }
    if (cpu::present(o.grad_router_bias)) {
      check_dtype("grad_router_bias", o.grad_router_bias, {acc, layer_dtype(layer())});
      check_shape("grad_router_bias", o.grad_router_bias, {p().num_experts});
    }
  }

  cpu::Call call_;
  int32_t device_type_;
};

// The operands that both argument structs name alike.
template <class Args>
cpu::Operands shared_operands(const Args& args) {
  cpu::Operands o{};
  o.x = args.x;
  o.w_router = args.w_router;
  o.router_bias = args.router_bias;
  o.selection_bias = args.selection_bias;
  o.topk_ids = args.topk_ids;
  o.topk_weights = args.topk_weights;
  o.w_gate = args.w_gate;
  o.w_up = args.w_up;
  o.w_down = args.w_down;
  o.b_up = args.b_up;
  o.b_down = args.b_down;
  o.logits = args.logits;
  o.z = args.z;
  o.flags = args.flags;
  return o;
}

}  // namespace

void check_layer(const fm_layer& layer, int32_t world) {
  const auto number = [](int64_t value) {
    return static_cast<double>(value);
  };
  check_number("dtype", layer.dtype >= FM_F64 && layer.dtype <= FM_F16, layer.dtype,
               "float64, float32, bfloat16 or float16");
  check_number("hidden", layer.hidden >= 1 && layer.hidden <= kMostColumns, number(layer.hidden),
               "1..2147483647");
  check_number("intermediate", layer.intermediate >= 1 && layer.intermediate <= kMostColumns,
               number(layer.intermediate), "1..2147483647");
  check_number("num_experts", layer.num_experts >= 1 && layer.num_experts <= cpu::kMaxExperts,
               number(layer.num_experts), "1..1024");
  if (layer.num_experts % world != 0) {
    fail(FM_INVALID_VALUE, "num_experts is ", layer.num_experts, ", expected a multiple of the ",
         world, " ranks of the group");
  }
  if (layer.top_k < 1 || layer.top_k > layer.num_experts) {
    fail(FM_INVALID_VALUE, "top_k is ", layer.top_k, ", expected 1..", layer.num_experts,
         " (num_experts)");
  }
  check_number("activation", layer.activation >= FM_SILU && layer.activation <= FM_IDENTITY,
               layer.activation, "an fm_activation");
  check_number("gate_layout",
               layer.gate_layout >= FM_GATE_CONCATENATED && layer.gate_layout <= FM_GATE_SEPARATE,
               layer.gate_layout, "an fm_gate_layout");
  check_number("act_limit", layer.act_limit >= 0, layer.act_limit, "0 (none) or a positive limit");
  check_number("act_alpha", std::isfinite(layer.act_alpha), layer.act_alpha, "a finite number");
  check_number("up_offset", std::isfinite(layer.up_offset), layer.up_offset, "a finite number");
  check_number("capacity_factor",
               layer.capacity_factor >= 0 && std::isfinite(layer.capacity_factor),
               layer.capacity_factor, "0 (dropless) or a positive number");
  check_router(layer);
}

void check_tokens(int64_t tokens, int64_t top_k) {
  if (tokens >= 0 && tokens <= kMostSlots / top_k) return;
  fail(FM_INVALID_VALUE, "x has ", tokens,
       " tokens, expected at least 0 and tokens * top_k below 2^31");
}

cpu::Call make_forward_call(const fabric::Group& group, const fm_layer& layer,
                            const fm_forward_args& args) {
  check_layer(layer, group.world());
  Checker checker(group, layer, args.device_type, false);
  auto& o = checker.call().operands = shared_operands(args);
  o.y = args.y;
  o.tokens_per_expert = args.tokens_per_expert;
  o.dropped = args.dropped;
  checker.check_shared();
  checker.check_forward();
  return checker.call();
}

cpu::Call make_backward_call(const fabric::Group& group, const fm_layer& layer,
                             const fm_backward_args& args) {
  check_layer(layer, group.world());
  Checker checker(group, layer, args.device_type, true);
  auto& o = checker.call().operands = shared_operands(args);
  o.grad_y = args.grad_y;
  o.grad_weights = args.grad_weights;
  o.grad_logits = args.grad_logits;
  o.grad_x = args.grad_x;
  o.grad_topk_weights = args.grad_topk_weights;
  o.grad_w_router = args.grad_w_router;
  o.grad_router_bias = args.grad_router_bias;
  o.grad_w_gate = args.grad_w_gate;
  o.grad_w_up = args.grad_w_up;
  o.grad_w_down = args.grad_w_down;
  o.grad_b_up = args.grad_b_up;
  o.grad_b_down = args.grad_b_down;
  checker.check_shared();
  checker.check_backward();
  return checker.call();
}

}  // namespace flashmoe::engine
