#include "cuda/kernel/backward.cuh"

namespace flashmoe::cuda::kernel {

BackwardEntry backward_fp16() {
  return backward_entry_of<config::BackwardOf<config::Element::kFp16>>();
}

}  // namespace flashmoe::cuda::kernel
