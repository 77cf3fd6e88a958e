// The roles of a job some of whose tiles both math warpgroups share: half of N each, one M. Such a
// tile takes fewer bytes for its products than two of one warpgroup (config/backward.h).
//
// What a job names beside pipeline.cuh's list:
//   is_shared(tile)              whose loads are load_shared(to, full), step after step
//   multiply_shared(tile, warpgroup_idx, sums, memory, stages, waiter, after_lead)
//                                tile::multiply_grad of the warpgroup's half
// Its WeightLoad and TokenLoad have load_shared(); Shared has `places` of the math warps and
// `load_places` of the load threads in `extra`, and, in the memory of its stages, a second ring of
// config::kGradStages that both warpgroups read, with the barriers grad_barriers. A load thread
// changes from one ring to the other when all that it put into the first has been read, in both
// CTAs.
//
// Turns are as of other tiles: a warpgroup starts its products when the other has passed. Of a
// shared tile the one whose turn it is leads, passes after kGradLead steps and keeps the turn for
// the next tile; the other one follows and passes at once. So one of them makes products while the
// other stores results.
#pragma once

#include "cuda/kernel/pipeline.cuh"
#include "cuda/tile/weight_grad.cuh"

namespace flashmoe::cuda::kernel {

// What a load thread, which has few registers, need not know within a tile.
struct LoadPlace {
  uint32_t other;  // its place in the ring that it does not fill now
  bool fills_shared;
};

// A load thread's two rings.
template <class Job>
class TwoRings {
 public:
  FM_DEVICE explicit TwoRings(typename Job::Shared& smem) : smem_(smem) {
    place().other = 0;
    place().fills_shared = false;
  }

  template <class Fill>
  FM_DEVICE void for_each_stage(const tile::Tile& tile, sync::Waiter& waiter, const Fill& fill) {
    const bool is_shared = Job::is_shared(tile);
    if (is_shared != place().fills_shared) change(is_shared, waiter);
    if (is_shared) {
      fill_ring(smem_.grad_barriers, tile.num_k_blocks, waiter, [&](auto& ring, int32_t step) {
        uint8_t* stage = tile::grad_stage(smem_.stages, ring.slot());
        fill(std::true_type{}, ring, stage, stage + config::kGradWeightBytes, step);
      });
    } else {
      fill_ring(smem_.stage_barriers, tile.num_k_blocks, waiter, [&](auto& ring, int32_t k_block) {
        auto& stage = smem_.stages[ring.slot()];
        fill(std::false_type{}, ring, stage.weights, stage.tokens, k_block);
      });
    }
  }

 private:
  // Of the weights' thread, in the first warp, or of the tokens', in the third.
  FM_DEVICE volatile LoadPlace& place() {
    return smem_.extra.load_places[ptx::thread_idx() / (2 * 32)];
  }
  template <int kSlots, class Fill>
  FM_DEVICE void fill_ring(sync::RingBarriers<kSlots>& barriers, int32_t num_steps,
                           sync::Waiter& waiter, const Fill& fill) {
    sync::StageWriter<kSlots> ring(barriers);
    ring.cursor().set(at_);
    for (int32_t step = 0; step < num_steps; ++step) {
      ring.acquire(waiter);
      fill(ring, step);
      ring.advance();
    }
    at_ = ring.cursor().word();
  }
  template <int kSlots>
  FM_DEVICE void drain(sync::RingBarriers<kSlots>& barriers, sync::Waiter& waiter) {
    sync::StageWriter<kSlots> ring(barriers);
    ring.cursor().set(at_);
    ring.drain(waiter);
  }
  FM_DEVICE void change(bool fills_shared, sync::Waiter& waiter) {
    if (fills_shared) {
      drain(smem_.stage_barriers, waiter);
    } else {
      drain(smem_.grad_barriers, waiter);
    }
    const uint32_t other = place().other;
    place().other = at_;
    at_ = other;
    place().fills_shared = fills_shared;
  }

  typename Job::Shared& smem_;
  uint32_t at_ = 0;  // the place in the ring that it fills
};

// Where a math warp is, in shared memory where registers are short: all of it while a tile is
// finished, its place among shared tiles' stages but for their products.
struct MathPlace {
  uint32_t stages;
  uint32_t tiles;
  uint32_t turn;
  uint32_t shared_stages;
};

// One warpgroup. Of the tiles that one warpgroup takes, warpgroup 0 has the CTA's 0, 2, 4, ...;
// warpgroup 1 the others.
template <class Job>
FM_DEVICE void shared_math_role(const typename Job::Params& params, typename Job::Shared& smem,
                                sync::Waiter& waiter, int warpgroup_idx) {
  constexpr config::GroupedProduct kShape = Job::kShape;
  sync::StageReader<kShape.num_stages> stages(smem.stage_barriers);
  TileReader tiles(smem.tiles);
  sync::Turns turns(smem.turns, warpgroup_idx);
  typename Job::Output output(smem, warpgroup_idx);
  float sums[kShape.max_tokens];
  const auto place = [&]() -> volatile MathPlace& {  // all lanes write and read the same
    return smem.extra.places[(ptx::thread_idx() - config::kWarpgroup) / 32];
  };
  place().shared_stages = 0;
  uint32_t next = 0;  // the warpgroup whose turn it is
  if (warpgroup_idx == 1) turns.pass();
  tile::Tile& current = smem.extra.current[warpgroup_idx];
  // The four warps leave together, also when the time of one of them is over: they meet at
  // barriers.
  while (true) {
    const tile::Tile tile = tiles.take(waiter);
    const bool has_turn = next == static_cast<uint32_t>(warpgroup_idx);
    const bool is_shared = Job::is_shared(tile);
    if (!tile.is_end() && !is_shared) {
      next ^= 1;
      if (!has_turn) {
        stages.skip(tile.num_k_blocks);
        continue;
      }
    }
    if (ptx::thread_idx() % config::kWarpgroup == 0) current = tile;
    if (!output.all(!tile.is_end() && waiter.alive())) break;
    output.prepare(params, current, waiter);
    turns.wait(waiter);
    if (is_shared) {
      sync::StageReader<config::kGradStages> shared_stages(smem.grad_barriers);
      shared_stages.cursor().set(place().shared_stages);
      if (!has_turn) turns.pass();
      Job::multiply_shared(tile, warpgroup_idx, sums, smem.stages, shared_stages, waiter, [&] {
        if (has_turn) turns.pass();
      });
      place().shared_stages = shared_stages.cursor().word();
    } else {
      Job::multiply(params, tile, sums, smem.stages, stages, tile.num_k_blocks, waiter,
                    [&] { turns.pass(); });
    }
    place().stages = stages.cursor().word();
    place().tiles = tiles.cursor().word();
    place().turn = 2 * next + turns.parity();
    output.finish(params, sums, current, waiter);
    stages.cursor().set(place().stages);
    tiles.cursor().set(place().tiles);
    turns.parity() = place().turn % 2;
    next = place().turn / 2;
  }
  output.drain();
}

}  // namespace flashmoe::cuda::kernel
