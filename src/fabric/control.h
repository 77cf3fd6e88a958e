// The control block: the small fixed part of a rank's symmetric memory. Peers write into it, its
// owner reads it. It outlives every growth of the data part.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/error.h"
#include "plan/flags.h"
#include "plan/problem.h"

namespace flashmoe::fabric {

inline constexpr uint32_t kControlMagic = 0x464d6f45;  // "FMoE"
inline constexpr int kTextBytes = 512;
inline constexpr int kMessageBytes = 256;

// What a rank says to all in Group::gather; whatever they agree on.
using Message = std::array<std::byte, kMessageBytes>;

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
  int64_t layer_id;
  int64_t tokens;  // of the sender; may differ between ranks
  char text[kTextBytes];
};

// Why the group stopped. Written once, by whoever stops it first.
enum class AbortState : uint32_t { kNone = 0, kWriting = 1, kSet = 2 };

// All words: relaxed plain data is published by the flag named beside it.
struct ControlBlock {
  // --- The head (kHeadBytes): the same in every version of the library, so that ranks of different
  // builds can tell each other so.

  // hello: writer: this block's owner, after filling in the rest of the introduction. reader: every
  // peer, once, when the group is made. publishes: the block exists and is zeroed, and world,
  // build, process and process_space. release/acquire. Never changes.
  std::atomic<uint32_t> hello;
  int32_t world;
  char build[128];
  int32_t process;         // of the owner
  uint64_t process_space;  // in which that number means something; 0: not known

  // abort: writer: the first rank or host thread that stops the group (compare-exchange from kNone,
  // text, then kSet with release). reader: every wait of the owner (acquire). Final.
  std::atomic<uint32_t> abort;
  int32_t abort_status;  // fm_status
  char abort_text[kTextBytes];

  // --- The rest: the same in every rank of a build.

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

  // told[bank][s]: writer: rank s inside a gather. reader: the owner inside the same gather.
  // publishes: message[bank][s]. release/acquire. Equality of the number of gathers, which counts
  // up from 1; bank: its parity. A rank writes a bank again two gathers later: it has then seen
  // every rank's word of the gather between, which that rank wrote after it had read this one.
  std::atomic<uint32_t> told[plan::kNumBanks][plan::kMaxWorld];
  Message message[plan::kNumBanks][plan::kMaxWorld];

  // waits_for: writer: the owner's threads, at every turn of a wait for a peer: that peer + 1; 0
  // when the wait is over. reader: peers whose own wait for the owner has run out, for their
  // message. A hint: relaxed, publishes nothing.
  std::atomic<uint32_t> waits_for;
};

inline constexpr size_t kHeadBytes = offsetof(ControlBlock, meta_ready);

// Fills in the head of the block of one of `world` ranks and raises hello. Build: the library's
// version and the size of this block, which must agree between ranks.
void introduce(ControlBlock& block, int32_t world);
// Throws FM_MISMATCH when the two ranks come from different builds or count different worlds.
void check_introduction(const ControlBlock& peer_block, int32_t peer, const ControlBlock& own_block,
                        int32_t rank);

// Stops the waits of the block's owner; false when it had been stopped before. The first reason
// stands.
bool stop_owner(ControlBlock& block, fm_status status, const std::string& reason);
// Throws FM_ABORTED when the owner has been stopped.
void check_stopped(const ControlBlock& block);

void set_text(char (&target)[kTextBytes], const std::string& text);

static_assert(std::atomic<uint32_t>::is_always_lock_free, "flags are shared between processes");

}  // namespace flashmoe::fabric
