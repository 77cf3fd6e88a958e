// The epilogue of dA' = dY W_down: reads Z, writes w A and dZ, and sums <A, dA'> of every row.
//
// Z comes chunk by chunk (16 rows by 64 columns of A: one box, or two halves of one) into shared
// memory, dZ takes its place there, and all goes out by the copy engine. Four sets of buffers: two
// chunks are on their way in and one is on its way out while another is worked on. Each warp starts
// the copies of one set: it stores chunk c - 1 in the middle of chunk c, when all warps have put
// theirs, and asks for chunk c + 3 at the beginning of the next.
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

// Where the next copies of a set are from or to, in shared memory: coordinates made anew for every
// copy took a third of a chunk's time.
struct HiddenCopy {
  const CUtensorMap* z;  // where Z is loaded from
  int32_t row;
  int32_t end;  // of the tile's rows
  int32_t column;
  int32_t z_column;  // of buffer 0
};

// Of one math warpgroup. Chunk n of a tile has set n % kHiddenSets, whose copies warp n %
// kHiddenSets starts. A tile has an even number of phases of each set, so that the parities of its
// chunks follow from their numbers: those that it has no chunks for are ended at once.
struct HiddenGradMemory {
  HiddenChunks* chunks;
  uint64_t z_full[config::kHiddenSets];  // phase n: the set's n-th chunk of Z is there
  uint64_t filled[config::kHiddenSets];  // phase n: all warps have put its n-th gradients
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

// Where a thread finds and puts its elements of 8 tokens in a chunk's buffers. What follows from
// the thread's index is found once.
template <ZOrder kOrder>
class ChunkAccess {
 public:
  // chunks: address of the first buffer of all.
  FM_DEVICE explicit ChunkAccess(uint32_t chunks)
      : place_(kKeepsPlace ? chunks + matrix_place() : chunks) {}

  // buffers: address of the chunk's first, at the first of the 8 tokens.
  FM_DEVICE HiddenWords load(uint32_t buffers) const {
    HiddenWords z{};
    const uint32_t at = address(buffers);
    if constexpr (kOrder == ZOrder::kPlain) ptx::ldmatrix_x2_trans(at, z.gate);
    if constexpr (kOrder == ZOrder::kHalves) ptx::ldmatrix_x4_trans(at, z.gate, z.up);
    if constexpr (kOrder == ZOrder::kInterleaved) {
      FM_UNROLL
      for (int column = 0; column < 2; ++column) {
        const uint32_t first = ptx::ld_shared(word_at(at, 0, column));
        const uint32_t second = ptx::ld_shared(word_at(at, 1, column));
        z.gate[column] = __byte_perm(first, second, kLowHalves);
        z.up[column] = __byte_perm(first, second, kHighHalves);
      }
    }
    return z;
  }
  FM_DEVICE void store(uint32_t buffers, const HiddenWords& grad,
                       const uint32_t (&activated)[2]) const {
    const uint32_t at = address(buffers);
    // Of two matrices lanes 0 to 15 give the addresses: those of the first buffer.
    const uint32_t row = kKeepsPlace ? at : buffers + place_ + matrix_place();
    ptx::stmatrix_x2_trans(row + 2 * config::kHiddenBytes, activated);
    if constexpr (kOrder == ZOrder::kPlain) ptx::stmatrix_x2_trans(at, grad.gate);
    if constexpr (kOrder == ZOrder::kHalves) {
      ptx::stmatrix_x4_trans(at, {grad.gate[0], grad.gate[1], grad.up[0], grad.up[1]});
    }
    if constexpr (kOrder == ZOrder::kInterleaved) {
      FM_UNROLL
      for (int column = 0; column < 2; ++column) {
        ptx::st_shared(word_at(at, 0, column),
                       __byte_perm(grad.gate[column], grad.up[column], kLowHalves));
        ptx::st_shared(word_at(at, 1, column),
                       __byte_perm(grad.gate[column], grad.up[column], kHighHalves));
      }
    }
  }

 private:
  static constexpr uint32_t kLowHalves = 0x5410;
  static constexpr uint32_t kHighHalves = 0x7632;
  // Words have no register to spare.
  static constexpr bool kKeepsPlace = kOrder != ZOrder::kInterleaved;

  FM_DEVICE uint32_t address(uint32_t buffers) const {
    return buffers + place_ + (kKeepsPlace ? 0 : word_place());
  }
  FM_DEVICE static uint32_t warp_idx() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup / 32;
  }

  // Of a row of an 8 x 8 matrix: token lane % 8, the lane / 8 % 2'th half of the warp's 16 columns;
  // the last 16 lanes' in the second buffer.
  FM_DEVICE static uint32_t matrix_place() {
    const uint32_t token = lane_of_warp() % 8;
    return lane_of_warp() / 16 * config::kHiddenBytes + token * 128 +
           ((2 * warp_idx() + lane_of_warp() / 8 % 2 ^ token) << 4);
  }
  // Of gate and up of the thread's first element: token 2 q, first column.
  FM_DEVICE static uint32_t word_place() {
    const uint32_t token = lane_of_warp() % 4 * 2;
    const uint32_t element = warp_idx() % 2 * 16 + lane_of_warp() / 4;
    return warp_idx() / 2 * config::kHiddenBytes + token * 128 + ((element / 4 ^ token) << 4) +
           element % 4 * 4;
  }
  // Of token 2 q + second and either column, from the first's: units of 16 bytes are swizzled by
  // the token's last three bits, and two units on is 8 columns on.
  FM_DEVICE static uint32_t word_at(uint32_t first, uint32_t second, uint32_t column) {
    return first ^ second * (128 + 16) ^ column * 32;
  }

  uint32_t place_;
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

// A thread's <A, dA'> of its rows of 16: tokens 2 q and 2 q + 1 of either group of 8.
struct HiddenDots {
  float even[kChunkGroups] = {};
  float odd[kChunkGroups] = {};
};

constexpr uint32_t kGroupBytes = kGroupRows * config::kHalfRows * config::kElementBytes;

// Z of one chunk: 64 columns of 16 rows. buffers: address of the chunk's first.
template <ZOrder kOrder>
FM_DEVICE void load_chunk(const ChunkAccess<kOrder>& access, uint32_t buffers,
                          HiddenWords (&z)[kChunkGroups]) {
  FM_UNROLL
  for (int group = 0; group < kChunkGroups; ++group) {
    z[group] = access.load(buffers + group * kGroupBytes);
  }
}

// The activation of a thread's elements of 8 rows with its slopes: [column][row].
struct GroupSlopes {
  ValueSlope at[2][2];
};

// Of both groups' gates (or x): the chains of operations of all elements run side by side, as one
// warp a scheduler has nothing else to hide them.
template <class Element, class Function>
FM_DEVICE void find_slopes(const Function& function, const HiddenWords (&z)[kChunkGroups],
                           GroupSlopes (&slopes)[kChunkGroups]) {
  FM_UNROLL
  for (int group = 0; group < kChunkGroups; ++group) {
    FM_UNROLL
    for (int column = 0; column < 2; ++column) {
      const float2 gate = Element::widen(z[group].gate[column]);
      slopes[group].at[column][0] = function(gate.x);
      slopes[group].at[column][1] = function(gate.y);
    }
  }
}

// Puts a chunk's gradients in the place of its Z. grads: dA'; weights: of the rows.
template <class Element, class Function, ZOrder kOrder>
FM_DEVICE void differentiate_chunk(const config::Activation& activation,
                                   const ChunkAccess<kOrder>& access, uint32_t buffers,
                                   HiddenWords (&z)[kChunkGroups],
                                   const GroupSlopes (&slopes)[kChunkGroups],
                                   const float (&grads)[kChunkGroups * kGroupSums],
                                   const float2 (&weights)[kChunkGroups], HiddenDots& dots) {
  constexpr bool kGated = is_gated(kOrder);
  FM_UNROLL
  for (int group = 0; group < kChunkGroups; ++group) {
    const float2 weight = weights[group];
    uint32_t activated[2];
    FM_UNROLL
    for (int column = 0; column < 2; ++column) {
      const float* grad = grads + group * kGroupSums + column * 2;
      const auto& at = slopes[group].at[column];
      const float2 up = Element::widen(z[group].up[column]);
      const HiddenSlopes first =
          differentiate<kGated, Function>(activation, at[0], up.x, weight.x * grad[0]);
      dots.even[group] = fmaf(first.activated, grad[0], dots.even[group]);
      const HiddenSlopes second =
          differentiate<kGated, Function>(activation, at[1], up.y, weight.y * grad[1]);
      dots.odd[group] = fmaf(second.activated, grad[1], dots.odd[group]);
      z[group].gate[column] = Element::pack(first.grad_gate, second.grad_gate);
      z[group].up[column] = Element::pack(first.grad_up, second.grad_up);
      activated[column] = Element::pack(weight.x * first.activated, weight.y * second.activated);
    }
    access.store(buffers + group * kGroupBytes, z[group], activated);
  }
}

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
    __syncwarp();
    if (!ptx::elect_one()) return;
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
    const auto first = static_cast<int32_t>(warp_idx());
    const int32_t both = num_halves == 2 ? 1 : 0;
    const int32_t column = place.column() + (first & both) * config::kHalfRows;
    const int32_t end = place.row_begin() + place.num_rows();
    own_copy().row =
        num_halves == 0 ? end : place.row_begin() + (first >> both) * config::kHiddenRows;
    own_copy().end = end;
    own_copy().z = &params.z_in[makes_z(params)];
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
    const uint32_t num_chunks = words().num_chunks;
    if (is_own(warp_idx(), num_chunks - 1)) store(params, num_chunks - 1, waiter);
    staging.sync();  // the dots are there
    write_parts(params, place);
    if (Staging::is_storer()) fill_rounds(num_chunks);
    staging.drain_all();
  }

 private:
  FM_DEVICE static uint32_t thread_of_warpgroup() {
    return static_cast<uint32_t>(ptx::thread_idx()) % config::kWarpgroup;
  }
  FM_DEVICE static uint32_t warp_idx() { return thread_of_warpgroup() / 32; }

  // Read again wherever they are needed, as HiddenPlace.
  FM_DEVICE const volatile HiddenGradMemory& words() const { return memory_; }
  FM_DEVICE static uint32_t parity_of(uint32_t c) { return c / config::kHiddenSets % 2; }
  FM_DEVICE volatile HiddenCopy& own_copy() {
    return const_cast<volatile HiddenCopy&>(memory_.copies[warp_idx()]);
  }

  // Starts the copy of Z into the warp's set, whose stores have been read. One lane.
  FM_DEVICE void request_z(const kernel::BackwardParams& params) {
    const int32_t row = own_copy().row;
    if (row >= own_copy().end) return;
    uint64_t* full = &memory_.z_full[warp_idx()];
    auto& buffers = (*memory_.chunks)[warp_idx()];
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, full,
                                   (params.sizes.gated ? 2 : 1) * config::kHiddenBytes);
    const int32_t at[3] = {own_copy().z_column, row, 0};
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, buffers[0], own_copy().z, at,
                              full);
  }

  template <class Config, ZOrder kOrder, class Function>
  FM_DEVICE void finish_chunks(const kernel::BackwardParams& params, const Function& function,
                               const float* sums, sync::Waiter& waiter) {
    constexpr config::GroupedProduct kConfig = Config::value;
    static_assert(kConfig.max_tokens % config::kHiddenRows == 0);
    constexpr int32_t kRowChunks = kConfig.max_tokens / config::kHiddenRows;
    using Element = ElementOf<kConfig.element>;
    const uint32_t both = words().num_halves == 2 ? 1 : 0;
    const ChunkAccess<kOrder> access(ptx::shared_address(*memory_.chunks));
    const uint32_t warp = warp_idx();
    HiddenDots dots;
    const uint32_t num_chunks = words().num_chunks;
#pragma unroll 1
    for (uint32_t c = 0; c < num_chunks; ++c) {
      if (is_own(warp, c - 2)) request_next(params);
      const uint32_t set = c % config::kHiddenSets;
      const uint32_t buffers = set * (config::kHiddenBuffers * config::kHiddenBytes);
      waiter.wait(&memory_.z_full[set], parity_of(c), sync::WaitTag::kStageFull);
      HiddenWords z[kChunkGroups];
      load_chunk(access, buffers, z);
      if (is_own(warp, c - 1)) store(params, c - 1, waiter);
      const uint32_t row = (c >> both) * config::kHiddenRows;
      GroupSlopes slopes[kChunkGroups];
      float2 weights[kChunkGroups];
      const auto prepare = [&] {
        find_slopes<Element>(function, z, slopes);
        load_weights(row, weights);
      };
      // What is found before the sums are hides their search; not all functions have the registers.
      if constexpr (!Function::kClamps) prepare();
      float grads[kChunkGroups * kGroupSums];
      take_sums<2 * kRowChunks>(sums, static_cast<int32_t>((c & both) * kRowChunks + (c >> both)),
                                grads);
      if constexpr (Function::kClamps) prepare();
      differentiate_chunk<Element, Function>(params.forward.activation, access, buffers, z, slopes,
                                             grads, weights, dots);
      if ((c & both) == both) {
        put_dots(row, sum_of_columns(dots.even, dots.odd));
        dots = {};
      }
      ptx::fence_proxy_async(ptx::space_shared);
      __syncwarp();
      if (lane_of_warp() == 0) {
        ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                             &memory_.filled[set]);
      }
    }
  }

  // Of a thread's rows of the 16 from `first` on.
  FM_DEVICE void load_weights(uint32_t first, float2 (&weights)[kChunkGroups]) const {
    FM_UNROLL
    for (int group = 0; group < kChunkGroups; ++group) {
      const uint32_t row = first + group * kGroupRows + lane_of_warp() % 4 * 2;
      weights[group] = *reinterpret_cast<const float2*>(memory_.weights + row);
    }
  }
  // Whether chunk c, which may be below 0, is there and of the set of warp `warp_idx`: past the
  // set's first chunk by a multiple of the sets.
  FM_DEVICE static bool is_own(uint32_t warp_idx, uint32_t c) {
    constexpr uint32_t kBelowZero = 1u << 31;
    return ((c - warp_idx) & (kBelowZero | (config::kHiddenSets - 1))) == 0;
  }
  // Asks for the next chunk of the warp's set, which was stored from a chunk ago. Whole warp.
  FM_DEVICE void request_next(const kernel::BackwardParams& params) {
    if (!ptx::elect_one()) return;
    ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    request_z(params);
  }
  // Ends the phases of the chunks that a tile has not, so that the next one's first is of an even
  // round. One thread, when all warps are done with the tile's.
  FM_DEVICE void fill_rounds(uint32_t num_chunks) {
#pragma unroll 1
    for (uint32_t c = num_chunks; c % (2 * config::kHiddenSets) != 0; ++c) {
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                           &memory_.z_full[c % config::kHiddenSets]);
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                           &memory_.filled[c % config::kHiddenSets], kMathWarpsOfGroup);
    }
  }

  // Stores chunk c of the warp's set, which then is of the chunk kHiddenSets later, once all warps
  // have put theirs. Whole warp.
  FM_DEVICE void store(const kernel::BackwardParams& params, uint32_t c, sync::Waiter& waiter) {
    if (!ptx::elect_one()) return;
    waiter.wait(&memory_.filled[warp_idx()], parity_of(c), sync::WaitTag::kStageFull);
    auto& buffers = (*memory_.chunks)[warp_idx()];
    const int32_t row = own_copy().row;
    const int32_t num_rows = min(config::kHiddenRows, own_copy().end - row);
    const int32_t z_at[5] = {own_copy().z_column, kWindow - num_rows, row + num_rows, kWindow, 0};
    ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &params.grad_z_out, z_at,
                              buffers[0]);
    const int32_t at[4] = {own_copy().column, kWindow - num_rows, row + num_rows, kWindow};
    ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &params.hidden_out, at,
                              buffers[2]);
    ptx::cp_async_bulk_commit_group();
    own_copy().row = row + config::kHiddenRows * (words().num_halves == 2 ? config::kHiddenSets / 2
                                                                          : config::kHiddenSets);
  }

  // dot: as sum_of_columns() says, of the 16 rows from `first` on.
  FM_DEVICE void put_dots(uint32_t first, float dot) {
    const uint32_t lane = lane_of_warp();
    if (lane >= config::kHiddenRows) return;
    memory_.dots[warp_idx()][first + lane / 8 * kGroupRows + lane % 4 * 2 + lane / 4 % 2] = dot;
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
