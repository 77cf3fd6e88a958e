// The backward's walk from tickets to tiles and its scratch table: pure functions, tested without a
// GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/config/backward.h"
#include "expert_rows.h"

namespace flashmoe::cuda {
namespace {

using tile::BackwardProduct;
using tile::Tile;

constexpr int32_t kMaxRows = config::kBackwardBlockRows;
constexpr int kProducts = 8;

// The table of the backward's blocks.
struct Table : ExpertRows {
  explicit Table(std::vector<int32_t> rows) : ExpertRows(std::move(rows), kMaxRows) {}
};

// What a walk's tiles have covered so far.
class Coverage {
 public:
  Coverage(const Table& table, const tile::BackwardWalk& walk) : table_(table), walk_(walk) {}

  void add(const Tile& tile) {
    const auto product = tile::product_of(tile);
    ASSERT_GT(tile.num_rows, 0);
    ASSERT_LE(tile.num_rows, tile::is_weight_grad(tile) ? tile::kGradColumns : kMaxRows);
    expect_dependencies(tile, product);
    for (int32_t i = 0; i < tile.num_rows; ++i) {
      const auto place =
          std::tuple(tile.product, tile.local_expert_idx, tile.weight_pair_idx, tile.row_begin + i);
      ASSERT_TRUE(covered_.insert(place).second) << "twice";
    }
    covered_of_[static_cast<size_t>(tile.product)] += tile.num_rows;
    if (!tile::is_weight_grad(tile)) ++tiles_of_block_[{tile.product, tile.row_begin}];
  }

  void expect_all() const {
    int64_t rows = 0;
    for (const int32_t count : table_.rows) rows += count;
    EXPECT_EQ(covered_of_[0], rows * walk_.pre_activation_pairs);
    EXPECT_EQ(covered_of_[1], rows * walk_.hidden_pairs);
    EXPECT_EQ(covered_of_[2], rows * walk_.input_pairs);
    EXPECT_EQ(covered_of_[3], int64_t{walk_.share_tokens} * walk_.input_pairs);
    for (int which = 0; which < tile::kWeightGrads; ++which) {
      EXPECT_EQ(covered_of_[static_cast<size_t>(4 + which)], of_weight(which));
    }
  }

 private:
  int64_t of_weight(int which) const {
    const tile::WeightGrid& grid = walk_.weight_grads[which];
    const int32_t sums = which == tile::kRouterGradIdx ? walk_.logit_segments : walk_.local_experts;
    return int64_t{grid.m_pairs} * grid.n_columns * sums;
  }
  int32_t done(BackwardProduct product, int32_t row_begin) const {
    const auto found = tiles_of_block_.find({static_cast<int>(product), row_begin});
    return found == tiles_of_block_.end() ? 0 : found->second;
  }
  // What a tile waits for has smaller tickets.
  void expect_dependencies(const Tile& tile, BackwardProduct product) const {
    int64_t hidden = 0;
    for (const int32_t count : table_.rows) hidden += count;
    if (product == BackwardProduct::kHiddenGrad) {
      ASSERT_EQ(done(BackwardProduct::kPreActivation, tile.row_begin), walk_.pre_activation_pairs);
    } else if (product == BackwardProduct::kInputGrad) {
      ASSERT_EQ(done(BackwardProduct::kHiddenGrad, tile.row_begin), walk_.hidden_pairs);
      ASSERT_EQ(covered_of_[4], of_weight(0)) << "its rows replace grad y's";
    } else if (product == BackwardProduct::kRouterShare) {
      ASSERT_EQ(covered_of_[1], hidden * walk_.hidden_pairs) << "slots' gradients are made of them";
      ASSERT_EQ(covered_of_[2], hidden * walk_.input_pairs) << "with the weight on the input";
    } else if (tile::is_weight_grad(tile)) {
      ASSERT_EQ(covered_of_[1], hidden * walk_.hidden_pairs);
    }
  }

  const Table& table_;
  const tile::BackwardWalk& walk_;
  std::set<std::tuple<int32_t, int32_t, int32_t, int32_t>> covered_;
  std::map<std::pair<int, int32_t>, int32_t> tiles_of_block_;
  std::array<int64_t, kProducts> covered_of_{};
};

void expect_cover_and_order(const Table& table, const tile::BackwardWalk& walk) {
  Coverage coverage(table, walk);
  for (int32_t ticket = 0;; ++ticket) {
    const Tile tile = walk.tile_at(ticket);
    if (tile.is_end()) break;
    coverage.add(tile);
    if (testing::Test::HasFatalFailure()) return;
  }
  coverage.expect_all();
}

TEST(CudaBackwardWalk, CoversEveryTileOnceAndInOrder) {
  std::mt19937 random(11);
  const auto from = [&random](int32_t least, int32_t most) {
    return least + static_cast<int32_t>(random() % static_cast<uint32_t>(most - least + 1));
  };
  for (const int32_t num_experts : {1, 2, 7, 33}) {
    for (int round = 0; round < 6; ++round) {
      const int32_t groups = 1 + round % 3;  // of sources
      std::vector<int32_t> rows(static_cast<size_t>(groups * num_experts));
      for (int32_t& count : rows) count = from(0, 2) == 0 ? 0 : from(1, 500);
      const Table table(rows);
      const tile::WeightGrid down{from(0, 3), tile::kGradUnit * from(1, 30)};
      const tile::WeightGrid up{from(0, 3), tile::kGradUnit * from(1, 30)};
      expect_cover_and_order(table, {table.view(),
                                     num_experts,
                                     kMaxRows,
                                     from(0, 3),
                                     from(1, 4),
                                     from(1, 5),
                                     from(0, 1) * from(1, 700),
                                     from(0, 8),
                                     {down, up, {round % 2, up.n_columns}, {from(0, 3), 128}}});
    }
  }
}

TEST(CudaBackwardWalk, IdleExpertsHaveWeightGradients) {
  const Table table(std::vector<int32_t>(5, 0));
  const tile::BackwardWalk walk{
      table.view(), 5, kMaxRows, 2, 2, 2, 9, 0, {{1, 128}, {1, 64}, {0, 0}, {0, 0}}};
  expect_cover_and_order(table, walk);
  EXPECT_EQ(tile::product_of(walk.tile_at(0)), BackwardProduct::kDownGrad);
}

// Gate and up columns of the widest layer: products of their sizes do not fit in 32 bits.
TEST(CudaBackwardWalk, TilesOfTheWidestGradientFollowEachOther) {
  constexpr auto kColumns = static_cast<int32_t>(2 * config::kMaxWidth);
  for (const int32_t columns : {kColumns, kColumns - tile::kGradUnit}) {
    const tile::WeightGrid grid{1, columns};
    int32_t end = 0;
    for (int32_t idx = 0; idx < grid.num_tiles(); ++idx) {
      const tile::Tile tile = grid.tile_at(idx, 0, BackwardProduct::kUpGrad);
      ASSERT_EQ(tile.row_begin, end);
      ASSERT_GT(tile.num_rows, 0);
      ASSERT_LE(tile.num_rows, tile::kGradColumns);
      end += tile.num_rows;
    }
    EXPECT_EQ(end, columns);
  }
}

// The steps of a sum over an expert's rows take in each row once, part after part.
TEST(ExpertParts, StepsCoverTheRowsOfEveryPart) {
  constexpr int32_t kStep = config::kDepthStep;
  constexpr int32_t kLocal = 4;
  const Table table({0, 64, 65, 0, 130, 0, 1, 0, 0, 0, 63, 0});  // three parts
  for (int32_t e = 0; e < kLocal; ++e) {
    const tile::ExpertParts expert{table.view(), kLocal, e};
    std::vector<int32_t> expected;
    int32_t blocks = 0;
    for (size_t part = static_cast<size_t>(e); part < table.rows.size(); part += kLocal) {
      for (int32_t row = 0; row < table.rows[part]; ++row) {
        expected.push_back(table.begin[part] + row);
      }
      blocks += table.blocks_before[part + 1] - table.blocks_before[part];
    }
    std::vector<int32_t> seen;
    tile::StepRows rows(expert);
    for (int32_t step = 0; step < expert.num_steps(kStep); ++step) {
      for (int32_t row = rows.row; row < std::min(rows.end, rows.row + kStep); ++row) {
        seen.push_back(row);
      }
      rows.advance(expert, kStep);
    }
    EXPECT_EQ(seen, expected) << e;
    EXPECT_EQ(expert.rows(), static_cast<int32_t>(expected.size())) << e;
    EXPECT_EQ(expert.blocks(), blocks) << e;
  }
  EXPECT_EQ((tile::ExpertParts{table.view(), kLocal, 0}.num_steps(kStep)), 3);
  EXPECT_EQ((tile::ExpertParts{table.view(), kLocal, 1}.num_steps(kStep)), 1);
  EXPECT_EQ((tile::ExpertParts{table.view(), kLocal, 3}.num_steps(kStep)), 1) << "of zeros";
}

config::BackwardTable table_of(int64_t rank_slots) {
  return config::backward_table({.tokens = 1000,
                                 .hidden = 192,
                                 .intermediate = 128,
                                 .up_columns = 256,
                                 .num_experts = 65,
                                 .top_k = 3,
                                 .rows = 4000,
                                 .rank_slots = rank_slots,
                                 .state_bytes = 24,
                                 .num_counters = 77,
                                 .has_router = true,
                                 .routes_by_tiles = true});
}

TEST(CudaBackward, RegionsOfTheScratchDoNotOverlap) {
  const auto table = table_of(2 * 3000);
  int64_t end = 0;
  for (const plan::Region& region : table.regions) {
    EXPECT_GE(region.offset, end) << region.name;
    EXPECT_EQ(region.offset % plan::kRegionAlign, 0) << region.name;
    EXPECT_GT(region.bytes, 0) << region.name;
    end = region.offset + region.bytes;
  }
  EXPECT_GE(table.total, end);
  using config::BackwardScratch;
  EXPECT_EQ(table[BackwardScratch::kSlotRow].bytes, 2 * 3000 * 4) << "slots of all ranks";
  EXPECT_EQ(table[BackwardScratch::kSlotOwner].bytes, 3000 * 4) << "own slots";
  EXPECT_EQ(table_of(0)[BackwardScratch::kSlotRow].bytes, 3000 * 4);
  EXPECT_EQ(table_of(0)[BackwardScratch::kSlotOwner].bytes, 0) << "a rank alone has all experts";
  const auto forward = config::forward_table({.tokens = 1000,
                                              .hidden = 192,
                                              .intermediate = 128,
                                              .num_experts = 65,
                                              .top_k = 3,
                                              .rows = 4000,
                                              .rank_slots = 0,
                                              .state_bytes = 24,
                                              .has_router = true,
                                              .own_logits = true,
                                              .weight_on_input = false});
  const plan::Region& state = table[config::BackwardScratch::kState];
  const plan::Region& shared = forward[config::ForwardScratch::kState];
  EXPECT_EQ(state.offset, shared.offset) << "launches of both kinds share it";
  EXPECT_EQ(state.bytes, shared.bytes);
}

}  // namespace
}  // namespace flashmoe::cuda
