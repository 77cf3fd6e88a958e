// Integer helpers of the plan, usable on host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FM_HD __host__ __device__
#else
#define FM_HD
#endif

namespace flashmoe::plan {

FM_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FM_HD constexpr int64_t align_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }
FM_HD constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FM_HD constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace flashmoe::plan
