// Where the time of a forward went, as the kernel's own marks tell.
#pragma once

#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

// Fills seconds and phase_seconds (route, plan, up, down, combine) from the marks of the last
// launch on this scratch of the current device, which has ended. Waits for nothing else; not on a
// stream that is being captured.
void time_forward(const void* scratch, fm_stats& stats);

}  // namespace flashmoe::cuda::launch
