// The grouped product as one persistent kernel: the roles of pipeline.cuh by themselves.
#pragma once

#include "cuda/kernel/grouped_product.h"
#include "cuda/kernel/pipeline.cuh"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/ptx/registers.cuh"
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

// The product's part of the roles in pipeline.cuh.
template <class Config>
struct ProductJob {
  using Params = GroupedProductParams;
  using Shared = ProductShared<Config>;
  using StageFill = OneRing<ProductJob>;
  static constexpr config::GroupedProduct kShape = Config::value;
  static constexpr uint32_t kTicketLead = config::kTicketLead;

  class Source {
   public:
    FM_DEVICE Source(const Params& params, Shared&)
        : experts_(params.expert_begin, params.expert_rows, params.num_experts,
                   {kShape.max_tokens, params.num_weight_pairs}),
          num_k_blocks_(params.num_k_blocks) {}
    FM_DEVICE tile::Tile tile_of(int32_t ticket) {
      tile::Tile tile = experts_.find(ticket);
      tile.is_ready = true;
      tile.num_k_blocks = num_k_blocks_;
      return tile;
    }

   private:
    tile::ExpertWindow experts_;
    int32_t num_k_blocks_;
  };

  FM_DEVICE static TicketCounter& tickets(const Params& params) {
    return params.workspace->tickets;
  }
  FM_DEVICE static uint32_t stage_bytes(const tile::Tile& tile) {
    constexpr config::GroupedProduct kOne = kShape;  // device code has no address of the member
    return kOne.weight_bytes() + kOne.token_bytes(tile.num_steps());
  }
  FM_DEVICE static int32_t pace_block(int32_t num_k_blocks) { return num_k_blocks / 2; }
  FM_DEVICE static void wait_for_weights(const Params&, const tile::Tile&, sync::Waiter&) {}
  FM_DEVICE static void wait_for_tokens(const Params&, const tile::Tile&, sync::Waiter&) {}

  class WeightLoad {
   public:
    FM_DEVICE WeightLoad(const Params& params, const tile::Tile& tile, int32_t cta_rank)
        : params_(params), tile_(tile), weight_tile_idx_(2 * tile.weight_pair_idx + cta_rank) {}
    FM_DEVICE void load(uint8_t* to, uint64_t* full, int32_t depth) const {
      tile::load_weights<Config>(to, full, params_.weights, tile_.local_expert_idx,
                                 weight_tile_idx_, depth);
    }

   private:
    const Params& params_;
    const tile::Tile& tile_;
    int32_t weight_tile_idx_;
  };
  struct TokenLoad : tile::TokenLoad {
    FM_DEVICE TokenLoad(const Params& params, const tile::Tile& tile, int32_t cta_rank)
        : tile::TokenLoad(params.tokens[tile.num_steps() - 1], tile, cta_rank) {}
  };
  template <class... Operands>
  FM_DEVICE static void multiply(const Params&, const tile::Tile& tile, Operands&&... operands) {
    tile::multiply_steps<Config>(tile.num_steps(), operands...);
  }
  struct Output : tile::StagedOutput {
    FM_DEVICE Output(Shared& smem, int warpgroup_idx)
        : tile::StagedOutput(smem.staging[warpgroup_idx], warpgroup_idx) {}
    FM_DEVICE void finish(const Params& params, const float* sums, const tile::Tile& current,
                          sync::Waiter&) {
      const tile::Tile tile = current;
      const int32_t weight_tile_idx = 2 * tile.weight_pair_idx + ptx::get_sreg_cluster_ctarank();
      const tile::RowBias bias =
          tile::load_bias<Config>(params.bias, tile.local_expert_idx, weight_tile_idx);
      tile::with_results<Config>(sums, params.activation, bias, [&](const auto& results) {
        tile::store_tile<Config>(results, this->staging, params.out, tile, weight_tile_idx);
      });
    }
  };
};

template <config::GroupedProductConfig Config>
__global__ void __launch_bounds__(config::kThreads, 1)
    grouped_product(const __grid_constant__ GroupedProductParams params) {
  FM_DYNAMIC_SHARED(raw);
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

  sync::Waiter waiter(params.waits);
  // The same in all lanes, as the compiler must see it for setmaxnreg.
  const int warpgroup_idx = __shfl_sync(0xFFFFFFFF, threadIdx.x / config::kWarpgroup, 0);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Config::value.load_registers>();
    const Role role = role_of(cta_rank);
    if (role == Role::kWeights) weights_role<ProductJob<Config>>(params, smem, waiter, cta_rank);
    if (role == Role::kTokens) tokens_role<ProductJob<Config>>(params, smem, waiter, cta_rank);
    if (role == Role::kTickets) tickets_role<ProductJob<Config>>(params, smem, waiter);
  } else {
    ptx::setmaxnreg_inc<Config::value.math_registers>();
    math_role<ProductJob<Config>>(params, smem, waiter, warpgroup_idx - 1);
  }
  // Nobody leaves while the other CTA may still write or arrive here.
  __syncwarp();
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

// What the host needs to launch one configuration.
template <config::GroupedProductConfig Config>
KernelEntry entry_of() {
  return {ptx::kernel_address(&grouped_product<Config>), sizeof(ProductShared<Config>),
          Config::value};
}

}  // namespace flashmoe::cuda::kernel
