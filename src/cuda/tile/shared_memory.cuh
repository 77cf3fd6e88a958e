// The shared memory of a grouped-product CTA; the host takes its size from here.
#pragma once

#include "cuda/config/grouped_product.h"
#include "cuda/sync/ring.cuh"
#include "cuda/sync/turns.cuh"

namespace flashmoe::cuda::tile {

// Extra: what else a kernel keeps. A member and not a derived struct, whose base would be padded.
template <config::GroupedProductConfig Config, class Extra>
struct SharedMemory {
  static constexpr config::GroupedProduct kConfig = Config::value;
  static constexpr int kStages = kConfig.num_stages;

  // The swizzle repeats every 1024 bytes, and descriptors count on it.
  struct alignas(1024) Stage {
    uint8_t weights[kConfig.weight_bytes()];
    alignas(1024) uint8_t tokens[kConfig.token_bytes(kConfig.max_steps())];
  };
  Stage stages[kStages];
  alignas(1024) uint8_t staging[2][config::kStoreBuffers][config::kStoreBytes];
  sync::RingBarriers<kStages> stage_barriers;
  sync::MessageRing<Tile, config::kTileSlots> tiles;
  // Completed by the leader's tokens thread in the middle of each tile: a later ticket is due.
  uint64_t pace[config::kTicketLead];
  sync::TurnBarriers turns;
  Extra extra;

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init() {
    constexpr int kMathWarps = 4;        // one warpgroup reads a stage,
    constexpr int kTileReaders = 8 + 2;  // but both, and the threads that load, read each tile
    stage_barriers.init(kMathWarps * config::kClusterSize);
    tiles.init(kTileReaders * config::kClusterSize);
    for (uint64_t& barrier : pace) ptx::mbarrier_init(&barrier, 1);
    turns.init();
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
};

}  // namespace flashmoe::cuda::tile
