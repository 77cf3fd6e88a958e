// Ticket -> unit of the sums that follow the down product: one column block of a few tokens.
//
// A rank alone: the units of column block 0, of 1, ...
// Several ranks: every rank sums the rows that it has of every source's tokens and sends the sums
// home, where the parts of all ranks are added up. Column block after column block: what is sent
// home of it, the peers' tokens first, then the own tokens' sums at home of the block before, whose
// parts had the time to come:
//
//   sent 0 | sent 1, home 0 | sent 2, home 1 | ... | home C-1
//
// A unit at home waits for units of smaller tickets only, here and at the peers, which wait for
// nothing but products: no rank waits for itself by way of another.
#pragma once

#include <cstdint>

#include "cuda/config/ranks.h"

namespace flashmoe::cuda::tile {

// Source of a unit that adds up what the ranks sent home.
inline constexpr int32_t kHome = -1;

struct CombineUnit {
  int32_t column_block = -1;
  int32_t source = 0;  // rank of its tokens, or kHome
  int32_t token = 0;
  int32_t end = 0;  // token after the last

  FM_HD constexpr bool is_home() const { return source == kHome; }
};

// Sources in the order in which a rank serves them: itself, then those after it.
FM_HD constexpr int32_t source_of_step(int32_t rank, int32_t world, int32_t step) {
  const int32_t source = rank + step;
  return source < world ? source : source - world;
}
FM_HD constexpr int32_t step_of_source(int32_t rank, int32_t world, int32_t source) {
  const int32_t step = source - rank;
  return step < 0 ? step + world : step;
}

struct CombineWalk {
  int32_t column_blocks;
  int32_t rank;
  int32_t world;
  const int32_t* tokens;  // of each rank; of a rank alone, num_tokens instead
  int32_t num_tokens;     // of this rank
  int32_t unit_tokens;    // of a rank alone

  // A unit of column block `column_blocks` or beyond from the last ticket on.
  FM_HD constexpr CombineUnit unit_at(int32_t ticket) const {
    return world == 1 ? own_unit(ticket) : rank_unit(ticket);
  }
  FM_HD constexpr bool is_end(const CombineUnit& unit) const {
    return unit.column_block >= column_blocks;
  }

 private:
  FM_HD constexpr CombineUnit unit_of(int32_t column_block, int32_t source, int32_t idx,
                                      int32_t size, int32_t all) const {
    const int32_t token = idx * size;
    return {column_block, source, token, token + size < all ? token + size : all};
  }
  FM_HD constexpr CombineUnit end_unit() const { return {.column_block = column_blocks}; }

  FM_HD constexpr CombineUnit own_unit(int32_t ticket) const {
    if (num_tokens == 0) return end_unit();
    const int32_t units = (num_tokens + unit_tokens - 1) / unit_tokens;
    const int32_t block = ticket / units;
    return unit_of(block, rank, ticket - block * units, unit_tokens, num_tokens);
  }
  FM_HD constexpr CombineUnit rank_unit(int32_t ticket) const {
    const int32_t at_home = config::home_units(num_tokens);
    int32_t sent = 0;
    for (int32_t s = 0; s < world; ++s) sent += config::return_units(tokens[s]);
    const int32_t both = sent + at_home > 0 ? sent + at_home : 1;
    int32_t block = 0;
    if (ticket >= sent) {
      block = 1 + (ticket - sent) / both;
      ticket -= sent + (block - 1) * both;
    }
    if (block < column_blocks && ticket < sent) return sent_unit(block, ticket);
    if (block < column_blocks) ticket -= sent;
    if (block > column_blocks || ticket >= at_home) return end_unit();
    return unit_of(block - 1, kHome, ticket, config::home_tokens(num_tokens), num_tokens);
  }
  FM_HD constexpr CombineUnit sent_unit(int32_t column_block, int32_t ticket) const {
    int32_t step = 1;
    for (; step < world; ++step) {
      const int32_t units = config::return_units(tokens[source_of_step(rank, world, step)]);
      if (ticket < units) break;
      ticket -= units;
    }
    const int32_t source = source_of_step(rank, world, step < world ? step : 0);
    return unit_of(column_block, source, ticket, config::return_tokens(tokens[source]),
                   tokens[source]);
  }
};

}  // namespace flashmoe::cuda::tile
