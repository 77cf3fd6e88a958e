// The sizes of one launch, as every stage, engine and layout function sees them.
#pragma once

#include <cstdint>

#include "plan/math.h"

namespace flashmoe::plan {

// Most ranks of a group: destination sets are one 64-bit mask a token.
inline constexpr int kMaxWorld = 64;

struct Problem {
  int32_t world = 1;
  int32_t rank = 0;
  int64_t tokens = 0;  // of this rank
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t num_experts = 0;  // of all ranks
  int64_t top_k = 0;
  int32_t gates = 2;  // G: 2 gated, 1 plain

  FM_HD constexpr int64_t local_experts() const { return num_experts / world; }
  FM_HD constexpr int64_t up_rows() const { return gates * intermediate; }
  FM_HD constexpr int64_t slots() const { return tokens * top_k; }
  // Block partition: expert e lives on rank e / E_loc.
  FM_HD constexpr int32_t owner_of(int64_t expert_idx) const {
    return static_cast<int32_t>(expert_idx / local_experts());
  }
  FM_HD constexpr int64_t local_expert_of(int64_t expert_idx) const {
    return expert_idx % local_experts();
  }
  // Step s serves the tokens of rank (rank + s) mod W: own tokens first.
  FM_HD constexpr int32_t source_of_step(int32_t step) const { return (rank + step) % world; }
  FM_HD constexpr int32_t step_of_source(int32_t source) const {
    return (source - rank + world) % world;
  }
};

}  // namespace flashmoe::plan
