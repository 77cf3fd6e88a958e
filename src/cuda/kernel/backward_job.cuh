// The backward's tiles for the roles in pipeline.cuh: its shared memory, what a tile waits for,
// which products it is made of, and where its results go. The kernel is in backward.cuh.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/kernel/mark.cuh"
#include "cuda/kernel/shared_tiles.cuh"
#include "cuda/stage/exchange.cuh"
#include "cuda/tile/backward_load.cuh"
#include "cuda/tile/hidden_grad.cuh"

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
  LoadPlace load_places[2];
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
  static_assert(config::kGradStages * config::kGradStageBytes <= sizeof(stages));
  alignas(1024) uint8_t staging[2][config::kBackwardStagingBytes];
  sync::RingBarriers<kShape.num_stages> stage_barriers;
  sync::RingBarriers<config::kGradStages> grad_barriers;  // of the stages' memory, see TwoRings
  sync::MessageRing<tile::Tile, config::kTileSlots> tiles;
  uint64_t pace[config::kBackwardTicketLead];
  sync::TurnBarriers turns;
  BackwardExtra extra;

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init() {
    constexpr int kMathWarps = 4;
    constexpr int kTileReaders = 8 + 2;
    stage_barriers.init(kMathWarps * config::kClusterSize);
    grad_barriers.init(2 * kMathWarps * config::kClusterSize);
    tiles.init(kTileReaders * config::kClusterSize);
    for (uint64_t& barrier : pace) ptx::mbarrier_init(&barrier, 1);
    turns.init();
    for (int i = 0; i < 2; ++i) extra.hidden_grad[i].init(staging[i]);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
};

inline constexpr uint32_t kGradWarpgroups = 2;  // of a CTA, each with half of a weight's tile

// What a tile's rows wait for: up to two counts.
struct BackwardDependency {
  uint32_t* words[2];
  uint32_t expected[2];
  sync::WaitTag first_tag = sync::WaitTag::kRowsReady;

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
            params.sizes.weight_grads[0].num_tiles() * config::kClusterSize * kGradWarpgroups);
        return;
      case BackwardProduct::kRouterShare:
      case BackwardProduct::kRouterGrad:
        first_tag = sync::WaitTag::kLogitsDone;
        set(0, counters.logits_done, ptx::num_blocks() * config::kCommWarps);
        set(1, counters.logits_done, ptx::num_blocks() * config::kCommWarps);
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
  using StageFill = TwoRings<BackwardJob>;
  using WeightLoad = tile::BackwardWeightLoad;
  using TokenLoad = tile::BackwardTokenLoad;
  static constexpr config::GroupedProduct kShape = Shared::kShape;
  static constexpr uint32_t kTicketLead = config::kBackwardTicketLead;
  template <config::Major kMajor>
  using Rows = config::BackwardProductOf<Config, kMajor>;

  class Source {
   public:
    FM_DEVICE Source(const Params& params, Shared&) : params_(params) {}
    FM_DEVICE tile::Tile tile_of(int32_t ticket) {
      const config::BackwardSizes& sizes = params_.sizes;
      const tile::BackwardWalk walk{table_of(params_),
                                    params_.forward.sizes.local_experts,
                                    config::kBackwardBlockRows,
                                    pre_activation_pairs(params_),
                                    sizes.hidden_pairs,
                                    params_.forward.sizes.down_pairs,
                                    sizes.share_tokens,
                                    sizes.logit_segments,
                                    {sizes.weight_grads[0], sizes.weight_grads[1],
                                     sizes.weight_grads[2], sizes.weight_grads[3]}};
      tile::Tile tile = walk.tile_at(ticket);
      if (params_.forward.sizes.source_groups > 1 &&
          product_of(tile) != BackwardProduct::kRouterGrad) {
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
    return *params.forward.memory.tickets;
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

  FM_DEVICE static bool is_shared(const tile::Tile& tile) {
    return !tile.is_end() && tile::is_weight_grad(tile);
  }
  template <class... Operands>
  FM_DEVICE static void multiply_shared(const tile::Tile& tile, int warpgroup_idx,
                                        Operands&&... operands) {
    const tile::GradBoxes boxes(tile, warpgroup_idx);
    tile::multiply_grad<Rows<config::Major::kDepth>>(boxes.count, tile.num_k_blocks, boxes.first,
                                                     operands...);
  }
  // A mainloop for each major order of the weights.
  template <class... Operands>
  FM_DEVICE static void multiply(const Params& params, const tile::Tile& tile,
                                 Operands&&... operands) {
    if (has_depth_major_weights(params, product_of(tile))) {
      tile::multiply_steps<Rows<config::Major::kDepth>>(tile.num_steps(), operands...);
    } else {
      tile::multiply_steps<Rows<config::Major::kColumns>>(tile.num_steps(), operands...);
    }
  }

  FM_DEVICE static bool has_depth_major_weights(const Params& params, BackwardProduct product) {
    switch (product) {
      case BackwardProduct::kPreActivation:
        return params.up_is_hidden_major;
      case BackwardProduct::kHiddenGrad:
        return params.down_is_hidden_major;
      case BackwardProduct::kInputGrad:
        return !params.up_is_hidden_major;
      default:  // the router's rows run along the hidden dimension, M
        return false;
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
        // Threads that store by themselves, or nothing, do not meet again before `current` is the
        // next tile.
        staging_.sync();
        // The input gradients wait for nothing but that the rows of grad y have been read.
        if (which == 0 && tile::Staging::is_storer()) {
          ptx::add_after_reads_gpu(&params.counters.down_of_expert[tile.local_expert_idx], 1);
        }
        tile::finish_weight_grad<Row>(
            sums, staging_, params.weight_grads[which], params.weight_grad_out[which],
            tile::grad_part(tile, staging_.warpgroup_idx()), weight_tile_idx);
        if (which == tile::kRouterGradIdx) publish_sums(params);
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
      // The thread that writes `current` is the only one that may read it still.
      if (!tile::Staging::is_storer()) return;
      ptx::fence_gpu();
      ptx::add_fenced_gpu(&counters.hidden_done[current.row_begin / config::kRowGroup], 1);
      ptx::add_fenced_gpu(&counters.hidden_of_expert[current.local_expert_idx], 1);
      ptx::add_fenced_gpu(counters.hidden_of_all, 1);
    }
    // What all threads have stored may be added up.
    FM_DEVICE void publish_sums(const Params& params) {
      staging_.sync();
      if (tile::Staging::is_storer()) ptx::add_release_gpu(params.counters.sums_done, 1);
    }
    FM_DEVICE void store_rows(const Params& params, const float* sums, const tile::Tile& tile,
                              int32_t weight_tile_idx) {
      const BackwardProduct product = product_of(tile);
      staging_.acquire_all();  // a weight gradient's buffers have other sizes
      config::BiasView bias = params.forward.up_bias;
      if (product != BackwardProduct::kPreActivation) bias.data = nullptr;
      const tile::RowBias row_bias =
          tile::load_bias<Row>(bias, tile.local_expert_idx, weight_tile_idx);
      const CUtensorMap& out = rows_of(params, product);
      tile::with_results<Row>(sums, params.forward.activation, row_bias, [&](const auto& results) {
        tile::store_tile<Row>(results, staging_, out, tile, weight_tile_idx);
      });
      staging_.publish(count_of(params, tile));
    }
    FM_DEVICE static const CUtensorMap& rows_of(const Params& params, BackwardProduct product) {
      if (product == BackwardProduct::kPreActivation) return params.pre_activation_out;
      if (product == BackwardProduct::kRouterShare) return params.share_out;
      return params.forward.row_out;
    }
    FM_DEVICE static uint32_t* count_of(const Params& params, const tile::Tile& tile) {
      switch (product_of(tile)) {
        case BackwardProduct::kPreActivation:
          return &params.counters.z_done[tile.row_begin / config::kRowGroup];
        case BackwardProduct::kRouterShare:
          return params.counters.shares_done;
        default:
          return params.forward.memory.down_done;
      }
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
      case BackwardProduct::kRouterShare:
        return config::kLogitTerms * config::router_depth(sizes.num_experts) / config::kDepthStep;
      default:
        return tile::steps_of_sum(params, tile);
    }
  }
  FM_DEVICE static void wait_for_rows(const Params& params, const tile::Tile& tile,
                                      sync::Waiter& waiter) {
    if (!tile.is_ready) {
      const BackwardDependency rows(params, tile);
      waiter.wait_rows(rows.words[0], rows.expected[0], rows.first_tag);
      waiter.wait_rows(rows.words[1], rows.expected[1], sync::WaitTag::kGradDone);
    }
    ptx::fence_proxy_async(ptx::space_global);
  }
};

}  // namespace flashmoe::cuda::kernel
