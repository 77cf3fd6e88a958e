// The grouped product's tickets, tiles and configuration: pure functions, tested without a GPU.
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/config/grouped_product.h"
#include "cuda/tile/schedule.h"
#include "plan/blocks.h"

namespace flashmoe::cuda {
namespace {

using tile::Tile;
using tile::TileGrid;

constexpr int32_t kMaxRows = config::kMaxTokens;

// Every row of the expert with every weight pair, once.
void expect_exact_cover(const TileGrid& grid, int32_t begin, int32_t rows) {
  std::set<std::tuple<int32_t, int32_t>> covered;
  for (int32_t tile_idx = 0; tile_idx < grid.num_tiles(rows); ++tile_idx) {
    const Tile tile = grid.tile_at(tile_idx, 3, begin, rows);
    ASSERT_FALSE(tile.is_end());
    ASSERT_LE(tile.num_rows, kMaxRows);
    ASSERT_EQ(tile.local_expert_idx, 3);
    ASSERT_LT(tile.weight_pair_idx, grid.num_weight_pairs);
    for (int32_t row = 0; row < tile.num_rows; ++row) {
      ASSERT_TRUE(covered.emplace(tile.weight_pair_idx, tile.row_begin + row).second)
          << rows << " rows, tile " << tile_idx << ", row " << row;
    }
  }
  ASSERT_EQ(covered.size(), static_cast<std::size_t>(rows) * grid.num_weight_pairs);
  if (rows > 0) {
    ASSERT_EQ(std::get<1>(*covered.begin()), begin);
    ASSERT_EQ(std::get<1>(*covered.rbegin()), begin + rows - 1);
  }
}

TEST(CudaSchedule, TilesCoverEveryRowAndWeightPairOnce) {
  for (int32_t rows = 0; rows < 800; ++rows) {
    expect_exact_cover({kMaxRows, 1 + rows % 5}, 7 * rows, rows);
  }
  std::mt19937 random(1);
  for (int round = 0; round < 50; ++round) {
    const auto rows = static_cast<int32_t>(random() % 20000);
    expect_exact_cover({kMaxRows, 2}, 16, rows);
  }
}

// Where blocks begin: the other engine, and the flags between up and down, count them too.
TEST(CudaSchedule, BlocksAreThePlansBlocks) {
  const plan::BlockShape shape{.row_align = tile::kTokenStep, .max_rows = kMaxRows};
  const TileGrid grid{kMaxRows, 1};
  for (int32_t rows = 0; rows < 5000; ++rows) {
    ASSERT_EQ(grid.num_blocks(rows), plan::blocks_of_expert(rows, shape)) << rows;
    const auto height = static_cast<int32_t>(plan::block_height(rows, shape));
    for (int32_t block_idx = 0; block_idx < grid.num_blocks(rows); ++block_idx) {
      ASSERT_EQ(grid.tile_at(block_idx, 0, 0, rows).row_begin, block_idx * height) << rows;
    }
  }
}

TEST(CudaSchedule, StepsRoundRowsUp) {
  const auto steps_of = [](int32_t num_rows) {
    Tile tile{};
    tile.num_rows = static_cast<int16_t>(num_rows);
    return tile.num_steps();
  };
  EXPECT_TRUE(Tile{}.is_end());
  EXPECT_EQ(steps_of(1), 1);
  EXPECT_EQ(steps_of(16), 1);
  EXPECT_EQ(steps_of(17), 2);
  EXPECT_EQ(steps_of(kMaxRows), config::kTokenMaps);
}

TEST(CudaConfig, FitsTheRegistersAndSharedMemoryOfHopper) {
  constexpr int kSharedLimit = 232448;  // bytes of a block, sm_90
  constexpr config::GroupedProduct kProduct{};
  static_assert(config::is_valid(kProduct));
  EXPECT_LE(kProduct.num_stages * kProduct.stage_bytes() + kProduct.staging_bytes() + 1024,
            kSharedLimit);
  config::GroupedProduct greedy = kProduct;
  greedy.math_registers += 8;
  EXPECT_FALSE(config::is_valid(greedy));
  config::GroupedProduct wide = kProduct;
  wide.max_tokens += tile::kTokenStep;
  EXPECT_FALSE(config::is_valid(wide));
}

TEST(CudaConfig, IsPrintable) {
  EXPECT_EQ(config::describe(config::GroupedProduct{}),
            "bf16 depth store: 128 x 176 ping-pong, pairs, 5 stages of 38912 bytes, registers 56 + "
            "2 x 224");
}

}  // namespace
}  // namespace flashmoe::cuda
