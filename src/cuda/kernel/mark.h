// What a launch notes of its course in the head of its scratch. Needs no CUDA header.
#pragma once

#include <cstdint>

namespace flashmoe::cuda::kernel {

// When the launch passed what; nanoseconds of the GPU's global timer, written by the first CTA
// where nothing else is said, and by the last one that ends.
enum class Mark : int32_t {
  kStart,
  kRouted,    // its tiles are routed
  kPlanned,   // all CTAs have the plan
  kUp,        // its first up tile may start; backward: its first tile of hidden gradients
  kDownGrad,  // backward: of the gradient of w_down
  kDown,      // its first down tile may start; backward: of input gradients
  kUpGrad,    // backward: of the gradient of w_up
  kLastTile,  // no tile is left
  kEnd,       // all tokens are combined
  kDone,      // backward: every CTA has done all that it does
  // Several ranks, beside the tiles:
  kRowsIn,    // all rows that came are in expert order
  kFirstSum,  // the first column block may be summed: by the warp that has its first unit
  kCount
};

}  // namespace flashmoe::cuda::kernel
