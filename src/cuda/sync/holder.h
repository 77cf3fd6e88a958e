// Which launch has a scratch: a word of its head.
//
// Launches of one scratch follow one another: on a stream by themselves, on several by events of
// the engine. Replays of captured graphs are ordered by whoever replays them; where that is
// forgotten and a launch leaves multiprocessors free, another one of the same scratch could start
// beside it. It is turned away instead.
//
//   writer       first thread of every CTA, by claim(); a launch on all multiprocessors, beside
//                which there is no room, by storing its id without asking
//                the last warp that combines (or the last CTA), by release(), after all use of the
//                scratch but a mark; where ranks disagree, the last CTA that found so
//   holds        0: nobody; the id of a launch: it has the scratch; id | kTurnedAway: likewise, and
//                another launch was turned away
//   why it stays so: of the launch that was turned away, some CTAs may come only now. They all get
//                the same answer, because release() frees a word without that mark alone; the host
//                zeroes it with the rest of the scratch when it reads the report (engine/workspace)
//   ids          even and not 0; of a captured launch, that of its capture
#pragma once

#include <cstdint>

#include "plan/math.h"

namespace flashmoe::cuda::sync {

inline constexpr uint32_t kTurnedAway = 1;

// The id of the launch after `id`.
constexpr uint32_t next_holder(uint32_t id) {
  const uint32_t next = id + 2;
  return next == 0 ? 2 : next;
}

// Whether the launch has the scratch. exchange(expected, desired): compare-and-swap of the word,
// returns what it held.
template <class Exchange>
FM_HD bool claim(uint32_t id, Exchange&& exchange) {
  uint32_t seen = exchange(0u, id);
  while (seen != 0 && (seen & ~kTurnedAway) != id) {
    const uint32_t before = exchange(seen, seen | kTurnedAway);
    if (before == seen) return false;
    seen = before == 0 ? exchange(0u, id) : before;
  }
  return true;
}

// One thread of the launch that has the scratch.
template <class Exchange>
FM_HD void release(uint32_t id, Exchange&& exchange) {
  exchange(id, 0u);
}

}  // namespace flashmoe::cuda::sync
