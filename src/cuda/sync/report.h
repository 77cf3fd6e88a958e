// What a kernel leaves behind when one of its waits runs out of time.
#pragma once

#include <cstdint>

namespace flashmoe::cuda::sync {

enum class WaitTag : uint32_t {
  kNone,
  kStageFull,   // math waits for the operands of a k-block
  kStageEmpty,  // load waits for a stage that both CTAs of the pair have used up
  kTileFull,    // a role waits for its next tile
  kTileEmpty,   // the ticket warp waits for a slot of the tile ring
  kPace,        // the ticket warp waits for the load of the tile before
  kTurn,        // a math warpgroup waits for the other's products
};

constexpr const char* name_of(WaitTag tag) {
  switch (tag) {
    case WaitTag::kNone:
      return "none";
    case WaitTag::kStageFull:
      return "stage full";
    case WaitTag::kStageEmpty:
      return "stage empty";
    case WaitTag::kTileFull:
      return "tile full";
    case WaitTag::kTileEmpty:
      return "tile empty";
    case WaitTag::kPace:
      return "pace of the load";
    case WaitTag::kTurn:
      return "turn of a math warpgroup";
  }
  return "unknown";
}

// One per workspace, in device memory. Written by the first thread whose wait expires (it claims
// `tag` by compare-and-swap from zero, then fills the rest), read by the host after the stream has
// been synchronised, zeroed by the host when the workspace is made.
struct WaitReport {
  uint32_t tag;
  uint32_t block_idx;
  uint32_t thread_idx;
  uint32_t parity;  // of the phase that did not complete
};

}  // namespace flashmoe::cuda::sync
