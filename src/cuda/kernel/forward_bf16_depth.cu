#include "cuda/kernel/forward_table.cuh"

namespace flashmoe::cuda::kernel {

ForwardEntry forward_bf16_depth(config::Epilogue up_epilogue, config::Major down_major) {
  return forward_entry<config::Element::kBf16, config::Major::kDepth>(up_epilogue, down_major);
}

}  // namespace flashmoe::cuda::kernel
