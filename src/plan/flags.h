// Epochs, banks and credits: the rules of every flag word.
//
// A flag word holds a launch number (epoch). Its writer stores the epoch of the launch it publishes
// for, with release order, after the data; its reader loads it with acquire order and takes the
// data when the word EQUALS the epoch of its own launch. Nothing is ever reset.
//
// Why equality is safe: no writer can be a launch ahead on a word that a reader still wants. A word
// is written in launch n+1 only after its writer has seen the reader's metadata of n+1, which the
// reader sends after it has left launch n; metadata itself lives in two banks by epoch parity and
// is written only under the owner's credit (see credit_epoch). A smaller-or-equal comparison would
// also accept a word that was last written half a wrap ago; equality accepts only one exactly 2^32
// launches old, in a word that no launch in between has touched.
//
// Wrap: 0 is never an epoch (fresh memory is zero). After 2^32 - 1 comes 2, so that parity, and
// with it the bank, still alternates; a fresh group starts at 2 as well, so that previous_epoch()
// is the inverse.
#pragma once

#include <cstdint>

#include "plan/math.h"

namespace flashmoe::plan {

using Epoch = uint32_t;

inline constexpr int kNumBanks = 2;

FM_HD constexpr Epoch next_epoch(Epoch epoch) {
  return epoch == 0xffffffffu || epoch == 0 ? 2u : epoch + 1u;
}

FM_HD constexpr Epoch previous_epoch(Epoch epoch) { return epoch == 2u ? 0xffffffffu : epoch - 1u; }

FM_HD constexpr int bank_of(Epoch epoch) { return static_cast<int>(epoch & 1u); }

FM_HD constexpr bool is_published(uint32_t flag, Epoch epoch) { return flag == epoch; }

// The launch that used this epoch's bank before: its owner must have finished it (`done`) before a
// peer may write the bank again. That is the only back-pressure between ranks.
FM_HD constexpr Epoch credit_epoch(Epoch epoch) { return previous_epoch(previous_epoch(epoch)); }

// `done` is written at the end of every launch, so it is never more than a few launches from the
// epoch asked for and the signed difference orders the two across the wrap.
FM_HD constexpr bool has_credit(uint32_t done, Epoch epoch) {
  return static_cast<int32_t>(done - credit_epoch(epoch)) >= 0;
}

}  // namespace flashmoe::plan
