#if FLASHMOE_ONEDNN

#include "cpu/gemm_onednn.h"

#include <omp.h>

#include <array>
#include <oneapi/dnnl/dnnl.hpp>
#include <string>
#include <unordered_map>

#include "base/error.h"

namespace flashmoe::cpu {
namespace {

using dnnl::memory;

const dnnl::engine& cpu_engine() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// Everything a prepared product depends on but its addresses.
using Key = std::array<int64_t, 10>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 1469598103934665603ull;
    for (int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211ull;
    return static_cast<size_t>(hash ^ (hash >> 29));
  }
};

struct Prepared {
  dnnl::matmul product;
  memory a, b, c;
};

// The stride of a dimension of size 1 means nothing: give it the one that keeps the matrix dense.
memory::dims strides_of(int64_t rows, int64_t cols, const DnnMatrix& m) {
  if (m.col_stride == 1) return {rows == 1 ? cols : m.row_stride, 1};
  return {1, cols == 1 ? rows : m.col_stride};
}

Prepared prepare(DnnType type, int64_t m, int64_t n, int64_t k, const DnnMatrix& a,
                 const DnnMatrix& b, int64_t ldc, bool accumulate) {
  const auto dtype = type == DnnType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
  const memory::desc a_desc({m, k}, dtype, strides_of(m, k, a));
  const memory::desc b_desc({k, n}, dtype, strides_of(k, n, b));
  const memory::desc c_desc({m, n}, memory::data_type::f32, memory::dims{m == 1 ? n : ldc, 1});
  dnnl::primitive_attr attributes;
  if (accumulate) {
    dnnl::post_ops sum;
    sum.append_sum(1.0f);
    attributes.set_post_ops(sum);
  }
#if DNNL_VERSION_MAJOR >= 3
  const dnnl::matmul::primitive_desc description(cpu_engine(), a_desc, b_desc, c_desc, attributes);
#else
  const dnnl::matmul::primitive_desc description(dnnl::matmul::desc(a_desc, b_desc, c_desc),
                                                 attributes, cpu_engine());
#endif
  return {dnnl::matmul(description), memory(a_desc, cpu_engine(), nullptr),
          memory(b_desc, cpu_engine(), nullptr), memory(c_desc, cpu_engine(), nullptr)};
}

// Prepared products are kept for each thread: the memory objects carry the addresses of one call.
Prepared& prepared_for(DnnType type, int64_t m, int64_t n, int64_t k, const DnnMatrix& a,
                       const DnnMatrix& b, int64_t ldc, bool accumulate) {
  constexpr size_t kMostKept = 4096;
  thread_local std::unordered_map<Key, Prepared, KeyHash> cache;
  const Key key{static_cast<int64_t>(type),
                m,
                n,
                k,
                a.row_stride,
                a.col_stride,
                b.row_stride,
                b.col_stride,
                ldc,
                accumulate};
  const auto found = cache.find(key);
  if (found != cache.end()) return found->second;
  if (cache.size() >= kMostKept) cache.clear();
  return cache.emplace(key, prepare(type, m, n, k, a, b, ldc, accumulate)).first->second;
}

}  // namespace

void gemm_onednn(DnnType type, int64_t m, int64_t n, int64_t k, DnnMatrix a, DnnMatrix b, float* c,
                 int64_t ldc, bool accumulate) {
  thread_local dnnl::stream stream(cpu_engine());
  try {
    Prepared& ready = prepared_for(type, m, n, k, a, b, ldc, accumulate);
    ready.a.set_data_handle(const_cast<void*>(a.data));
    ready.b.set_data_handle(const_cast<void*>(b.data));
    ready.c.set_data_handle(c);
    ready.product.execute(
        stream, {{DNNL_ARG_SRC, ready.a}, {DNNL_ARG_WEIGHTS, ready.b}, {DNNL_ARG_DST, ready.c}});
    stream.wait();
  } catch (const dnnl::error& error) {
    fail(FM_INTERNAL, "oneDNN refused a product of m ", m, ", n ", n, ", k ", k, ": ",
         error.what());
  }
}

bool onednn_has_bf16() {
  static const bool has = [] {
    const auto isa = dnnl::get_effective_cpu_isa();
#if DNNL_VERSION_MAJOR >= 3
    if (isa == dnnl::cpu_isa::avx512_core_fp16) return true;
#endif
    return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
  }();
  return has;
}

const char* onednn_description() {
  static const std::string text = [] {
    const dnnl_version_t* v = dnnl_version();
    return "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
           std::to_string(v->patch) + (onednn_has_bf16() ? ", native bf16" : ", bf16 as fp32");
  }();
  return text.c_str();
}

int onednn_set_threads(int num_threads) {
  const int previous = omp_get_max_threads();
  omp_set_num_threads(num_threads);
  return previous;
}

}  // namespace flashmoe::cpu

#endif
