// Tiles of weight gradients: [N columns, 128 of M] of an expert's matrix, of which each math
// warpgroup makes half of the columns, in whole boxes.
#pragma once

#include "cuda/config/backward.h"
#include "cuda/kernel/backward.h"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sync/ring.cuh"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/backward_load.cuh"
#include "cuda/tile/descriptor.cuh"
#include "cuda/tile/epilogue.cuh"

namespace flashmoe::cuda::tile {

// Where a step's operands are: M's two boxes, then N's, first of the 16 rows that one CTA of the
// pair loads, then of the other's.
template <class Stages>
FM_DEVICE uint8_t* grad_stage(Stages& memory, int slot) {
  return reinterpret_cast<uint8_t*>(memory) + slot * config::kGradStageBytes;
}

// Boxes of the tile's columns that the warpgroup has: [first, first + count).
struct GradBoxes {
  int32_t first;
  int32_t count;

  FM_DEVICE GradBoxes(const Tile& tile, int warpgroup_idx) {
    const int32_t boxes = column_boxes(tile);
    const int32_t of_first = (boxes + 1) / 2;
    first = warpgroup_idx == 0 ? 0 : of_first;
    count = warpgroup_idx == 0 ? of_first : boxes - of_first;
  }
};
inline constexpr int32_t kGradBoxesOfWarpgroup = config::kMaxColumnBoxes / 2;

// The warpgroup's columns as a tile of their own.
FM_DEVICE Tile grad_part(const Tile& tile, int warpgroup_idx) {
  const GradBoxes boxes(tile, warpgroup_idx);
  Tile part = tile;
  part.row_begin += boxes.first * config::kBoxColumns;
  part.num_rows = static_cast<int16_t>(boxes.count * config::kBoxColumns);
  return part;
}

// A warpgroup's products of kColumns columns, which begin with box `first_box`; of none it passes
// over the stages. One group of products stays in flight; after_lead() runs once, when the first
// kGradLead steps (or all) are started.
template <class Config, int kColumns, class Stages, class AfterLead>
FM_DEVICE void multiply_columns(int32_t num_steps, int32_t first_box, float* sums, Stages& memory,
                                sync::StageReader<config::kGradStages>& stages,
                                sync::Waiter& waiter, const AfterLead& after_lead) {
  using Element = typename ElementOf<Config::value.element>::Type;
  constexpr int kSecondHalf = Config::value.max_tokens / 2;
  constexpr int kMBoxStep = config::kGradBoxBytes >> 4;
  constexpr int kNBoxBytes = config::kGradBoxBytes / config::kClusterSize;
  const int32_t last_of_lead = min(num_steps, config::kGradLead) - 1;
  int previous = 0;
#pragma unroll 1
  for (int32_t step = 0; step < num_steps; ++step) {
    stages.wait(waiter);
    if constexpr (kColumns > 0) {
      const uint32_t stage = ptx::shared_address(grad_stage(memory, stages.slot()));
      const uint64_t m = operand_descriptor(stage);
      const uint64_t n =
          operand_descriptor<kNBoxBytes>(stage + config::kGradWeightBytes + first_box * kNBoxBytes);
      ptx::wgmma_fence();
      FM_UNROLL
      for (int i = 0; i < config::kGradDepth / 16; ++i) {
        const uint64_t a = m + i * kColumnMajorStep;
        const uint64_t b = n + i * (config::kGradHalfBytes >> 4);
        const int accumulate = (step | i) != 0;
        ptx::wgmma<Element, kColumns, 1, 1>(sums, a, b, accumulate);
        ptx::wgmma<Element, kColumns, 1, 1>(sums + kSecondHalf, a + kMBoxStep, b, accumulate);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();
    } else {
      __syncwarp();  // no lane gives the stage back that another one has still to see
    }
    if (step > 0) stages.release(previous);
    previous = stages.slot();
    stages.advance();
    if (step == last_of_lead) after_lead();
  }
  ptx::wgmma_wait_group<0>();
  stages.release(previous);
}

// The warpgroup's products of a tile.
template <class Config, int kBoxes = 0, class... Operands>
FM_DEVICE void multiply_grad(int32_t num_boxes, Operands&&... operands) {
  if constexpr (kBoxes < kGradBoxesOfWarpgroup) {
    if (num_boxes > kBoxes) {
      multiply_grad<Config, kBoxes + 1>(num_boxes, operands...);
      return;
    }
  }
  multiply_columns<Config, kBoxes * config::kBoxColumns>(operands...);
}

// By the copy engine, in chunks of 64 n by 64 m: as many at once as there are buffers, then the
// last.
template <class Config>
FM_DEVICE void store_weight_grad(const float* sums, Staging& staging, const CUtensorMap& out,
                                 const Tile& tile, int32_t weight_tile_idx) {
  constexpr config::GroupedProduct kConfig = Config::value;
  constexpr int kAtOnce = config::kStoreBuffers;
  constexpr int kChunks = 2 * kGradBoxesOfWarpgroup;  // chunk n: halves of M run fastest
  static_assert(kChunks == kAtOnce + 1);
  static_assert(config::kGradStoreColumns == config::kBoxColumns);
  const Results<Config, Identity> results{sums, RowBias{}, config::Activation{}, Identity{}};
  const auto exists = [&](int chunk_idx) {
    return chunk_idx / 2 * config::kGradStoreColumns < tile.num_rows;
  };
  const auto fill = [&](uint32_t buffer, int chunk_idx) {
    fill_chunk<Config, config::kGradStoreColumns>(buffer, chunk_idx / 2, chunk_idx % 2, results);
  };
  const auto store = [&](int buffer_idx, int chunk_idx) {
    const int32_t first = chunk_idx / 2 * config::kGradStoreColumns;
    const int32_t num_rows = min(config::kGradStoreColumns, tile.num_rows - first);
    const int32_t at[5] = {
        weight_tile_idx * config::kWeightRows + chunk_idx % 2 * config::kHalfRows,
        kWindow - num_rows, tile.row_begin + first + num_rows, kWindow, tile.local_expert_idx};
    staging.start_store<config::kGradStoreBytes>(out, at, buffer_idx);
  };
  const uint32_t buffers = staging.acquire_all();
  FM_UNROLL
  for (int i = 0; i < kAtOnce; ++i) {
    if (exists(i)) fill(buffers + i * config::kGradStoreBytes, i);
  }
  staging.show_to_copies();
  if (Staging::is_storer()) {
#pragma unroll 1
    for (int i = 0; i < kAtOnce && exists(i); ++i) store(i, i);
  }
  if (!exists(kAtOnce)) return;
  fill(staging.acquire<config::kGradStoreBytes>(), kAtOnce);
  staging.show_to_copies();
  if (Staging::is_storer()) store(0, kAtOnce);
}

template <class T>
FM_DEVICE void put(T* to, float value, bool is_accumulated) {
  *to = static_cast<T>(is_accumulated ? static_cast<float>(*to) + value : value);
}

// By the threads: any strides, f32 too, added to what is there or not. Eight lanes have 8
// neighbours along M.
template <class Config, class T>
FM_DEVICE void write_weight_grad(const float* sums, const kernel::WeightGradOut& out,
                                 const Tile& tile, int32_t weight_tile_idx) {
  constexpr config::GroupedProduct kConfig = Config::value;
  const int thread = ptx::thread_idx() % config::kWarpgroup;
  const int lane = thread % 32;
  const int32_t first_m = weight_tile_idx * config::kWeightRows + thread / 32 * 16 + lane / 4;
  T* of_tile = static_cast<T*>(out.data) + tile.local_expert_idx * out.expert_stride +
               (tile.row_begin + lane % 4 * 2) * out.n_stride + first_m * out.m_stride;
  FM_UNROLL
  for (int group = 0; group < kGradBoxesOfWarpgroup * config::kBoxColumns / 8; ++group) {
    if (group * 8 >= tile.num_rows) break;
    FM_UNROLL
    for (int half = 0; half < 2; ++half) {
      FM_UNROLL
      for (int row = 0; row < 2; ++row) {
        const int m = half * config::kHalfRows + row * 8;
        if (first_m + m >= out.m_columns) continue;
        const float* at = sums + half * (kConfig.max_tokens / 2) + group * 4 + row * 2;
        T* to = of_tile + m * out.m_stride;
        put(to, at[0], out.is_accumulated);
        put(to + out.n_stride, at[1], out.is_accumulated);
      }
    }
    of_tile += 8 * out.n_stride;
  }
}

// Of the warpgroup's part of a tile.
template <class Config>
FM_DEVICE void finish_weight_grad(const float* sums, Staging& staging, const CUtensorMap& map,
                                  const kernel::WeightGradOut& out, const Tile& tile,
                                  int32_t weight_tile_idx) {
  if (!out.is_direct) {
    store_weight_grad<Config>(sums, staging, map, tile, weight_tile_idx);
  } else if (out.is_wide) {
    write_weight_grad<Config, float>(sums, out, tile, weight_tile_idx);
  } else {
    write_weight_grad<Config, typename ElementOf<Config::value.element>::Type>(sums, out, tile,
                                                                               weight_tile_idx);
  }
}

}  // namespace flashmoe::cuda::tile
