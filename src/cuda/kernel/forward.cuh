// The forward as one persistent cooperative kernel. All warps of all CTAs first route the tokens
// and place their rows; then roles meet in shared-memory rings and at counters in global memory:
//
//   tickets (a warp of the pair's leader)  takes tickets, sends their tiles to both CTAs and
//                                          whether what they depend on is there
//   weights (a thread of each CTA)         copies the CTA's own weights
//   tokens  (a thread of each CTA)         copies half the pair's tokens, when they are there
//   math    (two warpgroups of each CTA)   take tiles in turn: one's products hide the other's
//                                          epilogue (ping-pong)
//   comm    (a warpgroup of each CTA)      sends tokens to the other ranks that need them, and
//                                          copies what came into expert order ahead of the up
//                                          tiles; combines column blocks behind the down tiles
//
// Counters (cleared by every launch before its plan, published by release, read by acquire):
//   rows_ready[first group of a block]  comm -> tickets, tokens: rows of the block that are copied
//   up_done[first group of a block]     math -> tickets, tokens: CTAs' up tiles of it, stored
//   down_done[column block]             math -> comm: CTAs' down tiles of it that are stored
// What crosses between ordinary and copy-engine accesses is fenced on both sides.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/kernel/mark.cuh"
#include "cuda/kernel/pipeline.cuh"
#include "cuda/kernel/start.cuh"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/stage/combine.cuh"
#include "cuda/stage/copy_rows.cuh"
#include "cuda/stage/exchange.cuh"
#include "cuda/stage/plan.cuh"
#include "cuda/stage/route.cuh"
#include "cuda/stage/send_rows.cuh"
#include "cuda/sync/grid_barrier.cuh"
#include "cuda/tile/expert_memory.cuh"
#include "cuda/tile/pre_activation.cuh"
#include "cuda/tile/shared_memory.cuh"

namespace flashmoe::cuda::kernel {

struct ForwardExtra {
  tile::ExpertMemory experts;
  int32_t num_blocks;  // of all experts
  stage::RankState ranks;
  bool has_scratch;
  uint32_t here[config::kClusterSize];  // CTAs of the pair that have the plan
  // The tile of each math warpgroup while its products run: no registers are free for it. Written
  // by one thread before the barrier that opens the loop, read by all after the products.
  tile::Tile current[2];
};

template <class Config>
using ForwardShared = tile::SharedMemory<config::UpOf<Config>, ForwardExtra>;

// Where the table of experts is.
template <class Shared>
FM_DEVICE int32_t* experts_of(const ForwardParams& params, Shared& smem) {
  return params.sizes.table_experts() <= config::kNearExperts ? smem.extra.experts.words
                                                              : params.memory.experts;
}
template <class Shared>
FM_DEVICE tile::ExpertTable table_of(const ForwardParams& params, Shared& smem) {
  return {experts_of(params, smem), params.sizes.table_experts()};
}

// The forward's part of the roles in pipeline.cuh.
template <class Config>
struct ForwardJob {
  using Params = ForwardParams;
  using Shared = ForwardShared<Config>;
  using Up = config::UpOf<Config>;
  using Down = config::DownOf<Config>;
  using StageFill = OneRing<ForwardJob>;
  static constexpr config::GroupedProduct kShape = Config::value.up();
  static constexpr uint32_t kTicketLead = config::kTicketLead;

  // What a tile's tokens wait for: a count, and where it is.
  struct Dependency {
    uint32_t* word;
    uint32_t expected;
    sync::WaitTag tag;

    FM_DEVICE Dependency(const Params& params, const tile::Tile& tile) {
      const bool is_up = tile.product == tile::kUpProduct;
      uint32_t* counters = is_up ? params.memory.rows_ready : params.memory.up_done;
      word = counters + tile.row_begin / config::kRowGroup;
      expected = is_up ? tile.num_rows : params.sizes.up_pairs * config::kClusterSize;
      tag = is_up ? sync::WaitTag::kRowsReady : sync::WaitTag::kUpDone;
    }
  };

  class Source {
   public:
    FM_DEVICE Source(const Params& params, Shared& smem)
        : params_(params),
          walk_{table_of(params, smem), kShape.max_tokens, params.sizes.up_pairs,
                params.sizes.down_pairs, params.sizes.column_pairs} {}
    FM_DEVICE tile::Tile tile_of(int32_t ticket) {
      tile::Tile tile = walk_.tile_at(ticket);
      const auto& sizes = params_.sizes;
      const bool is_up = tile.product == tile::kUpProduct;
      tile.num_k_blocks = (is_up ? sizes.hidden : sizes.intermediate) / config::kDepthStep;
      if (sizes.source_groups > 1) tile.local_expert_idx %= sizes.local_experts;
      bool is_ready = false;
      if (ptx::lane_idx() == 0 && !tile.is_end()) {
        const Dependency tokens(params_, tile);
        is_ready = ptx::ld_acquire_gpu(tokens.word) == tokens.expected;
      }
      tile.is_ready = __shfl_sync(0xFFFFFFFF, is_ready, 0);
      mark(tile);
      return tile;
    }

   private:
    // The first tile of either product.
    FM_DEVICE void mark(const tile::Tile& tile) {
      if (tile.is_end() || tile.product == product_) return;
      product_ = tile.product;
      const bool is_up = product_ == tile::kUpProduct;
      if (ptx::lane_idx() == 0) set_mark_of_first(params_, is_up ? Mark::kUp : Mark::kDown);
    }

    const Params& params_;
    tile::Walk walk_;
    int32_t product_ = -1;
  };

  FM_DEVICE static TicketCounter& tickets(const Params& params) { return *params.memory.tickets; }
  // A ticket, its tile and the look at what the tile waits for take as long as a few k-blocks.
  FM_DEVICE static int32_t pace_block(int32_t num_k_blocks) {
    constexpr int32_t kLead = 4;
    return max(num_k_blocks / 2 - kLead, 0);
  }
  FM_DEVICE static uint32_t stage_bytes(const tile::Tile& tile) {
    constexpr config::GroupedProduct kOne = kShape;  // device code has no address of the member
    return kOne.weight_bytes() + kOne.token_bytes(tile.num_steps());
  }
  FM_DEVICE static void wait_for_weights(const Params&, const tile::Tile&, sync::Waiter&) {}
  FM_DEVICE static void wait_for_tokens(const Params& params, const tile::Tile& tile,
                                        sync::Waiter& waiter) {
    if (!tile.is_ready) {
      const Dependency tokens(params, tile);
      waiter.wait_rows(tokens.word, tokens.expected, tokens.tag);
    }
    ptx::fence_proxy_async(ptx::space_global);
  }
  class WeightLoad {
   public:
    FM_DEVICE WeightLoad(const Params& params, const tile::Tile& tile, int32_t cta_rank)
        : params_(params), tile_(tile), weight_tile_idx_(2 * tile.weight_pair_idx + cta_rank) {}
    // Separate gate and up tensors are two copies of 64 rows.
    FM_DEVICE void load(uint8_t* to, uint64_t* full, int32_t depth) const {
      if (tile_.product == tile::kDownProduct) {
        load_from<Down>(params_.down_weights, to, full, depth);
        return;
      }
      load_from<Up>(params_.up_weights[0], to, full, depth);
      if (kShape.epilogue != config::Epilogue::kGated || !params_.separate_gate) return;
      constexpr int32_t kHalf = kShape.weight_bytes() / 2;
      load_from<Up>(params_.up_weights[1], to + kHalf, full, depth);
    }

   private:
    template <class Product>
    FM_DEVICE void load_from(const CUtensorMap& map, uint8_t* to, uint64_t* full,
                             int32_t depth) const {
      tile::load_weights<Product>(to, full, map, tile_.local_expert_idx, weight_tile_idx_, depth);
    }

    const Params& params_;
    const tile::Tile& tile_;
    int32_t weight_tile_idx_;
  };
  struct TokenLoad : tile::TokenLoad {
    FM_DEVICE TokenLoad(const Params& params, const tile::Tile& tile, int32_t cta_rank)
        : tile::TokenLoad(map_of(params, tile), tile, cta_rank) {}

   private:
    FM_DEVICE static const CUtensorMap& map_of(const Params& params, const tile::Tile& tile) {
      const bool is_up = tile.product == tile::kUpProduct;
      return (is_up ? params.row_tokens : params.hidden_tokens)[tile.num_steps() - 1];
    }
  };
  // Both mainloops are one where the weights' major orders are.
  template <class... Operands>
  FM_DEVICE static void multiply(const Params&, const tile::Tile& tile, Operands&&... operands) {
    if constexpr (Config::value.up_major == Config::value.down_major) {
      tile::multiply_steps<Up>(tile.num_steps(), operands...);
    } else if (tile.product == tile::kUpProduct) {
      tile::multiply_steps<Up>(tile.num_steps(), operands...);
    } else {
      tile::multiply_steps<Down>(tile.num_steps(), operands...);
    }
  }
  struct Output : tile::StagedOutput {
    FM_DEVICE Output(Shared& smem, int warpgroup_idx)
        : tile::StagedOutput(smem.staging[warpgroup_idx], warpgroup_idx) {}
    // Stores a tile's results and counts it where its readers wait.
    FM_DEVICE void finish(const Params& params, const float* sums, const tile::Tile& current,
                          sync::Waiter&) {
      // By itself: no register holds a tile or a bias meanwhile.
      if (params.keeps_z && current.product == tile::kUpProduct) {
        tile::store_pre_activation<Up>(params, sums, this->staging, current);
      }
      const tile::Tile tile = current;
      const int32_t weight_tile_idx = 2 * tile.weight_pair_idx + ptx::get_sreg_cluster_ctarank();
      uint32_t* done;
      if (tile.product == tile::kUpProduct) {
        const tile::RowBias bias =
            tile::load_bias<Up>(params.up_bias, tile.local_expert_idx, weight_tile_idx);
        tile::with_results<Up>(sums, params.activation, bias, [&](const auto& results) {
          tile::store_tile<Up>(results, this->staging, params.hidden_out, tile, weight_tile_idx);
        });
        done = &params.memory.up_done[tile.row_begin / config::kRowGroup];
      } else {
        const tile::RowBias bias =
            tile::load_bias<Down>(params.down_bias, tile.local_expert_idx, weight_tile_idx);
        tile::with_results<Down>(sums, params.activation, bias, [&](const auto& results) {
          tile::store_tile<Down>(results, this->staging, params.row_out, tile, weight_tile_idx);
        });
        done = &params.memory.down_done[tile.weight_pair_idx / params.sizes.column_pairs];
      }
      this->staging.publish(done);
    }
  };
};

// Both CTAs of a pair take up their roles, or neither: the wait of one of them for the plan may run
// out, or find the group stopped, when the other's does not. One thread of each tells both; a
// cluster barrier follows.
FM_DEVICE void tell_pair(uint32_t (&here)[config::kClusterSize], bool is_here) {
  if (ptx::thread_idx() != 0) return;
  FM_UNROLL
  for (uint32_t cta_rank = 0; cta_rank < config::kClusterSize; ++cta_rank) {
    ptx::st_cluster(&here[ptx::get_sreg_cluster_ctarank()], is_here ? 1 : 0, cta_rank);
  }
}
FM_DEVICE bool is_pair_here(const volatile uint32_t (&here)[config::kClusterSize]) {
  return (here[0] & here[1]) != 0;
}

// Every CTA of a launch whose ranks differ; the last one gives the scratch free, as the combine
// does of others.
FM_DEVICE void leave_without_roles(const ForwardParams& params) {
  if (ptx::thread_idx() == 0 && finish_tickets(params.memory.state->combine, gridDim.x)) {
    stage::release_scratch(params);
  }
}

// Logits of the fused router. False if a CTA did not come in time.
template <class Element>
FM_DEVICE bool compute_logits(const ForwardParams& params, uint8_t* arena) {
  if (params.router.weight == nullptr) return true;
  stage::check_selection_bias(params);
  stage::compute_logits<Element>(params, arena);
  return !params.sizes.has_few_tiles || sync::meet_all(&params.memory.state->barrier, params.waits);
}

// Routing and plan, by all threads of all CTAs. False if a CTA did not come in time.
template <class Config>
FM_DEVICE bool route_and_plan(const ForwardParams& params, ForwardShared<Config>& smem) {
  using Element = typename tile::ElementOf<Config::value.element>::Type;
  constexpr int32_t kArenaBytes = sizeof(smem.stages);
  static_assert(stage::LogitsLayout<false>::kBytes <= kArenaBytes);
  static_assert(stage::LogitsLayout<true>::kBytes <= kArenaBytes);
  static_assert(stage::kRouteBytes <= kArenaBytes);
  static_assert(stage::kPlanBytes <= kArenaBytes);
  const auto& sizes = params.sizes;
  auto* arena = reinterpret_cast<uint8_t*>(smem.stages);
  sync::GridBarrier* barrier = &params.memory.state->barrier;
  stage::clear_counters(params, sizes.row_groups);
  if (!compute_logits<Element>(params, arena)) return false;
  stage::route(params, arena, kArenaBytes);
  if (ptx::thread_idx() == 0) set_mark_of_first(params, Mark::kRouted);
  if (!sync::meet_all(barrier, params.waits)) return false;
  if (!sizes.has_few_tiles) {
    stage::scan_histograms(params);
    if (!sync::meet_all(barrier, params.waits)) return false;
  }
  const int32_t num_blocks =
      stage::is_alone(params)
          ? stage::place_rows<config::kForwardBlockRows>(params, arena, experts_of(params, smem))
          : stage::plan_ranks<config::kForwardBlockRows>(params, arena, experts_of(params, smem),
                                                         smem.extra.ranks);
  if (num_blocks == stage::kRanksDiffer) leave_without_roles(params);
  if (num_blocks < 0) return false;
  if (ptx::thread_idx() == 0) smem.extra.num_blocks = num_blocks;
  // The arena becomes operand stages, which the copy engine fills.
  ptx::fence_proxy_async(ptx::space_shared);
  return sizes.has_few_slots || sync::meet_all(barrier, params.waits);
}

// Combines until no unit is left; the last warp ends the launch. Whole warp.
template <class Config, int kPieces, int kRows>
FM_DEVICE void combine_outputs(const ForwardParams& params, ForwardShared<Config>& smem,
                               sync::Waiter& waiter) {
  if (!stage::combine<Config, kPieces, kRows>(params, smem.extra.ranks, smem.extra.num_blocks,
                                              waiter, [] { return false; })) {
    return;
  }
  set_mark(params, Mark::kEnd);
  stage::release_scratch(params);
}

// A warp of the communication warpgroup.
template <class Config>
FM_DEVICE void forward_comm(const ForwardParams& params, ForwardShared<Config>& smem,
                            sync::Waiter& waiter) {
  const auto warp_idx = [] {  // read where it is used: no register holds it in between
    return ptx::thread_idx() / 32 % config::kCommWarps;
  };
  const auto worker_idx = [&] {
    return warp_idx() * gridDim.x + ptx::block_idx();
  };
  const auto num_workers = [] {
    return gridDim.x * config::kCommWarps;
  };
  if (stage::is_alone(params)) {
    stage::copy_rows<Config>(params, table_of(params, smem), worker_idx(), num_workers());
  } else {
    const tile::ExpertTable experts = table_of(params, smem);
    stage::send_and_copy_rows(params, smem.extra.ranks, stage::OwnTokens{params}, experts,
                              worker_idx, num_workers, waiter, [&](int32_t row, const auto& find) {
                                stage::copy_unit<Config, 4>(params, experts, row, find);
                              });
    if (ptx::lane_idx() == 0) set_mark_of_first(params, Mark::kRowsIn);
  }
  combine_outputs<Config, 1, 4>(params, smem, waiter);
}

// The roles, after the plan.
template <class Config>
FM_DEVICE void run_roles(const ForwardParams& params, ForwardShared<Config>& smem) {
  using Job = ForwardJob<Config>;
  sync::Waiter waiter(params.waits);
  // The same in all lanes, as the compiler must see it for setmaxnreg.
  const int warpgroup_idx = __shfl_sync(0xFFFFFFFF, threadIdx.x / config::kWarpgroup, 0);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Job::kShape.load_registers>();
    const auto cta_rank = [] {  // read where it is used
      return static_cast<int32_t>(ptx::get_sreg_cluster_ctarank());
    };
    const auto role = [&] {
      return role_of(cta_rank());
    };
    if (role() == Role::kWeights) weights_role<Job>(params, smem, waiter, cta_rank());
    if (role() == Role::kTokens) tokens_role<Job>(params, smem, waiter, cta_rank());
    if (role() == Role::kTickets) {
      tickets_role<Job>(params, smem, waiter);
      if (ptx::lane_idx() == 0) set_mark_of_first(params, Mark::kLastTile);
    }
    if (role() == Role::kPost && !stage::is_alone(params))
      stage::post_flags(params, smem.extra.ranks);
  } else if (warpgroup_idx == 3) {
    ptx::setmaxnreg_dec<config::kCommRegisters>();
    forward_comm<Config>(params, smem, waiter);
  } else {
    ptx::setmaxnreg_inc<Job::kShape.math_registers>();
    math_role<Job>(params, smem, waiter, warpgroup_idx - 1);
    combine_outputs<Config, 2, 8>(params, smem, waiter);
  }
}

template <config::ForwardConfig Config>
__global__ void __launch_bounds__(config::kForwardThreads, 1)
    forward(const __grid_constant__ ForwardParams params) {
  FM_DYNAMIC_SHARED(raw);
  auto& smem = *reinterpret_cast<ForwardShared<Config>*>(raw);
  if (ptx::thread_idx() == 0) {
    smem.init();
    smem.extra.ranks.post.init();
    ptx::prefetch_tensormap(&params.up_weights[0]);
    ptx::prefetch_tensormap(&params.down_weights);
  }
  // Nobody writes or arrives in the other CTA before it has started. A CTA without the scratch
  // leaves behind its arrival, so that nobody waits for it; the other one, which gets the same
  // answer (sync/holder.h), leaves as well.
  ptx::barrier_cluster_arrive();
  if (!take_scratch(params, smem.extra.has_scratch)) return;
  if (ptx::thread_idx() == 0) set_mark_of_first(params, Mark::kStart);
  const bool is_planned = route_and_plan<Config>(params, smem);
  ptx::barrier_cluster_wait();  // the other CTA has started
  tell_pair(smem.extra.here, is_planned);
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (ptx::thread_idx() == 0) set_mark_of_first(params, Mark::kPlanned);
  if (is_pair_here(smem.extra.here)) run_roles<Config>(params, smem);
  // Nobody leaves while the other CTA may still write or arrive here.
  __syncwarp();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (ptx::thread_idx() == 0) stage::stop_peers(params);
}

template <config::ForwardConfig Config>
ForwardEntry forward_entry_of() {
  static_assert(sizeof(ForwardShared<Config>) <= config::kSharedLimit);
  return {ptx::kernel_address(&forward<Config>), sizeof(ForwardShared<Config>), Config::value};
}

}  // namespace flashmoe::cuda::kernel
