// The epilogue of dA' = dY W_down: reads Z, writes w A and dZ, and sums <A, dA'> of every row.
//
// Z comes chunk by chunk (16 rows by 64 columns of A: one or two boxes) into shared memory, dZ
// takes its place there, and all goes out by the copy engine. Four sets of buffers: one chunk is on
// its way in, one waits until all warps have put theirs and one is on its way out while another is
// worked on. Each warp starts the copies of one set.
//
// One body serves all chunks of a tile, which takes its sums out of the registers by a switch:
// unrolled, it is more instructions than any instruction cache holds (docs/backward_pass.md).
#pragma once

#include "cuda/config/backward.h"
#include "cuda/kernel/backward.h"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/sync/wait.cuh"
#include "cuda/tile/backward_load.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/slope.cuh"

namespace flashmoe::cuda::tile {

// [set][gate (or x), up, A]
using HiddenChunks = uint8_t[config::kHiddenSets][config::kHiddenBuffers][config::kHiddenBytes];

inline constexpr int32_t kGroupRows = 8;
inline constexpr int kGroupSums = 4;  // of a thread: two of 8 rows by two columns
inline constexpr int kChunkGroups = config::kHiddenRows / kGroupRows;
inline constexpr int kMathWarpsOfGroup = config::kWarpgroup / 32;
static_assert(config::kHiddenSets == kMathWarpsOfGroup && kChunkGroups == 2);

// Where the next copies of a set are from or to. A warp's first lane has it in shared memory:
// coordinates made anew for every copy took it a third of a chunk's time.
struct HiddenCopy {
  int32_t row;
  int32_t end;  // of the tile's rows
  int32_t column;
  int32_t z_column;  // of buffer 0
};

// Of one math warpgroup. Chunk n, counted over all its tiles, has set n % kHiddenSets, whose copies
// warp n % kHiddenSets starts.
struct HiddenGradMemory {
  HiddenChunks* chunks;
  uint64_t z_full[config::kHiddenSets];  // phase n: the set's n-th chunk of Z is there
  uint64_t filled[config::kHiddenSets];  // phase n: all warps have put its n-th gradients
  uint32_t num_before;                   // chunks of the tiles before
  uint32_t num_chunks;                   // of the tile
  int32_t num_halves;                    // of 64 columns that the tile has
  HiddenCopy copies[config::kHiddenSets];
  alignas(8) float weights[config::kBackwardBlockRows];       // of the tile's rows
  float dots[kMathWarpsOfGroup][config::kBackwardBlockRows];  // sums over the warp's columns

  // One thread of the CTA, before the cluster is synchronised.
  FM_DEVICE void init(uint8_t* staging) {
    for (uint64_t& barrier : z_full) ptx::mbarrier_init(&barrier, 1);
    for (uint64_t& barrier : filled) ptx::mbarrier_init(&barrier, kMathWarpsOfGroup);
    chunks = reinterpret_cast<HiddenChunks*>(staging);
    num_before = 0;
  }
};

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
    ptx::prefetch_tensor_2d(&params.z_ahead[makes_z(params)], z_column(params, of_half, i / 2),
                            tile.row_begin);
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

// Sums over the warp's 16 columns of the values of tokens 2 q and 2 q + 1 of two groups of 8, q =
// lane % 4. Every lane gets that of token 2 q + lane / 4 % 2 of group lane / 8 % 2.
FM_DEVICE float sum_of_columns(const float (&even)[kChunkGroups],
                               const float (&odd)[kChunkGroups]) {
  constexpr uint32_t kAll = 0xFFFFFFFF;
  const bool is_odd = (lane_of_warp() >> 2 & 1) != 0;
  const bool is_second = (lane_of_warp() >> 3 & 1) != 0;
  float sums[kChunkGroups];
  FM_UNROLL
  for (int group = 0; group < kChunkGroups; ++group) {
    sums[group] = is_odd ? odd[group] : even[group];
    sums[group] += __shfl_xor_sync(kAll, is_odd ? even[group] : odd[group], 4);
  }
  float sum = is_second ? sums[1] : sums[0];
  sum += __shfl_xor_sync(kAll, is_second ? sums[0] : sums[1], 8);
  sum += __shfl_xor_sync(kAll, sum, 16);
  return sum;
}

// One chunk: 64 columns of 16 rows. buffers: address of the chunk's first; grads: their dA';
// weights: of the rows. Returns the lane's sum of <A, dA'>, as sum_of_columns(). Both groups'
// chains of operations run side by side: one warp a scheduler has nothing else to hide them.
template <class Element, ZOrder kOrder, class Function>
FM_DEVICE float differentiate_chunk(const config::Activation& activation, const Function& function,
                                    uint32_t buffers,
                                    const float (&grads)[kChunkGroups * kGroupSums],
                                    const float* weights) {
  constexpr bool kGated = is_gated(kOrder);
  constexpr uint32_t kGroupBytes = kGroupRows * config::kHalfRows * config::kElementBytes;
  HiddenWords z[kChunkGroups];
  float even[kChunkGroups] = {}, odd[kChunkGroups] = {};
  FM_UNROLL
  for (int group = 0; group < kChunkGroups; ++group) {
    z[group] = ChunkAccess<kOrder>(buffers + group * kGroupBytes).load();
  }
  FM_UNROLL
  for (int group = 0; group < kChunkGroups; ++group) {
    const float2 weight =
        *reinterpret_cast<const float2*>(weights + group * kGroupRows + lane_of_warp() % 4 * 2);
    uint32_t activated[2];
    FM_UNROLL
    for (int column = 0; column < 2; ++column) {
      const float* grad = grads + group * kGroupSums + column * 2;
      const float2 gate = Element::widen(z[group].gate[column]);
      const float2 up = Element::widen(z[group].up[column]);
      const HiddenSlopes first =
          differentiate<kGated>(activation, function, gate.x, up.x, weight.x * grad[0]);
      even[group] = fmaf(first.activated, grad[0], even[group]);
      const HiddenSlopes second =
          differentiate<kGated>(activation, function, gate.y, up.y, weight.y * grad[1]);
      odd[group] = fmaf(second.activated, grad[1], odd[group]);
      z[group].gate[column] = Element::pack(first.grad_gate, second.grad_gate);
      z[group].up[column] = Element::pack(first.grad_up, second.grad_up);
      activated[column] = Element::pack(weight.x * first.activated, weight.y * second.activated);
    }
    ChunkAccess<kOrder>(buffers + group * kGroupBytes).store(z[group], activated);
  }
  return sum_of_columns(even, odd);
}

// Where chunk c of a tile is, and which of its warpgroup's chunks it is.
struct HiddenChunk {
  int32_t row_chunk;
  int32_t half;
  uint32_t idx;  // over all tiles

  // num_halves: 1 or 2. before: chunks of the tiles before.
  FM_DEVICE HiddenChunk(uint32_t c, int32_t num_halves, uint32_t before)
      : row_chunk(static_cast<int32_t>(num_halves == 2 ? c / 2 : c)),
        half(static_cast<int32_t>(num_halves == 2 ? c % 2 : 0)),
        idx(before + c) {}
  FM_DEVICE uint32_t set() const { return idx % config::kHiddenSets; }
  FM_DEVICE uint32_t parity() const { return idx / config::kHiddenSets % 2; }
};

// One math warpgroup's chunks of Z. Whole warpgroup, converged.
class HiddenGrad {
 public:
  FM_DEVICE explicit HiddenGrad(HiddenGradMemory& memory) : memory_(memory) {}

  // Loads the rows' weights and asks for the first chunks of a tile; before its products. Nothing
  // is read out of the chunks' memory any more: tiles of weights' gradients come later in the walk,
  // and pre-activations are counted only when they are stored.
  FM_DEVICE void request(const kernel::BackwardParams& params, const HiddenPlace& place,
                         sync::Waiter& waiter) {
    for (int32_t row = thread_of_warpgroup(); row < place.num_rows(); row += config::kWarpgroup) {
      memory_.weights[row] = params.sizes.weight_on_input
                                 ? 1.0f
                                 : params.forward.memory.row_weight[place.row_begin() + row];
    }
    if (lane_of_warp() != 0) return;
    const int32_t num_halves = place.num_halves(params.forward.sizes.intermediate);
    if (warp_idx() == 0) {
      const int32_t row_chunks = (place.num_rows() + config::kHiddenRows - 1) / config::kHiddenRows;
      memory_.num_halves = num_halves;
      memory_.num_chunks = static_cast<uint32_t>(row_chunks * num_halves);
    }
    if (makes_z(params)) {
      waiter.wait_rows(&params.counters.z_done[place.row_begin() / config::kRowGroup],
                       params.sizes.pre_activation_pairs * config::kClusterSize,
                       sync::WaitTag::kGradDone);
      ptx::fence_proxy_async(ptx::space_global);
    }
    const uint32_t c = (warp_idx() - num_before()) % config::kHiddenSets;
    const HiddenChunk chunk(c, num_halves, num_before());
    const int32_t column = place.column() + chunk.half * config::kHalfRows;
    const int32_t end = place.row_begin() + place.num_rows();
    own_copy().row =
        num_halves == 0 ? end : place.row_begin() + chunk.row_chunk * config::kHiddenRows;
    own_copy().end = end;
    own_copy().column = column;
    own_copy().z_column = z_column(params, column, 0);
    request_z(params);
  }

  template <class Config>
  FM_DEVICE void finish(const kernel::BackwardParams& params, const float* sums, Staging& staging,
                        const HiddenPlace& place, sync::Waiter& waiter) {
    staging.sync();  // the weights are there
    with_slope(params.forward.activation, [&](const auto& function) {
      if (params.sizes.interleaved) {
        finish_chunks<Config, ZOrder::kInterleaved>(params, function, sums, waiter);
      } else if (params.sizes.gated) {
        finish_chunks<Config, ZOrder::kHalves>(params, function, sums, waiter);
      } else {
        finish_chunks<Config, ZOrder::kPlain>(params, function, sums, waiter);
      }
    });
    store_if_due(params, num_chunks(), waiter);
    store_if_due(params, num_chunks() + 1, waiter);
    staging.sync();  // the dots are there, and nobody reads num_before
    write_parts(params, place);
    if (Staging::is_storer()) memory_.num_before = num_before() + num_chunks();
    staging.drain_all();
  }

 private:
  FM_DEVICE static uint32_t thread_of_warpgroup() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup;
  }
  FM_DEVICE static uint32_t warp_idx() { return thread_of_warpgroup() / 32; }

  // Read again wherever they are needed, as HiddenPlace.
  FM_DEVICE const volatile HiddenGradMemory& words() const { return memory_; }
  FM_DEVICE uint32_t num_before() const { return words().num_before; }
  FM_DEVICE uint32_t num_chunks() const { return words().num_chunks; }
  FM_DEVICE HiddenChunk chunk_at(uint32_t c) const { return {c, words().num_halves, num_before()}; }
  FM_DEVICE volatile HiddenCopy& own_copy() {
    return const_cast<volatile HiddenCopy&>(memory_.copies[warp_idx()]);
  }
  // Columns from buffer 0 of a chunk to buffer 1.
  FM_DEVICE static int32_t up_columns(const kernel::BackwardParams& params) {
    return params.sizes.interleaved ? config::kHalfRows : params.forward.sizes.intermediate;
  }

  // Starts the copies of Z into the warp's set, whose stores have been read. Its first lane.
  FM_DEVICE void request_z(const kernel::BackwardParams& params) {
    const int32_t row = own_copy().row;
    if (row >= own_copy().end) return;
    uint64_t* full = &memory_.z_full[warp_idx()];
    auto& buffers = (*memory_.chunks)[warp_idx()];
    const CUtensorMap& z = params.z_in[makes_z(params)];
    const int32_t column = own_copy().z_column;
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full,
                                   (params.sizes.gated ? 2 : 1) * config::kHiddenBytes);
    const int32_t at[2] = {column, row};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, buffers[0], &z, at, full);
    if (!params.sizes.gated) return;
    const int32_t up_at[2] = {column + up_columns(params), row};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, buffers[1], &z, up_at, full);
  }

  template <class Config, ZOrder kOrder, class Function>
  FM_DEVICE void finish_chunks(const kernel::BackwardParams& params, const Function& function,
                               const float* sums, sync::Waiter& waiter) {
    constexpr config::GroupedProduct kConfig = Config::value;
    static_assert(kConfig.max_tokens % config::kHiddenRows == 0);
    constexpr int32_t kRowChunks = kConfig.max_tokens / config::kHiddenRows;
    using Element = ElementOf<kConfig.element>;
#pragma unroll 1
    for (uint32_t c = 0; c < num_chunks(); ++c) {
      store_if_due(params, c, waiter);
      request_if_due(params, c);
      const HiddenChunk chunk = chunk_at(c);
      float grads[kChunkGroups * kGroupSums];
      take_sums<2 * kRowChunks>(sums, chunk.half * kRowChunks + chunk.row_chunk, grads);
      waiter.wait(&memory_.z_full[chunk.set()], chunk.parity(), sync::WaitTag::kStageFull);
      const float dot = differentiate_chunk<Element, kOrder>(
          params.forward.activation, function, ptx::shared_address((*memory_.chunks)[chunk.set()]),
          grads, memory_.weights + chunk.row_chunk * config::kHiddenRows);
      put_dots(chunk, dot);
      ptx::fence_proxy_async(ptx::space_shared);
      __syncwarp();
      if (lane_of_warp() == 0) {
        ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                             &memory_.filled[chunk.set()]);
      }
    }
  }

  // Whether the warp's set has chunk c of the tile, and the lane is its first.
  FM_DEVICE bool is_own(uint32_t c) const {
    return lane_of_warp() == 0 && (num_before() + c) % config::kHiddenSets == warp_idx();
  }
  // Stores chunk c - 2, whose gradients all warps have put meanwhile.
  FM_DEVICE void store_if_due(const kernel::BackwardParams& params, uint32_t c,
                              sync::Waiter& waiter) {
    if (c < 2 || !is_own(c - 2)) return;
    waiter.wait(&memory_.filled[warp_idx()], (num_before() + c - 2) / config::kHiddenSets % 2,
                sync::WaitTag::kStageFull);
    store(params);
  }
  // Asks for chunk c + 1, whose set was stored from a chunk ago.
  FM_DEVICE void request_if_due(const kernel::BackwardParams& params, uint32_t c) {
    if (c < 3 || !is_own(c + 1)) return;
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    request_z(params);
  }

  // Stores the warp's set, which then is of the chunk kHiddenSets later. Its first lane.
  FM_DEVICE void store(const kernel::BackwardParams& params) {
    auto& buffers = (*memory_.chunks)[warp_idx()];
    const int32_t row = own_copy().row;
    const int32_t num_rows = min(config::kHiddenRows, own_copy().end - row);
    const auto store_to = [&](const CUtensorMap& out, int32_t column, int buffer) {
      const int32_t at[4] = {column, kWindow - num_rows, row + num_rows, kWindow};
      ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &out, at, buffers[buffer]);
    };
    const int32_t column = own_copy().z_column;
    store_to(params.grad_z_out, column, 0);
    if (params.sizes.gated) store_to(params.grad_z_out, column + up_columns(params), 1);
    store_to(params.hidden_out, own_copy().column, 2);
    ptx::cp_async_bulk_commit_group();
    own_copy().row = row + config::kHiddenRows * (words().num_halves == 2 ? config::kHiddenSets / 2
                                                                          : config::kHiddenSets);
  }

  // dot: as sum_of_columns() says. The second half of a row follows the first, in the same lane.
  FM_DEVICE void put_dots(const HiddenChunk& chunk, float dot) {
    const uint32_t lane = lane_of_warp();
    if (lane >= config::kHiddenRows) return;
    const uint32_t row =
        chunk.row_chunk * config::kHiddenRows + lane / 8 * kGroupRows + lane % 4 * 2 + lane / 4 % 2;
    float& sum = memory_.dots[warp_idx()][row];
    sum = chunk.half == 0 ? dot : sum + dot;
  }
  // Adds the warps' sums of the tile's rows.
  FM_DEVICE void write_parts(const kernel::BackwardParams& params, const HiddenPlace& place) {
    if (place.column() >= params.forward.sizes.intermediate) return;
    float* parts =
        params.parts + int64_t{place.weight_tile_idx()} * params.sizes.max_rows + place.row_begin();
#pragma unroll 1
    for (int32_t row = thread_of_warpgroup(); row < place.num_rows(); row += config::kWarpgroup) {
      const auto& dots = memory_.dots;
      parts[row] = ((dots[0][row] + dots[1][row]) + dots[2][row]) + dots[3][row];
    }
  }

  HiddenGradMemory& memory_;
};

}  // namespace flashmoe::cuda::tile
