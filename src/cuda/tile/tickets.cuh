// From tickets to tiles: one warp walks the experts, 32 at a time.
#pragma once

#include <cstdint>

#include "cuda/ptx/ptx.cuh"
#include "cuda/tile/schedule.h"

namespace flashmoe::cuda::tile {

// Finds the tile of a ticket; tickets must not decrease. Whole warp: lane l holds one expert of the
// window, so that any number of experts needs no table in shared memory.
class ExpertWindow {
 public:
  FM_DEVICE ExpertWindow(const int64_t* expert_begin, const int64_t* expert_rows,
                         int32_t num_experts, const TileGrid& grid)
      : expert_begin_(expert_begin),
        expert_rows_(expert_rows),
        num_experts_(num_experts),
        grid_(grid) {
    load();
  }

  FM_DEVICE Tile find(int32_t ticket) {
    while (ticket >= tiles_before_window_ + window_tiles_) {
      tiles_before_window_ += window_tiles_;
      first_expert_ += kLanes;
      if (first_expert_ >= num_experts_) return Tile{};
      load();
    }
    const int32_t tile_idx = ticket - tiles_before_window_;
    // Experts without tiles repeat their predecessor's end: the last lane that starts at or before
    // the tile is the one that holds it.
    const uint32_t candidates = __ballot_sync(kAll, tiles_before_ <= tile_idx);
    const int32_t owner = 31 - __clz(static_cast<int>(candidates));
    return grid_.tile_at(tile_idx - __shfl_sync(kAll, tiles_before_, owner), first_expert_ + owner,
                         __shfl_sync(kAll, begin_, owner), __shfl_sync(kAll, rows_, owner));
  }

 private:
  static constexpr int32_t kLanes = 32;
  static constexpr uint32_t kAll = 0xFFFFFFFF;

  FM_DEVICE void load() {
    const int32_t lane = threadIdx.x % kLanes;
    const int32_t expert_idx = first_expert_ + lane;
    const bool exists = expert_idx < num_experts_;
    begin_ = exists ? static_cast<int32_t>(expert_begin_[expert_idx]) : 0;
    rows_ = exists ? static_cast<int32_t>(expert_rows_[expert_idx]) : 0;
    const int32_t own = grid_.num_tiles(rows_);
    int32_t sum = own;
    FM_UNROLL
    for (int32_t distance = 1; distance < kLanes; distance *= 2) {
      const int32_t below = __shfl_up_sync(kAll, sum, distance);
      if (lane >= distance) sum += below;
    }
    tiles_before_ = sum - own;
    window_tiles_ = __shfl_sync(kAll, sum, kLanes - 1);
  }

  const int64_t* expert_begin_;
  const int64_t* expert_rows_;
  int32_t num_experts_;
  TileGrid grid_;
  int32_t first_expert_ = 0;
  int32_t tiles_before_window_ = 0;
  int32_t window_tiles_ = 0;
  // This lane's expert.
  int32_t begin_ = 0;
  int32_t rows_ = 0;
  int32_t tiles_before_ = 0;  // in the window
};

}  // namespace flashmoe::cuda::tile
