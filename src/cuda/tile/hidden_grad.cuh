// The epilogue of dA' = dY W_down: reads Z, writes w A and dZ, and sums <A, dA'> of every row.
//
// Z comes chunk by chunk (16 rows by 64 columns of A: one or two boxes) into shared memory, dZ
// takes its place there, and all goes out by the copy engine. Four sets of buffers: two chunks are
// on their way in and one out while another is worked on.
#pragma once

#include "cuda/config/backward.h"
#include "cuda/kernel/backward.h"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/slope.cuh"

namespace flashmoe::cuda::tile {

// [set][gate (or x), up, A]
using HiddenChunks = uint8_t[config::kHiddenSets][config::kHiddenBuffers][config::kHiddenBytes];

// Of one math warpgroup.
struct HiddenGradMemory {
  HiddenChunks* chunks;
  uint64_t z_full[config::kHiddenSets];          // phase n: the set's n-th chunk of Z is there
  uint32_t phases;                               // bit s: parity of set s's next phase
  alignas(8) float weights[config::kMaxTokens];  // of the tile's rows
  float dots[2][4][config::kHiddenRows];         // [chunk % 2][warp][row]

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init(uint8_t* staging) {
    for (uint64_t& barrier : z_full) ptx::mbarrier_init(&barrier, 1);
    chunks = reinterpret_cast<HiddenChunks*>(staging);
    phases = 0;
  }
};

// Chunks (row_chunk, half) follow each other half first; those of even and odd row_chunk have sets
// of their own.
FM_DEVICE constexpr int set_of(int row_chunk, int half) { return row_chunk % 2 * 2 + half; }

// First column of Z of a chunk's buffer 0 (gates, or all) or 1 (ups).
FM_DEVICE int32_t z_column(const kernel::BackwardParams& params, int32_t column, int buffer) {
  if (params.sizes.interleaved) return 2 * column + buffer * config::kHalfRows;
  return column + buffer * params.forward.sizes.intermediate;
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

// Gate and up (or x) of two tokens, 2 q and 2 q + 1 of a group of 8, in one of a thread's columns.
struct ZPair {
  uint32_t gate;
  uint32_t up;
};

// Where a thread finds and puts its elements of 8 tokens in a chunk's buffers: of its two columns
// (8 apart) of the warp's 16.
template <bool kGated>
class ChunkAccess {
 public:
  FM_DEVICE ChunkAccess(uint32_t buffers, bool interleaved)
      : buffers_(buffers), interleaved_(kGated && interleaved) {}

  FM_DEVICE ZPair load(int group, int column) const {
    if (!interleaved_) {
      const uint32_t at = row_address(group, column);
      ZPair z{ptx::ldmatrix_x1_trans(at), 0};
      if constexpr (kGated) z.up = ptx::ldmatrix_x1_trans(at + config::kHiddenBytes);
      return z;
    }
    const uint32_t first = ptx::ld_shared(word_address(group, 0, column));
    const uint32_t second = ptx::ld_shared(word_address(group, 1, column));
    return {__byte_perm(first, second, kLowHalves), __byte_perm(first, second, kHighHalves)};
  }
  FM_DEVICE void store(int group, int column, const ZPair& grad, uint32_t activated) const {
    const uint32_t at = row_address(group, column);
    ptx::stmatrix_x1_trans(at + 2 * config::kHiddenBytes, activated);
    if (!interleaved_) {
      ptx::stmatrix_x1_trans(at, grad.gate);
      if constexpr (kGated) ptx::stmatrix_x1_trans(at + config::kHiddenBytes, grad.up);
      return;
    }
    ptx::st_shared(word_address(group, 0, column), __byte_perm(grad.gate, grad.up, kLowHalves));
    ptx::st_shared(word_address(group, 1, column), __byte_perm(grad.gate, grad.up, kHighHalves));
  }

 private:
  static constexpr uint32_t kLowHalves = 0x5410;
  static constexpr uint32_t kHighHalves = 0x7632;
  FM_DEVICE static uint32_t warp_idx() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup / 32;
  }

  // Of an 8 x 8 matrix: the column'th half of this warp's 16 columns.
  FM_DEVICE uint32_t row_address(int group, int column) const {
    const uint32_t token = lane_of_warp() % 8;
    return buffers_ + group * 1024 + token * 128 + ((2 * warp_idx() + column ^ token) << 4);
  }
  // Of gate and up of one element: token 2 q + second.
  FM_DEVICE uint32_t word_address(int group, int second, int column) const {
    const uint32_t lane = lane_of_warp();
    const uint32_t warp = warp_idx();
    const uint32_t token = lane % 4 * 2 + second;
    const uint32_t place = warp % 2 * 16 + lane / 4 + column * 8;
    return buffers_ + warp / 2 * config::kHiddenBytes + group * 1024 + token * 128 +
           ((place / 4 ^ token) << 4) + place % 4 * 4;
  }

  uint32_t buffers_;
  bool interleaved_;
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

// One chunk: 64 columns of 16 rows. sums: the half's dA'; weights: of the chunk's rows; dots: what
// lane l < 16 has summed of its row, l / 8 * 8 + 2 (l % 4) + l / 4 % 2. Column by column: the sums
// leave few registers.
template <class Element, bool kGated, class Function>
FM_DEVICE float differentiate_chunk(const kernel::BackwardParams& params, const Function& function,
                                    const float* sums, int first_group, uint32_t buffers,
                                    const float* weights, float dots) {
  const ChunkAccess<kGated> access(buffers, params.sizes.interleaved);
  const auto& activation = params.forward.activation;
  FM_UNROLL
  for (int group = 0; group < config::kHiddenRows / 8; ++group) {
    float even = 0.0f, odd = 0.0f;
    const float2 weight =
        *reinterpret_cast<const float2*>(weights + group * 8 + lane_of_warp() % 4 * 2);
    FM_UNROLL
    for (int column = 0; column < 2; ++column) {
      const float* grads = sums + (first_group + group) * 4 + column * 2;
      ZPair z = access.load(group, column);
      const float2 gate = Element::widen(z.gate);
      const float2 up = Element::widen(z.up);
      const HiddenSlopes first =
          differentiate<kGated>(activation, function, gate.x, up.x, weight.x * grads[0]);
      even = fmaf(first.activated, grads[0], even);
      const HiddenSlopes second =
          differentiate<kGated>(activation, function, gate.y, up.y, weight.y * grads[1]);
      odd = fmaf(second.activated, grads[1], odd);
      z.gate = Element::pack(first.grad_gate, second.grad_gate);
      z.up = Element::pack(first.grad_up, second.grad_up);
      access.store(group, column, z,
                   Element::pack(weight.x * first.activated, weight.y * second.activated));
    }
    const float sum = sum_of_columns(even, odd);
    dots += lane_of_warp() / 8 == group ? sum : 0.0f;
  }
  return dots;
}

// One math warpgroup's chunks of Z. Whole warpgroup, converged.
class HiddenGrad {
 public:
  // memory: of both warpgroups.
  FM_DEVICE explicit HiddenGrad(HiddenGradMemory (&memory)[2]) : memory_(memory) {}

  // Loads the rows' weights and asks for the first chunks of a tile; before its products.
  FM_DEVICE void request(const kernel::BackwardParams& params, const HiddenPlace& place,
                         sync::Waiter& waiter) {
    for (int32_t row = thread_of_warpgroup(); row < place.num_rows(); row += config::kWarpgroup) {
      memory().weights[row] = params.sizes.weight_on_input
                                  ? 1.0f
                                  : params.forward.memory.row_weight[place.row_begin() + row];
    }
    if (!Staging::is_storer()) return;
    if (params.sizes.pre_activation_pairs > 0) {
      waiter.wait_word(&params.counters.z_done[place.row_begin() / config::kRowGroup],
                       params.sizes.pre_activation_pairs * config::kClusterSize,
                       sync::WaitTag::kUpDone);
      ptx::fence_proxy_async(ptx::space_global);
    }
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    const int32_t num_halves = place.num_halves(params.forward.sizes.intermediate);
    for (int half = 0; half < num_halves; ++half) request_z(params, place, 0, half);
  }

  template <class Config>
  FM_DEVICE void finish(const kernel::BackwardParams& params, const float* sums, Staging& staging,
                        const HiddenPlace& place, sync::Waiter& waiter) {
    staging.sync();  // the weights are there
    with_slope(params.forward.activation, [&](const auto& function) {
      if (params.sizes.gated) {
        finish_chunks<Config, true>(params, function, sums, staging, place, waiter);
      } else {
        finish_chunks<Config, false>(params, function, sums, staging, place, waiter);
      }
    });
  }

 private:
  FM_DEVICE static uint32_t thread_of_warpgroup() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup;
  }
  FM_DEVICE HiddenGradMemory& memory() const {
    return memory_[static_cast<uint32_t>(ptx::thread_idx()) / config::kWarpgroup - 1];
  }

  // Starts the copy of a chunk of Z. The storer; its last stores out of this set have been read.
  FM_DEVICE void request_z(const kernel::BackwardParams& params, const HiddenPlace& place,
                           int row_chunk, int half) {
    HiddenGradMemory& own = memory();
    const int set = set_of(row_chunk, half);
    const int num_buffers = params.sizes.gated ? 2 : 1;
    const int32_t column = place.column() + half * config::kHalfRows;
    const int32_t row = place.row_begin() + row_chunk * config::kHiddenRows;
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                                   &own.z_full[set], num_buffers * config::kHiddenBytes);
#pragma unroll 1
    for (int buffer = 0; buffer < num_buffers; ++buffer) {
      const int32_t at[2] = {z_column(params, column, buffer), row};
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, (*own.chunks)[set][buffer],
                                &params.z_in, at, &own.z_full[set]);
    }
  }

  template <class Config, bool kGated, class Function>
  FM_DEVICE void finish_chunks(const kernel::BackwardParams& params, const Function& function,
                               const float* sums, Staging& staging, const HiddenPlace& place,
                               sync::Waiter& waiter) {
    constexpr config::GroupedProduct kConfig = Config::value;
    static_assert(kConfig.max_tokens % config::kHiddenRows == 0);
    using Element = ElementOf<kConfig.element>;
    FM_UNROLL
    for (int row_chunk = 0; row_chunk < kConfig.max_tokens / config::kHiddenRows; ++row_chunk) {
      if (row_chunk * config::kHiddenRows >= place.num_rows()) break;
      float dots = 0.0f;
      FM_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (half >= place.num_halves(params.forward.sizes.intermediate)) break;
        const int set = set_of(row_chunk, half);
        request_next(params, place, row_chunk, half);
        waiter.wait(&memory().z_full[set], (phases() >> set ^ row_chunk / 2) & 1,
                    sync::WaitTag::kStageFull);
        dots = differentiate_chunk<Element, kGated>(
            params, function, sums + half * (kConfig.max_tokens / 2),
            row_chunk * (config::kHiddenRows / 8), ptx::shared_address((*memory().chunks)[set]),
            memory().weights + row_chunk * config::kHiddenRows, dots);
        put_dots(row_chunk, dots);
        ptx::fence_proxy_async(ptx::space_shared);
        staging.sync();
        if (Staging::is_storer()) store<kGated>(params, place, row_chunk, half);
      }
      write_parts(params, place, row_chunk);
    }
    staging.sync();  // all have read the phases and weights
    if (Staging::is_storer()) pass_phases(params, place);
  }

  // Bit s: parity of set s's phase at the tile's first chunk of it.
  FM_DEVICE uint32_t phases() const {
    return *const_cast<const volatile uint32_t*>(&memory().phases);
  }
  FM_DEVICE void pass_phases(const kernel::BackwardParams& params, const HiddenPlace& place) {
    const int32_t num_chunks = (place.num_rows() + config::kHiddenRows - 1) / config::kHiddenRows;
    const int32_t num_halves = place.num_halves(params.forward.sizes.intermediate);
    uint32_t flips = 0;
    for (int half = 0; half < num_halves; ++half) {
      flips |= ((num_chunks + 1) / 2 & 1) << set_of(0, half);
      flips |= (num_chunks / 2 & 1) << set_of(1, half);
    }
    memory().phases = phases() ^ flips;
  }

  // Asks for the same half of the next rows: its set was stored from two chunks ago (one, where
  // there is one half).
  FM_DEVICE void request_next(const kernel::BackwardParams& params, const HiddenPlace& place,
                              int row_chunk, int half) {
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
                       int row_chunk, int half) {
    auto& buffers = (*memory().chunks)[set_of(row_chunk, half)];
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

  FM_DEVICE void put_dots(int row_chunk, float dots) {
    const uint32_t lane = lane_of_warp();
    if (lane >= config::kHiddenRows) return;
    memory().dots[row_chunk % 2][thread_of_warpgroup() / 32][lane] = dots;
  }
  // The four warps' sums of a chunk's rows, which all have put; the first warp adds them.
  FM_DEVICE void write_parts(const kernel::BackwardParams& params, const HiddenPlace& place,
                             int row_chunk) {
    const uint32_t lane = thread_of_warpgroup();
    if (lane >= config::kHiddenRows) return;
    const int32_t token = row_chunk * config::kHiddenRows +
                          static_cast<int32_t>(lane / 8 * 8 + lane % 4 * 2 + (lane >> 2 & 1));
    if (token >= place.num_rows() || place.column() >= params.forward.sizes.intermediate) return;
    const auto& of_chunk = memory().dots[row_chunk % 2];
    params.parts[int64_t{place.weight_tile_idx()} * params.sizes.max_rows + place.row_begin() +
                 token] =
        ((of_chunk[0][lane] + of_chunk[1][lane]) + of_chunk[2][lane]) + of_chunk[3][lane];
  }

  HiddenGradMemory (&memory_)[2];
};

}  // namespace flashmoe::cuda::tile
