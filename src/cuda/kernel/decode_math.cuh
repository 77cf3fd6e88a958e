// Of the forward of few tokens (decode.cuh): the warps that multiply. A unit's depth is divided
// among them stage by stage, and their sums are added in the order of the warps.
#pragma once

#include "cuda/kernel/decode_load.cuh"
#include "cuda/kernel/mark.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sync/grid_barrier.cuh"
#include "cuda/tile/activation.cuh"

namespace flashmoe::cuda::kernel {

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
    int32_t ticket = 0;
    if (ptx::lane_idx() == 0) {
      waiter_.wait(&barriers.full[tickets_.slot()], tickets_.parity(), sync::WaitTag::kTileFull);
      ticket = smem_.tickets[tickets_.slot()];
      ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared,
                           &barriers.empty[tickets_.slot()]);
    }
    tickets_.advance();
    return __shfl_sync(stage::kAllLanes, ticket, 0);
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

}  // namespace flashmoe::cuda::kernel
