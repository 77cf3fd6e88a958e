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
// Units are given out by tickets: memory serves some CTAs faster than others.
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
#include "cuda/stage/few_logits.cuh"
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
  sync::RingBarriers<Decode::kTicketSlots> ticket_barriers;
  int32_t tickets[Decode::kTicketSlots];  // of units, from the load warp to the others
  stage::DecodePlan plan;
  bool has_scratch;
};

// How many units there are of either product, and stages of one. Ticket -> unit: those of the up
// product, then those of the down product.
struct DecodeWalk {
  int32_t units_of_expert;  // of the up product
  int32_t up_units;
  int32_t up_stages;
  int32_t down_units;
  int32_t boxes_of_expert;  // of a down unit's rows
  int32_t down_boxes;       // of all chosen experts
  int32_t down_stages;
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
    boxes_of_expert = stages_of(sizes.intermediate, Decode::kDownChunks);
    down_boxes = num_chosen * boxes_of_expert;
    down_stages = plan::ceil_div(down_boxes, Decode::kBoxes);
  }
  FM_DEVICE int32_t num_tickets() const { return up_units + down_units; }
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
  // Rows [row, ...) of all chosen experts; the last stage may have one box.
  FM_DEVICE void load_down(int32_t row, const DecodeWalk& walk) {
    DownBox box(smem_.plan, row);
    for (int32_t left = walk.down_boxes; left > 0; left -= Decode::kBoxes) {
      const bool has_second = left > 1;
      if (!begin(has_second ? 2 : 1)) return;
      copy(0, params_.down_weights, box.at);
      box.advance(smem_.plan, walk);
      if (has_second) {
        copy(1, params_.down_weights, box.at);
        box.advance(smem_.plan, walk);
      }
      stages_.advance();
    }
  }
  // Tells the other warps of the CTA.
  FM_DEVICE void send(int32_t ticket) {
    waiter_.wait(&smem_.ticket_barriers.empty[tickets_.slot()], tickets_.parity() ^ 1,
                 sync::WaitTag::kTileEmpty);
    smem_.tickets[tickets_.slot()] = ticket;
    ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                         &smem_.ticket_barriers.full[tickets_.slot()]);
    tickets_.advance();
  }

 private:
  // Coordinates of a box of the down product: one chosen expert after the other.
  struct DownBox {
    int32_t at[4];
    int32_t chosen_idx = 0;

    FM_DEVICE DownBox(const stage::DecodePlan& plan, int32_t row)
        : at{0, row, 0, plan.experts[0]} {}
    FM_DEVICE void advance(const stage::DecodePlan& plan, const DecodeWalk& walk) {
      at[2] += Decode::kDownChunks;
      if (at[2] < walk.boxes_of_expert * Decode::kDownChunks) return;
      at[2] = 0;
      at[3] = plan.experts[min(++chosen_idx, plan.num_chosen - 1)];
    }
  };

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
  sync::RingCursor<Decode::kTicketSlots> tickets_;
};

FM_DEVICE void decode_load(const DecodeParams& params, DecodeShared& smem, const DecodeWalk& walk) {
  if (!ptx::elect_one()) return;
  sync::Waiter waiter(params.forward.waits);
  DecodeLoad load(params, smem, waiter);
  const int32_t num_ctas = ptx::num_blocks();
  TicketCounter& counter = *params.forward.memory.tickets;
  int32_t ticket = ptx::block_idx();
  while (ticket < walk.num_tickets() && waiter.alive()) {
    // It is there when the unit's loads have begun.
    const int32_t next = num_ctas + static_cast<int32_t>(atomicAdd(&counter.next, 1u));
    load.send(ticket);
    if (ticket < walk.up_units) {
      load.load_up(smem.plan.experts[ticket / walk.units_of_expert],
                   ticket % walk.units_of_expert * walk.out_columns, walk.up_stages);
    } else {
      load.load_down((ticket - walk.up_units) * Decode::kDownRows, walk);
    }
    ticket = next;
  }
  load.send(walk.num_tickets());
  finish_tickets(counter, num_ctas);
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
    bool has_met = false;
    int32_t ticket = take_ticket();
    bool goes_on = all_have(ticket);
    while (goes_on) {
      const int32_t down_unit = ticket - walk_.up_units;
      if (down_unit >= 0 && !has_met) {
        meet_all();
        has_met = true;
      }
      if (down_unit < 0) {
        multiply_up(ticket);
      } else {
        multiply_down();
      }
      const int32_t next = take_ticket();
      goes_on = all_have(next);  // and the unit's parts are there
      if (down_unit < 0) {
        store_hidden(ticket);
      } else {
        store_y(down_unit * Decode::kDownRows);
      }
      parts_idx_ ^= 1;
      ticket = next;
    }
    if (!has_met && all(waiter_.alive())) meet_all();
  }

 private:
  using Parts = float[Decode::kMathWarps][Decode::kBoxes * Decode::kUpRows][Decode::kTokens];
  static constexpr int kBarrier = 1;  // 0 is __syncthreads

  FM_DEVICE static int32_t thread() { return ptx::thread_idx() - 32; }
  FM_DEVICE static int32_t warp() { return thread() / 32; }
  FM_DEVICE static void sync() { ptx::barrier_sync(kBarrier, Decode::kMathThreads); }
  FM_DEVICE static bool all(bool vote) {
    return ptx::barrier_sync_and(kBarrier, Decode::kMathThreads, vote);
  }

  FM_DEVICE int32_t take_ticket() {
    auto& barriers = smem_.ticket_barriers;
    waiter_.wait(&barriers.full[tickets_.slot()], tickets_.parity(), sync::WaitTag::kTileFull);
    const int32_t ticket = smem_.tickets[tickets_.slot()];
    __syncwarp();
    if (ptx::lane_idx() == 0) {
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                           &barriers.empty[tickets_.slot()]);
    }
    tickets_.advance();
    return ticket;
  }
  // Whether there is such a unit; false in all warps once the time of one of them is over: they
  // leave together.
  FM_DEVICE bool all_have(int32_t ticket) {
    return all(waiter_.alive() && ticket < walk_.num_tickets());
  }

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

  // The warp's parts of the sums for out_columns columns of an expert.
  FM_DEVICE void multiply_up(int32_t unit) {
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
  }

  // A box of the down product: of which chosen expert, and its first chunk.
  struct BoxPlace {
    int32_t chosen_idx;
    int32_t first_chunk;

    FM_DEVICE BoxPlace(const DecodeWalk& walk, int32_t box)
        : chosen_idx(box / walk.boxes_of_expert),
          first_chunk((box - chosen_idx * walk.boxes_of_expert) * Decode::kDownChunks) {}
  };

  // The warp's parts of y of all tokens in kDownRows columns.
  FM_DEVICE void multiply_down() {
    const int32_t num_chunks = params_.sizes.intermediate / config::kDepthStep;
    float totals[2] = {};
    struct Tokens {
      ChunkWords chunks[Decode::kBoxes][Decode::kDownChunks];
    };
    const auto read_tokens = [&](int32_t stage) {
      Tokens tokens;
      FM_UNROLL
      for (int box = 0; box < Decode::kBoxes; ++box) {
        const int32_t box_idx = stage * Decode::kBoxes + box;
        const BoxPlace at(walk_, min(box_idx, walk_.down_boxes - 1));
        const uint8_t* row = row_of_hidden(at.chosen_idx);
        FM_UNROLL
        for (int i = 0; i < Decode::kDownChunks; ++i) {
          const int32_t chunk = at.first_chunk + i;
          tokens.chunks[box][i] = read_token(chunk < num_chunks ? row : nullptr, chunk);
        }
      }
      return tokens;
    };
    const auto multiply = [&](int32_t stage, const uint8_t* boxes, const Tokens& tokens) {
      FM_UNROLL
      for (int box = 0; box < Decode::kBoxes; ++box) {
        const int32_t box_idx = stage * Decode::kBoxes + box;
        if (box_idx >= walk_.down_boxes) break;
        float sums[4] = {};
        multiply_box(sums, boxes + box * Decode::kBoxBytes, tokens.chunks[box]);
        add_weighted(totals, BoxPlace(walk_, box_idx).chosen_idx, sums);
      }
    };
    for_each_stage(walk_.down_stages, read_tokens, multiply);
    keep(0, totals[0], totals[1]);
  }

  // A box's sums, each with what its expert counts for the token.
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

  // One box of 8 rows; chunks past the last are zeros.
  FM_DEVICE static void multiply_box(float (&sums)[4], const uint8_t* box,
                                     const ChunkWords (&tokens)[Decode::kDownChunks]) {
    FM_UNROLL
    for (int i = 0; i < Decode::kDownChunks; ++i) {
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
  FM_DEVICE void store_hidden(int32_t unit) {
    const int32_t chosen_idx = unit / walk_.units_of_expert;
    const int32_t first_column = unit % walk_.units_of_expert * walk_.out_columns;
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
  sync::RingCursor<Decode::kTicketSlots> tickets_;
  int32_t parts_idx_ = 0;
};

template <class Element>
FM_DEVICE bool route_few(const ForwardParams& params, DecodeShared& smem) {
  static_assert(
      4 * Decode::kTokens *
          stage::TeamMemory<stage::kWarpLanes>::words(config::kMaxExperts, config::kMaxExperts) <=
      static_cast<int32_t>(sizeof(smem.stages)));
  if (params.router.weight != nullptr) {
    stage::check_selection_bias(params);
    stage::compute_few_logits<Element>(params);
    if (!sync::meet_all(&params.memory.state->barrier, params.waits)) return false;
  }
  stage::plan_few(params, smem.stages[0], smem.plan);
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
    smem.ticket_barriers.init(Decode::kMathWarps);
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
