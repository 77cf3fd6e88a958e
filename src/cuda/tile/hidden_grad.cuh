// The epilogue of dA' = dY W_down: reads Z, writes w A and dZ, and sums <A, dA'> of every row.
//
// Z comes chunk by chunk (32 rows by 64 columns of A: one or two boxes) into shared memory, dZ takes
// its place there, and all goes out by the copy engine. Two sets of buffers: a chunk is on its way
// while the one before is worked on.
#pragma once

#include "cuda/config/backward.h"
#include "cuda/kernel/backward.h"
#include "cuda/ptx/registers.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/slope.cuh"

namespace flashmoe::cuda::tile {

inline constexpr int kChunkSets = 2;

using ChunkBuffers = uint8_t[kChunkSets][config::kStoreBuffers][config::kStoreBytes];

// Of one math warpgroup.
struct HiddenGradMemory {
  ChunkBuffers* buffers;
  uint64_t z_full[kChunkSets];  // phase n: the set's n-th chunk of Z is there
  uint32_t phases;              // bit s: parity of set s's next phase
  float dots[2][4][32];         // [chunk % 2][warp][lane]

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init(ChunkBuffers& of_warpgroup) {
    for (uint64_t& barrier : z_full) ptx::mbarrier_init(&barrier, 1);
    buffers = &of_warpgroup;
    phases = 0;
  }
};

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

// Gate and up (or x) of a thread's four elements of 8 tokens by 16 columns: pairs of tokens of its
// two columns.
struct ZPairs {
  uint32_t gate[2];
  uint32_t up[2];
};

// Where a thread finds and puts its elements of 8 tokens in a chunk's buffers.
template <bool kGated>
class ChunkAccess {
 public:
  FM_DEVICE ChunkAccess(uint32_t buffers, bool interleaved)
      : buffers_(buffers), interleaved_(kGated && interleaved) {}

  FM_DEVICE ZPairs load(int group) const {
    ZPairs z{};
    if (!interleaved_) {
      ptx::ldmatrix_x2_trans(z.gate, row_address(group, 0));
      if constexpr (kGated) ptx::ldmatrix_x2_trans(z.up, row_address(group, 1));
      return z;
    }
    FM_UNROLL
    for (int column = 0; column < 2; ++column) {
      const uint32_t first = ptx::ld_shared(word_address(group, 0, column));
      const uint32_t second = ptx::ld_shared(word_address(group, 1, column));
      z.gate[column] = __byte_perm(first, second, kLowHalves);
      z.up[column] = __byte_perm(first, second, kHighHalves);
    }
    return z;
  }
  FM_DEVICE void store(int group, const ZPairs& grad, const uint32_t (&activated)[2]) const {
    ptx::stmatrix_x2_trans(row_address(group, 2), activated);
    if (!interleaved_) {
      ptx::stmatrix_x2_trans(row_address(group, 0), grad.gate);
      if constexpr (kGated) ptx::stmatrix_x2_trans(row_address(group, 1), grad.up);
      return;
    }
    FM_UNROLL
    for (int column = 0; column < 2; ++column) {
      const uint32_t gate = grad.gate[column], up = grad.up[column];
      ptx::st_shared(word_address(group, 0, column), __byte_perm(gate, up, kLowHalves));
      ptx::st_shared(word_address(group, 1, column), __byte_perm(gate, up, kHighHalves));
    }
  }

 private:
  static constexpr uint32_t kLowHalves = 0x5410;
  static constexpr uint32_t kHighHalves = 0x7632;
  FM_DEVICE static uint32_t warp_idx() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup / 32;
  }

  // Of the 8 x 8 matrices of this warp's 16 columns: lanes 0-7 the first, 8-15 the second.
  FM_DEVICE uint32_t row_address(int group, int buffer) const {
    const uint32_t lane = lane_of_warp();
    const uint32_t token = lane % 8;
    const uint32_t unit = 2 * warp_idx() + (lane >> 3 & 1);
    return buffers_ + buffer * config::kStoreBytes + group * 1024 + token * 128 +
           ((unit ^ token) << 4);
  }
  // Of gate and up of one element: token 2 q + second, the thread's column 0 or 1 (8 further).
  FM_DEVICE uint32_t word_address(int group, int second, int column) const {
    const uint32_t lane = lane_of_warp();
    const uint32_t warp = warp_idx();
    const uint32_t token = lane % 4 * 2 + second;
    const uint32_t place = warp % 2 * 16 + lane / 4 + column * 8;
    return buffers_ + warp / 2 * config::kStoreBytes + group * 1024 + token * 128 +
           ((place / 4 ^ token) << 4) + place % 4 * 4;
  }

  uint32_t buffers_;
  bool interleaved_;
};

// Sums over the warp's 16 columns of two tokens' values (of tokens 2 q and 2 q + 1 of a group of 8).
// Every lane gets that of token 2 (lane % 4) + lane / 4 % 2.
FM_DEVICE float sum_of_columns(float even, float odd) {
  constexpr uint32_t kAll = 0xFFFFFFFF;
  const bool is_odd = (lane_of_warp() >> 2 & 1) != 0;
  float sum = is_odd ? odd : even;
  sum += __shfl_xor_sync(kAll, is_odd ? even : odd, 4);
  sum += __shfl_xor_sync(kAll, sum, 8);
  sum += __shfl_xor_sync(kAll, sum, 16);
  return sum;
}

// One chunk: 64 columns of 32 rows. grads: the half's dA', two tokens a word; dots: what lane l has summed of its row,
// l / 8 * 8 + 2 (l % 4) + l / 4 % 2.
template <class Element, bool kGated, int kMaxGroups, class Function>
FM_DEVICE float differentiate_chunk(const kernel::BackwardParams& params, const Function& function,
                                    const uint32_t* grads, int first_group, uint32_t buffers,
                                    int32_t row, float dots) {
  const ChunkAccess<kGated> access(buffers, params.sizes.interleaved);
  const bool on_input = params.sizes.weight_on_input;
  const auto& activation = params.forward.activation;
  FM_UNROLL
  for (int group = 0; group < config::kStoreTokens / 8; ++group) {
    if (first_group + group >= kMaxGroups) break;
    const uint32_t lane = lane_of_warp();
    float2 weights = {1.0f, 1.0f};
    if (!on_input) {
      weights = *reinterpret_cast<const float2*>(params.forward.memory.row_weight + row +
                                                 group * 8 + lane % 4 * 2);
    }
    ZPairs z = access.load(group);
    uint32_t activated[2];
    float even = 0.0f, odd = 0.0f;
    FM_UNROLL
    for (int column = 0; column < 2; ++column) {
      const float2 gate = Element::widen(z.gate[column]);
      const float2 up = kGated ? Element::widen(z.up[column]) : float2{};
      uint32_t pair = grads[(first_group + group) * 2 + column];
      ptx::compute_now(pair);  // not unpacked ahead of its use
      const float2 grad = Element::widen(pair);
      const auto first = differentiate<kGated>(activation, function, gate.x, up.x, grad.x);
      const auto second = differentiate<kGated>(activation, function, gate.y, up.y, grad.y);
      even = fmaf(first.activated, grad.x, even);
      odd = fmaf(second.activated, grad.y, odd);
      activated[column] =
          Element::pack(weights.x * first.activated, weights.y * second.activated);
      z.gate[column] = Element::pack(weights.x * first.grad_gate, weights.y * second.grad_gate);
      if constexpr (kGated) {
        z.up[column] = Element::pack(weights.x * first.grad_up, weights.y * second.grad_up);
      }
    }
    access.store(group, z, activated);
    const float sum = sum_of_columns(even, odd);
    dots += lane / 8 == group ? sum : 0.0f;
  }
  return dots;
}

// One math warpgroup's chunks of Z: set s has those of half s. Whole warpgroup, converged.
class HiddenGrad {
 public:
  // memory: of both warpgroups.
  FM_DEVICE explicit HiddenGrad(HiddenGradMemory (&memory)[2]) : memory_(memory) {}

  // Asks for the first chunks of a tile; before its products.
  FM_DEVICE void request(const kernel::BackwardParams& params, const HiddenPlace& place,
                         sync::Waiter& waiter) {
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

  // dA' is rounded to the layer's element type first, as a layer of plain products does: 176 sums
  // leave no registers for the activation's derivative.
  template <class Config>
  FM_DEVICE void finish(const kernel::BackwardParams& params, const float* sums, Staging& staging,
                        const HiddenPlace& place, sync::Waiter& waiter) {
    uint32_t grads[Config::value.max_tokens / 2];
    FM_UNROLL
    for (int i = 0; i < Config::value.max_tokens / 2; ++i) {
      grads[i] = ElementOf<Config::value.element>::pack(sums[2 * i], sums[2 * i + 1]);
      ptx::compute_now(grads[i]);
    }
    with_slope(params.forward.activation, [&](const auto& function) {
#ifdef QUICK2
      return finish_chunks<Config, true>(params, function, grads, staging, place, waiter);
#endif
      if (params.sizes.gated) {
        finish_chunks<Config, true>(params, function, grads, staging, place, waiter);
      } else {
        finish_chunks<Config, false>(params, function, grads, staging, place, waiter);
      }
    });
  }

 private:
  FM_DEVICE HiddenGradMemory& memory() const {
    return memory_[static_cast<uint32_t>(ptx::thread_idx()) / config::kWarpgroup - 1];
  }

  // Starts the copy of a chunk of Z. The storer; its last stores out of this set have been read.
  FM_DEVICE void request_z(const kernel::BackwardParams& params, const HiddenPlace& place,
                           int row_chunk, int half) {
    HiddenGradMemory& own = memory();
    const int num_buffers = params.sizes.gated ? 2 : 1;
    const int32_t column = place.column() + half * config::kHalfRows;
    const int32_t row = place.row_begin() + row_chunk * config::kStoreTokens;
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                                   &own.z_full[half], num_buffers * config::kStoreBytes);
#pragma unroll 1
    for (int buffer = 0; buffer < num_buffers; ++buffer) {
      const int32_t at[2] = {z_column(params, column, buffer), row};
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, (*own.buffers)[half][buffer],
                                &params.z_in, at, &own.z_full[half]);
    }
  }

  template <class Config, bool kGated, class Function>
  FM_DEVICE void finish_chunks(const kernel::BackwardParams& params, const Function& function,
                               const uint32_t* grads, Staging& staging, const HiddenPlace& place,
                               sync::Waiter& waiter) {
    constexpr config::GroupedProduct kConfig = Config::value;
    constexpr int kChunks = (kConfig.max_tokens + config::kStoreTokens - 1) / config::kStoreTokens;
    using Element = ElementOf<kConfig.element>;
    FM_UNROLL
    for (int row_chunk = 0; row_chunk < kChunks; ++row_chunk) {
      if (row_chunk * config::kStoreTokens >= place.num_rows()) break;
      float dots = 0.0f;
      FM_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (half >= place.num_halves(params.forward.sizes.intermediate)) break;
        request_next(params, place, row_chunk, half);
        waiter.wait(&memory().z_full[half], (phases() >> half ^ row_chunk) & 1,
                    sync::WaitTag::kStageFull);
        const uint32_t buffers = ptx::shared_address((*memory().buffers)[half]);
        dots = differentiate_chunk<Element, kGated, kConfig.max_tokens / 8>(
            params, function, grads + half * (kConfig.max_tokens / 4), row_chunk * 4, buffers,
            place.row_begin() + row_chunk * config::kStoreTokens, dots);
        put_dots(row_chunk, dots);
        ptx::fence_proxy_async(ptx::space_shared);
        staging.sync();
        if (Staging::is_storer()) store<kGated>(params, place, row_chunk, half);
      }
      write_parts(params, place, row_chunk);
    }
    staging.sync();  // all have read the phases
    if (Staging::is_storer()) pass_phases(params, place);
  }

  // Bit s: parity of set s's phase at the tile's first chunk.
  FM_DEVICE uint32_t phases() const {
    return *const_cast<const volatile uint32_t*>(&memory().phases);
  }
  FM_DEVICE void pass_phases(const kernel::BackwardParams& params, const HiddenPlace& place) {
    const int32_t num_chunks =
        (place.num_rows() + config::kStoreTokens - 1) / config::kStoreTokens;
    const int32_t num_halves = place.num_halves(params.forward.sizes.intermediate);
    if (num_chunks % 2 != 0) memory().phases = phases() ^ ((1u << num_halves) - 1);
  }

  // Asks for the chunk after this one, if its set is not the one it comes to now.
  FM_DEVICE void request_next(const kernel::BackwardParams& params, const HiddenPlace& place,
                              int row_chunk, int half) {
    if (!Staging::is_storer()) return;
    const int32_t num_halves = place.num_halves(params.forward.sizes.intermediate);
    const bool is_first = row_chunk == 0 && half == 0;
    const int next_chunk = row_chunk + half;
    if (is_first || next_chunk * config::kStoreTokens >= place.num_rows()) return;
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    request_z(params, place, next_chunk, num_halves == 2 ? 1 - half : 0);
  }

  // The storer.
  template <bool kGated>
  FM_DEVICE void store(const kernel::BackwardParams& params, const HiddenPlace& place,
                       int row_chunk, int half) {
    auto& buffers = (*memory().buffers)[half];
    const int32_t first = row_chunk * config::kStoreTokens;
    const int32_t num_rows = min(config::kStoreTokens, place.num_rows() - first);
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
    const uint32_t warp_idx = static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup / 32;
    memory().dots[row_chunk % 2][warp_idx][lane_of_warp()] = dots;
  }
  // The four warps' sums of a chunk's rows, which all have put; the first warp adds them.
  FM_DEVICE void write_parts(const kernel::BackwardParams& params, const HiddenPlace& place,
                             int row_chunk) {
    if (ptx::thread_idx() % config::kWarpgroup >= 32) return;
    const uint32_t lane = lane_of_warp();
    const int32_t token =
        row_chunk * config::kStoreTokens + lane / 8 * 8 + lane % 4 * 2 + (lane >> 2 & 1);
    if (token >= place.num_rows() || place.column() >= params.forward.sizes.intermediate) return;
    const auto& of_chunk = memory().dots[row_chunk % 2];
    params.parts[int64_t{place.weight_tile_idx()} * params.sizes.max_rows + place.row_begin() +
                 token] =
        ((of_chunk[0][lane] + of_chunk[1][lane]) + of_chunk[2][lane]) + of_chunk[3][lane];
  }

  HiddenGradMemory (&memory_)[2];
};

}  // namespace flashmoe::cuda::tile
