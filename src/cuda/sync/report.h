// What a kernel leaves behind when one of its waits runs out of time, or it finds a token that has
// no defined routing.
#pragma once

#include <cstdint>

namespace flashmoe::cuda::sync {

enum class WaitTag : uint32_t {
  kNone,
  kStageFull,   // products wait for the operands of a k-block
  kStageEmpty,  // load waits for a stage that both CTAs of the pair have used up
  kTileFull,    // a role waits for its next tile
  kTileEmpty,   // the ticket warp waits for a slot of the tile ring
  kPace,        // the ticket warp waits for the load of the tile before
  kTurn,        // a math warpgroup waits for the other's products
  kGrid,        // all CTAs meet: before the products begin, of few tokens between them
  kRowsReady,   // an up tile waits for its block's rows
  kUpDone,      // a down tile waits for its block's hidden rows
  kDownDone,    // a combine unit waits for its column block
  kGradDone,    // a tile of the backward waits for tiles before it
  kLogitsDone,  // the router's products wait for the gradients of all logits
  kRouterDone,  // the combine waits for the router's share, its gradients for their segments
  kMetadata,    // the plan waits for what a rank says of its tokens
  kPushed,      // a copy waits for rows that a rank sends
  kReturned,    // a sum waits for the part of a rank
  kSlotGrads,   // the router's gradients wait for those of slots that a rank has
  kAborted,     // the group was stopped; `expected` is 1 + the rank that stopped it
  // Not waits: what a token's routing may be wrong with.
  kUndefinedLogits,  // NaN, +inf or nothing finite; block_idx is the token
  kUndefinedBias,    // NaN in the selection bias
  kInvalidId,        // an expert id below -1; block_idx is the token
  // Nor these: what ranks may disagree in, or have no room for.
  kMismatch,     // a config::RankField (block_idx) of rank peer.rank differs
  kTooManyRows,  // `expected` rows came to this rank; peer.seen: it has room for so many
  kHeld,         // nor this: another launch had the scratch (sync/holder.h)
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
    case WaitTag::kGradDone:
      return "tiles of the backward before this one";
    case WaitTag::kLogitsDone:
      return "gradients of all logits";
    case WaitTag::kRouterDone:
      return "runs of the router's gradients";
    case WaitTag::kMetadata:
      return "metadata of a rank";
    case WaitTag::kPushed:
      return "rows from a rank";
    case WaitTag::kReturned:
      return "partial sums from a rank";
    case WaitTag::kSlotGrads:
      return "gradients of slots from a rank";
    case WaitTag::kAborted:
      return "the group was stopped";
    case WaitTag::kMismatch:
      return "a field that differs between ranks";
    case WaitTag::kTooManyRows:
      return "more rows than there is room for";
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

// What a wait for another rank knows.
struct PeerReport {
  int32_t rank = -1;
  uint32_t epoch = 0;  // of the launch: what the flag should have held
  uint32_t seen = 0;   // what it held
};

// In device memory or pinned host memory.
//   claimed  writer: the first thread that has something to report, by compare-and-swap from zero
//   tag      writer: that thread, by release after the rest; reader: the host, by acquire
// Zeroed by the host when the workspace is made and when it has read it.
struct WaitReport {
  uint32_t tag;  // a WaitTag; 0: nothing to read
  uint32_t block_idx;
  uint32_t thread_idx;
  uint32_t expected;  // count, flag or parity that did not come
  PeerReport peer;
  uint32_t claimed;
};

// What the launches of a workspace have to say. They are told apart, so that a token without a
// routing does not hide that the launch was stopped.
struct LaunchReports {
  WaitReport failure;  // why the launch did not come to its end
  // What is wrong with one that did: kUndefinedLogits, kUndefinedBias, kInvalidId, kMismatch. Ranks
  // are in step after it, and the next launch finds its scratch clean.
  WaitReport notice;
};

// How long the waits of a launch last, and where the first one that does not end is written down.
struct WaitBounds {
  WaitReport* report;  // LaunchReports::failure
  // In 1024 ns; the largest: no bound. Of a wait for another rank, and of one for this rank itself:
  // longer among several ranks, so that what a rank lacks is not reported by those who wait for it.
  uint32_t timeout_us;
  uint32_t local_timeout_us;
  uint32_t* abort;    // not zero: all waits end. May be null
  uint32_t own_mark;  // what a wait that gives up leaves there: 1 + this rank
};

// Nanoseconds as WaitBounds counts them.
constexpr uint32_t microseconds(uint64_t nanoseconds) {
  const uint64_t all = nanoseconds >> 10;
  return all < 0xFFFFFFFF ? static_cast<uint32_t>(all) : 0xFFFFFFFF;
}
// The bound of waits for the rank itself, when those for others have this one.
constexpr uint32_t local_bound(uint32_t timeout_us) {
  constexpr uint64_t kSecond = 1000000;
  const uint64_t longer = 2 * uint64_t{timeout_us} + kSecond;
  return longer < 0xFFFFFFFF ? static_cast<uint32_t>(longer) : 0xFFFFFFFF;
}

}  // namespace flashmoe::cuda::sync
