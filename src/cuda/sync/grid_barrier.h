// The words of the barrier over all CTAs.
#pragma once

#include <cstdint>

namespace flashmoe::cuda::sync {

// In device memory, zero when made; launches leave `arrived` at zero and may start at any
// generation. Writer of `arrived`: one thread of each CTA, by adding; the last one puts it back and
// then releases the next generation, which publishes what all CTAs wrote before they came. A CTA
// reads the generation before it arrives: it cannot advance until that CTA has.
struct GridBarrier {
  uint32_t arrived;
  uint32_t generation;
};

}  // namespace flashmoe::cuda::sync
