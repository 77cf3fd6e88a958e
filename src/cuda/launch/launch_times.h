// Where the time of a launch went, as the kernel's own marks tell.
#pragma once

#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

// Fills seconds and phase_seconds from the marks of the last launch on this scratch of the current
// device, which has ended. Of a forward: route, plan, up, down, combine; of a backward: route, plan,
// up (hidden gradients, and pre-activations that were not kept), weight, down (input gradients),
// combine (what follows the last tile). Waits for nothing else; not on a stream that is being
// captured.
void time_launch(const void* scratch, bool is_backward, fm_stats& stats);

}  // namespace flashmoe::cuda::launch
