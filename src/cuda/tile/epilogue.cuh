// From the sums in registers to rows of `out`: chunks of 32 tokens by 64 columns through a ring of
// staging buffers, each stored by one copy that drains under the next chunks and the next tile.
#pragma once

#include <cuda.h>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/word.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/schedule.h"
#include "cuda/tile/window.h"

namespace flashmoe::cuda::tile {

// One math warpgroup's staging buffers: kStoreBuffers of kBytes, which a tile chooses. A tile of
// other kBytes than the one before begins with acquire_all(). Whole warpgroup, converged.
class Staging {
 public:
  FM_DEVICE Staging(uint8_t* buffers, int warpgroup_idx)
      : buffers_(buffers), barrier_idx_(kFirstBarrier + warpgroup_idx) {}

  // Address of a buffer whose last store has been read out.
  template <int kBytes = config::kStoreBytes>
  FM_DEVICE uint32_t acquire() {
    wait_for_reads<config::kStoreBuffers - 1>();
    return ptx::shared_address(buffers_ + buffer_idx_ * kBytes);
  }

  // Address of the first of all buffers, whose stores have been read out.
  FM_DEVICE uint32_t acquire_all() {
    wait_for_reads<0>();
    buffer_idx_ = 0;
    ptx::forget(buffers_);
    return ptx::shared_address(buffers_);
  }

  // Stores what the warpgroup has written: rows [row, row + num_rows) of `out`, 64 columns.
  FM_DEVICE void store(const CUtensorMap& out, int32_t column, int32_t row, int32_t num_rows) {
    const int32_t at[4] = {column, kWindow - num_rows, row + num_rows, kWindow};
    store_at<config::kStoreBytes>(out, at);
  }
  // at: coordinates of the buffer's first element in `out`.
  template <int kBytes, int kDims>
  FM_DEVICE void store_at(const CUtensorMap& out, const int32_t (&at)[kDims]) {
    show_to_copies();
    if (is_storer()) start_store<kBytes>(out, at, buffer_idx_);
    buffer_idx_ = buffer_idx_ == config::kStoreBuffers - 1 ? 0 : buffer_idx_ + 1;
  }

  // The copy engine may read what the warpgroup has written.
  FM_DEVICE void show_to_copies() {
    ptx::fence_proxy_async(ptx::space_shared);
    sync();
  }
  // Starts the copy of a buffer. The storer.
  template <int kBytes, int kDims>
  FM_DEVICE void start_store(const CUtensorMap& out, const int32_t (&at)[kDims], int buffer_idx) {
    ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &out, at,
                              buffers_ + buffer_idx * kBytes);
    ptx::cp_async_bulk_commit_group();
  }

  // Counts the tile at `done` when all that was stored is in global memory.
  FM_DEVICE void publish(uint32_t* done) {
    if (!is_storer()) return;
    drain();
    ptx::fence_proxy_async(ptx::space_global);
    ptx::add_release_gpu(done, 1);
  }

  // All stores of all threads are in global memory, and everybody knows.
  FM_DEVICE void drain_all() {
    ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
    ptx::fence_proxy_async(ptx::space_global);
    sync();
  }

  // Before the kernel ends: all stores are in global memory.
  FM_DEVICE void drain() {
    if (is_storer()) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>());
  }

  FM_DEVICE int warpgroup_idx() const { return barrier_idx_ - kFirstBarrier; }

  // Whether `vote` holds in every thread of the warpgroup.
  FM_DEVICE bool all(bool vote) {
    return ptx::barrier_sync_and(barrier_idx_, config::kWarpgroup, vote);
  }

  // The thread that starts copies, and waits for their ends.
  FM_DEVICE static bool is_storer() { return ptx::thread_idx() % config::kWarpgroup == 0; }
  FM_DEVICE void sync() { ptx::barrier_sync(barrier_idx_, config::kWarpgroup); }

 private:
  // Returns when all stores but the last kLeft have been read out.
  template <int kLeft>
  FM_DEVICE void wait_for_reads() {
    if (is_storer()) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<kLeft>());
    sync();
  }

  static constexpr int kFirstBarrier = 1;  // 0 is __syncthreads

  uint8_t* buffers_;
  int barrier_idx_;
  int buffer_idx_ = 0;
};

// The kCount sums of a thread from kCount * idx on, of kCases times as many: a switch, for loops
// over a tile's sums that are not unrolled. Whole warps take the same.
template <int kCases, int kFirst = 0, int kCount>
FM_DEVICE void take_sums(const float* sums, int32_t idx, float (&taken)[kCount]) {
  if constexpr (kCases > 1) {
    constexpr int kHalf = kCases / 2;
    if (idx < kFirst + kHalf) {
      take_sums<kHalf, kFirst>(sums, idx, taken);
    } else {
      take_sums<kCases - kHalf, kFirst + kHalf>(sums, idx, taken);
    }
  } else {
    FM_UNROLL
    for (int i = 0; i < kCount; ++i) taken[i] = sums[kFirst * kCount + i];
  }
}

// What a job's output has that stages its results and nothing else.
struct StagedOutput {
  Staging staging;

  FM_DEVICE StagedOutput(uint8_t (&buffers)[config::kStoreBuffers][config::kStoreBytes],
                         int warpgroup_idx)
      : staging(buffers[0], warpgroup_idx) {}
  FM_DEVICE bool all(bool vote) { return staging.all(vote); }
  template <class Params>
  FM_DEVICE void prepare(const Params&, const Tile&, sync::Waiter&) {}
  FM_DEVICE void drain() { staging.drain(); }
};

// 16 tokens by two of the chunk's 8 units of 8 columns. packed: eight results of a thread, tokens
// on N; the transposed store turns them into rows of tokens. Swizzled as the map of `out` expects.
FM_DEVICE void write_chunk_part(uint32_t chunk, int lane, int first_token, int unit_of_first,
                                int unit_stride, const uint32_t (&packed)[4]) {
  const int token = first_token + (lane >> 4) * 8 + (lane & 7);
  const int unit = unit_of_first + ((lane >> 3) & 1) * unit_stride;
  ptx::stmatrix_x4_trans(chunk + token * 128 + ((unit ^ (token & 7)) << 4), packed);
}

// Rounds the sums of kTokens tokens (of fewer at the end of the widest tile) into a chunk.
// results(half, i): see activation.cuh.
template <class Config, int kTokens = config::kStoreTokens, class Results>
FM_DEVICE void fill_chunk(uint32_t chunk, int chunk_idx, int half, const Results& results) {
  using Element = ElementOf<Config::value.element>;
  constexpr bool kPairs = Config::value.epilogue == config::Epilogue::kGatedPairs;
  // Read here, or the addresses that follow from it take registers while products run.
  const int thread_idx = ptx::thread_idx();
  const int warp_idx = thread_idx % config::kWarpgroup / 32;
  FM_UNROLL
  for (int part = 0; part < kTokens / 16; ++part) {
    const int first = (chunk_idx * kTokens / 16 + part) * 8;
    if (first >= Config::value.max_tokens / 2) break;
    uint32_t packed[4];
    FM_UNROLL
    for (int pair = 0; pair < 4; ++pair) {
      if constexpr (kPairs) {  // a unit from either half of the weight rows
        const int i = first + pair / 2 * 4;
        packed[pair] =
            Element::pack(results.of_pair(pair % 2, i), results.of_pair(pair % 2, i + 1));
      } else {
        const int i = first + pair * 2;
        packed[pair] = Element::pack(results(half, i), results(half, i + 1));
      }
    }
    write_chunk_part(chunk, thread_idx % 32, part * 16, kPairs ? warp_idx : 2 * warp_idx,
                     kPairs ? 4 : 1, packed);
  }
}

// Stores a tile. weight_tile_idx: this CTA's. Rows past the tile's are clipped by the map.
template <class Config, class Results>
FM_DEVICE void store_tile(const Results& results, Staging& staging, const CUtensorMap& out,
                          const Tile& tile, int32_t weight_tile_idx) {
  constexpr config::GroupedProduct kConfig = Config::value;
  constexpr int kChunks = (kConfig.max_tokens + config::kStoreTokens - 1) / config::kStoreTokens;
  const int32_t column = weight_tile_idx * kConfig.out_columns();
  FM_UNROLL
  for (int chunk_idx = 0; chunk_idx < kChunks; ++chunk_idx) {
    const int32_t first = chunk_idx * config::kStoreTokens;
    if (first >= tile.num_rows) break;
    const int32_t row = tile.row_begin + first;
    const int32_t num_rows = min(config::kStoreTokens, tile.num_rows - first);
    FM_UNROLL
    for (int half = 0; half < (kConfig.gated() ? 1 : 2); ++half) {
      fill_chunk<Config>(staging.acquire(), chunk_idx, half, results);
      staging.store(out, column + half * config::kHalfRows, row, num_rows);
    }
  }
}

}  // namespace flashmoe::cuda::tile
