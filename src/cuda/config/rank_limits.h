// What several ranks can exchange at most. No CUDA.
#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

#include "cuda/config/forward.h"
#include "cuda/config/ranks.h"

namespace flashmoe::cuda::config {

// Sizes of a group's memory, or of one layer in it. tokens: most of a rank.
struct RankSizes {
  int32_t world = 1;
  int64_t tokens = 0;
  int64_t hidden = 0;
  int64_t top_k = 0;
  int64_t local_experts = 0;
};

constexpr SymmetricCapacity needed_capacity(const RankSizes& s) {
  return needed_capacity(s.world, s.tokens, s.hidden, s.top_k, s.local_experts);
}

// Two ranks or more share the experts.
static_assert(kMaxExperts / 2 <= kMaxLocalExperts);

// What is beyond the words that ranks exchange, by name, or an empty text. Every size is looked at
// before it is multiplied: any int64 from 0 on may be given.
inline std::string refuse_rank_sizes(const RankSizes& s) {
  // Words of flags are numbered in 32 bits.
  constexpr int64_t kMaxFlags = std::numeric_limits<int32_t>::max();
  std::ostringstream text;
  if (s.world > kMaxRanks) {
    text << "the group has " << s.world << " ranks; accepted on CUDA: to " << kMaxRanks;
  } else if (s.hidden > kMaxWidth) {
    text << "hidden is " << s.hidden << "; accepted on CUDA: to " << kMaxWidth;
  } else if (s.top_k > kMaxTopK) {
    text << "top_k is " << s.top_k << "; accepted on CUDA: to " << kMaxTopK;
  } else if (s.local_experts > kMaxExperts / s.world) {
    text << "num_experts is " << s.local_experts << " on each of " << s.world
         << " ranks; accepted on CUDA: to " << kMaxExperts << " in all";
  } else if (s.tokens > kMaxRankSlots || s.tokens * s.top_k > kMaxRankSlots) {
    text << "tokens * top_k of a rank is " << s.tokens << " * " << s.top_k
         << "; accepted on CUDA with several ranks: to " << kMaxRankSlots;
  } else if (const int64_t flags = needed_capacity(s).flag_words; flags > kMaxFlags) {
    text << "tokens is " << s.tokens << " with hidden " << s.hidden << " on " << s.world
         << " ranks, which takes " << flags << " flags; accepted on CUDA with several ranks: to "
         << kMaxFlags;
  }
  return text.str();
}

// How the ranks of a launch share its memory, for people.
struct RankLayout {
  RankSizes sizes;             // of the layer, with most tokens of a rank
  SymmetricCapacity capacity;  // that the memory is made for
  int64_t rows = 0;            // of all ranks that this one can take in
  int32_t source_groups = 1;
  int32_t block_rows = 1;  // most of a block
};

// A line for each fact.
inline std::string describe(const RankLayout& layout) {
  const RankSizes& s = layout.sizes;
  const SymmetricTable table = symmetric_table(s.world, layout.capacity);
  const int64_t experts = int64_t{layout.source_groups} * s.local_experts;
  std::ostringstream text;
  text << "ranks   " << s.world << ", of up to " << s.tokens << " tokens each; at most "
       << layout.rows << " rows come to one, "
       << (s.world > 2 ? "twice an even share" : "all there can be") << "\n"
       << "region  " << table.total
       << " bytes a rank that its peers write: " << table[Symmetric::kReceived].bytes
       << " of received rows and as many of their gradients, " << table[Symmetric::kPartial].bytes
       << " of partial sums\n"
       << "experts " << s.local_experts << " here x " << layout.source_groups
       << (layout.source_groups > 1 ? " sources" : " group of all sources") << " = " << experts
       << " virtual ones, at most " << experts + layout.rows / layout.block_rows << " blocks of "
       << layout.block_rows << " rows";
  return text.str();
}

}  // namespace flashmoe::cuda::config
