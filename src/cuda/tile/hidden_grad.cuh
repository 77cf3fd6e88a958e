// The epilogue of dA' = dY W_down: reads Z, writes w A and dZ, and sums <A, dA'> of every row.
//
// Z comes chunk by chunk (16 rows by 64 columns of A: one or two boxes) into shared memory, dZ
// takes its place there, and all goes out by the copy engine. Four sets of buffers: two chunks are
// on their way in and one out while another is worked on.
//
// One body serves all chunks of a tile, which takes its sums out of the registers by a switch:
// unrolled, it is more instructions than any instruction cache holds (docs/backward_pass.md).
#pragma once

#include "cuda/config/backward.h"
#include "cuda/kernel/backward.h"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/slope.cuh"

namespace flashmoe::cuda::tile {

// [set][gate (or x), up, A]
using HiddenChunks = uint8_t[config::kHiddenSets][config::kHiddenBuffers][config::kHiddenBytes];

// Of one math warpgroup.
struct HiddenGradMemory {
  HiddenChunks* chunks;
  uint64_t z_full[config::kHiddenSets];  // phase n: the set's n-th chunk of Z is there
  uint32_t phases;                       // bit s: parity of set s's next phase
  alignas(8) float weights[config::kBackwardBlockRows];  // of the tile's rows
  // [row chunk % 2][half][warp][row]: sums over the warp's 16 columns of the half.
  float dots[2][2][4][config::kHiddenRows];

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init(uint8_t* staging) {
    for (uint64_t& barrier : z_full) ptx::mbarrier_init(&barrier, 1);
    chunks = reinterpret_cast<HiddenChunks*>(staging);
    phases = 0;
  }
};

// Chunks (row_chunk, half) follow each other half first; those of even and odd row_chunk have sets
// of their own.
FM_DEVICE constexpr int32_t set_of(int32_t row_chunk, int32_t half) {
  return row_chunk % 2 * 2 + half;
}

// First column of Z of a chunk's buffer 0 (gates, or all) or 1 (ups).
FM_DEVICE int32_t z_column(const kernel::BackwardParams& params, int32_t column, int buffer) {
  if (params.sizes.interleaved) return 2 * column + buffer * config::kHalfRows;
  return column + buffer * params.forward.sizes.intermediate;
}

// Z of a tile on its way to the L2 cache. One thread.
FM_DEVICE void fetch_z(const kernel::BackwardParams& params, const Tile& tile, int32_t cta_rank) {
  const int32_t column = (2 * tile.weight_pair_idx + cta_rank) * config::kWeightRows;
  const int num_buffers = params.sizes.gated ? 2 : 1;
#pragma unroll 1
  for (int i = 0; i < 2 * num_buffers; ++i) {
    const int32_t of_half = column + i % 2 * config::kHalfRows;
    if (of_half >= params.forward.sizes.intermediate) continue;
    ptx::prefetch_tensor_2d(&params.z_ahead, z_column(params, of_half, i / 2), tile.row_begin);
  }
}

// What a thread reads again wherever it needs it: the products' sums leave few registers.
class HiddenPlace {
 public:
  FM_DEVICE explicit HiddenPlace(const Tile& tile) : tile_(tile) {}

  FM_DEVICE int32_t row_begin() const { return tile_.row_begin; }
  FM_DEVICE int32_t num_rows() const { return tile_.num_rows; }
  FM_DEVICE int32_t weight_tile_idx() const {
    return 2 * tile_.weight_pair_idx + static_cast<int32_t>(ptx::get_sreg_cluster_ctarank());
  }
  // Of A, the CTA's first.
  FM_DEVICE int32_t column() const { return weight_tile_idx() * config::kWeightRows; }
  // Of 64 columns that exist.
  FM_DEVICE int32_t num_halves(int32_t intermediate) const {
    const int32_t columns = intermediate - column();
    return columns > config::kHalfRows ? 2 : columns > 0 ? 1 : 0;
  }

 private:
  const volatile Tile& tile_;
};

// As ptx::lane_idx(), whose divisions need not mind a sign.
FM_DEVICE uint32_t lane_of_warp() { return static_cast<uint32_t>(ptx::thread_idx()) % 32; }

inline constexpr int32_t kGroupRows = 8;
inline constexpr int kGroupSums = 4;  // of a thread: two of 8 rows by two columns

// Of a thread's two columns (8 apart, of the warp's 16) and two of 8 tokens (2 q and 2 q + 1): a
// word a column, its low half the first token.
struct HiddenWords {
  uint32_t gate[2];  // or x
  uint32_t up[2];
};

// How Z lies in a chunk's buffers.
enum class ZOrder {
  kPlain,        // x in one
  kHalves,       // gates in one, ups in the other
  kInterleaved,  // gate and up of an element side by side, in two
};
constexpr bool is_gated(ZOrder order) { return order != ZOrder::kPlain; }

// Where a thread finds and puts its elements of 8 tokens in a chunk's buffers.
template <ZOrder kOrder>
class ChunkAccess {
 public:
  // buffers: address of the chunk's first, at the first of the 8 tokens.
  FM_DEVICE explicit ChunkAccess(uint32_t buffers) : buffers_(buffers) {}

  FM_DEVICE HiddenWords load() const {
    HiddenWords z{};
    if constexpr (kOrder == ZOrder::kPlain) ptx::ldmatrix_x2_trans(matrix_address(), z.gate);
    if constexpr (kOrder == ZOrder::kHalves) ptx::ldmatrix_x4_trans(matrix_address(), z.gate, z.up);
    if constexpr (kOrder == ZOrder::kInterleaved) {
      FM_UNROLL
      for (int column = 0; column < 2; ++column) {
        const uint32_t first = ptx::ld_shared(word_address(0, column));
        const uint32_t second = ptx::ld_shared(word_address(1, column));
        z.gate[column] = __byte_perm(first, second, kLowHalves);
        z.up[column] = __byte_perm(first, second, kHighHalves);
      }
    }
    return z;
  }
  FM_DEVICE void store(const HiddenWords& grad, const uint32_t (&activated)[2]) const {
    ptx::stmatrix_x2_trans(row_address() + 2 * config::kHiddenBytes, activated);
    if constexpr (kOrder == ZOrder::kPlain) ptx::stmatrix_x2_trans(matrix_address(), grad.gate);
    if constexpr (kOrder == ZOrder::kHalves) {
      ptx::stmatrix_x4_trans(matrix_address(),
                             {grad.gate[0], grad.gate[1], grad.up[0], grad.up[1]});
    }
    if constexpr (kOrder == ZOrder::kInterleaved) {
      FM_UNROLL
      for (int column = 0; column < 2; ++column) {
        ptx::st_shared(word_address(0, column),
                       __byte_perm(grad.gate[column], grad.up[column], kLowHalves));
        ptx::st_shared(word_address(1, column),
                       __byte_perm(grad.gate[column], grad.up[column], kHighHalves));
      }
    }
  }

 private:
  static constexpr uint32_t kLowHalves = 0x5410;
  static constexpr uint32_t kHighHalves = 0x7632;
  FM_DEVICE static uint32_t warp_idx() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup / 32;
  }

  // Of a row of an 8 x 8 matrix: token lane % 8, the lane / 8 % 2'th half of the warp's 16 columns.
  FM_DEVICE uint32_t row_address() const {
    const uint32_t token = lane_of_warp() % 8;
    return buffers_ + token * 128 + ((2 * warp_idx() + lane_of_warp() / 8 % 2 ^ token) << 4);
  }
  // The same; the last 16 lanes' in the second buffer.
  FM_DEVICE uint32_t matrix_address() const {
    return row_address() + lane_of_warp() / 16 * config::kHiddenBytes;
  }
  // Of gate and up of one element: token 2 q + second.
  FM_DEVICE uint32_t word_address(uint32_t second, uint32_t column) const {
    const uint32_t token = lane_of_warp() % 4 * 2 + second;
    const uint32_t place = warp_idx() % 2 * 16 + lane_of_warp() / 4 + column * 8;
    return buffers_ + warp_idx() / 2 * config::kHiddenBytes + token * 128 +
           ((place / 4 ^ token) << 4) + place % 4 * 4;
  }

  uint32_t buffers_;
};

// Sums over the warp's 16 columns of two tokens' values (of tokens 2 q and 2 q + 1 of a group of
// 8). Every lane gets that of token 2 (lane % 4) + lane / 4 % 2.
FM_DEVICE float sum_of_columns(float even, float odd) {
  constexpr uint32_t kAll = 0xFFFFFFFF;
  const bool is_odd = (lane_of_warp() >> 2 & 1) != 0;
  float sum = is_odd ? odd : even;
  sum += __shfl_xor_sync(kAll, is_odd ? even : odd, 4);
  sum += __shfl_xor_sync(kAll, sum, 8);
  sum += __shfl_xor_sync(kAll, sum, 16);
  return sum;
}

// 64 columns of 8 rows. buffers: address of their first in the chunk's buffers; grads: their dA';
// weights: of the rows. Returns the lane's sum of <A, dA'>, as sum_of_columns().
template <class Element, ZOrder kOrder, class Function>
FM_DEVICE float differentiate_group(const config::Activation& activation, const Function& function,
                                    uint32_t buffers, const float (&grads)[kGroupSums],
                                    const float* weights) {
  constexpr bool kGated = is_gated(kOrder);
  const ChunkAccess<kOrder> access(buffers);
  const float2 weight = *reinterpret_cast<const float2*>(weights + lane_of_warp() % 4 * 2);
  HiddenWords z = access.load();
  uint32_t activated[2];
  float even = 0.0f, odd = 0.0f;
  FM_UNROLL
  for (int column = 0; column < 2; ++column) {
    const float* grad = grads + column * 2;
    const float2 gate = Element::widen(z.gate[column]);
    const float2 up = Element::widen(z.up[column]);
    const HiddenSlopes first =
        differentiate<kGated>(activation, function, gate.x, up.x, weight.x * grad[0]);
    even = fmaf(first.activated, grad[0], even);
    const HiddenSlopes second =
        differentiate<kGated>(activation, function, gate.y, up.y, weight.y * grad[1]);
    odd = fmaf(second.activated, grad[1], odd);
    z.gate[column] = Element::pack(first.grad_gate, second.grad_gate);
    z.up[column] = Element::pack(first.grad_up, second.grad_up);
    activated[column] = Element::pack(weight.x * first.activated, weight.y * second.activated);
  }
  access.store(z, activated);
  return sum_of_columns(even, odd);
}

// One math warpgroup's chunks of Z. Whole warpgroup, converged.
class HiddenGrad {
 public:
  FM_DEVICE explicit HiddenGrad(HiddenGradMemory& memory) : memory_(memory) {}

  // Loads the rows' weights and asks for the first chunks of a tile; before its products.
  FM_DEVICE void request(const kernel::BackwardParams& params, const HiddenPlace& place,
                         sync::Waiter& waiter) {
    for (int32_t row = thread_of_warpgroup(); row < place.num_rows(); row += config::kWarpgroup) {
      memory_.weights[row] = params.sizes.weight_on_input
                                 ? 1.0f
                                 : params.forward.memory.row_weight[place.row_begin() + row];
    }
    if (!Staging::is_storer()) return;
    if (params.sizes.pre_activation_pairs > 0) {
      waiter.wait_word(&params.counters.z_done[place.row_begin() / config::kRowGroup],
                       params.sizes.pre_activation_pairs * config::kClusterSize,
                       sync::WaitTag::kGradDone);
      ptx::fence_proxy_async(ptx::space_global);
    }
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    const int32_t num_halves = place.num_halves(params.forward.sizes.intermediate);
    for (int32_t half = 0; half < num_halves; ++half) request_z(params, place, 0, half);
  }

  template <class Config>
  FM_DEVICE void finish(const kernel::BackwardParams& params, const float* sums, Staging& staging,
                        const HiddenPlace& place, sync::Waiter& waiter) {
    staging.sync();  // the weights are there
    with_slope(params.forward.activation, [&](const auto& function) {
      if (params.sizes.interleaved) {
        finish_chunks<Config, ZOrder::kInterleaved>(params, function, sums, staging, place, waiter);
      } else if (params.sizes.gated) {
        finish_chunks<Config, ZOrder::kHalves>(params, function, sums, staging, place, waiter);
      } else {
        finish_chunks<Config, ZOrder::kPlain>(params, function, sums, staging, place, waiter);
      }
    });
  }

 private:
  FM_DEVICE static uint32_t thread_of_warpgroup() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup;
  }

  // Starts the copy of a chunk of Z. The storer; its last stores out of this set have been read.
  FM_DEVICE void request_z(const kernel::BackwardParams& params, const HiddenPlace& place,
                           int32_t row_chunk, int32_t half) {
    const int32_t set = set_of(row_chunk, half);
    const int num_buffers = params.sizes.gated ? 2 : 1;
    const int32_t column = place.column() + half * config::kHalfRows;
    const int32_t row = place.row_begin() + row_chunk * config::kHiddenRows;
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                                   &memory_.z_full[set], num_buffers * config::kHiddenBytes);
#pragma unroll 1
    for (int buffer = 0; buffer < num_buffers; ++buffer) {
      const int32_t at[2] = {z_column(params, column, buffer), row};
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global,
                                (*memory_.chunks)[set][buffer], &params.z_in, at,
                                &memory_.z_full[set]);
    }
  }

  template <class Config, ZOrder kOrder, class Function>
  FM_DEVICE void finish_chunks(const kernel::BackwardParams& params, const Function& function,
                               const float* sums, Staging& staging, const HiddenPlace& place,
                               sync::Waiter& waiter) {
    constexpr config::GroupedProduct kConfig = Config::value;
    static_assert(kConfig.max_tokens % config::kHiddenRows == 0);
    constexpr int32_t kRowChunks = kConfig.max_tokens / config::kHiddenRows;
    constexpr int32_t kGroups = config::kHiddenRows / kGroupRows;
    constexpr int32_t kGroupBytes = kGroupRows * config::kHalfRows * config::kElementBytes;
    using Element = ElementOf<kConfig.element>;
#pragma unroll 1
    for (int32_t row_chunk = 0; row_chunk * config::kHiddenRows < place.num_rows(); ++row_chunk) {
#pragma unroll 1
      for (int32_t half = 0; half < place.num_halves(params.forward.sizes.intermediate); ++half) {
        const int32_t set = set_of(row_chunk, half);
        request_next(params, place, row_chunk, half);
        waiter.wait(&memory_.z_full[set], (phases() >> set ^ row_chunk / 2) & 1,
                    sync::WaitTag::kStageFull);
#pragma unroll 1
        for (int32_t group = 0; group < kGroups; ++group) {
          float grads[kGroupSums];
          take_sums<2 * kRowChunks * kGroups>(
              sums, (half * kRowChunks + row_chunk) * kGroups + group, grads);
          const float dot = differentiate_group<Element, kOrder>(
              params.forward.activation, function,
              ptx::shared_address((*memory_.chunks)[set]) + group * kGroupBytes, grads,
              memory_.weights + row_chunk * config::kHiddenRows + group * kGroupRows);
          put_dots(row_chunk, half, group, dot);
        }
        ptx::fence_proxy_async(ptx::space_shared);
        staging.sync();
        if (Staging::is_storer()) store<is_gated(kOrder)>(params, place, row_chunk, half);
      }
      write_parts(params, place, row_chunk);
    }
    staging.sync();  // all have read the phases and weights
    if (Staging::is_storer()) pass_phases(params, place);
  }

  // Bit s: parity of set s's phase at the tile's first chunk of it.
  FM_DEVICE uint32_t phases() const {
    return *const_cast<const volatile uint32_t*>(&memory_.phases);
  }
  FM_DEVICE void pass_phases(const kernel::BackwardParams& params, const HiddenPlace& place) {
    const int32_t num_chunks = (place.num_rows() + config::kHiddenRows - 1) / config::kHiddenRows;
    const int32_t num_halves = place.num_halves(params.forward.sizes.intermediate);
    uint32_t flips = 0;
    for (int32_t half = 0; half < num_halves; ++half) {
      flips |= ((num_chunks + 1) / 2 & 1) << set_of(0, half);
      flips |= (num_chunks / 2 & 1) << set_of(1, half);
    }
    memory_.phases = phases() ^ flips;
  }

  // Asks for the same half of the next rows: its set was stored from two chunks ago (one, where
  // there is one half).
  FM_DEVICE void request_next(const kernel::BackwardParams& params, const HiddenPlace& place,
                              int32_t row_chunk, int32_t half) {
    if (!Staging::is_storer()) return;
    if ((row_chunk + 1) * config::kHiddenRows >= place.num_rows()) return;
    if (place.num_halves(params.forward.sizes.intermediate) == 2) {
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<1>());
    } else {
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    }
    request_z(params, place, row_chunk + 1, half);
  }

  // The storer.
  template <bool kGated>
  FM_DEVICE void store(const kernel::BackwardParams& params, const HiddenPlace& place,
                       int32_t row_chunk, int32_t half) {
    auto& buffers = (*memory_.chunks)[set_of(row_chunk, half)];
    const int32_t first = row_chunk * config::kHiddenRows;
    const int32_t num_rows = min(config::kHiddenRows, place.num_rows() - first);
    const int32_t row = place.row_begin() + first;
    const int32_t column = place.column() + half * config::kHalfRows;
    const auto store_to = [&](const CUtensorMap& out, int32_t first_column, int buffer) {
      const int32_t at[4] = {first_column, kWindow - num_rows, row + num_rows, kWindow};
      ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &out, at, buffers[buffer]);
    };
    store_to(params.grad_z_out, z_column(params, column, 0), 0);
    if constexpr (kGated) store_to(params.grad_z_out, z_column(params, column, 1), 1);
    store_to(params.hidden_out, column, 2);
    ptx::cp_async_bulk_commit_group();
  }

  // dot: of row 2 (lane % 4) + lane / 4 % 2 of the group.
  FM_DEVICE void put_dots(int32_t row_chunk, int32_t half, int32_t group, float dot) {
    const uint32_t lane = lane_of_warp();
    if (lane >= kGroupRows) return;
    const uint32_t row = group * kGroupRows + lane % 4 * 2 + lane / 4;
    memory_.dots[row_chunk % 2][half][thread_of_warpgroup() / 32][row] = dot;
  }
  // The halves' and warps' sums of a chunk's rows, which all have put; the first warp adds them.
  FM_DEVICE void write_parts(const kernel::BackwardParams& params, const HiddenPlace& place,
                             int32_t row_chunk) {
    const uint32_t thread = thread_of_warpgroup();
    if (thread >= config::kHiddenRows) return;
    const int32_t row = row_chunk * config::kHiddenRows + static_cast<int32_t>(thread);
    if (row >= place.num_rows() || place.column() >= params.forward.sizes.intermediate) return;
    float sum = 0.0f;
#pragma unroll 1
    for (int32_t half = 0; half < place.num_halves(params.forward.sizes.intermediate); ++half) {
      const auto& dots = memory_.dots[row_chunk % 2][half];
      sum += ((dots[0][thread] + dots[1][thread]) + dots[2][thread]) + dots[3][thread];
    }
    params
        .parts[int64_t{place.weight_tile_idx()} * params.sizes.max_rows + place.row_begin() + row] =
        sum;
  }

  HiddenGradMemory& memory_;
};

}  // namespace flashmoe::cuda::tile
