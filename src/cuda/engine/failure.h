// What a launch left in its report, as the library's errors. No CUDA: tested without a GPU.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "base/error.h"
#include "cuda/config/ranks.h"
#include "cuda/sync/report.h"
#include "flashmoe/c_api.h"

namespace flashmoe::cuda {

// Whose report it is.
struct ReportPlace {
  int32_t device = 0;
  int32_t rank = 0;
  int32_t world = 1;
  double timeout_seconds = 0;
};

inline fm_status status_of(sync::WaitTag tag) {
  switch (tag) {
    case sync::WaitTag::kUndefinedLogits:
    case sync::WaitTag::kUndefinedBias:
    case sync::WaitTag::kInvalidId:
      return FM_ROUTING;
    case sync::WaitTag::kHeld:
      return FM_UNSUPPORTED;
    case sync::WaitTag::kMismatch:
      return FM_MISMATCH;
    case sync::WaitTag::kTooManyRows:
      return FM_OUT_OF_MEMORY;
    case sync::WaitTag::kAborted:
      return FM_ABORTED;
    default:
      return FM_TIMEOUT;
  }
}

inline const char* name_of(config::RankField field) {
  using config::RankField;
  switch (field) {
    case RankField::kDtype:
      return "dtype";
    case RankField::kHidden:
      return "hidden size";
    case RankField::kIntermediate:
      return "intermediate size";
    case RankField::kNumExperts:
      return "num_experts";
    case RankField::kTopK:
      return "top_k";
    case RankField::kActivation:
      return "activation";
    case RankField::kGated:
      return "gated";
    case RankField::kWeightOnInput:
      return "weight_on_input";
    case RankField::kActAlpha:
      return "activation alpha";
    case RankField::kActLimit:
      return "activation limit";
    case RankField::kUpOffset:
      return "activation up_offset";
    case RankField::kCapacityFactor:
      return "capacity_factor";
    case RankField::kLayerId:
      return "layer_id";
    case RankField::kTokenCapacity:
      return "token capacity";
    case RankField::kDirection:
      return "direction (forward or backward)";
    case RankField::kCount:
      break;
  }
  return "a field";
}

// The phase in which a rank waits for another one, for its message; null for its own affairs.
inline const char* phase_of(sync::WaitTag tag) {
  switch (tag) {
    case sync::WaitTag::kMetadata:
      return "plan";
    case sync::WaitTag::kPushed:
      return "push";
    case sync::WaitTag::kSlotGrads:
      return "weights of slots";
    case sync::WaitTag::kReturned:
      return "combine";
    default:
      return nullptr;
  }
}

inline std::string describe_routing(const sync::WaitReport& report, sync::WaitTag tag) {
  std::ostringstream text;
  if (tag == sync::WaitTag::kUndefinedBias) {
    text << sync::name_of(tag) << " (expert " << report.block_idx << ")";
    return text.str();
  }
  const bool of_caller = tag == sync::WaitTag::kInvalidId;
  text << (of_caller ? "topk_ids: " : "") << sync::name_of(tag) << " (first seen in token "
       << report.block_idx << ")";
  return text.str();
}

inline std::string describe_wait(const sync::WaitReport& report, sync::WaitTag tag,
                                 const ReportPlace& at) {
  std::ostringstream text;
  if (const char* phase = phase_of(tag)) {
    text << "rank " << at.rank << " waited " << at.timeout_seconds << " s in phase " << phase
         << " for " << sync::name_of(tag) << ", rank " << report.peer.rank << ": epoch "
         << report.peer.epoch << ", expected " << report.expected << ", seen " << report.peer.seen
         << ". Is that rank alive and in the same call? FLASHMOE_TIMEOUT_S sets the bound";
    return text.str();
  }
  text << "a wait ran out of time: " << sync::name_of(tag) << " (block " << report.block_idx
       << ", thread " << report.thread_idx << ", expected " << report.expected << ")";
  return text.str();
}

inline std::string describe_ranks(const sync::WaitReport& report, sync::WaitTag tag,
                                  const ReportPlace& at) {
  std::ostringstream text;
  if (tag == sync::WaitTag::kMismatch) {
    text << name_of(static_cast<config::RankField>(report.block_idx))
         << " differs between ranks: rank " << report.peer.rank << " has another one than rank "
         << at.rank << " (epoch " << report.peer.epoch << ")";
  } else if (tag == sync::WaitTag::kTooManyRows) {
    text << report.expected << " rows came to rank " << at.rank << " of " << at.world
         << ", its scratch holds " << report.peer.seen
         << ", twice an even share: balance the routing, use fewer tokens a call or more ranks, or "
            "make a group whose max_tokens * top_k is "
         << (int64_t{report.expected} + 1) / 2 << " or more";
  } else {
    text << "the group was aborted by rank " << static_cast<int64_t>(report.expected) - 1
         << ", whose own error says why; make a new group to go on";
  }
  return text.str();
}

inline std::string describe(const sync::WaitReport& report, const ReportPlace& at) {
  const auto tag = static_cast<sync::WaitTag>(report.tag);
  std::ostringstream text;
  switch (status_of(tag)) {
    case FM_ROUTING:
      text << describe_routing(report, tag);
      break;
    case FM_UNSUPPORTED:
      text << sync::name_of(tag)
           << " beside it; launches of one group follow one another: order the replays of its "
              "captured graphs by events, or give each graph a group of its own";
      break;
    case FM_TIMEOUT:
      text << describe_wait(report, tag, at);
      break;
    default:
      text << describe_ranks(report, tag, at);
  }
  return text.str();
}

// What the reports come to, one of which holds something: the failure's status, if there is one,
// and a text with both.
inline Error error_of(const sync::LaunchReports& reports, const ReportPlace& at) {
  const bool failed = reports.failure.tag != 0;
  const sync::WaitReport& first = failed ? reports.failure : reports.notice;
  std::ostringstream text;
  text << "an earlier launch on CUDA device " << at.device
       << " failed, its outputs are not valid: " << describe(first, at);
  if (failed && reports.notice.tag != 0) {
    text << "; and before that: " << describe(reports.notice, at);
  }
  return Error(status_of(static_cast<sync::WaitTag>(first.tag)), text.str());
}

}  // namespace flashmoe::cuda
