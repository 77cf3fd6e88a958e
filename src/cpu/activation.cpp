#include "cpu/activation.h"

#include <algorithm>
#include <cmath>

namespace flashmoe::cpu {
namespace {

constexpr int64_t kPiece = 256;  // elements kept on the stack

template <class A>
using Piece = Eigen::Array<A, 1, Eigen::Dynamic, Eigen::RowMajor, 1, kPiece>;

template <class A>
using Strided = Eigen::Map<const Eigen::Array<A, 1, Eigen::Dynamic>, 0, Eigen::InnerStride<>>;
template <class A>
using MutableStrided = Eigen::Map<Eigen::Array<A, 1, Eigen::Dynamic>, 0, Eigen::InnerStride<>>;

template <class A>
Piece<A> load(const A* from, int64_t stride, int64_t count) {
  if (stride == 1) return ArrayView<A>(from, count);
  return Strided<A>(from, count, Eigen::InnerStride<>(stride));
}

template <class A>
void store(const Piece<A>& values, A* to, int64_t stride) {
  if (stride == 1) {
    MutableArray<A>(to, values.size()) = values;
  } else {
    MutableStrided<A>(to, values.size(), Eigen::InnerStride<>(stride)) = values;
  }
}

// value = f(x) and, where slope is not null, slope = f'(x).
template <class A>
void silu(A alpha, const Piece<A>& x, Piece<A>& value, Piece<A>* slope) {
  const Piece<A> s = (alpha * x).logistic();
  value = x * s;
  if (slope != nullptr) *slope = s * (A(1) + alpha * x * (A(1) - s));
}

template <class A>
void gelu_erf(const Piece<A>& x, Piece<A>& value, Piece<A>* slope) {
  constexpr double kSqrtHalf = 0.70710678118654752440;
  constexpr double kInvSqrt2Pi = 0.39894228040143267794;
  const Piece<A> cdf =
      x.unaryExpr([](A v) { return A(0.5) * std::erfc(-v * static_cast<A>(kSqrtHalf)); });
  value = x * cdf;
  if (slope != nullptr) {
    *slope = cdf + x * static_cast<A>(kInvSqrt2Pi) * (A(-0.5) * x * x).exp();
  }
}

template <class A>
void gelu_tanh(const Piece<A>& x, Piece<A>& value, Piece<A>* slope) {
  const A scale = static_cast<A>(0.79788456080286535588);  // sqrt(2 / pi)
  const A cubic = static_cast<A>(0.044715);
  const Piece<A> t = (scale * (x + cubic * x * x * x)).tanh();
  value = A(0.5) * x * (A(1) + t);
  if (slope != nullptr) {
    *slope =
        A(0.5) * (A(1) + t) + A(0.5) * x * (A(1) - t * t) * scale * (A(1) + A(3) * cubic * x * x);
  }
}

// NaN stays NaN: it is not below 0.
template <class A>
void relu(const Piece<A>& x, Piece<A>& value, Piece<A>* slope) {
  value = (x < A(0)).select(A(0), x);
  if (slope != nullptr) *slope = (x > A(0)).template cast<A>();
}

template <class A>
void relu2(const Piece<A>& x, Piece<A>& value, Piece<A>* slope) {
  value = (x < A(0)).select(A(0), x * x);
  if (slope != nullptr) *slope = (x < A(0)).select(A(0), A(2) * x);
}

template <class A>
void apply(const ActivationSpec& spec, const Piece<A>& x, Piece<A>& value, Piece<A>* slope) {
  switch (spec.kind) {
    case FM_SILU:
      return silu(static_cast<A>(spec.alpha), x, value, slope);
    case FM_GELU_ERF:
      return gelu_erf(x, value, slope);
    case FM_GELU_TANH:
      return gelu_tanh(x, value, slope);
    case FM_RELU:
      return relu(x, value, slope);
    case FM_RELU2:
      return relu2(x, value, slope);
    default:
      value = x;
      if (slope != nullptr) *slope = Piece<A>::Ones(x.size());
  }
}

// The clamped operands; written with selects so that NaN passes through.
template <class A>
struct Clamped {
  Piece<A> gate, up;

  Clamped(const ActivationSpec& spec, const PreActivation<A>& z, int64_t first, int64_t count) {
    const A limit = static_cast<A>(spec.limit);
    gate = load(z.gate + first * z.stride, z.stride, count);
    if (limit > 0) gate = (gate > limit).select(limit, gate);
    if (!spec.gated) return;
    up = load(z.up + first * z.stride, z.stride, count);
    if (limit > 0) up = (up > limit).select(limit, (up < -limit).select(-limit, up));
    up += static_cast<A>(spec.up_offset);
  }
};

// Zeroes the slopes where the clamp was active; torch.clamp passes gradients on the bound itself.
template <class A>
void mask_slopes(const ActivationSpec& spec, const PreActivation<A>& z, int64_t first,
                 Piece<A>& grad_gate, Piece<A>& grad_up) {
  const A limit = static_cast<A>(spec.limit);
  if (!(limit > 0)) return;
  const int64_t count = grad_gate.size();
  const Piece<A> gate = load(z.gate + first * z.stride, z.stride, count);
  grad_gate = (gate > limit).select(A(0), grad_gate);
  if (!spec.gated) return;
  const Piece<A> up = load(z.up + first * z.stride, z.stride, count);
  grad_up = (up.abs() > limit).select(A(0), grad_up);
}

}  // namespace

template <class A>
void activate(const ActivationSpec& spec, const PreActivation<A>& z, A* out, int64_t count) {
  for (int64_t first = 0; first < count; first += kPiece) {
    const int64_t size = std::min(kPiece, count - first);
    const Clamped<A> operands(spec, z, first, size);
    Piece<A> value(size);
    apply<A>(spec, operands.gate, value, nullptr);
    if (spec.gated) value *= operands.up;
    store(value, out + first, 1);
  }
}

template <class A>
void activate_backward(const ActivationSpec& spec, const PreActivation<A>& z, const A* grad_out,
                       A* out, A* grad_gate, A* grad_up, int64_t count) {
  for (int64_t first = 0; first < count; first += kPiece) {
    const int64_t size = std::min(kPiece, count - first);
    const Clamped<A> operands(spec, z, first, size);
    const Piece<A> grad = load(grad_out + first, 1, size);
    Piece<A> value(size), slope(size);
    apply<A>(spec, operands.gate, value, &slope);
    Piece<A> to_gate = grad * slope;
    Piece<A> to_up;
    if (spec.gated) {
      to_up = grad * value;
      to_gate *= operands.up;
      value *= operands.up;
    }
    mask_slopes(spec, z, first, to_gate, to_up);
    store(value, out + first, 1);
    store(to_gate, grad_gate + first * z.stride, z.stride);
    if (spec.gated) store(to_up, grad_up + first * z.stride, z.stride);
  }
}

template void activate<float>(const ActivationSpec&, const PreActivation<float>&, float*, int64_t);
template void activate<double>(const ActivationSpec&, const PreActivation<double>&, double*,
                               int64_t);
template void activate_backward<float>(const ActivationSpec&, const PreActivation<float>&,
                                       const float*, float*, float*, float*, int64_t);
template void activate_backward<double>(const ActivationSpec&, const PreActivation<double>&,
                                        const double*, double*, double*, double*, int64_t);

}  // namespace flashmoe::cpu
