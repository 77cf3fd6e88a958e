// What the launches of both directions know of the ranks of their group.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/config/rank_limits.h"
#include "cuda/config/ranks.h"
#include "cuda/kernel/forward.h"
#include "cuda/sync/report.h"
#include "flashmoe/c_api.h"

namespace flashmoe::cuda::launch {

// The ranks of a launch, as one of them sees them.
struct RankArguments {
  int32_t rank = 0;
  int32_t world = 1;  // 1: the rest is not read
  // What the ranks' regions were made for, the same on all of them.
  config::SymmetricCapacity capacity;
  // [world] device addresses of the ranks' regions, zero when made, each of
  // config::symmetric_table(world, capacity).total bytes or more.
  void* const* regions = nullptr;
};

// Most tokens of a rank in a launch in which this one has so many.
int64_t token_cap_of(int64_t tokens, const RankArguments& ranks);

// Rows of all ranks that scratch holds: twice the average, which for two ranks is all there can be.
int64_t rows_of(const fm_layer& layer, int64_t tokens, const RankArguments& ranks);

// Each source's rows get blocks of their own, in the order in which they come, if that leaves whole
// blocks; experts of few rows have those of all sources together. The same in both directions: a Z
// that the forward kept lies as its rows did.
int32_t source_groups_of(const fm_layer& layer, int64_t tokens, const RankArguments& ranks);

// Most slots of all ranks together; 0 for a rank alone.
int64_t rank_slots_of(const fm_layer& layer, const RankArguments& ranks);

// The layer's part of memory that is made for so many tokens.
config::RankSizes rank_sizes_of(const fm_layer& layer, const RankArguments& ranks);

// What rows and slots of a launch are counted in, and the words that ranks exchange, do not hold,
// or their memory has no room for; or an empty text.
std::string refuse_tokens(const fm_layer& layer, int64_t tokens, const RankArguments& ranks);

// What a kernel knows of its ranks. rows: that its scratch has.
kernel::RankParams rank_params(const fm_layer& layer, int64_t tokens, const RankArguments& ranks,
                               int64_t rows, config::Direction direction);

// How long its waits last, and where they say why they did not end.
sync::WaitBounds waits_of(const RankArguments& ranks, sync::LaunchReports& reports,
                          uint64_t timeout_ns);

}  // namespace flashmoe::cuda::launch
