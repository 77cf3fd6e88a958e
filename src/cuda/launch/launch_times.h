// Where the time of a launch went, as the kernel's own marks tell.
#pragma once

#include "cuda/launch/phases.h"
#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

// Fills seconds and phase_seconds (launch/phases.h) from the marks of the last launch on this
// scratch of the current device, which has ended. Waits for nothing else; not on a stream that is
// being captured.
void time_launch(const void* scratch, const LaunchKind& kind, fm_stats& stats);

}  // namespace flashmoe::cuda::launch
