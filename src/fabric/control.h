// The control block: the small fixed part of a rank's symmetric memory. Peers write into it, its
// owner reads it. It outlives every growth of the data part.
#pragma once

#include <atomic>
#include <cstdint>

#include "plan/flags.h"
#include "plan/problem.h"

namespace flashmoe::fabric {

inline constexpr uint32_t kControlMagic = 0x464d6f45;  // "FMoE"
inline constexpr int kTextBytes = 512;

enum class CallStatus : uint32_t {
  kReady = 0,       // metadata follows in the bank
  kNeedMemory = 1,  // the symmetric memory is too small: the group grows and launches again
  kRefused = 2,     // the rank cannot launch; `text` says why
};

// What a rank says of its call, beside its metadata, in every launch. Compared field by field.
struct CallHeader {
  uint32_t status;     // CallStatus
  uint32_t operation;  // fabric::Operation
  int64_t dtype;
  int64_t hidden;
  int64_t intermediate;
  int64_t num_experts;
  int64_t top_k;
  int64_t activation;
  int64_t gated;
  int64_t weight_on_input;
  double act_alpha;
  double act_limit;
  double up_offset;
  double capacity_factor;
  int64_t tokens;  // of the sender; may differ between ranks
  char text[kTextBytes];
};

// Why the group stopped. Written once, by whoever stops it first.
enum class AbortState : uint32_t { kNone = 0, kWriting = 1, kSet = 2 };

// All words: relaxed plain data is published by the flag named beside it.
struct ControlBlock {
  // hello: writer: this block's owner, after filling build and world. reader: every peer, once,
  // when the group is made. publishes: the block exists and is zeroed. release/acquire. Never
  // changes.
  std::atomic<uint32_t> hello;
  int32_t world;
  char build[128];

  // meta_ready[bank][s]: writer: rank s, once a launch. reader: the owner's plan task. publishes:
  // header[bank][s] and, when its status is kReady, s's counts and slots in the same bank of the
  // data part. release/acquire. Epoch equality; the bank is written only under credit.
  std::atomic<uint32_t> meta_ready[plan::kNumBanks][plan::kMaxWorld];
  CallHeader header[plan::kNumBanks][plan::kMaxWorld];

  // done[d]: writer: rank d, at the end of each of its launches, errors included. reader: the
  // owner, before it writes d's metadata bank. publishes: d reads nothing of that epoch's bank any
  // more. release/acquire. Signed distance (plan::has_credit).
  std::atomic<uint32_t> done[plan::kMaxWorld];

  // grow_ready[d], grow_mapped[d]: writer: rank d inside a growth. reader: the owner inside the
  // same growth. publishes: d's new data part exists; d has mapped every new part. release/acquire.
  // Generation equality; generations count up from 1.
  std::atomic<uint32_t> grow_ready[plan::kMaxWorld];
  std::atomic<uint32_t> grow_mapped[plan::kMaxWorld];

  // abort: writer: the first rank or host thread that stops the group (compare-exchange from kNone,
  // text, then kSet with release). reader: every wait of the owner (acquire). Final.
  std::atomic<uint32_t> abort;
  int32_t abort_status;  // fm_status
  char abort_text[kTextBytes];
};

// The library's version and the layout that it gives this block: must agree between ranks.
void set_build(ControlBlock& block);
// Throws FM_MISMATCH when the two ranks' blocks come from different builds.
void check_build(const ControlBlock& peer_block, int32_t peer, const ControlBlock& own_block,
                 int32_t rank);

static_assert(std::atomic<uint32_t>::is_always_lock_free, "flags are shared between processes");

}  // namespace flashmoe::fabric
