// The grouped product as one persistent kernel: roles that meet in shared-memory rings.
//
//   tickets (a warp of the pair's leader)  takes tickets one tile ahead, sends tiles to both CTAs
//   load    (a thread of each CTA)         copies operands: own weights, half the pair's tokens
//   math    (two warpgroups of each CTA)   take tiles in turn: one's products hide the other's
//                                          epilogue (ping-pong)
#pragma once

#include "cuda/kernel/grouped_product.h"
#include "cuda/kernel/roles.cuh"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/mainloop.cuh"
#include "cuda/tile/shared_memory.cuh"
#include "cuda/tile/tickets.cuh"

namespace flashmoe::cuda::kernel {

struct ProductExtra {
  // The tile of each math warpgroup while its products run: no registers are free for it. Written
  // by one thread before the barrier that opens the loop, read by all after the products.
  tile::Tile current[2];
};

template <class Config>
using ProductShared = tile::SharedMemory<Config, ProductExtra>;

// Whole warp of the leader. The next ticket is taken when half of a tile is loaded: early enough to
// hide the counter's latency, late enough that no pair sits on a tile that another could start.
template <class Config>
FM_DEVICE void tickets_role(const GroupedProductParams& params, ProductShared<Config>& smem,
                            sync::Waiter waiter) {
  const int32_t num_clusters = gridDim.x / config::kClusterSize;
  const bool is_taker = threadIdx.x % 32 == 0;
  TileWriter tiles(smem.tiles);
  tile::ExpertWindow experts(params.expert_begin, params.expert_rows, params.num_experts,
                             {Config::value.max_tokens, params.num_weight_pairs});
  uint32_t pace_parity = 0;
  for (bool is_first = true;; is_first = false) {
    if (!is_first) {
      waiter.wait(&smem.pace, pace_parity, sync::WaitTag::kPace);
      pace_parity ^= 1;
    }
    int32_t ticket = 0;
    if (is_taker) ticket = take_ticket(params.workspace->tickets, is_first, num_clusters);
    ticket = __shfl_sync(0xFFFFFFFF, ticket, 0);
    const bool alive = __all_sync(0xFFFFFFFF, waiter.alive());
    const tile::Tile tile = alive ? experts.find(ticket) : tile::Tile{};
    tiles.send(tile, waiter);
    if (tile.is_end()) break;
  }
  if (is_taker) finish_tickets(params.workspace->tickets, num_clusters);
}

// One thread of each CTA.
template <class Config>
FM_DEVICE void load_role(const GroupedProductParams& params, ProductShared<Config>& smem,
                         sync::Waiter waiter, int32_t cta_rank) {
  constexpr config::GroupedProduct kConfig = Config::value;
  sync::StageWriter<kConfig.num_stages> stages(smem.stage_barriers);
  TileReader tiles(smem.tiles);
  const int32_t num_k_blocks = params.num_k_blocks;
  while (true) {
    const tile::Tile tile = tiles.take_and_rearm(waiter);
    if (tile.is_end() || !waiter.alive()) break;
    const int32_t num_steps = tile.num_steps();
    const int32_t weight_tile_idx = 2 * tile.weight_pair_idx + cta_rank;
    const uint32_t num_bytes = kConfig.weight_bytes() + kConfig.token_bytes(num_steps);
    const CUtensorMap& token_map = params.tokens[num_steps - 1];
    for (int32_t k_block = 0; k_block < num_k_blocks; ++k_block) {
      stages.acquire(num_bytes, waiter);
      auto& stage = smem.stages[stages.slot()];
      const int32_t depth = k_block * config::kDepthStep;
      tile::load_tokens_for_pair(stage.tokens, stages.full(), token_map, tile.row_begin, num_steps,
                                 depth, cta_rank);
      tile::load_weights<Config>(stage.weights, stages.full(), params.weights,
                                 tile.local_expert_idx, weight_tile_idx, depth);
      if (k_block == num_k_blocks / 2 && cta_rank == 0) {
        ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &smem.pace);
      }
      stages.advance();
    }
  }
}

// Whole warpgroup.
template <class Config>
FM_DEVICE void store(const GroupedProductParams& params, const float* sums, tile::Staging& staging,
                     const tile::Tile& current) {
  const tile::Tile tile = current;
  const int32_t weight_tile_idx = 2 * tile.weight_pair_idx + ptx::get_sreg_cluster_ctarank();
  const tile::RowBias bias = tile::load_bias<Config>(params.bias, tile, weight_tile_idx);
  tile::with_results<Config>(sums, params.activation, bias, [&](const auto& results) {
    tile::store_tile<Config>(results, staging, params.out, tile, weight_tile_idx);
  });
}

// One warpgroup. Warpgroup 0 has the CTA's tiles 0, 2, 4, ...; warpgroup 1 the others.
template <class Config>
FM_DEVICE void math_role(const GroupedProductParams& params, ProductShared<Config>& smem,
                         sync::Waiter waiter, int warpgroup_idx) {
  constexpr config::GroupedProduct kConfig = Config::value;
  sync::StageReader<kConfig.num_stages> stages(smem.stage_barriers);
  TileReader tiles(smem.tiles);
  sync::Turns turns(smem.turns, warpgroup_idx);
  tile::Staging staging(smem.staging[warpgroup_idx], warpgroup_idx);
  const int32_t num_k_blocks = params.num_k_blocks;
  float sums[kConfig.max_tokens];

  tile::Tile tile = tiles.take(waiter);
  const auto pass_over = [&] {  // from the other's tile to the own one after it
    if (tile.is_end()) return;
    stages.skip(num_k_blocks);
    tile = tiles.take(waiter);
  };
  if (warpgroup_idx == 1) {
    turns.pass();
    pass_over();
  }
  tile::Tile& current = smem.extra.current[warpgroup_idx];
  // The four warps leave together, also when the time of one of them is over: they meet at
  // barriers.
  while (true) {
    if (threadIdx.x % config::kWarpgroup == 0) current = tile;
    if (!staging.all(!tile.is_end() && waiter.alive())) break;
    turns.wait(waiter);
    tile::multiply_steps<Config>(tile.num_steps(), sums, smem.stages, stages, num_k_blocks, waiter,
                                 [&] { turns.pass(); });
    store<Config>(params, sums, staging, current);
    tile = tiles.take(waiter);
    pass_over();
  }
  staging.drain();
}

template <config::GroupedProductConfig Config>
__global__ void __launch_bounds__(config::kThreads, 1)
    grouped_product(const __grid_constant__ GroupedProductParams params) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& smem = *reinterpret_cast<ProductShared<Config>*>(raw);
  const int32_t cta_rank = ptx::get_sreg_cluster_ctarank();
  if (threadIdx.x == 0) {
    smem.init();
    ptx::prefetch_tensormap(&params.weights);
    ptx::prefetch_tensormap(&params.out);
  }
  __syncthreads();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();

  const sync::Waiter waiter(&params.workspace->report, params.timeout_ns);
  // The same in all lanes, as the compiler must see it for setmaxnreg.
  const int warpgroup_idx = __shfl_sync(0xFFFFFFFF, threadIdx.x / config::kWarpgroup, 0);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Config::value.load_registers>();
    const Role role = role_of(cta_rank);
    if (role == Role::kLoad) load_role<Config>(params, smem, waiter, cta_rank);
    if (role == Role::kTickets) tickets_role<Config>(params, smem, waiter);
  } else {
    ptx::setmaxnreg_inc<Config::value.math_registers>();
    math_role<Config>(params, smem, waiter, warpgroup_idx - 1);
  }
  // Nobody leaves while the other CTA may still write or arrive here.
  __syncwarp();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

// What the host needs to launch one configuration.
template <config::GroupedProductConfig Config>
KernelEntry entry_of() {
  return {reinterpret_cast<const void*>(&grouped_product<Config>), sizeof(ProductShared<Config>),
          Config::value};
}

}  // namespace flashmoe::cuda::kernel
