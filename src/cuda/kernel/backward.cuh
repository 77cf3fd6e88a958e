// The backward as one persistent cooperative kernel, with the roles of the forward (forward.cuh):
// routing that is given becomes rows as it did there, and the ticket warps walk through
// tile/backward_walk.h.
//
//   tickets, weights, tokens  as in pipeline.cuh; of a sum over rows, its M and its N side
//   math  (two warpgroups of each CTA)  take tiles in turn
//   comm  (a warpgroup of each CTA)     sends grad y and tokens to the other ranks that need
//                                       them, and copies what came into expert order ahead of the
//                                       tiles; then gradients of slots and biases, when the hidden
//                                       gradients are there
//   both, then                          the router's share of grad x; the combine of the input
//                                       gradients onto it; the gradients of the router. All by
//                                       tickets, so that those who are free take them
//
// Counters: kernel/backward.h. Every tile of a gradient has one owner, and every sum one order.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/kernel/forward.cuh"
#include "cuda/stage/bias_grad.cuh"
#include "cuda/stage/copy_operands.cuh"
#include "cuda/stage/router_grad.cuh"
#include "cuda/stage/slot_exchange.cuh"
#include "cuda/tile/backward_load.cuh"
#include "cuda/tile/hidden_grad.cuh"
#include "cuda/tile/weight_grad.cuh"

namespace flashmoe::cuda::kernel {

using tile::BackwardProduct;
using tile::parts_of;
using tile::pre_activation_pairs;
using tile::product_of;
using tile::table_of;

struct BackwardExtra {
  tile::HiddenGradMemory hidden_grad[2];  // of each math warpgroup
  int32_t num_blocks;                     // of all experts
  stage::RankState ranks;
  bool has_scratch;
  uint32_t here[config::kClusterSize];  // CTAs of the pair that have the plan
  tile::Tile current[2];                // of each math warpgroup while its products run
  MathPlace places[config::kMathWarps];
};

// As tile::SharedMemory, with more staging.
template <config::BackwardConfig Config>
struct BackwardShared {
  static constexpr config::GroupedProduct kShape = Config::value.product(config::Major::kDepth);

  struct alignas(1024) Stage {
    uint8_t weights[kShape.weight_bytes()];
    alignas(1024) uint8_t tokens[kShape.token_bytes(kShape.max_steps())];
  };
  Stage stages[kShape.num_stages];
  alignas(1024) uint8_t staging[2][config::kBackwardStagingBytes];
  sync::RingBarriers<kShape.num_stages> stage_barriers;
  sync::MessageRing<tile::Tile, config::kTileSlots> tiles;
  uint64_t pace[config::kBackwardTicketLead];
  sync::TurnBarriers turns;
  BackwardExtra extra;

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init() {
    constexpr int kMathWarps = 4;
    constexpr int kTileReaders = 8 + 2;
    stage_barriers.init(kMathWarps * config::kClusterSize);
    tiles.init(kTileReaders * config::kClusterSize);
    for (uint64_t& barrier : pace) ptx::mbarrier_init(&barrier, 1);
    turns.init();
    for (int i = 0; i < 2; ++i) extra.hidden_grad[i].init(staging[i]);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
};

// What a tile's rows wait for: up to two counts.
struct BackwardDependency {
  uint32_t* words[2];
  uint32_t expected[2];

  FM_DEVICE BackwardDependency(const BackwardParams& params, const tile::Tile& tile) {
    const BackwardCounters& counters = params.counters;
    const int32_t group = tile.row_begin / config::kRowGroup;
    const int32_t e = tile.local_expert_idx;
    const uint32_t ctas_of_hidden = params.sizes.hidden_pairs * config::kClusterSize;
    const auto blocks = [&] {
      return parts_of(params, tile).blocks();
    };
    switch (product_of(tile)) {
      case BackwardProduct::kPreActivation:
        set(0, &counters.x_ready[group], tile.num_rows);
        set(1, &counters.x_ready[group], tile.num_rows);
        return;
      case BackwardProduct::kHiddenGrad:
        set(0, &counters.grad_y_ready[group], tile.num_rows);
        set(1, &counters.z_done[group], pre_activation_pairs(params) * config::kClusterSize);
        return;
      case BackwardProduct::kInputGrad:
        set(0, &counters.hidden_done[group], ctas_of_hidden);
        set(1, &counters.down_of_expert[e],
            params.sizes.weight_grads[0].num_tiles() * config::kClusterSize);
        return;
      case BackwardProduct::kDownGrad:
        set(0, &counters.hidden_of_expert[e], blocks() * ctas_of_hidden);
        set(1, &counters.hidden_of_expert[e], blocks() * ctas_of_hidden);
        return;
      default:
        set(0, &counters.hidden_of_expert[e], blocks() * ctas_of_hidden);
        set(1, &counters.x_of_expert[e], parts_of(params, tile).rows());
    }
  }

 private:
  FM_DEVICE void set(int i, uint32_t* word, uint32_t count) {
    words[i] = word;
    expected[i] = count;
  }
};

// The backward's part of the roles in pipeline.cuh.
template <class Config>
struct BackwardJob {
  using Params = BackwardParams;
  using Shared = BackwardShared<Config>;
  using WeightLoad = tile::BackwardWeightLoad;
  using TokenLoad = tile::BackwardTokenLoad;
  static constexpr config::GroupedProduct kShape = Shared::kShape;
  static constexpr uint32_t kTicketLead = config::kBackwardTicketLead;
  template <config::Major kMajor>
  using Rows = config::BackwardProductOf<Config, kMajor>;
  using Sums = config::BackwardProductOf<Config, config::Major::kColumns, config::Major::kColumns>;

  class Source {
   public:
    FM_DEVICE Source(const Params& params, Shared&) : params_(params) {}
    FM_DEVICE tile::Tile tile_of(int32_t ticket) {
      const config::BackwardSizes& sizes = params_.sizes;
      const tile::BackwardWalk walk{
          table_of(params_),
          params_.forward.sizes.local_experts,
          config::kBackwardBlockRows,
          pre_activation_pairs(params_),
          sizes.hidden_pairs,
          params_.forward.sizes.down_pairs,
          {sizes.weight_grads[0], sizes.weight_grads[1], sizes.weight_grads[2]}};
      tile::Tile tile = walk.tile_at(ticket);
      if (params_.forward.sizes.source_groups > 1) {
        tile.local_expert_idx %= params_.forward.sizes.local_experts;
      }
      bool is_ready = true;
      const int32_t lane = ptx::lane_idx();
      if (lane < 2 && !tile.is_end()) {
        const BackwardDependency rows(params_, tile);
        uint32_t* word = lane == 0 ? rows.words[0] : rows.words[1];
        is_ready = ptx::ld_acquire_gpu(word) == (lane == 0 ? rows.expected[0] : rows.expected[1]);
      }
      tile.is_ready = __all_sync(0xFFFFFFFF, is_ready);
      if (!tile.is_end()) tile.num_k_blocks = num_k_blocks(params_, tile);
      mark(tile);
      return tile;
    }

   private:
    // The first tile of each product.
    FM_DEVICE void mark(const tile::Tile& tile) {
      if (tile.is_end() || tile.product == product_) return;
      product_ = tile.product;
      if (ptx::lane_idx() != 0) return;
      switch (product_of(tile)) {
        case BackwardProduct::kHiddenGrad:
          return set_mark_of_first(params_.forward, Mark::kUp);
        case BackwardProduct::kDownGrad:
          return set_mark_of_first(params_.forward, Mark::kDownGrad);
        case BackwardProduct::kInputGrad:
          return set_mark_of_first(params_.forward, Mark::kDown);
        case BackwardProduct::kUpGrad:
          return set_mark_of_first(params_.forward, Mark::kUpGrad);
        default:
          return;
      }
    }

    const Params& params_;
    int32_t product_ = -1;
  };

  FM_DEVICE static TicketCounter& tickets(const Params& params) {
    return params.forward.memory.state->tickets;
  }

  FM_DEVICE static uint32_t stage_bytes(const tile::Tile& tile) {
    constexpr config::GroupedProduct kOne = kShape;  // device code has no address of the member
    return tile::backward_stage_bytes(kOne, tile);
  }
  // As the forward's.
  FM_DEVICE static int32_t pace_block(int32_t num_k_blocks) {
    constexpr int32_t kLead = 4;
    return max(num_k_blocks / 2 - kLead, 0);
  }
  // Of a sum over rows, both operands are rows.
  FM_DEVICE static void wait_for_weights(const Params& params, const tile::Tile& tile,
                                         sync::Waiter& waiter) {
    if (tile::is_weight_grad(tile)) wait_for_rows(params, tile, waiter);
  }
  FM_DEVICE static void wait_for_tokens(const Params& params, const tile::Tile& tile,
                                        sync::Waiter& waiter) {
    if (product_of(tile) == BackwardProduct::kHiddenGrad) {
      tile::fetch_z(params, tile, static_cast<int32_t>(ptx::get_sreg_cluster_ctarank()));
    }
    wait_for_rows(params, tile, waiter);
  }

  // A mainloop for each pair of major orders.
  template <class... Operands>
  FM_DEVICE static void multiply(const Params& params, const tile::Tile& tile,
                                 Operands&&... operands) {
    const BackwardProduct product = product_of(tile);
    if (tile::is_weight_grad(tile)) {
      tile::multiply_steps<Sums>(tile.num_steps(), operands...);
      return;
    }
    const bool depth_is_hidden = product != BackwardProduct::kInputGrad;
    const bool hidden_major = product == BackwardProduct::kHiddenGrad ? params.down_is_hidden_major
                                                                      : params.up_is_hidden_major;
    if (depth_is_hidden == hidden_major) {
      tile::multiply_steps<Rows<config::Major::kDepth>>(tile.num_steps(), operands...);
    } else {
      tile::multiply_steps<Rows<config::Major::kColumns>>(tile.num_steps(), operands...);
    }
  }

  class Output {
   public:
    FM_DEVICE Output(Shared& smem, int warpgroup_idx)
        : staging_(smem.staging[warpgroup_idx], warpgroup_idx), smem_(smem) {}
    FM_DEVICE bool all(bool vote) { return staging_.all(vote); }
    FM_DEVICE void prepare(const Params& params, const tile::Tile& tile, sync::Waiter& waiter) {
      if (product_of(tile) == BackwardProduct::kHiddenGrad) {
        hidden_grad().request(params, tile::HiddenPlace(tile), waiter);
      }
    }
    // Stores a tile's results and counts it where its readers wait.
    FM_DEVICE void finish(const Params& params, const float* sums, const tile::Tile& current,
                          sync::Waiter& waiter) {
      if (product_of(current) == BackwardProduct::kHiddenGrad) {
        finish_hidden(params, sums, current, waiter);
        return;
      }
      const tile::Tile tile = current;
      const int32_t weight_tile_idx = 2 * tile.weight_pair_idx + ptx::get_sreg_cluster_ctarank();
      if (tile::is_weight_grad(tile)) {
        const int32_t which = tile::gradient_of(tile);
        // Threads that store by themselves do not meet again before `current` is the next tile.
        if (params.weight_grad_out[which].is_direct) staging_.sync();
        tile::finish_weight_grad<Row>(sums, staging_, params.weight_grads[which],
                                      params.weight_grad_out[which], tile, weight_tile_idx);
        if (which == 0) staging_.publish(&params.counters.down_of_expert[tile.local_expert_idx]);
      } else {
        store_rows(params, sums, tile, weight_tile_idx);
      }
    }
    FM_DEVICE void drain() { staging_.drain(); }

   private:
    using Row = Rows<config::Major::kDepth>;

    // Found where it is used: no register holds it while products run.
    FM_DEVICE tile::HiddenGrad hidden_grad() const {
      return tile::HiddenGrad(smem_.extra.hidden_grad[staging_.warpgroup_idx()]);
    }
    FM_DEVICE void finish_hidden(const Params& params, const float* sums, const tile::Tile& current,
                                 sync::Waiter& waiter) {
      const BackwardCounters& counters = params.counters;
      hidden_grad().template finish<Row>(params, sums, staging_, tile::HiddenPlace(current),
                                         waiter);
      staging_.publish(&counters.hidden_done[current.row_begin / config::kRowGroup]);
      if (!tile::Staging::is_storer()) return;
      ptx::add_release_gpu(&counters.hidden_of_expert[current.local_expert_idx], 1);
      ptx::add_release_gpu(counters.hidden_of_all, 1);
    }
    FM_DEVICE void store_rows(const Params& params, const float* sums, const tile::Tile& tile,
                              int32_t weight_tile_idx) {
      const bool is_z = product_of(tile) == BackwardProduct::kPreActivation;
      config::BiasView bias = params.forward.up_bias;
      if (!is_z) bias.data = nullptr;
      const tile::RowBias row_bias =
          tile::load_bias<Row>(bias, tile.local_expert_idx, weight_tile_idx);
      const CUtensorMap& out = is_z ? params.pre_activation_out : params.forward.row_out;
      tile::with_results<Row>(sums, params.forward.activation, row_bias, [&](const auto& results) {
        tile::store_tile<Row>(results, staging_, out, tile, weight_tile_idx);
      });
      staging_.publish(is_z ? &params.counters.z_done[tile.row_begin / config::kRowGroup]
                            : params.forward.memory.down_done);
    }

    tile::Staging staging_;
    Shared& smem_;
  };

 private:
  using ForwardSizes = config::ForwardSizes;
  FM_DEVICE static int32_t num_k_blocks(const Params& params, const tile::Tile& tile) {
    const ForwardSizes& sizes = params.forward.sizes;
    switch (product_of(tile)) {
      case BackwardProduct::kPreActivation:
      case BackwardProduct::kHiddenGrad:
        return sizes.hidden / config::kDepthStep;
      case BackwardProduct::kInputGrad:
        return params.sizes.up_columns / config::kDepthStep;
      default:
        return parts_of(params, tile).num_steps(config::kDepthStep);
    }
  }
  FM_DEVICE static void wait_for_rows(const Params& params, const tile::Tile& tile,
                                      sync::Waiter& waiter) {
    if (!tile.is_ready) {
      const BackwardDependency rows(params, tile);
      waiter.wait_rows(rows.words[0], rows.expected[0], sync::WaitTag::kRowsReady);
      waiter.wait_rows(rows.words[1], rows.expected[1], sync::WaitTag::kGradDone);
    }
    ptx::fence_proxy_async(ptx::space_global);
  }
};

// Plan of the rows, from routing that is given. All threads of all CTAs; false if a CTA did not
// come in time.
template <class Config>
FM_DEVICE bool plan_rows(const BackwardParams& params, BackwardShared<Config>& smem) {
  constexpr int32_t kArenaBytes = sizeof(smem.stages);
  static_assert(stage::kRouteBytes <= kArenaBytes && stage::kPlanBytes <= kArenaBytes);
  const ForwardParams& forward = params.forward;
  auto* arena = reinterpret_cast<uint8_t*>(smem.stages);
  sync::GridBarrier* barrier = &forward.memory.state->barrier;
  const int32_t thread = ptx::block_idx() * config::kForwardThreads + ptx::thread_idx();
  for (int32_t i = thread; i < params.counters.count;
       i += static_cast<int32_t>(gridDim.x) * config::kForwardThreads) {
    params.counters.first[i] = 0;
  }
  stage::route(forward, arena, kArenaBytes);
  if (ptx::thread_idx() == 0) set_mark_of_first(forward, Mark::kRouted);
  if (!sync::meet_all(barrier, forward.waits)) return false;
  if (!forward.sizes.has_few_tiles) {
    stage::scan_histograms(forward);
    if (!sync::meet_all(barrier, forward.waits)) return false;
  }
  const int32_t num_blocks =
      stage::is_alone(forward)
          ? stage::place_rows<config::kBackwardBlockRows>(forward, arena, forward.memory.experts)
          : stage::plan_ranks<config::kBackwardBlockRows>(forward, arena, forward.memory.experts,
                                                          smem.extra.ranks);
  if (num_blocks < 0) return false;
  if (ptx::thread_idx() == 0) smem.extra.num_blocks = num_blocks;
  // The arena becomes operand stages, which the copy engine fills.
  ptx::fence_proxy_async(ptx::space_shared);
  return forward.sizes.has_few_slots || sync::meet_all(barrier, forward.waits);
}

// Communication warps of the launch.
FM_DEVICE int32_t num_comm_warps() { return ptx::num_blocks() * config::kCommWarps; }

// Returns when all that the slots' gradients are made of is there: all hidden gradients, or with
// the weight on the input all input gradients. False in all lanes if it did not come in time.
template <class Config>
FM_DEVICE bool wait_for_slots(const BackwardParams& params, const BackwardShared<Config>& smem,
                              sync::Waiter& waiter) {
  const bool on_input = params.sizes.weight_on_input;
  const int32_t pairs = on_input ? params.forward.sizes.down_pairs : params.sizes.hidden_pairs;
  waiter.wait_word(on_input ? params.forward.memory.down_done : params.counters.hidden_of_all,
                   smem.extra.num_blocks * pairs * config::kClusterSize, sync::WaitTag::kGradDone);
  return __all_sync(stage::kAllLanes, waiter.alive());
}

// Gradients of the slots' weights and of the biases; of several ranks, the slots' by the ranks of
// their experts, which send them home. Whole warp.
template <class Config, class Index>
FM_DEVICE void differentiate_routing(const BackwardParams& params, BackwardShared<Config>& smem,
                                     const Index& worker_idx, sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  const bool is_alone = stage::is_alone(params.forward);
  if (is_alone && !params.routing.any()) return;
  if (!wait_for_slots(params, smem, waiter)) return;
  if (is_alone) {
    stage::differentiate_slots<Element>(params, worker_idx(), num_comm_warps());
  } else {
    stage::send_slots<Element>(params, smem.extra.ranks, worker_idx, num_comm_warps, waiter);
  }
  if (params.routing.any_bias()) {
    stage::sum_biases<Element>(params, table_of(params), worker_idx, num_comm_warps);
  }
  if (!is_alone) {
    stage::take_slots(params, smem.extra.ranks, worker_idx, num_comm_warps, waiter);
  }
}

// Counts `count` for the warp, whose stores are then visible to whom sees the count. Whole warp.
FM_DEVICE void publish_count(uint32_t* counter, uint32_t count) {
  __syncwarp();
  if (ptx::lane_idx() == 0) ptx::add_release_gpu(counter, count);
}

// The gradients of the logits of one communication warp are there. Whole warp.
FM_DEVICE void finish_logits(const BackwardParams& params) {
  if (params.routing.w_router == nullptr) return;
  if (ptx::block_idx() == 0 && ptx::thread_idx() / 32 % config::kCommWarps == 0) {
    stage::clear_logit_padding(params);
  }
  publish_count(params.counters.logits_done, 1);
}

// The next run that `taken` counts. Whole warp.
FM_DEVICE int32_t take_router_run(uint32_t* taken) {
  int32_t idx = 0;
  if (ptx::lane_idx() == 0) idx = static_cast<int32_t>(atomicAdd(taken, 1u));
  return __shfl_sync(stage::kAllLanes, idx, 0);
}

// Takes runs of those before num_runs, which read the gradients of the logits, until none is left
// and all are done. Returns the first one behind that this warp took, or kNoRun if its time was
// over. Whole warp.
inline constexpr int32_t kNoRun = 0x7FFFFFFF;
template <class Make>
FM_DEVICE int32_t make_router_runs(const BackwardParams& params, uint32_t* taken, uint32_t* done,
                                   int32_t num_runs, sync::Waiter& waiter, const Make& make) {
  int32_t idx = take_router_run(taken);
  if (idx < num_runs) {
    waiter.wait_word(params.counters.logits_done, num_comm_warps(), sync::WaitTag::kLogitsDone);
  }
  if (!__all_sync(stage::kAllLanes, waiter.alive())) {
    // The run that it took counts all the same: nobody waits for it.
    if (idx < num_runs) publish_count(done, 1);
    return kNoRun;
  }
  __builtin_assume(waiter.alive());  // no register holds it meanwhile
  uint32_t num_done = 0;
#pragma unroll 1
  for (; idx < num_runs; idx = take_router_run(taken)) {
    make(idx);
    ++num_done;
  }
  if (num_done > 0) publish_count(done, num_done);
  waiter.wait_word(done, num_runs, sync::WaitTag::kRouterDone);
  return __all_sync(stage::kAllLanes, waiter.alive()) ? idx : kNoRun;
}

// The router's share of grad x: before the combine, which adds to it. Whole warp.
template <class Config, config::RouterStages kStages>
FM_DEVICE void share_router(const BackwardParams& params, sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  if (params.routing.w_router == nullptr) return;
  make_router_runs(params, params.counters.shares_taken, params.counters.shares_done,
                   params.router_runs.num_shares(), waiter,
                   [&](int32_t idx) { stage::make_router_share<Element, kStages>(params, idx); });
}

// The gradients of the router's weight and bias, after the combine. Whole warp.
template <class Config, config::RouterStages kStages>
FM_DEVICE void finish_router(const BackwardParams& params, sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  const tile::RouterRuns& runs = params.router_runs;
  if (runs.num_runs() == 0) return;
  int32_t idx = make_router_runs(
      params, params.counters.sums_taken, params.counters.sums_done, runs.num_sums(), waiter,
      [&](int32_t at) { stage::make_router_sum<Element, kStages>(params, at); });
#pragma unroll 1
  for (; idx < runs.num_runs(); idx = take_router_run(params.counters.sums_taken)) {
    stage::reduce_router(params, runs.run_at(idx).idx);
  }
}

// Combines until no unit is left, onto the router's share. Whole warp.
template <class Config, int kPieces, int kRows>
FM_DEVICE void combine_inputs(const BackwardParams& params, BackwardShared<Config>& smem,
                              sync::Waiter& waiter) {
  const auto adds = [&] {
    return params.routing.w_router != nullptr;
  };
  if (stage::combine<Config, kPieces, kRows>(params.forward, smem.extra.ranks,
                                             smem.extra.num_blocks, waiter, adds)) {
    set_mark(params.forward, Mark::kEnd);
  }
}

// A warp of the communication warpgroup.
template <class Config>
FM_DEVICE void backward_comm(const BackwardParams& params, BackwardShared<Config>& smem,
                             sync::Waiter& waiter) {
  const auto worker_idx = [] {  // read where it is used: no register holds it in between
    return ptx::thread_idx() / 32 % config::kCommWarps * ptx::num_blocks() + ptx::block_idx();
  };
  if (stage::is_alone(params.forward)) {
    stage::copy_operands<Config>(params, table_of(params), worker_idx(), num_comm_warps());
  } else {
    stage::exchange_operands<Config>(params, smem.extra.ranks, table_of(params), worker_idx,
                                     num_comm_warps, waiter);
    if (ptx::lane_idx() == 0) set_mark_of_first(params.forward, Mark::kRowsIn);
  }
  differentiate_routing<Config>(params, smem, worker_idx, waiter);
  finish_logits(params);
  share_router<Config, config::kCommRouterStages>(params, waiter);
  combine_inputs<Config, 1, 4>(params, smem, waiter);
  finish_router<Config, config::kCommRouterStages>(params, waiter);
}

// The roles, after the plan.
template <class Config>
FM_DEVICE void run_backward_roles(const BackwardParams& params, BackwardShared<Config>& smem) {
  using Job = BackwardJob<Config>;
  sync::Waiter waiter(params.forward.waits);
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
      if (ptx::lane_idx() == 0) set_mark_of_first(params.forward, Mark::kLastTile);
    }
    if (role() == Role::kPost && !stage::is_alone(params.forward))
      stage::post_flags(params.forward, smem.extra.ranks);
  } else if (warpgroup_idx == 3) {
    ptx::setmaxnreg_dec<config::kBackwardCommRegisters>();
    backward_comm<Config>(params, smem, waiter);
  } else {
    ptx::setmaxnreg_inc<Job::kShape.math_registers>();
    math_role<Job>(params, smem, waiter, warpgroup_idx - 1);
    share_router<Config, config::kMathRouterStages>(params, waiter);
    combine_inputs<Config, 2, 8>(params, smem, waiter);
    finish_router<Config, config::kMathRouterStages>(params, waiter);
  }
}

// One thread of each CTA, when all of it has done; the last one gives the scratch free.
FM_DEVICE void leave_backward(const BackwardParams& params) {
  if (ptx::add_acq_rel_gpu(params.counters.left, 1) != ptx::num_blocks() - 1u) return;
  set_mark(params.forward, Mark::kDone);
  stage::release_scratch(params.forward);
}

template <config::BackwardConfig Config>
__global__ void __launch_bounds__(config::kForwardThreads, 1)
    backward(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& smem = *reinterpret_cast<BackwardShared<Config>*>(raw);
  if (ptx::thread_idx() == 0) {
    smem.init();
    smem.extra.ranks.post.init();
  }
  if (!take_scratch(params.forward, smem)) return;
  if (ptx::thread_idx() == 0) set_mark_of_first(params.forward, Mark::kStart);
  tell_pair(smem.extra.here, plan_rows<Config>(params, smem));
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (ptx::thread_idx() == 0) set_mark_of_first(params.forward, Mark::kPlanned);
  if (is_pair_here(smem.extra.here)) run_backward_roles<Config>(params, smem);
  // Nobody leaves while the other CTA may still write or arrive here.
  __syncwarp();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (ptx::thread_idx() == 0) leave_backward(params);
  if (ptx::thread_idx() == 0) stage::stop_peers(params.forward);
}

template <config::BackwardConfig Config>
BackwardEntry backward_entry_of() {
  constexpr std::size_t kSharedLimit = 227 * 1024;  // a Hopper CTA's
  static_assert(sizeof(BackwardShared<Config>) <= kSharedLimit);
  return {reinterpret_cast<const void*>(&backward<Config>), sizeof(BackwardShared<Config>),
          Config::value};
}

}  // namespace flashmoe::cuda::kernel
