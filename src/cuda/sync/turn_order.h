// Who is next: the decisions of one of a CTA's two math warpgroups, which come out alike in both.
//
//   a tile of one warpgroup  goes to one and the other in turn
//   a shared tile            both have a part of it. The one that is next starts first, and the
//                            other one after it; the same one is next after the tile
//
// So the two have turns strictly one after the other, whatever the tiles are. One word, on host and
// device: a warp keeps it in a register.
#pragma once

#include <cstdint>

#include "plan/math.h"

namespace flashmoe::cuda::sync {

class TurnOrder {
 public:
  FM_HD explicit constexpr TurnOrder(int warpgroup_idx)
      : word_(warpgroup_idx == 0 ? 0 : kOtherIsNext) {}

  // The CTA's next tile. Returns whether this warpgroup has a part of it.
  FM_HD constexpr bool takes(bool is_shared) {
    const bool is_next = (word_ & kOtherIsNext) == 0;
    word_ &= ~kStartsFirst;
    if (!is_shared) {
      word_ ^= kOtherIsNext;
      return is_next;
    }
    if (is_next) word_ |= kStartsFirst;
    return true;
  }
  // Of the tile taken last: whether the other one has a turn of it after this one.
  FM_HD constexpr bool starts_first() const { return (word_ & kStartsFirst) != 0; }

  // Parity of the phase that a turn waits for; advance() after the wait.
  FM_HD constexpr uint32_t parity() const { return word_ & kParity; }
  FM_HD constexpr void advance() { word_ ^= kParity; }

  // The state as a word, and back to it.
  FM_HD constexpr uint32_t word() const { return word_; }
  FM_HD constexpr void set(uint32_t word) { word_ = word; }

 private:
  static constexpr uint32_t kParity = 1;
  static constexpr uint32_t kOtherIsNext = 2;
  static constexpr uint32_t kStartsFirst = 4;
  uint32_t word_;
};

}  // namespace flashmoe::cuda::sync
