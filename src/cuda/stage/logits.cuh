// Logits of 16-bit router weights, by the warpgroups' matrix products. The copy engine brings the
// operands, one thread asks it to, and stages go round between it and all warps (sync/ring.cuh).
//
// Of many tiles all CTAs read the same weights at the same time, and the L2 slices that hold them
// are the bound. So the CTAs of a pair, which go through the same items in step, copy half of a
// step's weights each, for both: a stage is free when the warps of both have read it.
#pragma once

#include "cuda/ptx/wgmma.cuh"
#include "cuda/stage/logit_tiles.cuh"
#include "cuda/sync/ring.cuh"
#include "cuda/tile/descriptor.cuh"

namespace flashmoe::cuda::stage {

// One step of the pipeline: a box of 64 tokens and, of each warpgroup, a box of 32 experts, both as
// the products read them (tile/descriptor.cuh).
struct LogitsLayout {
  static constexpr int32_t kStages = 7;
  static constexpr int32_t kRowBytes = kLogitDepth * config::kElementBytes;
  static constexpr int32_t kTokenBytes = kTileTokens * kRowBytes;
  static constexpr int32_t kBoxBytes = config::kLogitBoxExperts * kRowBytes;
  static constexpr int32_t kStageBytes = kTokenBytes + kLogitWarpgroups * kBoxBytes;
  static constexpr int32_t kBytes = kStages * kStageBytes;
  // Steps that are copied ahead: of one stage less than there are, so that who copies does not wait
  // for the slowest warp of the step before.
  static constexpr int32_t kAhead = kStages - 2;
};

using LogitBarriers = sync::RingBarriers<LogitsLayout::kStages>;

// Whether the CTAs of a pair copy weights for each other.
FM_DEVICE bool shares_logit_weights(const config::ForwardSizes& sizes) {
  return !sizes.has_few_tiles;
}
// Warps that read a stage.
FM_DEVICE int32_t logit_readers(const config::ForwardSizes& sizes) {
  return config::kForwardWarps * (shares_logit_weights(sizes) ? config::kClusterSize : 1);
}

// Boxes of a tile's experts; those wholly past the last expert are not copied.
FM_DEVICE int32_t boxes_of(const config::ForwardSizes& sizes, const LogitsTile& tile) {
  const int32_t experts = min(sizes.num_experts - tile.first_expert, kLogitExperts);
  return (experts + config::kLogitBoxExperts - 1) / config::kLogitBoxExperts;
}

// The copies of a CTA's steps, of all its items in order. A warp, of which one thread works.
class LogitCopies {
 public:
  FM_DEVICE LogitCopies(const kernel::ForwardParams& params, uint8_t* arena,
                        LogitBarriers& barriers)
      : params_(params),
        arena_(arena),
        stages_(barriers),
        items_(params.sizes),
        num_items_(items_.count()) {}

  // Starts those of the CTA's steps before `end`, as far as there are steps, each once its stage is
  // free.
  FM_DEVICE void start_until(int32_t end, sync::Waiter& waiter) {
    while (num_started_ < end && find_step()) {
      if (ptx::elect_one()) start(waiter);
      stages_.advance();
      ++num_started_;
      ++step_;
    }
  }

 private:
  // Goes on to the next item that has a step (parts past the end of the hidden size have none), if
  // the last one has no more. False after the last item.
  FM_DEVICE bool find_step() {
    while (step_ >= tile_.end_step) {
      if (next_item_ >= num_items_) return false;
      tile_ = items_.at(next_item_++);
      step_ = tile_.first_step;
    }
    return true;
  }

  FM_DEVICE void start(sync::Waiter& waiter) {
    stages_.acquire(waiter);
    // Else copies might come into stages that are still read, also of the other CTA, whose own
    // waits then run out for want of them.
    if (!waiter.alive()) return;
    const auto& sizes = params_.sizes;
    const int32_t num_boxes = boxes_of(sizes, tile_);
    stages_.announce(LogitsLayout::kTokenBytes + num_boxes * LogitsLayout::kBoxBytes);
    uint8_t* stage = arena_ + stages_.slot() * LogitsLayout::kStageBytes;
    const int32_t depth = step_ * kLogitDepth;
    const int32_t token_at[2] = {depth, tile_.first_token};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, stage, &params_.logit_tokens,
                              token_at, stages_.full());
    const bool shares = shares_logit_weights(sizes);
    const int32_t apart = shares ? config::kClusterSize : 1;
    const int32_t first = shares ? ptx::get_sreg_cluster_ctarank() : 0;
    for (int32_t box = first; box < num_boxes; box += apart) {
      uint8_t* to = stage + LogitsLayout::kTokenBytes + box * LogitsLayout::kBoxBytes;
      const int32_t at[2] = {depth, tile_.first_expert + box * config::kLogitBoxExperts};
      load_weights(to, at, shares);
    }
  }
  FM_DEVICE void load_weights(uint8_t* to, const int32_t (&at)[2], bool is_for_both) {
    constexpr uint16_t kBoth = 0b11;
    const CUtensorMap* map = &params_.logit_weights;
    if (is_for_both) {
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, map, at, stages_.full(),
                                kBoth);
    } else {
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, map, at, stages_.full());
    }
  }

  const kernel::ForwardParams& params_;
  uint8_t* arena_;
  sync::StageWriter<LogitsLayout::kStages> stages_;
  LogitItems items_;
  int32_t num_items_;
  int32_t next_item_ = 0;
  int32_t num_started_ = 0;
  LogitsTile tile_{};  // without a step
  int32_t step_ = 0;
};

// A warpgroup's 64 tokens by 32 experts. tokens, weights: addresses of its first row of either. The
// sums of 16 k are new ones each.
template <class Element>
FM_DEVICE void multiply_step(WarpSums& sums, uint32_t tokens, uint32_t weights) {
  constexpr int kProducts = kLogitDepth / 16;
  const uint64_t a = tile::operand_descriptor(tokens);
  const uint64_t b = tile::operand_descriptor(weights);
  float products[kProducts][16];
  ptx::wgmma_fence();
  FM_UNROLL
  for (int k = 0; k < kProducts; ++k) {
    const int step = k * tile::kDepthMajorStep;
    ptx::wgmma<Element, 32, 0>(products[k], a + step, b + step, 0);
  }
  ptx::wgmma_commit_group();
  ptx::wgmma_wait_group<0>();
  FM_UNROLL
  for (auto& product : products) {
    ptx::wgmma_settle(product);
    FM_UNROLL
    for (int i = 0; i < 16; ++i) sums.values[i / 4][i % 4] += product[i];
  }
}

// All logits of the fused router, or their parts. All threads of all CTAs, after the barriers of
// both CTAs of the pair are made; arena: LogitsLayout::kBytes of shared memory, in which the copy
// engine's writes have been waited for when this returns. False in all threads of a CTA one of
// whose waits ran out: it has gone on without, since the warps of a warpgroup multiply together.
template <class Element>
FM_DEVICE bool compute_logits(const kernel::ForwardParams& params, uint8_t* arena,
                              LogitBarriers& barriers) {
  const auto& sizes = params.sizes;
  // The same in all lanes, as the compiler must see it for copies and products.
  const int32_t warp_idx = __shfl_sync(0xFFFFFFFF, ptx::thread_idx() / 32, 0);
  const int32_t warpgroup_idx = warp_idx / 4;
  const bool copies_steps = warp_idx == 0;
  sync::Waiter waiter(params.waits);
  LogitCopies copies(params, arena, barriers);
  sync::StageReader<LogitsLayout::kStages> stages(barriers);
  TileSums sums(sizes);
  const LogitItems items(sizes);
  const int32_t num_items = items.count();
  int32_t num_read = 0;
  for (int32_t n = 0; n < num_items; ++n) {
    const LogitsTile tile = items.at(n);
    const bool has_experts = warpgroup_idx < boxes_of(sizes, tile);
    sums.clear();
    for (int32_t step = tile.first_step; step < tile.end_step; ++step) {
      if (copies_steps) copies.start_until(++num_read + LogitsLayout::kAhead, waiter);
      stages.wait(waiter);
      const uint32_t stage = ptx::shared_address(arena) + stages.slot() * LogitsLayout::kStageBytes;
      if (has_experts) {
        multiply_step<Element>(
            sums.segment(), stage,
            stage + LogitsLayout::kTokenBytes + warpgroup_idx * LogitsLayout::kBoxBytes);
      } else {
        __syncwarp();  // no lane gives the stage back that another one has still to see
      }
      if (shares_logit_weights(sizes)) {
        stages.release(stages.slot());
      } else {
        stages.release_own(stages.slot());
      }
      stages.advance();
      sums.end_step(step + 1 == tile.end_step);
    }
    write_logits(params, tile, sums.total());
  }
  return __syncthreads_and(waiter.alive()) != 0;
}

}  // namespace flashmoe::cuda::stage
