// Ticket -> task of the backward's math roles:
//
//   [pre-activation tiles] | hidden-gradient tiles | gradient of w_down | input-gradient tiles |
//   [the router's share of grad x] | [the gradient of its weight] | gradients of w_gate and w_up
//
// Pre-activations are computed again where the forward did not keep them. The input gradients
// replace the rows of grad y, which the gradient of w_down is the last to read; the gradients of
// w_up hide the combination of the input gradients, which adds them to the router's share. Every
// task depends only on smaller tickets, on copies that wait for no ticket and on gradients of
// logits that wait for smaller ones, so the walk never deadlocks.
#pragma once

#include "cuda/tile/walk.h"

namespace flashmoe::cuda::tile {

// Tile::product of the backward. A tile of a weight gradient is (columns of its N side: row_begin,
// num_rows), (pair of M tiles: weight_pair_idx); its depth is the rows of the expert, or the
// router's range of tokens, that local_expert_idx says.
enum class BackwardProduct : int8_t {
  kPreActivation,  // Z = X W_up^T + b_up
  kHiddenGrad,     // dA' = dY W_down, and from it w A, dZ and a part of the slot's weight gradient
  kInputGrad,      // dX = dZ W_up
  kRouterShare,    // grad_logits W_router: rows are the tokens, of no expert
  kDownGrad,       // dW_down = dY^T (w A)
  kUpGrad,         // dW_up = dZ^T X, or the gate's where gate and up are two tensors
  kUpGrad2,        // then the up tensor's
  kRouterGrad,     // grad_logits^T X: a sum over each of several ranges of tokens, of no expert
};
// The last four, from kDownGrad on.
inline constexpr int kWeightGrads = 4;
inline constexpr int kRouterGradIdx = 3;
// Pairs of operands that they are made of: of the down, the up and the router's weights.
inline constexpr int kGradOperands = 3;
inline constexpr int kRouterOperandsIdx = 2;

FM_HD constexpr BackwardProduct product_of(const Tile& tile) {
  return static_cast<BackwardProduct>(tile.product);
}
FM_HD constexpr bool is_weight_grad(const Tile& tile) {
  return product_of(tile) >= BackwardProduct::kDownGrad;
}

// Columns of a weight gradient's N tile: at most four boxes of 64.
inline constexpr int32_t kGradUnit = 64;
inline constexpr int32_t kGradColumns = 4 * kGradUnit;

// How an expert's weight gradient [n_columns, M] is cut. No tiles where it was not asked for.
struct WeightGrid {
  int32_t m_pairs;    // pairs of 128 columns of M
  int32_t n_columns;  // a multiple of kGradUnit

  FM_HD constexpr int32_t num_blocks() const { return plan::ceil_div(n_columns, kGradColumns); }
  FM_HD constexpr int32_t num_tiles() const { return m_pairs * num_blocks(); }
  // The side with fewer tiles runs fastest: its operand stays in the L2 cache.
  FM_HD constexpr Tile tile_at(int32_t tile_idx, int32_t local_expert_idx,
                               BackwardProduct product) const {
    const int32_t blocks = num_blocks();
    const int32_t units = n_columns / kGradUnit;
    const bool pairs_inner = m_pairs <= blocks;
    const int32_t outer = tile_idx / (pairs_inner ? m_pairs : blocks);
    const int32_t inner = tile_idx - outer * (pairs_inner ? m_pairs : blocks);
    const int32_t block = pairs_inner ? outer : inner;
    // The first unit of a block, block * units / blocks, whose product may not fit.
    const auto first = [&](int32_t of) {
      return of * (units / blocks) + of * (units % blocks) / blocks;
    };
    const int32_t begin = first(block);
    const int32_t end = first(block + 1);
    return {.row_begin = begin * kGradUnit,
            .num_k_blocks = 0,
            .num_rows = static_cast<int16_t>((end - begin) * kGradUnit),
            .local_expert_idx = static_cast<int16_t>(local_expert_idx),
            .weight_pair_idx = static_cast<int16_t>(pairs_inner ? inner : outer),
            .product = static_cast<int8_t>(product),
            .is_ready = false};
  }
};

// An expert of this rank in a table that has it once for each group of sources, all experts of the
// first group first.
struct ExpertParts {
  ExpertTable experts;
  int32_t local_experts;
  int32_t local_expert_idx;

  FM_HD constexpr int32_t rows() const {
    int32_t sum = 0;
    for (int32_t e = local_expert_idx; e < experts.num_experts; e += local_experts) {
      sum += experts.rows(e);
    }
    return sum;
  }
  FM_HD constexpr int32_t blocks() const {
    int32_t sum = 0;
    for (int32_t e = local_expert_idx; e < experts.num_experts; e += local_experts) {
      sum += experts.blocks_before(e + 1) - experts.blocks_before(e);
    }
    return sum;
  }
  // Steps of a sum over its rows, each of rows of one part; at least one: an expert without rows
  // has a step of zeros.
  FM_HD constexpr int32_t num_steps(int32_t step_rows) const {
    int32_t sum = 0;
    for (int32_t e = local_expert_idx; e < experts.num_experts; e += local_experts) {
      sum += plan::ceil_div(experts.rows(e), step_rows);
    }
    return sum > 0 ? sum : 1;
  }
};

// The rows of those steps, one after the other: [row, end), of which a step takes the first.
struct StepRows {
  static constexpr int32_t kNoMoreParts = 1 << 30;  // of rows that are not in a table
  int32_t part = 0;                                 // in the table
  int32_t row = 0;
  int32_t end = 0;

  StepRows() = default;
  FM_HD constexpr StepRows(int32_t part, int32_t row, int32_t end)
      : part(part), row(row), end(end) {}
  FM_HD explicit constexpr StepRows(const ExpertParts& of)
      : part(of.local_expert_idx), row(of.experts.begin(part)), end(row + of.experts.rows(part)) {
    skip(of);
  }
  FM_HD constexpr void advance(const ExpertParts& of, int32_t step_rows) {
    row += step_rows;
    skip(of);
  }

 private:
  FM_HD constexpr void skip(const ExpertParts& of) {
    while (row >= end && part + of.local_experts < of.experts.num_experts) {
      part += of.local_experts;
      row = of.experts.begin(part);
      end = row + of.experts.rows(part);
    }
  }
};

struct BackwardWalk {
  ExpertTable experts;
  int32_t local_experts;         // whose weights have gradients: see ExpertParts
  int32_t max_rows;              // of a block
  int32_t pre_activation_pairs;  // 0: they were kept
  int32_t hidden_pairs;
  int32_t input_pairs;
  int32_t share_tokens;    // whose router's share of grad x is tiles
  int32_t logit_segments;  // ranges of tokens, each with a sum for the router's weight
  WeightGrid weight_grads[kWeightGrads];  // down, up (or gate), up, router

  // The tile of any ticket; an end tile from the last ticket on.
  FM_HD constexpr Tile tile_at(int32_t ticket) const {
    const int32_t blocks = experts.num_blocks();
    int32_t left = ticket;
    if (left < blocks * pre_activation_pairs) {
      return row_tile(left, pre_activation_pairs, BackwardProduct::kPreActivation);
    }
    left -= blocks * pre_activation_pairs;
    if (left < blocks * hidden_pairs) {
      return row_tile(left, hidden_pairs, BackwardProduct::kHiddenGrad);
    }
    left -= blocks * hidden_pairs;
    if (left < tiles_of(0)) return weight_tile(left, 0);
    left -= tiles_of(0);
    if (left < blocks * input_pairs) {
      return row_tile(left, input_pairs, BackwardProduct::kInputGrad);
    }
    left -= blocks * input_pairs;
    if (left < share_tiles()) {
      Tile tile = TileGrid{max_rows, input_pairs}.tile_at(left, 0, 0, share_tokens);
      tile.product = static_cast<int8_t>(BackwardProduct::kRouterShare);
      return tile;
    }
    left -= share_tiles();
    if (left < tiles_of(kRouterGradIdx)) return weight_tile(left, kRouterGradIdx);
    left -= tiles_of(kRouterGradIdx);
    if (left < tiles_of(1)) return weight_tile(left, 1);
    left -= tiles_of(1);
    return left < tiles_of(2) ? weight_tile(left, 2) : Tile{};
  }
  FM_HD constexpr int32_t share_tiles() const {
    return TileGrid{max_rows, input_pairs}.num_tiles(share_tokens);
  }

 private:
  FM_HD constexpr int32_t tiles_of(int which) const {
    const int32_t sums = which == kRouterGradIdx ? logit_segments : local_experts;
    return sums * weight_grads[which].num_tiles();
  }
  FM_HD constexpr Tile weight_tile(int32_t tile_idx, int which) const {
    const int32_t of_expert = weight_grads[which].num_tiles();
    const int32_t e = tile_idx / of_expert;
    const auto product =
        static_cast<BackwardProduct>(static_cast<int>(BackwardProduct::kDownGrad) + which);
    return weight_grads[which].tile_at(tile_idx - e * of_expert, e, product);
  }
  // Of `pairs` weight pairs of every block; of an expert of the table.
  FM_HD constexpr Tile row_tile(int32_t tile_idx, int32_t pairs, BackwardProduct product) const {
    const int32_t e = experts.expert_of_block(tile_idx / pairs);
    Tile tile = TileGrid{max_rows, pairs}.tile_at(tile_idx - experts.blocks_before(e) * pairs, e,
                                                  experts.begin(e), experts.rows(e));
    tile.product = static_cast<int8_t>(product);
    return tile;
  }
};

}  // namespace flashmoe::cuda::tile
