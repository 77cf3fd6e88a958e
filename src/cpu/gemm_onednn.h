// Products by oneDNN, fp32 and bf16, one thread.
#pragma once

#include <cstdint>

namespace flashmoe::cpu {

enum class DnnType : int32_t { kF32, kBf16 };

struct DnnMatrix {
  const void* data;
  int64_t row_stride;
  int64_t col_stride;
};

void gemm_onednn(DnnType type, int64_t m, int64_t n, int64_t k, DnnMatrix a, DnnMatrix b, float* c,
                 int64_t ldc, bool accumulate);

// Native bf16 products (AVX512_BF16 or AMX); otherwise the engine widens to fp32.
bool onednn_has_bf16();

const char* onednn_description();

// oneDNN brings an OpenMP runtime: sets the threads of products made by the calling thread and
// returns the setting before.
int onednn_set_threads(int num_threads);

}  // namespace flashmoe::cpu
