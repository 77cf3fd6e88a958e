// Integer helpers of the plan, usable on host and device. Their type is that of their operands:
// kernels count in 32 bits, where a 64-bit division would be a call.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define FM_HD __host__ __device__
#else
#define FM_HD
#endif

namespace flashmoe::plan {

template <class A, class B>
FM_HD constexpr std::common_type_t<A, B> ceil_div(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
FM_HD constexpr std::common_type_t<A, B> align_up(A a, B unit) {
  return ceil_div(a, unit) * unit;
}
template <class A, class B>
FM_HD constexpr std::common_type_t<A, B> min_of(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
FM_HD constexpr std::common_type_t<A, B> max_of(A a, B b) {
  return a > b ? a : b;
}

}  // namespace flashmoe::plan
