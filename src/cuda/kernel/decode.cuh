// The forward of few tokens (config::Decode) on one rank, as one persistent cooperative kernel.
// Every CTA routes all tokens for itself. Then a warp of it loads weights and the others multiply
// them, each a stage by itself:
//
//   up    a CTA takes 16 gate rows of a chosen expert and their up rows at a time (ungated: 32
//         rows) and makes hidden values of all tokens from them
//   meet  all hidden values are there; the load warp is at the weights of the down product by then
//   down  a CTA takes 8 rows of all chosen experts at a time and makes y of all tokens from them:
//         the sum over experts takes no other CTA
//
// A unit's depth is divided among the warps stage by stage, whatever the number of CTAs, and their
// sums are added in the order of the warps: the bits depend on the sizes alone.
#pragma once

#include "cuda/kernel/decode.h"
#include "cuda/kernel/mark.cuh"
#include "cuda/kernel/roles.cuh"
#include "cuda/kernel/start.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/prefetch.cuh"
#include "cuda/stage/decode_plan.cuh"
#include "cuda/stage/exchange.cuh"
#include "cuda/sync/grid_barrier.cuh"
#include "cuda/sync/ring.cuh"
#include "cuda/tile/activation.cuh"

namespace flashmoe::cuda::kernel {

using config::Decode;

struct DecodeShared {
  // Before the roles begin, the arena of routing.
  alignas(1024) uint8_t stages[Decode::kStages][Decode::kStageBytes];
  // Of the warps' parts of a unit's sums; two, so that the warps meet once a unit.
  float parts[2][Decode::kMathWarps][Decode::kBoxes * Decode::kUpRows][Decode::kTokens];
  sync::RingBarriers<Decode::kStages> barriers;
  stage::DecodePlan plan;
  bool has_scratch;
};

// How many units there are of either product, and stages of one.
struct DecodeWalk {
  int32_t units_of_expert;  // of the up product
  int32_t up_units;
  int32_t up_stages;
  int32_t down_units;
  int32_t down_stages;  // of one expert's rows
  int32_t out_columns;  // of an up unit

  FM_DEVICE DecodeWalk(const DecodeParams& params, int32_t num_chosen) {
    const auto& sizes = params.forward.sizes;
    const auto stages_of = [](int32_t depth, int32_t chunks) {
      return plan::ceil_div(depth, chunks * config::kDepthStep);
    };
    out_columns = params.is_gated ? Decode::kUpRows : Decode::kBoxes * Decode::kUpRows;
    units_of_expert = sizes.intermediate / out_columns;
    up_units = num_chosen * units_of_expert;
    up_stages = stages_of(sizes.hidden, Decode::kUpChunks);
    down_units = sizes.hidden / Decode::kDownRows;
    down_stages = stages_of(sizes.intermediate, Decode::kBoxes * Decode::kDownChunks);
  }
};

// The load warp's thread: stages in the order in which the units need them.
class DecodeLoad {
 public:
  FM_DEVICE DecodeLoad(const DecodeParams& params, DecodeShared& smem, sync::Waiter& waiter)
      : params_(params.forward), smem_(smem), waiter_(waiter), stages_(smem.barriers) {}

  // Gate rows and up rows [row, ...) of an expert.
  FM_DEVICE void load_up(int32_t expert_idx, int32_t row, int32_t num_stages) {
    for (int32_t stage = 0; stage < num_stages; ++stage) {
      const int32_t at[4] = {0, row, stage * Decode::kUpChunks, expert_idx};
      if (!begin(Decode::kBoxes)) return;
      copy(0, params_.up_weights[0], at);
      copy(1, params_.up_weights[1], at);
      stages_.advance();
    }
  }
  // Rows [row, ...) of an expert; the last stage may have one box.
  FM_DEVICE void load_down(int32_t expert_idx, int32_t row, int32_t num_chunks) {
    for (int32_t chunk = 0; chunk < num_chunks; chunk += Decode::kBoxes * Decode::kDownChunks) {
      const bool has_second = chunk + Decode::kDownChunks < num_chunks;
      const int32_t first[4] = {0, row, chunk, expert_idx};
      const int32_t second[4] = {0, row, chunk + Decode::kDownChunks, expert_idx};
      if (!begin(has_second ? 2 : 1)) return;
      copy(0, params_.down_weights, first);
      if (has_second) copy(1, params_.down_weights, second);
      stages_.advance();
    }
  }

 private:
  // False once a wait has run out of time: stages might still be read.
  FM_DEVICE bool begin(int32_t num_boxes) {
    stages_.acquire(waiter_);
    if (!waiter_.alive()) return false;
    stages_.announce(num_boxes * Decode::kBoxBytes);
    return true;
  }
  FM_DEVICE void copy(int32_t box, const CUtensorMap& map, const int32_t (&at)[4]) {
    uint8_t* to = smem_.stages[stages_.slot()] + box * Decode::kBoxBytes;
    ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &map, at, stages_.full());
  }

  const ForwardParams& params_;
  DecodeShared& smem_;
  sync::Waiter& waiter_;
  sync::StageWriter<Decode::kStages> stages_;
};

FM_DEVICE void decode_load(const DecodeParams& params, DecodeShared& smem, const DecodeWalk& walk) {
  if (!ptx::elect_one()) return;
  sync::Waiter waiter(params.forward.waits);
  DecodeLoad load(params, smem, waiter);
  const int32_t num_ctas = ptx::num_blocks();
  for (int32_t unit = ptx::block_idx(); unit < walk.up_units; unit += num_ctas) {
    load.load_up(smem.plan.experts[unit / walk.units_of_expert],
                 unit % walk.units_of_expert * walk.out_columns, walk.up_stages);
  }
  const int32_t chunks = params.forward.sizes.intermediate / config::kDepthStep;
  for (int32_t unit = ptx::block_idx(); unit < walk.down_units; unit += num_ctas) {
    for (int32_t i = 0; i < smem.plan.num_chosen; ++i) {
      load.load_down(smem.plan.experts[i], unit * Decode::kDownRows, chunks);
    }
  }
}

// 16-bit elements of one chunk of 64 k, as a lane has them: 16 bytes of the chunk's first half and
// 16 of its second. A product takes two words of either: its k are those of the four lanes that
// share a row, the same for weights and tokens.
struct ChunkWords {
  uint4 halves[2];

  FM_DEVICE uint32_t word(int step, int i) const {
    const uint4& half = halves[step / 2];
    return step % 2 == 0 ? (i == 0 ? half.x : half.y) : (i == 0 ? half.z : half.w);
  }
};
inline constexpr int kChunkSteps = config::kDepthStep / 16;

// A line of a box, as copies swizzle it.
FM_DEVICE ChunkWords read_line(const uint8_t* box, int32_t line) {
  const int32_t piece = ptx::lane_idx() % 4;
  const auto* pieces = reinterpret_cast<const uint4*>(box + line * Decode::kLineBytes);
  return {{pieces[piece ^ line % 8], pieces[(piece + 4) ^ line % 8]}};
}

// The lane's token in one chunk, or zeros. row: of the token, null if it takes no part.
FM_DEVICE ChunkWords read_token(const uint8_t* row, int32_t chunk) {
  if (row == nullptr) return {};
  const auto* pieces = reinterpret_cast<const uint4*>(row + chunk * Decode::kLineBytes);
  const int32_t piece = ptx::lane_idx() % 4;
  return {{pieces[piece], pieces[piece + 4]}};
}

// A math warp: its lane's token is lane / 4, its sums are of weight rows lane / 4 and of tokens
// 2 (lane % 4) and the next.
template <class Element>
class DecodeMath {
 public:
  FM_DEVICE DecodeMath(const DecodeParams& params, DecodeShared& smem, const DecodeWalk& walk)
      : params_(params.forward),
        hidden_(params.hidden),
        is_gated_(params.is_gated),
        smem_(smem),
        walk_(walk),
        waiter_(params.forward.waits) {}

  FM_DEVICE void run() {
    const int32_t num_ctas = ptx::num_blocks();
    for (int32_t unit = ptx::block_idx(); unit < walk_.up_units; unit += num_ctas) make_up(unit);
    meet_all();
    for (int32_t unit = ptx::block_idx(); unit < walk_.down_units; unit += num_ctas) {
      make_down(unit);
    }
  }

 private:
  using Parts = float[Decode::kMathWarps][Decode::kBoxes * Decode::kUpRows][Decode::kTokens];
  static constexpr int kBarrier = 1;  // 0 is __syncthreads

  FM_DEVICE static int32_t thread() { return ptx::thread_idx() - 32; }
  FM_DEVICE static int32_t warp() { return thread() / 32; }
  FM_DEVICE static void sync() { ptx::barrier_sync(kBarrier, Decode::kMathThreads); }

  FM_DEVICE void meet_all() {
    sync();
    if (thread() == 0) sync::meet(&params_.memory.state->barrier, waiter_);
    sync();
    if (thread() == 0) set_mark_of_first(params_, Mark::kDown);
  }

  // The lane's token as the up product reads it; null if the expert is not one of its own.
  FM_DEVICE const uint8_t* row_of_x(int32_t chosen_idx) const {
    const int32_t token = ptx::lane_idx() / 4;
    if (!smem_.plan.is_routed[chosen_idx][token]) return nullptr;
    return static_cast<const uint8_t*>(params_.x) +
           token * params_.x_stride * config::kElementBytes;
  }
  FM_DEVICE uint8_t* hidden_row(int32_t chosen_idx, int32_t token) const {
    const int64_t row = chosen_idx * Decode::kTokens + token;
    return static_cast<uint8_t*>(hidden_) +
           row * params_.sizes.intermediate * config::kElementBytes;
  }
  FM_DEVICE const uint8_t* row_of_hidden(int32_t chosen_idx) const {
    const int32_t token = ptx::lane_idx() / 4;
    return smem_.plan.is_routed[chosen_idx][token] ? hidden_row(chosen_idx, token) : nullptr;
  }

  // Calls use(stage, its memory) for the warp's stages of the next num_stages, each when it is
  // there; prepare(stage) before.
  template <class Prepare, class Use>
  FM_DEVICE void for_each_stage(int32_t num_stages, const Prepare& prepare, const Use& use) {
    sync::RingCursor<Decode::kStages> at = cursor_;
    at.skip(warp());
    for (int32_t stage = warp(); stage < num_stages; stage += Decode::kMathWarps) {
      const auto prepared = prepare(stage);
      // Another warp had the slot before: until it has given that back, its phase might be taken
      // for this one's.
      waiter_.wait(&smem_.barriers.empty[at.slot()], at.parity() ^ 1, sync::WaitTag::kStageFull);
      waiter_.wait(&smem_.barriers.full[at.slot()], at.parity(), sync::WaitTag::kStageFull);
      use(stage, smem_.stages[at.slot()], prepared);
      __syncwarp();
      if (ptx::lane_idx() == 0) {
        ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                             &smem_.barriers.empty[at.slot()]);
      }
      at.skip(Decode::kMathWarps);
    }
    cursor_.skip(num_stages);
  }

  // Hidden values of all tokens in out_columns columns of an expert.
  FM_DEVICE void make_up(int32_t unit) {
    const int32_t chosen_idx = unit / walk_.units_of_expert;
    const uint8_t* row = row_of_x(chosen_idx);
    const int32_t num_chunks = params_.sizes.hidden / config::kDepthStep;
    float sums[Decode::kBoxes][4] = {};
    struct Tokens {
      ChunkWords chunks[Decode::kUpChunks];
    };
    const auto read_tokens = [&](int32_t stage) {
      Tokens tokens;
      FM_UNROLL
      for (int i = 0; i < Decode::kUpChunks; ++i) {
        const int32_t chunk = stage * Decode::kUpChunks + i;
        tokens.chunks[i] = read_token(chunk < num_chunks ? row : nullptr, chunk);
      }
      return tokens;
    };
    const auto multiply = [&](int32_t, const uint8_t* boxes, const Tokens& tokens) {
      FM_UNROLL
      for (int i = 0; i < Decode::kUpChunks; ++i) {
        FM_UNROLL
        for (int box = 0; box < Decode::kBoxes; ++box) {
          const uint8_t* of_box = boxes + box * Decode::kBoxBytes;
          const int32_t line = i * Decode::kUpRows + ptx::lane_idx() / 4;
          const ChunkWords upper = read_line(of_box, line);
          const ChunkWords lower = read_line(of_box, line + 8);
          FM_UNROLL
          for (int step = 0; step < kChunkSteps; ++step) {
            const uint32_t weights[4] = {upper.word(step, 0), lower.word(step, 0),
                                         upper.word(step, 1), lower.word(step, 1)};
            ptx::mma_m16n8k16<Element>(sums[box], weights, tokens.chunks[i].word(step, 0),
                                       tokens.chunks[i].word(step, 1));
          }
        }
      }
    };
    for_each_stage(walk_.up_stages, read_tokens, multiply);
    FM_UNROLL
    for (int box = 0; box < Decode::kBoxes; ++box) {
      keep(box * Decode::kUpRows, sums[box][0], sums[box][1]);
      keep(box * Decode::kUpRows + 8, sums[box][2], sums[box][3]);
    }
    sync();
    store_hidden(chosen_idx, unit % walk_.units_of_expert * walk_.out_columns);
    next_parts();
  }

  // y of all tokens in kDownRows columns.
  FM_DEVICE void make_down(int32_t unit) {
    const int32_t num_chunks = params_.sizes.intermediate / config::kDepthStep;
    float totals[2] = {};
    const auto multiply = [&](int32_t stage, const uint8_t* boxes, int32_t chosen_idx) {
      const int32_t stage_of_expert = stage - chosen_idx * walk_.down_stages;
      const int32_t first_chunk = stage_of_expert * Decode::kBoxes * Decode::kDownChunks;
      const uint8_t* row = row_of_hidden(chosen_idx);
      float sums[4] = {};
      FM_UNROLL
      for (int box = 0; box < Decode::kBoxes; ++box) {
        multiply_down(sums, row, boxes + box * Decode::kBoxBytes,
                      first_chunk + box * Decode::kDownChunks, num_chunks);
      }
      add_weighted(totals, chosen_idx, sums);
    };
    for_each_stage(
        smem_.plan.num_chosen * walk_.down_stages,
        [&](int32_t stage) { return stage / walk_.down_stages; }, multiply);
    keep(0, totals[0], totals[1]);
    sync();
    store_y(unit * Decode::kDownRows);
    next_parts();
  }

  // A stage's sums, each with what its expert counts for the token.
  FM_DEVICE void add_weighted(float (&totals)[2], int32_t chosen_idx,
                              const float (&sums)[4]) const {
    FM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int32_t token = ptx::lane_idx() % 4 * 2 + i;
      // Not a product with zero: what is not there may be no number.
      if (!smem_.plan.is_routed[chosen_idx][token]) continue;
      totals[i] += smem_.plan.coefficients[chosen_idx][token] * sums[i];
    }
  }

  // One box of 8 rows and the chunks from first_chunk on, those that exist.
  FM_DEVICE static void multiply_down(float (&sums)[4], const uint8_t* row, const uint8_t* box,
                                      int32_t first_chunk, int32_t num_chunks) {
    ChunkWords tokens[Decode::kDownChunks];
    FM_UNROLL
    for (int i = 0; i < Decode::kDownChunks; ++i) {
      tokens[i] = read_token(first_chunk + i < num_chunks ? row : nullptr, first_chunk + i);
    }
    FM_UNROLL
    for (int i = 0; i < Decode::kDownChunks; ++i) {
      if (first_chunk + i >= num_chunks) break;
      const ChunkWords words = read_line(box, i * Decode::kDownRows + ptx::lane_idx() / 4);
      FM_UNROLL
      for (int step = 0; step < kChunkSteps; ++step) {
        const uint32_t weights[4] = {words.word(step, 0), 0, words.word(step, 1), 0};
        ptx::mma_m16n8k16<Element>(sums, weights, tokens[i].word(step, 0), tokens[i].word(step, 1));
      }
    }
  }

  // The lane's part of two sums of weight row first_row + lane / 4.
  FM_DEVICE void keep(int32_t first_row, float first, float second) {
    const int32_t lane = ptx::lane_idx();
    *reinterpret_cast<float2*>(&parts()[warp()][first_row + lane / 4][lane % 4 * 2]) = {first,
                                                                                        second};
  }
  FM_DEVICE Parts& parts() { return smem_.parts[parts_idx_]; }
  FM_DEVICE void next_parts() { parts_idx_ ^= 1; }
  FM_DEVICE float sum_of(int32_t row, int32_t token) {
    float sum = 0.0f;
    FM_UNROLL
    for (int i = 0; i < Decode::kMathWarps; ++i) sum += parts()[i][row][token];
    return sum;
  }

  FM_DEVICE static float bias_at(const config::BiasView& bias, int32_t expert_idx, int32_t column,
                                 int32_t offset) {
    if (bias.data == nullptr) return 0.0f;
    const auto* of_expert =
        static_cast<const Element*>(bias.data) + expert_idx * bias.expert_stride;
    return static_cast<float>(of_expert[int64_t{column} * bias.column_stride + offset]);
  }

  // A thread a token and two columns.
  FM_DEVICE void store_hidden(int32_t chosen_idx, int32_t first_column) {
    const int32_t token = thread() % Decode::kTokens;
    const int32_t column = thread() / Decode::kTokens * 2;
    if (column >= walk_.out_columns || !smem_.plan.is_routed[chosen_idx][token]) return;
    const int32_t expert_idx = smem_.plan.experts[chosen_idx];
    const auto biased = [&](int32_t row, int32_t i, int32_t offset) {
      return sum_of(row, token) + bias_at(params_.up_bias, expert_idx, first_column + i, offset);
    };
    tile::with_function(params_.activation, [&](const auto& function) {
      const auto value = [&](int32_t i) {
        const float gate = biased(i, i, 0);
        if (!is_gated_) return function(tile::at_most(gate, params_.activation.limit));
        const float up = biased(Decode::kUpRows + i, i, params_.up_bias.half_offset);
        return tile::gated_value(function, params_.activation, gate, up);
      };
      store_pair(hidden_row(chosen_idx, token), first_column + column, value(column),
                 value(column + 1));
    });
  }

  FM_DEVICE void store_y(int32_t first_column) {
    const int32_t token = thread() % Decode::kTokens;
    const int32_t column = thread() / Decode::kTokens * 2;
    if (column >= Decode::kDownRows || token >= params_.sizes.tokens) return;
    const auto value = [&](int32_t i) {
      if (smem_.plan.is_undefined[token]) return stage::not_a_number();
      return sum_of(i, token) + biases_of(token, first_column + i);
    };
    store_pair(static_cast<uint8_t*>(params_.y) + token * params_.y_stride * config::kElementBytes,
               first_column + column, value(column), value(column + 1));
  }
  // What the down product's biases add to y.
  FM_DEVICE float biases_of(int32_t token, int32_t column) const {
    float sum = 0.0f;
    if (params_.down_bias.data == nullptr) return sum;
    for (int32_t i = 0; i < smem_.plan.num_chosen; ++i) {
      if (!smem_.plan.is_routed[i][token]) continue;
      sum += smem_.plan.coefficients[i][token] *
             bias_at(params_.down_bias, smem_.plan.experts[i], column, 0);
    }
    return sum;
  }
  FM_DEVICE static void store_pair(uint8_t* row, int32_t column, float first, float second) {
    auto* to = reinterpret_cast<Element*>(row) + column;
    to[0] = static_cast<Element>(first);
    to[1] = static_cast<Element>(second);
  }

  const ForwardParams& params_;
  void* const hidden_;
  const bool is_gated_;
  DecodeShared& smem_;
  const DecodeWalk& walk_;
  sync::Waiter waiter_;
  sync::RingCursor<Decode::kStages> cursor_;
  int32_t parts_idx_ = 0;
};

template <class Element>
FM_DEVICE bool route_few(const ForwardParams& params, DecodeShared& smem) {
  constexpr int32_t kArenaBytes = sizeof(smem.stages);
  static_assert(stage::LogitsLayout<false>::kBytes <= kArenaBytes);
  static_assert(stage::LogitsLayout<true>::kBytes <= kArenaBytes);
  static_assert(
      4 * Decode::kTokens *
          stage::TeamMemory<stage::kWarpLanes>::words(config::kMaxExperts, config::kMaxExperts) <=
      kArenaBytes);
  uint8_t* arena = smem.stages[0];
  if (!compute_logits<Element>(params, arena)) return false;
  stage::plan_few(params, arena, smem.plan);
  // The arena becomes stages, which the copy engine fills.
  ptx::fence_proxy_async(ptx::space_shared);
  __syncthreads();
  return true;
}

template <class Element>
__global__ void __launch_bounds__(config::kForwardThreads, 1)
    decode(const __grid_constant__ DecodeParams params) {
  FM_DYNAMIC_SHARED(raw);
  auto& smem = *reinterpret_cast<DecodeShared*>(raw);
  const ForwardParams& forward = params.forward;
  if (ptx::thread_idx() == 0) {
    smem.barriers.init(1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    ptx::prefetch_tensormap(&forward.up_weights[0]);
    ptx::prefetch_tensormap(&forward.up_weights[1]);
    ptx::prefetch_tensormap(&forward.down_weights);
  }
  if (!take_scratch(forward, smem.has_scratch)) return;
  if (ptx::thread_idx() == 0) set_mark_of_first(forward, Mark::kStart);
  if (!route_few<Element>(forward, smem)) return;
  if (ptx::thread_idx() == 0) {
    set_mark_of_first(forward, Mark::kRouted);
    set_mark_of_first(forward, Mark::kPlanned);
    set_mark_of_first(forward, Mark::kUp);
  }
  const DecodeWalk walk(params, smem.plan.num_chosen);
  if (ptx::thread_idx() < 32) {
    decode_load(params, smem, walk);
  } else {
    DecodeMath<Element>(params, smem, walk).run();
  }
  __syncthreads();
  if (ptx::thread_idx() != 0) return;
  if (!finish_tickets(*forward.memory.combine, ptx::num_blocks())) return;
  set_mark(forward, Mark::kLastTile);
  set_mark(forward, Mark::kEnd);
  stage::release_scratch(forward);
}

template <class Element>
DecodeEntry decode_entry() {
  static_assert(sizeof(DecodeShared) <= config::kSharedLimit);
  return {ptx::kernel_address(&decode<Element>), sizeof(DecodeShared)};
}

}  // namespace flashmoe::cuda::kernel
