// Where the time of a launch went, as the kernel's own marks tell.
#pragma once

#include <cstdint>

#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

struct LaunchKind {
  bool is_backward = false;
  int32_t world = 1;
};

// Fills seconds and phase_seconds from the marks of the last launch on this scratch of the current
// device, which has ended. Of a forward: route, plan, up, down, combine; of a backward: route,
// plan, up (hidden gradients, and pre-activations that were not kept), weight, down (input
// gradients), combine (what follows the last tile). Of several ranks also, beside those: push (rows
// of all ranks) and return (from the first sums on). Waits for nothing else; not on a stream that
// is being captured.
void time_launch(const void* scratch, const LaunchKind& kind, fm_stats& stats);

}  // namespace flashmoe::cuda::launch
