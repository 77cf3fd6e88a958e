// What the ranks of a group have in common before their memory is made: how much of it, and the
// error of one that cannot make it, which all of them then have. No CUDA: tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "cuda/config/rank_limits.h"
#include "cuda/engine/peers.h"
#include "cuda/engine/ranks.h"
#include "plan/math.h"

namespace flashmoe::cuda {

inline RankNeeds larger_of(const RankNeeds& a, const RankNeeds& b) {
  return {.tokens = std::max(a.tokens, b.tokens),
          .hidden = std::max(a.hidden, b.hidden),
          .top_k = std::max(a.top_k, b.top_k),
          .local_experts = std::max(a.local_experts, b.local_experts)};
}

inline bool is_within(const RankNeeds& needs, const RankNeeds& has) {
  return needs.tokens <= has.tokens && needs.hidden <= has.hidden && needs.top_k <= has.top_k &&
         needs.local_experts <= has.local_experts;
}

inline config::RankSizes sizes_of(int32_t world, const RankNeeds& needs) {
  return {.world = world,
          .tokens = needs.tokens,
          .hidden = needs.hidden,
          .top_k = needs.top_k,
          .local_experts = needs.local_experts};
}

// Throws FM_UNSUPPORTED, by name.
inline void check_limits(int32_t world, const RankNeeds& needs) {
  const std::string reason = config::refuse_rank_sizes(sizes_of(world, needs));
  if (!reason.empty()) fail(FM_UNSUPPORTED, "CUDA: ", reason);
}

// What memory is made for: the first call is seldom the largest. Not beyond a limit that the needs
// themselves keep. needs: within the limits.
inline RankNeeds rounded(int32_t world, const RankNeeds& needs) {
  constexpr int64_t kTokenUnit = 1024;
  RankNeeds wider = needs;
  wider.tokens = plan::align_up(std::max<int64_t>(needs.tokens, 1), kTokenUnit);
  return config::refuse_rank_sizes(sizes_of(world, wider)).empty() ? wider : needs;
}

// The error that ends `body`; none if it comes to its end.
template <class Body>
std::optional<Error> attempt(Body&& body) {
  try {
    body();
    return std::nullopt;
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(FM_OUT_OF_MEMORY, "no host memory to make the memory of the ranks with");
  }
}

// Collective: throws the first rank's failure on all ranks, or on none.
inline void agree(Peers& peers, const std::optional<Error>& failure) {
  struct Outcome {
    int32_t status;
    char text[std::tuple_size_v<Peers::Message> - sizeof(int32_t)];
  };
  Outcome outcome{.status = FM_OK, .text = {}};
  if (failure) {
    outcome.status = failure->status();
    std::strncpy(outcome.text, failure->what(), sizeof(outcome.text) - 1);
  }
  Peers::Message message{};
  static_assert(sizeof(outcome) == sizeof(message));
  std::memcpy(message.data(), &outcome, sizeof(outcome));
  int32_t rank = 0;
  for (const Peers::Message& told : peers.gather(message)) {
    std::memcpy(&outcome, told.data(), sizeof(outcome));
    if (outcome.status != FM_OK) {
      const bool is_own = rank == peers.rank();
      throw HarmlessError(
          static_cast<fm_status>(outcome.status),
          "rank " + std::to_string(rank) + ": " + (is_own ? failure->what() : outcome.text));
    }
    ++rank;
  }
}

// Where one rank of a process makes the memory of all and fails: every other rank has that failure
// in its own next call, so that all have failed the same calls. Not locked.
class OwedErrors {
 public:
  explicit OwedErrors(int32_t world) : owed_(static_cast<size_t>(world)) {}

  void add(int32_t by, const Error& error) {
    for (size_t rank = 0; rank < owed_.size(); ++rank) {
      if (rank != static_cast<size_t>(by)) owed_[rank].push_back(error);
    }
  }
  // The oldest of this rank's, which it then owes no more.
  std::optional<Error> take(int32_t rank) {
    auto& own = owed_[static_cast<size_t>(rank)];
    if (own.empty()) return std::nullopt;
    const Error oldest = own.front();
    own.pop_front();
    return oldest;
  }

 private:
  std::vector<std::deque<Error>> owed_;
};

}  // namespace flashmoe::cuda
