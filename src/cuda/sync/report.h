// What a kernel leaves behind when one of its waits runs out of time, or it finds a token that has
// no defined routing.
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
  kGrid,        // all CTAs meet before the products begin
  kRowsReady,   // an up tile waits for its block's rows
  kUpDone,      // a down tile waits for its block's hidden rows
  kDownDone,    // a combine unit waits for its column block
  // Not waits: what a token's routing may be wrong with.
  kUndefinedLogits,  // NaN, +inf or nothing finite; block_idx is the token
  kUndefinedBias,    // NaN in the selection bias
  kInvalidId,        // an expert id below -1; block_idx is the token
  kHeld,             // nor this: another launch had the scratch (sync/holder.h)
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
    case WaitTag::kGrid:
      return "all CTAs";
    case WaitTag::kRowsReady:
      return "rows of a block";
    case WaitTag::kUpDone:
      return "hidden rows of a block";
    case WaitTag::kDownDone:
      return "rows of a column block";
    case WaitTag::kUndefinedLogits:
      return "router logits that are NaN, +inf or all -inf";
    case WaitTag::kUndefinedBias:
      return "NaN in the selection bias";
    case WaitTag::kInvalidId:
      return "expert id below -1";
    case WaitTag::kHeld:
      return "another launch of this group was running";
  }
  return "unknown";
}

// One per workspace, in device memory or pinned host memory. Written by the first thread that has
// something to report (it claims `tag` by compare-and-swap from zero, then fills the rest), read by
// the host, zeroed by the host when the workspace is made and when it has read it.
struct WaitReport {
  uint32_t tag;
  uint32_t block_idx;
  uint32_t thread_idx;
  uint32_t parity;  // of the phase that did not complete
};

}  // namespace flashmoe::cuda::sync
