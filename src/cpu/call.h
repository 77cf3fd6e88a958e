// One call of the layer as the engine received it: the layer, its sizes, its operands. Validated.
#pragma once

#include "cpu/activation.h"
#include "cpu/router.h"
#include "flashmoe/c_api.h"
#include "plan/problem.h"

namespace flashmoe::cpu {

// The operands of both directions under one set of names; absent tensors have data null.
struct Operands {
  fm_tensor x, w_router, router_bias, selection_bias, topk_ids, topk_weights;
  fm_tensor w_gate, w_up, w_down, b_up, b_down, logits, z;
  // forward
  fm_tensor y, tokens_per_expert, dropped;
  // backward
  fm_tensor grad_y, grad_weights, grad_logits;
  fm_tensor grad_x, grad_topk_weights, grad_w_router, grad_router_bias;
  fm_tensor grad_w_gate, grad_w_up, grad_w_down, grad_b_up, grad_b_down;
  uint32_t flags;  // fm_backward_flags
};

struct Call {
  fm_layer layer;
  plan::Problem problem;
  Operands operands;
  ActivationSpec activation;
  RouterSpec router;
  bool backward = false;

  bool fused_router() const { return operands.w_router.data != nullptr; }
};

inline bool present(const fm_tensor& tensor) { return tensor.data != nullptr; }

// Matrix `expert_idx` of a [E_loc, rows, cols] tensor.
template <class T>
struct StridedMatrix {
  T* data;
  int64_t row_stride;
  int64_t col_stride;
};

template <class T>
StridedMatrix<T> expert_matrix(const fm_tensor& tensor, int64_t expert_idx) {
  return {static_cast<T*>(tensor.data) + expert_idx * tensor.stride[0], tensor.stride[1],
          tensor.stride[2]};
}

template <class T>
T* row_of(const fm_tensor& tensor, int64_t row) {
  return static_cast<T*>(tensor.data) + row * tensor.stride[0];
}

// Element of a router-side or index tensor whatever its dtype; rank 1 or 2, any strides.
inline double read_real(const fm_tensor& tensor, int64_t i, int64_t j = 0) {
  const int64_t at = i * tensor.stride[0] + (tensor.ndim > 1 ? j * tensor.stride[1] : 0);
  switch (tensor.dtype) {
    case FM_F64:
      return static_cast<const double*>(tensor.data)[at];
    case FM_F32:
      return static_cast<const float*>(tensor.data)[at];
    case FM_BF16:
      return static_cast<float>(static_cast<const bf16*>(tensor.data)[at]);
    default:
      return static_cast<float>(static_cast<const fp16*>(tensor.data)[at]);
  }
}

inline void write_real(const fm_tensor& tensor, int64_t i, int64_t j, double value) {
  const int64_t at = i * tensor.stride[0] + (tensor.ndim > 1 ? j * tensor.stride[1] : 0);
  switch (tensor.dtype) {
    case FM_F64:
      static_cast<double*>(tensor.data)[at] = value;
      return;
    case FM_F32:
      static_cast<float*>(tensor.data)[at] = static_cast<float>(value);
      return;
    case FM_BF16:
      static_cast<bf16*>(tensor.data)[at] = bf16(static_cast<float>(value));
      return;
    default:
      static_cast<fp16*>(tensor.data)[at] = fp16(static_cast<float>(value));
  }
}

inline int64_t read_index(const fm_tensor& tensor, int64_t i, int64_t j) {
  const int64_t at = i * tensor.stride[0] + j * tensor.stride[1];
  if (tensor.dtype == FM_I32) return static_cast<const int32_t*>(tensor.data)[at];
  return static_cast<const int64_t*>(tensor.data)[at];
}

inline void write_index(const fm_tensor& tensor, int64_t i, int64_t j, int64_t value) {
  const int64_t at = i * tensor.stride[0] + j * tensor.stride[1];
  if (tensor.dtype == FM_I32) {
    static_cast<int32_t*>(tensor.data)[at] = static_cast<int32_t>(value);
  } else {
    static_cast<int64_t*>(tensor.data)[at] = value;
  }
}

}  // namespace flashmoe::cpu
