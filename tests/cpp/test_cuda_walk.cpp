// The forward's walk from tickets to tiles and its scratch table: pure functions, tested without a
// GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/config/forward.h"
#include "cuda/tile/combine_walk.h"
#include "cuda/tile/walk.h"
#include "expert_rows.h"

namespace flashmoe::cuda {
namespace {

using tile::Tile;

constexpr int32_t kMaxRows = config::kForwardBlockRows;
constexpr int32_t kMaxPairs = 8;

// The table of the forward's blocks.
struct Table : ExpertRows {
  explicit Table(std::vector<int32_t> rows) : ExpertRows(std::move(rows), kMaxRows) {}
};

std::vector<int32_t> random_rows(std::mt19937& random, int32_t num_experts) {
  std::vector<int32_t> rows(num_experts);
  for (int32_t& count : rows) count = random() % 3 == 0 ? 0 : static_cast<int32_t>(random() % 700);
  return rows;
}

// Every row of every expert, with every weight pair of either product, exactly once; and whatever a
// tile needs has a smaller ticket.
void expect_cover_and_order(const Table& table, const tile::Walk& walk) {
  const int32_t all_rows = table.begin.back();
  std::vector<bool> covered(2 * kMaxPairs * all_rows);  // [product][pair][row]
  int64_t num_covered = 0;
  std::map<int32_t, int32_t> up_tiles_of_block;  // by first row
  int32_t column_block = -1;
  for (int32_t ticket = 0;; ++ticket) {
    const Tile tile = walk.tile_at(ticket);
    if (tile.is_end()) break;
    const int32_t e = tile.local_expert_idx;
    ASSERT_GE(tile.row_begin, table.begin[e]);
    ASSERT_LE(tile.row_begin + tile.num_rows, table.begin[e] + table.rows[e]);
    for (int32_t row = 0; row < tile.num_rows; ++row) {
      const size_t at = (size_t{kMaxPairs} * tile.product + tile.weight_pair_idx) * all_rows +
                        tile.row_begin + row;
      ASSERT_FALSE(covered[at]);
      covered[at] = true;
      ++num_covered;
    }
    if (tile.product == tile::kUpProduct) {
      ASSERT_LT(column_block, 0) << "an up tile behind down tiles";
      ++up_tiles_of_block[tile.row_begin];
      continue;
    }
    ASSERT_EQ(up_tiles_of_block[tile.row_begin], walk.up_pairs);
    ASSERT_GE(tile.weight_pair_idx / walk.column_pairs, column_block);
    column_block = tile.weight_pair_idx / walk.column_pairs;
  }
  int64_t rows = 0;
  for (const int32_t count : table.rows) rows += count;
  ASSERT_EQ(num_covered, rows * (walk.up_pairs + walk.down_pairs));
}

TEST(CudaWalk, CoversEveryTileOnceAndInOrder) {
  std::mt19937 random(7);
  for (const int32_t num_experts : {1, 2, 7, 32, 33, 100}) {
    for (int round = 0; round < 4; ++round) {
      const Table table(random_rows(random, num_experts));
      const auto down_pairs = static_cast<int32_t>(1 + random() % 6);
      const auto column_pairs = static_cast<int32_t>(1 + random() % down_pairs);
      expect_cover_and_order(table, {table.view(), kMaxRows, static_cast<int32_t>(1 + random() % 4),
                                     down_pairs, column_pairs});
    }
  }
}

TEST(CudaWalk, NoRowsNoTiles) {
  const Table table(std::vector<int32_t>(5, 0));
  EXPECT_TRUE((tile::Walk{table.view(), kMaxRows, 3, 4, 2}.tile_at(0).is_end()));
}

TEST(CudaWalk, FindsTheExpertOfEveryRowGroup) {
  std::mt19937 random(3);
  const Table table(random_rows(random, 50));
  for (int32_t e = 0; e < 50; ++e) {
    for (int32_t row = table.begin[e]; row < table.begin[e + 1]; row += config::kCopyRows) {
      ASSERT_EQ(table.view().expert_of_row(row), e) << row;
    }
  }
}

// A shape that has every region.
constexpr config::ForwardTableShape kFullShape{.tokens = 1000,
                                               .hidden = 192,
                                               .intermediate = 128,
                                               .num_experts = 65,
                                               .top_k = 3,
                                               .rows = 4096,
                                               .rank_slots = 6000,
                                               .state_bytes = 24,
                                               .has_router = true,
                                               .own_logits = true,
                                               .weight_on_input = true};

TEST(CudaForward, RegionsOfTheScratchDoNotOverlap) {
  const auto table = config::forward_table(kFullShape);
  int64_t end = 0;
  for (const plan::Region& region : table.regions) {
    EXPECT_GE(region.offset, end) << region.name;
    EXPECT_EQ(region.offset % plan::kRegionAlign, 0) << region.name;
    EXPECT_GT(region.bytes, 0) << region.name;
    end = region.offset + region.bytes;
  }
  EXPECT_GE(table.total, end);
}

// A region whose words must last between launches lies where no size moves it.
TEST(CudaForward, StateIsFirst) {
  config::ForwardTableShape least = kFullShape;
  least.tokens = 0;
  least.has_router = least.own_logits = least.weight_on_input = false;
  for (const config::ForwardTableShape& shape : {kFullShape, least}) {
    const auto table = config::forward_table(shape);
    EXPECT_EQ(table[config::ForwardScratch::kState].offset, 0);
  }
}

// Every (column block, source, token) is in one unit that is sent and every (column block, own
// token) in one at home, which comes after all units that are sent of its column block.
void expect_combine_cover(const std::vector<int32_t>& tokens, int32_t rank, int32_t blocks) {
  const auto world = static_cast<int32_t>(tokens.size());
  const tile::CombineWalk walk{.column_blocks = blocks,
                               .rank = rank,
                               .world = world,
                               .tokens = tokens.data(),
                               .num_tokens = tokens[rank],
                               .unit_tokens = 3};
  std::map<std::array<int32_t, 3>, int32_t> ticket_of;
  int32_t ticket = 0;
  for (;; ++ticket) {
    const tile::CombineUnit unit = walk.unit_at(ticket);
    if (walk.is_end(unit)) break;
    ASSERT_LT(unit.token, unit.end);
    for (int32_t t = unit.token; t < unit.end; ++t) {
      const bool is_new = ticket_of.insert({{unit.column_block, unit.source, t}, ticket}).second;
      ASSERT_TRUE(is_new) << ticket;
    }
  }
  EXPECT_TRUE(walk.is_end(walk.unit_at(ticket + 1)));
  EXPECT_TRUE(walk.is_end(walk.unit_at(ticket + 100000)));
  const size_t sent = std::accumulate(tokens.begin(), tokens.end(), size_t{0});
  const size_t at_home = world == 1 ? 0 : tokens[rank];
  EXPECT_EQ(ticket_of.size(), blocks * (sent + at_home));
  if (world == 1) return;
  std::vector<int32_t> last_sent(blocks, -1);
  for (const auto& [what, at] : ticket_of) {
    if (what[1] != tile::kHome) last_sent[what[0]] = std::max(last_sent[what[0]], at);
  }
  for (const auto& [what, at] : ticket_of) {
    if (what[1] == tile::kHome) {
      EXPECT_GT(at, last_sent[what[0]]);
    }
  }
}

TEST(CudaRanks, UnitsOfTheSumsCoverAllAndComeHomeLast) {
  for (const std::vector<int32_t>& tokens : {std::vector<int32_t>{0},
                                             {7},
                                             {5000},
                                             {0, 0},
                                             {0, 5},
                                             {130, 1},
                                             {4097, 64, 0},
                                             {1, 2, 3, 4}}) {
    for (int32_t blocks : {1, 2, 5}) {
      for (int32_t rank = 0; rank < static_cast<int32_t>(tokens.size()); ++rank) {
        expect_combine_cover(tokens, rank, blocks);
      }
    }
  }
}

TEST(CudaRanks, FlagsOfEverySizeHaveAPlace) {
  for (int32_t tokens : {0, 1, 63, 1024, 4096, 4097, 16384, 16385, 140001}) {
    for (int32_t cap : {tokens, tokens + 1, 2 * tokens + 7}) {
      EXPECT_LE(config::return_units(tokens), config::return_stride(cap)) << tokens;
      EXPECT_LE((tokens + config::kPushTokens - 1) / config::kPushTokens, config::push_stride(cap));
    }
  }
}

TEST(CudaRanks, StepsBeginWithTheRankItself) {
  for (int32_t world : {1, 2, 3, 8}) {
    for (int32_t rank = 0; rank < world; ++rank) {
      EXPECT_EQ(tile::source_of_step(rank, world, 0), rank);
      for (int32_t step = 0; step < world; ++step) {
        const int32_t source = tile::source_of_step(rank, world, step);
        EXPECT_EQ(tile::step_of_source(rank, world, source), step);
      }
    }
  }
}

TEST(CudaRanks, RegionsOfTheSymmetricMemoryDoNotOverlap) {
  const auto capacity = config::needed_capacity(3, 100, 512, 4, 5);
  const auto table = config::symmetric_table(3, capacity);
  EXPECT_EQ(table[config::Symmetric::kControl].offset, 0);
  int64_t end = 0;
  for (const plan::Region& region : table.regions) {
    EXPECT_GE(region.offset, end) << region.name;
    EXPECT_GT(region.bytes, 0) << region.name;
    end = region.offset + region.bytes;
  }
  EXPECT_EQ(table[config::Symmetric::kReceived].bytes, 3 * 100 * 512 * 2);
}

}  // namespace
}  // namespace flashmoe::cuda
