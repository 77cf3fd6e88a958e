// The warpgroup's matrix product (wgmma), sm_90a. Every function: all 128 threads of a warpgroup,
// converged.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/ptx/ptx.cuh"

namespace flashmoe::cuda::ptx {

// Registers and shared memory written before are seen by the products issued after.
FM_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

// The products issued since the last commit become one group.
FM_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

// Returns when at most kPending of the groups are still under way.
template <int kPending>
FM_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

// The sums of products that were waited for: they are read no earlier than here.
template <int kCount>
FM_DEVICE void wgmma_settle(float (&sums)[kCount]) {
  FM_UNROLL
  for (float& sum : sums) asm volatile("" : "+f"(sum) : : "memory");
}

// wgmma<T, N, kTransA, kTransB>: d[N / 2] (+)= A[64, 16] * B[N, 16]^T. T is __nv_bfloat16 or
// __half; A and B are in shared memory, told by descriptors (tile/descriptor.cuh); A is M-major
// where kTransA is 1, B is N-major where kTransB is 1, else both are K-major. d is overwritten
// where `accumulate` is 0. An operand list has a fixed length, hence one body a width.
template <class T, int N, int kTransA, int kTransB>
struct Wgmma;

// clang-format off
#define FM_EIGHT_SUMS(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),     \
      "+f"(d[i + 6]), "+f"(d[i + 7])

// The sums of a width: their operand numbers, and the operands.
#define FM_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FM_SUMS_16 FM_EIGHT_SUMS(0)
#define FM_NAMES_32 FM_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FM_SUMS_32 FM_SUMS_16, FM_EIGHT_SUMS(8)
#define FM_NAMES_48 FM_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FM_SUMS_48 FM_SUMS_32, FM_EIGHT_SUMS(16)
#define FM_NAMES_64 FM_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FM_SUMS_64 FM_SUMS_48, FM_EIGHT_SUMS(24)
#define FM_NAMES_80 FM_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FM_SUMS_80 FM_SUMS_64, FM_EIGHT_SUMS(32)
#define FM_NAMES_96 FM_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FM_SUMS_96 FM_SUMS_80, FM_EIGHT_SUMS(40)
#define FM_NAMES_112 FM_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FM_SUMS_112 FM_SUMS_96, FM_EIGHT_SUMS(48)
#define FM_NAMES_128 FM_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FM_SUMS_128 FM_SUMS_112, FM_EIGHT_SUMS(56)
#define FM_NAMES_144 FM_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define FM_SUMS_144 FM_SUMS_128, FM_EIGHT_SUMS(64)
#define FM_NAMES_160 FM_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define FM_SUMS_160 FM_SUMS_144, FM_EIGHT_SUMS(72)
#define FM_NAMES_176 FM_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define FM_SUMS_176 FM_SUMS_160, FM_EIGHT_SUMS(80)
// a, b, accumulate, trans_a, trans_b: numbers of the operands that follow the sums.
#define FM_WGMMA_TYPE(N, type, a, b, accumulate, trans_a, trans_b)                                \
  asm volatile(                                                                                   \
      "{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" accumulate ", 0;\n\t"                              \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" FM_NAMES_##N "}, "     \
      "%" a ", %" b ", p, 1, 1, %" trans_a ", %" trans_b ";\n\t}"                                 \
      : FM_SUMS_##N                                                                               \
      : "l"(a_descriptor), "l"(b_descriptor), "r"(sum), "n"(kTransA), "n"(kTransB))

#define FM_WGMMA(N, a, b, accumulate, trans_a, trans_b)                                           \
  template <class T, int kTransA, int kTransB>                                                    \
  struct Wgmma<T, N, kTransA, kTransB> {                                                          \
    FM_DEVICE static void multiply(float* d, uint64_t a_descriptor, uint64_t b_descriptor,        \
                                   int sum) {                                                     \
      if constexpr (std::is_same_v<T, __nv_bfloat16>) {                                           \
        FM_WGMMA_TYPE(N, "bf16", a, b, accumulate, trans_a, trans_b);                             \
      } else {                                                                                    \
        static_assert(std::is_same_v<T, __half>);                                                 \
        FM_WGMMA_TYPE(N, "f16", a, b, accumulate, trans_a, trans_b);                              \
      }                                                                                           \
    }                                                                                             \
  };

FM_WGMMA(16, "8", "9", "10", "11", "12")
FM_WGMMA(32, "16", "17", "18", "19", "20")
FM_WGMMA(48, "24", "25", "26", "27", "28")
FM_WGMMA(64, "32", "33", "34", "35", "36")
FM_WGMMA(80, "40", "41", "42", "43", "44")
FM_WGMMA(96, "48", "49", "50", "51", "52")
FM_WGMMA(112, "56", "57", "58", "59", "60")
FM_WGMMA(128, "64", "65", "66", "67", "68")
FM_WGMMA(144, "72", "73", "74", "75", "76")
FM_WGMMA(160, "80", "81", "82", "83", "84")
FM_WGMMA(176, "88", "89", "90", "91", "92")

#undef FM_NAMES_16
#undef FM_SUMS_16
#undef FM_NAMES_32
#undef FM_SUMS_32
#undef FM_NAMES_48
#undef FM_SUMS_48
#undef FM_NAMES_64
#undef FM_SUMS_64
#undef FM_NAMES_80
#undef FM_SUMS_80
#undef FM_NAMES_96
#undef FM_SUMS_96
#undef FM_NAMES_112
#undef FM_SUMS_112
#undef FM_NAMES_128
#undef FM_SUMS_128
#undef FM_NAMES_144
#undef FM_SUMS_144
#undef FM_NAMES_160
#undef FM_SUMS_160
#undef FM_NAMES_176
#undef FM_SUMS_176
#undef FM_EIGHT_SUMS
#undef FM_WGMMA_TYPE
#undef FM_WGMMA
// clang-format on

template <class T, int N, int kTransA, int kTransB = 0>
FM_DEVICE void wgmma(float* d, uint64_t a_descriptor, uint64_t b_descriptor, int accumulate) {
  Wgmma<T, N, kTransA, kTransB>::multiply(d, a_descriptor, b_descriptor, accumulate);
}

}  // namespace flashmoe::cuda::ptx
