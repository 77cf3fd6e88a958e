// Z of an up tile: its sums with their bias, stored for the backward in the column order of w_up.
// Loops are rolled: few kernels keep Z, and none has registers or instruction cache to spare for
// it.
#pragma once

#include "cuda/kernel/forward.h"
#include "cuda/tile/activation.cuh"
#include "cuda/tile/epilogue.cuh"

namespace flashmoe::cuda::tile {

inline constexpr int32_t kPartTokens = 16;
inline constexpr int kPartSums = 8;  // of a thread: 16 tokens by two columns of a half

// 16 tokens of a half as they are.
template <class Config>
FM_DEVICE void write_part(const float* sums, const RowBias& bias, uint32_t chunk, int32_t half,
                          int32_t part_idx) {
  using Element = ElementOf<Config::value.element>;
  constexpr int kParts = Config::value.max_tokens / kPartTokens;
  float values[kPartSums];
  take_sums<2 * kParts>(sums, half * kParts + part_idx, values);
  uint32_t packed[4];
  FM_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float row_bias = half == 0 ? bias.of(0, 2 * i) : bias.of(1, 2 * i);
    packed[i] = Element::pack(values[2 * i] + row_bias, values[2 * i + 1] + row_bias);
  }
  const int thread_idx = ptx::thread_idx();
  write_chunk_part(chunk, thread_idx % 32, part_idx % 2 * kPartTokens,
                   2 * (thread_idx % config::kWarpgroup / 32), 1, packed);
}

// Gate and up of an element side by side, 16 tokens: of the warps whose elements are in the chunk,
// the first or second 64 columns of the tile's 128.
template <class Config>
FM_DEVICE void write_interleaved_part(const float* sums, const RowBias& bias, uint32_t chunk,
                                      int32_t chunk_of_two, int32_t part_idx) {
  using Element = ElementOf<Config::value.element>;
  constexpr int kGroupSums = 4;  // of 8 tokens: two elements of two tokens
  constexpr int kGroups = Config::value.max_tokens / 8;
#pragma unroll 1
  for (int32_t group = 0; group < kPartTokens / 8; ++group) {
    float gates[kGroupSums], ups[kGroupSums];
    take_sums<2 * kGroups>(sums, 2 * part_idx + group, gates);
    take_sums<2 * kGroups>(sums, kGroups + 2 * part_idx + group, ups);
    const auto thread = static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup;
    if (static_cast<int32_t>(thread / 64) != chunk_of_two) continue;
    FM_UNROLL
    for (int i = 0; i < kGroupSums; ++i) {
      const uint32_t token = part_idx % 2 * kPartTokens + group * 8 + thread % 4 * 2 + i % 2;
      const uint32_t element = thread / 32 % 2 * 16 + thread % 32 / 4 + i / 2 * 8;
      const uint32_t at = chunk + token * 128 + ((element / 4 ^ token % 8) << 4) + element % 4 * 4;
      ptx::st_shared(at, Element::pack(gates[i] + bias.of(0, i), ups[i] + bias.of(1, i)));
    }
  }
}

// tile: in shared memory, read again where it is needed.
template <class Config>
FM_DEVICE void store_pre_activation(const kernel::ForwardParams& params, const float* sums,
                                    Staging& staging, const volatile Tile& tile) {
  constexpr bool kHalvesAreGates = Config::value.halves_are_gates();
  const auto weight_tile_idx = [&] {
    return 2 * tile.weight_pair_idx + static_cast<int32_t>(ptx::get_sreg_cluster_ctarank());
  };
  // Gates of the last pair's second tile may lie past the last: their columns would be ups.
  constexpr int32_t kGates = Config::value.out_columns();
  if (kHalvesAreGates && weight_tile_idx() * kGates >= params.sizes.intermediate) return;
  const RowBias bias = load_bias<Config>(params.up_bias, tile.local_expert_idx, weight_tile_idx());
#pragma unroll 1
  for (int32_t first = 0; first < tile.num_rows; first += config::kStoreTokens) {
#pragma unroll 1
    for (int32_t half = 0; half < 2; ++half) {
      const uint32_t chunk = staging.acquire();
#pragma unroll 1
      for (int32_t token = first; token < min(first + config::kStoreTokens, int32_t{tile.num_rows});
           token += kPartTokens) {
        if (kHalvesAreGates && params.z_is_interleaved) {
          write_interleaved_part<Config>(sums, bias, chunk, half, token / kPartTokens);
        } else {
          write_part<Config>(sums, bias, chunk, half, token / kPartTokens);
        }
      }
      const bool apart = kHalvesAreGates && !params.z_is_interleaved;  // the halves' columns
      const int32_t column =
          apart ? weight_tile_idx() * config::kHalfRows + half * params.sizes.intermediate
                : weight_tile_idx() * config::kWeightRows + half * config::kHalfRows;
      staging.store(params.z_out, column, tile.row_begin + first,
                    min(config::kStoreTokens, tile.num_rows - first));
    }
  }
}

}  // namespace flashmoe::cuda::tile
