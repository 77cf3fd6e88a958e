#include "cuda/kernel/decode.cuh"

namespace flashmoe::cuda::kernel {

DecodeEntry decode_bf16() { return decode_entry<__nv_bfloat16>(); }
DecodeEntry decode_fp16() { return decode_entry<__half>(); }

}  // namespace flashmoe::cuda::kernel
