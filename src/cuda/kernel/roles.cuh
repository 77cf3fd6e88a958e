// What the kernels' roles share.
#pragma once

#include "cuda/kernel/grouped_product.h"
#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/word.cuh"
#include "cuda/sync/ring.cuh"
#include "cuda/tile/schedule.h"

namespace flashmoe::cuda::kernel {

enum class Role { kIdle, kTickets, kWeights, kTokens, kPost, kMath };

FM_DEVICE Role role_of(int32_t cta_rank) {
  const uint32_t warpgroup_idx = ptx::thread_idx() / config::kWarpgroup;
  if (warpgroup_idx > 0) return Role::kMath;
  switch (ptx::thread_idx() / 32) {
    case 0:
      return Role::kWeights;
    case 1:
      return cta_rank == 0 ? Role::kTickets : Role::kIdle;
    case 2:
      return Role::kTokens;
    default:
      return Role::kPost;
  }
}

using TileWriter = sync::MessageWriter<tile::Tile, config::kTileSlots>;
using TileReader = sync::MessageReader<tile::Tile, config::kTileSlots>;

// The first ticket of a cluster is its index, and costs no round trip. One thread.
FM_DEVICE int32_t take_ticket(TicketCounter& tickets, bool is_first, int32_t num_clusters) {
  if (is_first) return ptx::block_idx() / config::kClusterSize;
  return num_clusters + static_cast<int32_t>(atomicAdd(&tickets.next, 1u));
}

// Each of num_takers calls once, after its last ticket; the last one (true) leaves zeros and sees
// what the others did before.
FM_DEVICE bool finish_tickets(TicketCounter& tickets, int32_t num_takers) {
  if (ptx::add_acq_rel_gpu(&tickets.finished, 1) + 1 != static_cast<uint32_t>(num_takers)) {
    return false;
  }
  ptx::st_relaxed_gpu(&tickets.next, 0u);
  ptx::st_relaxed_gpu(&tickets.finished, 0u);
  return true;
}

}  // namespace flashmoe::cuda::kernel
