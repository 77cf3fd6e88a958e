// Whose products are next: the two math warpgroups of a CTA issue theirs in turn.
#pragma once

#include "cuda/sync/turn_order.h"
#include "cuda/sync/wait.cuh"

namespace flashmoe::cuda::sync {

// barrier[g]: phase n completes when warpgroup g may start its n-th turn. Arrivals: the four warps
// of the other warpgroup, each after its last wait for a stage; a warpgroup that started earlier
// would take the parity of a stage's earlier contents for its own. Of a tile that both share, the
// one that starts first arrives at once: both wait for the same stages.
struct TurnBarriers {
  uint64_t barriers[2];

  FM_DEVICE void init() {
    for (uint64_t& barrier : barriers) ptx::mbarrier_init(&barrier, kWarps);
  }
  static constexpr int kWarps = 4;
};

// A math warpgroup's end. Every warp of it calls.
class Turns {
 public:
  FM_DEVICE Turns(TurnBarriers& turns, int warpgroup_idx)
      : turns_(turns), warpgroup_idx_(warpgroup_idx), order_(warpgroup_idx) {
    if (warpgroup_idx == 1) pass();  // the first turn is the other's
  }

  // Returns when the tile taken last may start.
  FM_DEVICE void begin(Waiter& waiter) {
    waiter.wait(&turns_.barriers[warpgroup_idx_], order_.parity(), WaitTag::kTurn);
    order_.advance();
    if (order_.starts_first()) pass();
  }
  // After the tile's last wait for a stage.
  FM_DEVICE void end() {
    if (!order_.starts_first()) pass();
  }
  FM_DEVICE TurnOrder& order() { return order_; }

 private:
  FM_DEVICE void pass() {
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                           &turns_.barriers[warpgroup_idx_ ^ 1]);
    }
  }

  TurnBarriers& turns_;
  int warpgroup_idx_;
  TurnOrder order_;
};

}  // namespace flashmoe::cuda::sync
