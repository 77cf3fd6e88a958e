// What the tests of groups share.
#pragma once

#include "layer_case.h"

namespace flashmoe::test {

inline fm_layer small_layer(int64_t experts, int64_t top_k, int64_t hidden = 8) {
  return plain_layer(FM_F32, hidden, 8, experts, top_k);
}

// The launches of this case on `group` give the bits that a fresh group gives. What those bits have
// to be is test_layer.cpp's matter.
inline void expect_calm_bits(LayerCase& c, const Ranks& group, bool backward = false) {
  c.poison_outputs();
  expect_all_ok(c.forward(group));
  if (backward) expect_all_ok(c.backward(group));
  EXPECT_EQ(c.output_bytes(), calm_bytes(c, backward));
}

inline void run_checked(Rng& rng, const Ranks& group, const fm_layer& layer,
                        const std::vector<int64_t>& tokens, bool backward) {
  LayerCase c(rng, layer, {.world = group.world(), .tokens = tokens});
  expect_calm_bits(c, group, backward);
}

// The forward of one rank, on this thread.
inline Outcome forward_alone(LayerCase& c, fm_group group, int32_t rank = 0) {
  const auto args = c.ranks[static_cast<size_t>(rank)].forward_args();
  return outcome(fm_forward(group, &c.layer, &args));
}

}  // namespace flashmoe::test
