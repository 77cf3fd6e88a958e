// The epilogue of weight gradients: a tile [N columns, 128 of M] of an expert's matrix.
#pragma once

#include "cuda/config/backward.h"
#include "cuda/kernel/backward.h"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/epilogue.cuh"

namespace flashmoe::cuda::tile {

// By the copy engine, in chunks of 64 n by 64 m.
template <class Config>
FM_DEVICE void store_weight_grad(const float* sums, Staging& staging, const CUtensorMap& out,
                                 const Tile& tile, int32_t weight_tile_idx) {
  constexpr config::GroupedProduct kConfig = Config::value;
  constexpr int kChunks = kGradColumns / config::kGradStoreColumns;
  const Results<Config, Identity> results{sums, RowBias{}, config::Activation{}, Identity{}};
  const int32_t column = weight_tile_idx * config::kWeightRows;
  FM_UNROLL
  for (int chunk_idx = 0; chunk_idx < kChunks; ++chunk_idx) {
    const int32_t first = chunk_idx * config::kGradStoreColumns;
    if (first >= tile.num_rows) break;
    const int32_t num_rows = min(config::kGradStoreColumns, tile.num_rows - first);
    FM_UNROLL
    for (int half = 0; half < 2; ++half) {
      fill_chunk<Config, config::kGradStoreColumns>(staging.acquire<config::kGradStoreBytes>(),
                                                    chunk_idx, half, results);
      const int32_t at[5] = {column + half * config::kHalfRows, kWindow - num_rows,
                             tile.row_begin + first + num_rows, kWindow, tile.local_expert_idx};
      staging.store_at<config::kGradStoreBytes>(out, at);
    }
  }
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
  for (int group = 0; group < kConfig.max_tokens / 8; ++group) {
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
