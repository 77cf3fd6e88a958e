// The backward as one persistent cooperative kernel, with the roles of the forward (forward.cuh):
// routing that is given becomes rows as it did there, and the ticket warps walk through
// tile/backward_walk.h.
//
//   tickets (a warp of the pair's leader)  takes tickets, sends their tiles to both CTAs and
//                                          whether what they depend on is there
//   load    (a thread of each CTA)         copies operands: own M tile, half the pair's N tile
//   math    (two warpgroups of each CTA)   take tiles in turn; then combine, and at the end the
//                                          gradients of routing and biases
//   comm    (a warpgroup of each CTA)      copies grad y and tokens into expert order ahead of the
//                                          tiles; combines column blocks of the input gradients
//
// Counters: kernel/backward.h. Every tile of a gradient has one owner, and every sum one order.
#pragma once

#include "cuda/kernel/backward.h"
#include "cuda/kernel/forward.cuh"
#include "cuda/stage/bias_grad.cuh"
#include "cuda/stage/copy_operands.cuh"
#include "cuda/stage/router_grad.cuh"
#include "cuda/stage/slot_grad.cuh"
#include "cuda/tile/hidden_grad.cuh"
#include "cuda/tile/weight_grad.cuh"

namespace flashmoe::cuda::kernel {

using tile::BackwardProduct;
using tile::product_of;

// As tile::SharedMemory, with two sets of staging buffers and stages that hold three boxes of 64
// columns beside an M tile.
template <config::BackwardConfig Config>
struct BackwardShared {
  static constexpr config::GroupedProduct kShape = Config::value.product(config::Major::kDepth);

  struct alignas(1024) Stage {
    uint8_t weights[kShape.weight_bytes()];
    alignas(1024) uint8_t tokens[config::kBackwardTokenBytes];
  };
  Stage stages[kShape.num_stages];
  alignas(1024) uint8_t staging[2][config::kBackwardStagingBytes];
  alignas(
      16) uint8_t comm_rows[config::kCommWarps][stage::RowRing<config::kBackwardCommRows>::kBytes];
  sync::RingBarriers<kShape.num_stages> stage_barriers;
  sync::MessageRing<tile::Tile, config::kTileSlots> tiles;
  uint64_t pace;
  sync::TurnBarriers turns;
  tile::HiddenGradMemory hidden_grad[2];
  int32_t num_blocks;
  tile::Tile current[2];  // of each math warpgroup while its products run

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init() {
    constexpr int kMathWarps = 4;
    constexpr int kTileReaders = 8 + 1;
    stage_barriers.init(kMathWarps * config::kClusterSize);
    tiles.init(kTileReaders * config::kClusterSize);
    ptx::mbarrier_init(&pace, 1);
    turns.init();
    for (int i = 0; i < 2; ++i) hidden_grad[i].init(staging[i]);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
};

FM_DEVICE tile::ExpertTable table_of(const BackwardParams& params) {
  return {params.forward.memory.experts, params.forward.sizes.num_experts};
}

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
      const tile::ExpertTable experts = table_of(params);
      return experts.blocks_before(e + 1) - experts.blocks_before(e);
    };
    switch (product_of(tile)) {
      case BackwardProduct::kPreActivation:
        set(0, &counters.x_ready[group], tile.num_rows);
        set(1, &counters.x_ready[group], tile.num_rows);
        return;
      case BackwardProduct::kHiddenGrad:
        set(0, &counters.grad_y_ready[group], tile.num_rows);
        set(1, &counters.z_done[group], params.sizes.pre_activation_pairs * config::kClusterSize);
        return;
      case BackwardProduct::kInputGrad:
        set(0, &counters.hidden_done[group], ctas_of_hidden);
        set(1, &counters.down_of_expert[e],
            params.sizes.weight_grads[0].num_tiles(kMaxTokens) * config::kClusterSize);
        return;
      case BackwardProduct::kDownGrad:
        set(0, &counters.hidden_of_expert[e], blocks() * ctas_of_hidden);
        set(1, &counters.hidden_of_expert[e], blocks() * ctas_of_hidden);
        return;
      default:
        set(0, &counters.hidden_of_expert[e], blocks() * ctas_of_hidden);
        set(1, &counters.x_of_expert[e], table_of(params).rows(e));
    }
  }

 private:
  static constexpr int32_t kMaxTokens =
      config::Backward{}.product(config::Major::kDepth).max_tokens;
  FM_DEVICE void set(int i, uint32_t* word, uint32_t count) {
    words[i] = word;
    expected[i] = count;
  }
};

template <class Config>
struct BackwardJob {
  using Params = BackwardParams;
  using Shared = BackwardShared<Config>;
  static constexpr config::GroupedProduct kShape = Shared::kShape;
  using Element = tile::ElementOf<Config::value.element>;
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
          kShape.max_tokens,
          sizes.pre_activation_pairs,
          sizes.hidden_pairs,
          params_.forward.sizes.down_pairs,
          params_.forward.sizes.column_pairs,
          {sizes.weight_grads[0], sizes.weight_grads[1], sizes.weight_grads[2]}};
      tile::Tile tile = walk.tile_at(ticket);
      bool is_ready = true;
      const int32_t lane = ptx::lane_idx();
      if (lane < 2 && !tile.is_end()) {
        const BackwardDependency rows(params_, tile);
        uint32_t* word = lane == 0 ? rows.words[0] : rows.words[1];
        is_ready = ptx::ld_acquire_gpu(word) == (lane == 0 ? rows.expected[0] : rows.expected[1]);
      }
      tile.is_ready = __all_sync(0xFFFFFFFF, is_ready);
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
  // At least one: an expert without rows has a step of zeros.
  FM_DEVICE static int32_t num_k_blocks(const Params& params, const tile::Tile& tile) {
    const ForwardSizes& sizes = params.forward.sizes;
    switch (product_of(tile)) {
      case BackwardProduct::kPreActivation:
      case BackwardProduct::kHiddenGrad:
        return sizes.hidden / config::kDepthStep;
      case BackwardProduct::kInputGrad:
        return params.sizes.up_columns / config::kDepthStep;
      default:
        const int32_t rows = table_of(params).rows(tile.local_expert_idx);
        return max((rows + config::kDepthStep - 1) / config::kDepthStep, 1);
    }
  }

  // A load thread's view of a tile of a product of rows: this CTA's 128 rows of M, two boxes a
  // step.
  class WeightLoads {
   public:
    FM_DEVICE WeightLoads(const Params& params, const tile::Tile& tile, int32_t cta_rank)
        : params_(params),
          expert_idx_(tile.local_expert_idx),
          m_((2 * tile.weight_pair_idx + cta_rank) * config::kWeightRows) {
      const BackwardProduct product = product_of(tile);
      is_down_ = product == BackwardProduct::kHiddenGrad;
      // Of the tensor's two dimensions, M runs along H in dX alone.
      m_is_hidden_ = product == BackwardProduct::kInputGrad;
      const bool hidden_major = is_down_ ? params.down_is_hidden_major : params.up_is_hidden_major;
      depth_first_ = hidden_major != m_is_hidden_;
    }
    FM_DEVICE void load(uint8_t* to, uint64_t* full, int32_t depth) const {
      const int32_t intermediate = params_.forward.sizes.intermediate;
      FM_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int32_t m = m_ + half * config::kHalfRows;
        const int32_t along_up = m_is_hidden_ ? depth : m;  // of the weight's G * I
        const bool is_second = !is_down_ && params_.sizes.separate && along_up >= intermediate;
        const int32_t less = is_second ? intermediate : 0;
        const int32_t own_m = m_is_hidden_ ? m : m - less;
        const int32_t own_k = m_is_hidden_ ? depth - less : depth;
        const CUtensorMap* map = is_down_ ? &params_.down_weights : &params_.up_weights[is_second];
        const int32_t at[3] = {depth_first_ ? own_k : own_m, depth_first_ ? own_m : own_k,
                               expert_idx_};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                                  to + half * config::kBoxBytes, map, at, full);
      }
    }

   private:
    const Params& params_;
    int32_t expert_idx_;
    int32_t m_;
    bool is_down_;
    bool m_is_hidden_;
    bool depth_first_;
  };
  FM_DEVICE static const CUtensorMap& token_map(const Params& params, const tile::Tile& tile) {
    const int32_t idx = tile.num_steps() - 1;
    switch (product_of(tile)) {
      case BackwardProduct::kPreActivation:
        return params.forward.row_tokens[idx];
      case BackwardProduct::kHiddenGrad:
        return params.grad_y_tokens[idx];
      default:
        return params.grad_z_tokens[idx];
    }
  }
  // A load thread's view of a tile of a sum over rows: own boxes of M, half the depth of the boxes
  // of N for both CTAs. Rows past the expert's last are zeros.
  class RowLoads {
   public:
    FM_DEVICE RowLoads(const Params& params, const tile::Tile& tile, int32_t cta_rank)
        : cta_rank_(cta_rank) {
      const int which = tile.product - static_cast<int>(BackwardProduct::kDownGrad);
      const WeightGradOut& out = params.weight_grad_out[which];
      const tile::ExpertTable experts = table_of(params);
      m_map_ = &params.grad_m[which > 0];
      n_map_ = &params.grad_n[which > 0];
      row_ = experts.begin(tile.local_expert_idx);
      left_ = experts.rows(tile.local_expert_idx);
      m_ = out.m_offset + (2 * tile.weight_pair_idx + cta_rank) * config::kWeightRows;
      n_ = out.n_offset + tile.row_begin;
      num_boxes_ = (tile.num_rows + config::kBoxColumns - 1) / config::kBoxColumns;
    }
    // The next step.
    FM_DEVICE void load(uint8_t* m_to, uint8_t* n_to, uint64_t* full) {
      constexpr int32_t kHalfDepth = config::kDepthStep / 2;
      constexpr uint16_t kBoth = 0b11;
      const int32_t own = max(min(left_, config::kDepthStep), 0);
      FM_UNROLL
      for (int box = 0; box < 2; ++box) {
        const int32_t at[4] = {m_ + box * config::kBoxColumns, tile::kWindow - own, row_ + own,
                               tile::kWindow};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                                  m_to + box * config::kBoxBytes, m_map_, at, full);
      }
      const int32_t half = max(min(left_ - cta_rank_ * kHalfDepth, kHalfDepth), 0);
      const int32_t end = row_ + cta_rank_ * kHalfDepth + half;
      n_to += cta_rank_ * (config::kBoxBytes / 2);
      FM_UNROLL
      for (int box = 0; box < config::kMaxColumnBoxes; ++box) {
        if (box >= num_boxes_) break;
        const int32_t at[4] = {n_ + box * config::kBoxColumns, tile::kWindow - half, end,
                               tile::kWindow};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                                  n_to + box * config::kBoxBytes, n_map_, at, full, kBoth);
      }
      row_ += config::kDepthStep;
      left_ -= config::kDepthStep;
    }

   private:
    const CUtensorMap* m_map_;
    const CUtensorMap* n_map_;
    int32_t cta_rank_;
    int32_t row_;
    int32_t left_;
    int32_t m_;
    int32_t n_;
    int32_t num_boxes_;
  };
  // Z of a tile of hidden gradients, which its epilogue reads, on its way to the L2 cache.
  FM_DEVICE static void fetch_z(const Params& params, const tile::Tile& tile, int32_t cta_rank) {
    const int32_t column = (2 * tile.weight_pair_idx + cta_rank) * config::kWeightRows;
    const int num_buffers = params.sizes.gated ? 2 : 1;
#pragma unroll 1
    for (int i = 0; i < 2 * num_buffers; ++i) {
      const int32_t of_half = column + i % 2 * config::kHalfRows;
      if (of_half >= params.forward.sizes.intermediate) continue;
      ptx::prefetch_tensor_2d(&params.z_ahead, tile::z_column(params, of_half, i / 2),
                              tile.row_begin);
    }
  }
  // Bytes of a stage.
  FM_DEVICE static uint32_t stage_bytes(const tile::Tile& tile) {
    constexpr config::GroupedProduct kOne = kShape;
    const int32_t boxes = (tile.num_rows + config::kBoxColumns - 1) / config::kBoxColumns;
    const int32_t tokens =
        tile::is_weight_grad(tile) ? boxes * config::kBoxBytes : kOne.token_bytes(tile.num_steps());
    return kOne.weight_bytes() + tokens;
  }
  FM_DEVICE static void wait_for_rows(const Params& params, const tile::Tile& tile,
                                      sync::Waiter& waiter) {
    if (!tile.is_ready) {
      const BackwardDependency rows(params, tile);
      waiter.wait_word(rows.words[0], rows.expected[0], sync::WaitTag::kRowsReady);
      waiter.wait_word(rows.words[1], rows.expected[1], sync::WaitTag::kUpDone);
    }
    ptx::fence_proxy_async(ptx::space_global);
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

  // Stores a tile's results and counts it where its readers wait.
  FM_DEVICE static void finish(const Params& params, const float* sums, tile::Staging& staging,
                               tile::HiddenGrad& hidden, const tile::Tile& current,
                               sync::Waiter& waiter) {
    using Row = Rows<config::Major::kDepth>;
    const BackwardCounters& counters = params.counters;
    if (product_of(current) == BackwardProduct::kHiddenGrad) {
      hidden.template finish<Row>(params, sums, staging, tile::HiddenPlace(current), waiter);
      staging.publish(&counters.hidden_done[current.row_begin / config::kRowGroup]);
      count(&counters.hidden_of_expert[current.local_expert_idx]);
      return;
    }
    const tile::Tile tile = current;
    const int32_t weight_tile_idx = 2 * tile.weight_pair_idx + ptx::get_sreg_cluster_ctarank();
    const int32_t group = tile.row_begin / config::kRowGroup;
    const BackwardProduct product = product_of(tile);
    if (tile::is_weight_grad(tile)) {
      const int which = tile.product - static_cast<int>(BackwardProduct::kDownGrad);
      tile::finish_weight_grad<Row>(sums, staging, params.weight_grads[which],
                                    params.weight_grad_out[which], tile, weight_tile_idx);
      if (which == 0) staging.publish(&counters.down_of_expert[tile.local_expert_idx]);
    } else {
      const bool is_z = product == BackwardProduct::kPreActivation;
      config::BiasView bias = params.forward.up_bias;
      if (!is_z) bias.data = nullptr;
      const tile::RowBias row_bias = tile::load_bias<Row>(bias, tile, weight_tile_idx);
      const CUtensorMap& out = is_z ? params.pre_activation_out : params.forward.row_out;
      tile::with_results<Row>(sums, params.forward.activation, row_bias, [&](const auto& results) {
        tile::store_tile<Row>(results, staging, out, tile, weight_tile_idx);
      });
      const int32_t column_block = tile.weight_pair_idx / params.forward.sizes.column_pairs;
      staging.publish(is_z ? &counters.z_done[group]
                           : &params.forward.memory.down_done[column_block]);
    }
  }

 private:
  using ForwardSizes = config::ForwardSizes;
  FM_DEVICE static void count(uint32_t* done) {
    if (tile::Staging::is_storer()) ptx::add_release_gpu(done, 1);
  }
};

// The next ticket is due when about half of a tile is loaded. One thread of each CTA.
template <class Job>
FM_DEVICE void keep_pace(typename Job::Shared& smem, int32_t k_block, int32_t num_k_blocks,
                         int32_t cta_rank) {
  constexpr int32_t kLead = 4;
  if (k_block != max(num_k_blocks / 2 - kLead, 0) || cta_rank != 0) return;
  ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &smem.pace);
}

template <class Job>
using BackwardStages = sync::StageWriter<Job::kShape.num_stages>;

// A tile of a product of rows. Weights of a tile whose rows are not there yet go first.
template <class Job>
FM_DEVICE void load_product(const BackwardParams& params, typename Job::Shared& smem,
                            BackwardStages<Job>& stages, const tile::Tile& tile,
                            int32_t num_k_blocks, int32_t cta_rank, sync::Waiter& waiter) {
  const typename Job::WeightLoads weights(params, tile, cta_rank);
  const uint32_t num_bytes = Job::stage_bytes(tile);
  const auto load_weights = [&](int32_t k_block) {
    stages.acquire(num_bytes, waiter);
    weights.load(smem.stages[stages.slot()].weights, stages.full(), k_block * config::kDepthStep);
    stages.advance();
  };
  auto stages_of_tokens = stages;
  const int32_t num_ahead =
      tile.is_ready ? 0 : min(num_k_blocks, static_cast<int32_t>(Job::kShape.num_stages));
#pragma unroll 1
  for (int32_t k_block = 0; k_block < num_ahead; ++k_block) load_weights(k_block);
  Job::wait_for_rows(params, tile, waiter);
  if (!waiter.alive()) return;
  const CUtensorMap& tokens = Job::token_map(params, tile);
#pragma unroll 1
  for (int32_t k_block = 0; k_block < num_k_blocks; ++k_block) {
    if (k_block >= num_ahead) load_weights(k_block);
    tile::load_tokens_for_pair(smem.stages[stages_of_tokens.slot()].tokens, stages_of_tokens.full(),
                               tokens, tile.row_begin, tile.num_steps(),
                               k_block * config::kDepthStep, cta_rank);
    stages_of_tokens.advance();
    keep_pace<Job>(smem, k_block, num_k_blocks, cta_rank);
  }
}

// A tile of a sum over rows.
template <class Job>
FM_DEVICE void load_sum(const BackwardParams& params, typename Job::Shared& smem,
                        BackwardStages<Job>& stages, const tile::Tile& tile, int32_t num_k_blocks,
                        int32_t cta_rank, sync::Waiter& waiter) {
  Job::wait_for_rows(params, tile, waiter);
  if (!waiter.alive()) return;
  typename Job::RowLoads rows(params, tile, cta_rank);
  const uint32_t num_bytes = Job::stage_bytes(tile);
#pragma unroll 1
  for (int32_t k_block = 0; k_block < num_k_blocks; ++k_block) {
    stages.acquire(num_bytes, waiter);
    auto& stage = smem.stages[stages.slot()];
    rows.load(stage.weights, stage.tokens, stages.full());
    stages.advance();
    keep_pace<Job>(smem, k_block, num_k_blocks, cta_rank);
  }
}

// One thread of each CTA.
template <class Job>
FM_DEVICE void backward_load(const BackwardParams& params, typename Job::Shared& smem,
                             sync::Waiter waiter, int32_t cta_rank) {
  BackwardStages<Job> stages(smem.stage_barriers);
  TileReader tiles(smem.tiles);
  while (true) {
    const tile::Tile tile = tiles.take_and_rearm(waiter);
    if (tile.is_end() || !waiter.alive()) break;
    const int32_t num_k_blocks = Job::num_k_blocks(params, tile);
    if (product_of(tile) == BackwardProduct::kHiddenGrad) Job::fetch_z(params, tile, cta_rank);
    if (tile::is_weight_grad(tile)) {
      load_sum<Job>(params, smem, stages, tile, num_k_blocks, cta_rank, waiter);
    } else {
      load_product<Job>(params, smem, stages, tile, num_k_blocks, cta_rank, waiter);
    }
    if (!waiter.alive()) break;
  }
}

// One warpgroup: pipeline.cuh's math_role, with Z asked for before a tile's products.
template <class Job>
FM_DEVICE void backward_math(const BackwardParams& params, typename Job::Shared& smem,
                             sync::Waiter& waiter, int warpgroup_idx) {
  constexpr config::GroupedProduct kShape = Job::kShape;
  sync::StageReader<kShape.num_stages> stages(smem.stage_barriers);
  TileReader tiles(smem.tiles);
  sync::Turns turns(smem.turns, warpgroup_idx);
  using StoreBuffers = uint8_t[config::kStoreBuffers][config::kStoreBytes];
  static_assert(sizeof(StoreBuffers) <= config::kBackwardStagingBytes);
  tile::Staging staging(*reinterpret_cast<StoreBuffers*>(smem.staging[warpgroup_idx]),
                        warpgroup_idx);
  tile::HiddenGrad hidden(smem.hidden_grad);
  float sums[kShape.max_tokens];
  tile::Tile tile = tiles.take(waiter);
  const auto pass_over = [&] {  // from the other's tile to the own one after it
    if (tile.is_end()) return;
    stages.skip(Job::num_k_blocks(params, tile));
    tile = tiles.take(waiter);
  };
  if (warpgroup_idx == 1) {
    turns.pass();
    pass_over();
  }
  tile::Tile& current = smem.current[warpgroup_idx];
  while (true) {
    if (threadIdx.x % config::kWarpgroup == 0) current = tile;
    if (!staging.all(!tile.is_end() && waiter.alive())) break;
    turns.wait(waiter);
    if (product_of(tile) == BackwardProduct::kHiddenGrad) {
      hidden.request(params, tile::HiddenPlace(current), waiter);
    }
    Job::multiply(params, tile, sums, smem.stages, stages, Job::num_k_blocks(params, tile), waiter,
                  [&] { turns.pass(); });
    Job::finish(params, sums, staging, hidden, current, waiter);
    tile = tiles.take(waiter);
    pass_over();
  }
  staging.drain();
}

// Plan of the rows, from routing that is given. All threads of all CTAs; false if a CTA did not
// come in time.
template <class Config>
FM_DEVICE bool plan_rows(const BackwardParams& params, BackwardShared<Config>& smem,
                         sync::Waiter& waiter) {
  constexpr int32_t kArenaBytes = sizeof(smem.stages);
  static_assert(stage::kRouteBytes <= kArenaBytes && stage::kPlanBytes <= kArenaBytes);
  const ForwardParams& forward = params.forward;
  auto* arena = reinterpret_cast<uint8_t*>(smem.stages);
  sync::GridBarrier* barrier = &forward.memory.state->barrier;
  const int32_t thread = blockIdx.x * config::kForwardThreads + ptx::thread_idx();
  for (int32_t i = thread; i < params.counters.count;
       i += static_cast<int32_t>(gridDim.x) * config::kForwardThreads) {
    params.counters.first[i] = 0;
  }
  stage::route(forward, arena, kArenaBytes);
  if (ptx::thread_idx() == 0) set_mark_of_first(forward, Mark::kRouted);
  if (!sync::meet_all(barrier, waiter)) return false;
  if (!forward.sizes.has_few_tiles) {
    stage::scan_histograms(forward);
    if (!sync::meet_all(barrier, waiter)) return false;
  }
  const int32_t num_blocks = stage::place_rows(forward, arena, forward.memory.experts);
  if (ptx::thread_idx() == 0) smem.num_blocks = num_blocks;
  // The arena becomes operand stages, which the copy engine fills.
  ptx::fence_proxy_async(ptx::space_shared);
  return forward.sizes.has_few_slots || sync::meet_all(barrier, waiter);
}

inline constexpr int kMathMeets = 3;  // a barrier of the math warps; tile::Staging has 1 and 2

// The math warps of all CTAs meet. False if a CTA did not come in time.
FM_DEVICE bool meet_math(sync::GridBarrier* barrier, sync::Waiter& waiter) {
  constexpr int32_t kThreads = config::kMathWarps * 32;
  ptx::barrier_sync(kMathMeets, kThreads);
  if (ptx::thread_idx() == config::kWarpgroup) {
    const uint32_t generation = ptx::ld_acquire_gpu(&barrier->generation);
    if (ptx::add_acq_rel_gpu(&barrier->arrived, 1) == gridDim.x - 1) {
      barrier->arrived = 0;
      ptx::st_release_gpu(&barrier->generation, generation + 1);
    } else {
      waiter.wait_word(&barrier->generation, generation + 1, sync::WaitTag::kGrid);
    }
  }
  return ptx::barrier_sync_and(kMathMeets, kThreads, waiter.alive());
}

// Gradients of routing and biases, once all input gradients are combined. The math warps.
template <class Config>
FM_DEVICE void finish_routing(const BackwardParams& params, BackwardShared<Config>& smem,
                              sync::Waiter& waiter) {
  using Element = tile::ElementOf<Config::value.element>;
  static_assert(stage::RouterLayout::kBytes <= sizeof(smem.stages));
  constexpr int32_t kThreads = config::kMathWarps * 32;
  if (!params.routing.any()) return;
  if (ptx::thread_idx() == config::kWarpgroup) {
    waiter.wait_word(params.counters.combined, gridDim.x * stage::kCombineWarps,
                     sync::WaitTag::kDownDone);
  }
  if (!ptx::barrier_sync_and(kMathMeets, kThreads, waiter.alive())) return;
  const int32_t worker_idx = (ptx::thread_idx() - config::kWarpgroup) / 32 * gridDim.x + blockIdx.x;
  const int32_t num_workers = gridDim.x * config::kMathWarps;
  stage::differentiate_slots<Element>(params, worker_idx, num_workers);
  if (params.routing.any_bias()) {
    stage::sum_biases<Element>(params, table_of(params), worker_idx, num_workers);
  }
  if (params.routing.w_router == nullptr) return;
  sync::GridBarrier* barrier = &params.forward.memory.state->barrier;
  if (!meet_math(barrier, waiter)) return;
  stage::multiply_router<Element>(params, reinterpret_cast<float*>(smem.stages), kMathMeets);
  if (!meet_math(barrier, waiter)) return;
  stage::reduce_router(params);
}

// Combines until no unit is left, and says that this warp has. Whole warp.
template <class Config, int kRows>
FM_DEVICE void combine_inputs(const BackwardParams& params, int32_t num_blocks, uint8_t* memory,
                              sync::Waiter& waiter) {
  stage::combine<Config, kRows>(params.forward, num_blocks, memory, waiter);
  __syncwarp();
  if (ptx::lane_idx() == 0) ptx::add_release_gpu(params.counters.combined, 1);
}

// The roles, after the plan.
template <class Config>
FM_DEVICE void run_backward_roles(const BackwardParams& params, BackwardShared<Config>& smem,
                                  int32_t cta_rank) {
  using Job = BackwardJob<Config>;
  sync::Waiter waiter(params.forward.report, params.forward.timeout_ns);
  // The same in all lanes, as the compiler must see it for setmaxnreg.
  const int warpgroup_idx = __shfl_sync(0xFFFFFFFF, threadIdx.x / config::kWarpgroup, 0);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Job::kShape.load_registers>();
    const Role role = role_of(cta_rank);
    if (role == Role::kLoad) backward_load<Job>(params, smem, waiter, cta_rank);
    if (role == Role::kTickets) {
      tickets_role<Job>(params, smem, waiter);
      if (ptx::lane_idx() == 0) set_mark_of_first(params.forward, Mark::kLastTile);
    }
  } else if (warpgroup_idx == 3) {
    ptx::setmaxnreg_dec<config::kCommRegisters>();
    const auto warp_idx = [] {
      return ptx::thread_idx() / 32 % config::kCommWarps;
    };
    stage::copy_operands<Config>(params, table_of(params), warp_idx() * gridDim.x + blockIdx.x,
                                 gridDim.x * config::kCommWarps);
    combine_inputs<Config, config::kBackwardCommRows>(params, smem.num_blocks,
                                                      smem.comm_rows[warp_idx()], waiter);
  } else {
    ptx::setmaxnreg_inc<Job::kShape.math_registers>();
    backward_math<Job>(params, smem, waiter, warpgroup_idx - 1);
    // No operand is on its way any more once both warpgroups have done their last tile.
    ptx::barrier_sync(kMathMeets, 2 * config::kWarpgroup);
    using Ring = stage::RowRing<config::kMathRows>;
    const int32_t warp_idx = ptx::thread_idx() / 32 - config::kWarpgroup / 32;
    auto* rows = reinterpret_cast<uint8_t*>(smem.stages) + warp_idx * Ring::kBytes;
    combine_inputs<Config, config::kMathRows>(params, smem.num_blocks, rows, waiter);
    finish_routing<Config>(params, smem, waiter);
    if (ptx::thread_idx() == config::kWarpgroup) set_mark_of_first(params.forward, Mark::kDone);
  }
}

template <config::BackwardConfig Config>
__global__ void __launch_bounds__(config::kForwardThreads, 1)
    backward(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& smem = *reinterpret_cast<BackwardShared<Config>*>(raw);
  const int32_t cta_rank = ptx::get_sreg_cluster_ctarank();
  if (ptx::thread_idx() == 0) {
    set_mark_of_first(params.forward, Mark::kStart);
    smem.init();
  }
  sync::Waiter waiter(params.forward.report, params.forward.timeout_ns);
  const bool all_here = plan_rows<Config>(params, smem, waiter);
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
  if (ptx::thread_idx() == 0) set_mark_of_first(params.forward, Mark::kPlanned);
  if (all_here) run_backward_roles<Config>(params, smem, cta_rank);
  // Nobody leaves while the other CTA may still write or arrive here.
  __syncwarp();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

template <config::BackwardConfig Config>
BackwardEntry backward_entry_of() {
  constexpr std::size_t kSharedLimit = 227 * 1024;  // a Hopper CTA's
  static_assert(sizeof(BackwardShared<Config>) <= kSharedLimit);
  return {reinterpret_cast<const void*>(&backward<Config>), sizeof(BackwardShared<Config>),
          Config::value};
}

}  // namespace flashmoe::cuda::kernel
