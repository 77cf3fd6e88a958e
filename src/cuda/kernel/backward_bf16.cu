#include "cuda/kernel/backward.cuh"

namespace flashmoe::cuda::kernel {

BackwardEntry backward_bf16() {
  return backward_entry_of<config::BackwardOf<config::Element::kBf16>>();
}

}  // namespace flashmoe::cuda::kernel
