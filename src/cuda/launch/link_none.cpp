#include "base/error.h"
#include "cuda/launch/link.h"

namespace flashmoe::cuda {

LinkSpeed measure_link(int32_t, int32_t) {
  fail(FM_UNSUPPORTED, "this flashmoe was built without CUDA: build it with FLASHMOE_CUDA=ON");
}

}  // namespace flashmoe::cuda
