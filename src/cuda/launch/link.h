// How fast two devices of this process reach each other.
#pragma once

#include <cstdint>

namespace flashmoe::cuda {

struct LinkSpeed {
  double bytes_per_second = 0;  // of a kernel's stores into the peer's memory
  double flag_seconds = 0;      // from a flag's store there to its reader's seeing it
};

// Measures with the memory and the words that ranks use. Throws FM_UNSUPPORTED where one of the
// devices cannot reach the other, has no kernels in this build or is not there.
LinkSpeed measure_link(int32_t device, int32_t peer);

}  // namespace flashmoe::cuda
