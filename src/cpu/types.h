// Storage and accumulation types of the CPU engine, and the conversions between them.
#pragma once

#include <Eigen/Core>
#include <cstdint>

#include "flashmoe/c_api.h"

namespace flashmoe::cpu {

using bf16 = Eigen::bfloat16;
using fp16 = Eigen::half;

// Products, reductions and the router run in fp32; in fp64 for fp64 layers.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class T>
struct DtypeOf;
template <>
struct DtypeOf<double> {
  static constexpr fm_dtype value = FM_F64;
};
template <>
struct DtypeOf<float> {
  static constexpr fm_dtype value = FM_F32;
};
template <>
struct DtypeOf<bf16> {
  static constexpr fm_dtype value = FM_BF16;
};
template <>
struct DtypeOf<fp16> {
  static constexpr fm_dtype value = FM_F16;
};

inline int32_t dtype_bytes(int32_t dtype) {
  switch (dtype) {
    case FM_F64:
    case FM_I64:
      return 8;
    case FM_F32:
    case FM_I32:
      return 4;
    default:
      return 2;
  }
}

template <class T>
using ArrayView = Eigen::Map<const Eigen::Array<T, 1, Eigen::Dynamic>>;
template <class T>
using MutableArray = Eigen::Map<Eigen::Array<T, 1, Eigen::Dynamic>>;

// to[i] = from[i], one rounding.
template <class To, class From>
void convert(const From* from, To* to, int64_t count) {
  MutableArray<To>(to, count) = ArrayView<From>(from, count).template cast<To>();
}

// Calls f(T{}) with the storage type of a layer dtype.
template <class F>
decltype(auto) with_dtype(int32_t dtype, F&& f) {
  switch (dtype) {
    case FM_F64:
      return f(double{});
    case FM_F32:
      return f(float{});
    case FM_BF16:
      return f(bf16{});
    default:
      return f(fp16{});
  }
}

}  // namespace flashmoe::cpu
