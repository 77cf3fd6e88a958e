// Whose products are next: the two math warpgroups of a CTA issue theirs in turn.
#pragma once

#include "cuda/sync/wait.cuh"

namespace flashmoe::cuda::sync {

// barrier[g]: phase n completes when warpgroup g may start its n-th tile. Arrivals: the four warps
// of the other warpgroup, each after its last wait for a stage; a warpgroup that started earlier
// would take the parity of a stage's earlier contents for its own.
struct TurnBarriers {
  uint64_t barriers[2];

  FM_DEVICE void init() {
    for (uint64_t& barrier : barriers) ptx::mbarrier_init(&barrier, kWarps);
  }
  static constexpr int kWarps = 4;
};

class Turns {
 public:
  FM_DEVICE Turns(TurnBarriers& turns, int warpgroup_idx)
      : turns_(turns), warpgroup_idx_(warpgroup_idx) {}

  FM_DEVICE void wait(Waiter& waiter) {
    waiter.wait(&turns_.barriers[warpgroup_idx_], parity_, WaitTag::kTurn);
    parity_ ^= 1;
  }
  // Every warp of the warpgroup.
  FM_DEVICE void pass() {
    __syncwarp();  // else the turn might come back before a lane has seen that it was here
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                           &turns_.barriers[warpgroup_idx_ ^ 1]);
    }
  }
  FM_DEVICE uint32_t& parity() { return parity_; }

 private:
  TurnBarriers& turns_;
  int warpgroup_idx_;
  uint32_t parity_ = 0;
};

}  // namespace flashmoe::cuda::sync
