// The roles of every kernel of tiles: a pair of CTAs that meet in shared-memory rings.
//
//   tickets (a warp of the pair's leader)  takes tickets one tile ahead, sends tiles to both CTAs
//   weights (a thread of each CTA)         copies the CTA's own weights
//   tokens  (a thread of each CTA)         copies half the pair's tokens, when they are there
//   math    (two warpgroups of each CTA)   take tiles in turn: one's products hide the other's
//                                          epilogue (ping-pong); shared_tiles.cuh has another
//
// A Job says what a kernel's tiles are and what becomes of them; the roles own rings, phases and
// turns. It names Params, Shared, kShape (the geometry of the stages), kTicketLead (tiles that a
// pair has tickets of beside the one that it loads), and has static functions of the launch's
// parameters:
//   tickets(params)                         the counter
//   stage_bytes(tile)                       of one step's operands
//   pace_block(num_k_blocks)                the step at whose load a later ticket is due
//   wait_for_weights(params, tile, waiter)  the copy engine may read the tile's weights
//   wait_for_tokens(params, tile, waiter)   and its tokens
//   multiply(params, tile, operands...)     tile::multiply_steps of the tile's configuration
// and classes, which a role makes for itself or for a tile:
//   StageFill(smem)                         where a load thread puts a tile's steps, see OneRing
//   Source(params, smem)                    the ticket warp's
//     tile_of(ticket)                       whole warp; tickets do not decrease. Says also how many
//                                           steps it has, and whether its tokens are there
//   WeightLoad(params, tile, cta_rank)      load(to, full, k): this CTA's weights of one step
//   TokenLoad(params, tile, cta_rank)       likewise its half of the tokens, for both CTAs
//   Output(smem, warpgroup_idx)             a math warpgroup's; all of it calls
//     all(vote)                             whether the vote holds in all threads
//     prepare(params, tile, waiter)         before its turn to make the tile's products
//     finish(params, sums, tile, waiter)    stores the results
//     drain()                               all stores are in global memory
#pragma once

#include <type_traits>

#include "cuda/kernel/roles.cuh"
#include "cuda/sync/turns.cuh"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/load.cuh"
#include "cuda/tile/mainloop.cuh"

namespace flashmoe::cuda::kernel {

// The stages of a job whose tiles all go through one ring, as a load thread fills them.
template <class Job>
class OneRing {
 public:
  FM_DEVICE explicit OneRing(typename Job::Shared& smem)
      : smem_(smem), stages_(smem.stage_barriers) {}

  // Calls fill(is_shared, ring, weights, tokens, k_block) for every step of the tile, when its
  // stage, where its operands go, is free; is_shared: a type, of shared_tiles.cuh.
  template <class Fill>
  FM_DEVICE void for_each_stage(const tile::Tile& tile, sync::Waiter& waiter, const Fill& fill) {
    for (int32_t k_block = 0; k_block < tile.num_k_blocks; ++k_block) {
      stages_.acquire(waiter);
      auto& stage = smem_.stages[stages_.slot()];
      fill(std::false_type{}, stages_, stage.weights, stage.tokens, k_block);
      stages_.advance();
    }
  }

 private:
  typename Job::Shared& smem_;
  sync::StageWriter<Job::kShape.num_stages> stages_;
};

template <class IsShared, class Load>
FM_DEVICE void load_step(IsShared, Load& load, uint8_t* to, uint64_t* full, int32_t k_block) {
  if constexpr (IsShared::value) {
    load.load_shared(to, full);
  } else {
    load.load(to, full, k_block * config::kDepthStep);
  }
}

// Whole warp of the leader. The ticket of the kTicketLead'th tile after it is taken when about half
// of a tile is loaded: early enough to hide the counter's latency, late enough that no pair sits on
// tiles that others could start.
template <class Job>
FM_DEVICE void tickets_role(const typename Job::Params& params, typename Job::Shared& smem,
                            sync::Waiter waiter) {
  const int32_t num_clusters = ptx::num_blocks() / config::kClusterSize;
  const bool is_taker = ptx::lane_idx() == 0;
  TileWriter tiles(smem.tiles);
  typename Job::Source source(params, smem);
  for (uint32_t tile_idx = 0;; ++tile_idx) {
    if (tile_idx >= Job::kTicketLead) {
      const uint32_t paced = tile_idx - Job::kTicketLead;
      waiter.wait(&smem.pace[paced % Job::kTicketLead], paced / Job::kTicketLead % 2,
                  sync::WaitTag::kPace);
    }
    int32_t ticket = 0;
    if (is_taker) ticket = take_ticket(Job::tickets(params), tile_idx == 0, num_clusters);
    ticket = __shfl_sync(0xFFFFFFFF, ticket, 0);
    const bool alive = __all_sync(0xFFFFFFFF, waiter.alive());
    const tile::Tile tile = alive ? source.tile_of(ticket) : tile::Tile{};
    tiles.send(tile, waiter);
    if (tile.is_end()) break;
  }
  if (is_taker) finish_tickets(Job::tickets(params), num_clusters);
}

// A warp of each CTA, of which one thread works. It announces a stage's bytes, its tokens' too, and
// copies the weights: ahead of the tokens as far as there are stages.
template <class Job>
FM_DEVICE void weights_role(const typename Job::Params& params, typename Job::Shared& smem,
                            sync::Waiter waiter, int32_t cta_rank) {
  if (!ptx::elect_one()) return;
  typename Job::StageFill stages(smem);
  TileReader tiles(smem.tiles);
  while (true) {
    const tile::Tile tile = tiles.take_and_rearm(waiter);
    if (tile.is_end() || !waiter.alive()) break;
    Job::wait_for_weights(params, tile, waiter);
    if (!waiter.alive()) break;
    typename Job::WeightLoad weights(params, tile, cta_rank);
    const uint32_t num_bytes = Job::stage_bytes(tile);
    const auto fill = [&](auto is_shared, auto& ring, uint8_t* to, uint8_t*, int32_t k_block) {
      ring.announce(num_bytes);
      load_step(is_shared, weights, to, ring.full(), k_block);
    };
    stages.for_each_stage(tile, waiter, fill);
  }
}

// Likewise. It copies this CTA's half of the pair's tokens, once they are there. One thread's
// instructions for both operands take as long as a stage's products.
template <class Job>
FM_DEVICE void tokens_role(const typename Job::Params& params, typename Job::Shared& smem,
                           sync::Waiter waiter, int32_t cta_rank) {
  if (!ptx::elect_one()) return;
  typename Job::StageFill stages(smem);
  TileReader tiles(smem.tiles);
  // Tiles are counted by the ring that they come through.
  static_assert(config::kTileSlots % Job::kTicketLead == 0);
  const auto tile_idx = [&] {
    return static_cast<uint32_t>(tiles.cursor().slot() + config::kTileSlots - 1);
  };
  while (true) {
    const tile::Tile tile = tiles.take_alone(waiter);
    if (tile.is_end() || !waiter.alive()) break;
    Job::wait_for_tokens(params, tile, waiter);
    if (!waiter.alive()) break;
    typename Job::TokenLoad tokens(params, tile, cta_rank);
    const int32_t pace_block = Job::pace_block(tile.num_k_blocks);
    const auto fill = [&](auto is_shared, auto& ring, uint8_t*, uint8_t* to, int32_t k_block) {
      load_step(is_shared, tokens, to, ring.full(), k_block);
      if (k_block == pace_block && cta_rank == 0) {
        ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                             &smem.pace[tile_idx() % Job::kTicketLead]);
      }
    };
    stages.for_each_stage(tile, waiter, fill);
  }
}

// One warpgroup. Warpgroup 0 has the CTA's tiles 0, 2, 4, ...; warpgroup 1 the others.
template <class Job>
FM_DEVICE void math_role(const typename Job::Params& params, typename Job::Shared& smem,
                         sync::Waiter& waiter, int warpgroup_idx) {
  constexpr config::GroupedProduct kShape = Job::kShape;
  sync::StageReader<kShape.num_stages> stages(smem.stage_barriers);
  TileReader tiles(smem.tiles);
  sync::Turns turns(smem.turns, warpgroup_idx);
  typename Job::Output output(smem, warpgroup_idx);
  float sums[kShape.max_tokens];

  tile::Tile tile = tiles.take(waiter);
  const auto pass_over = [&] {  // from the other's tile to the own one after it
    if (tile.is_end()) return;
    stages.skip(tile.num_k_blocks);
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
    if (!output.all(!tile.is_end() && waiter.alive())) break;
    output.prepare(params, current, waiter);
    turns.wait(waiter);
    Job::multiply(params, tile, sums, smem.stages, stages, tile.num_k_blocks, waiter,
                  [&] { turns.pass(); });
    output.finish(params, sums, current, waiter);
    tile = tiles.take(waiter);
    pass_over();
  }
  output.drain();
}

}  // namespace flashmoe::cuda::kernel
