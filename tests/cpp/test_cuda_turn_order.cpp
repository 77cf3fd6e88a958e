// Turns of the two math warpgroups, by a model of their barriers that runs on the CPU.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "cuda/sync/turn_order.h"

namespace flashmoe::cuda {
namespace {

// Tiles of a CTA: whether both warpgroups share it.
using Tiles = std::vector<bool>;

// What a run leaves behind.
struct Turns {
  std::vector<int> of;                          // warpgroups in the order of their turns
  std::vector<std::pair<int, size_t>> started;  // likewise, with the tiles
};

// The warpgroups as sync::Turns and math_role() have them; `random` says who makes the next step.
class Model {
 public:
  explicit Model(const Tiles& tiles) : tiles_(tiles), is_ended_(tiles.size(), false) {
    ++passed_to_[0];  // by warpgroup 1, when it starts
    for (int g = 0; g < 2; ++g) take(g);
  }

  bool has_work(int g) const { return of(g).tile_idx < tiles_.size(); }

  // One step of warpgroup g; false if it waits.
  bool step(int g) {
    Warpgroup& own = of(g);
    if (own.is_running) {
      end(g);
      return true;
    }
    // As a barrier: the phase of that parity is complete.
    if (passed_to_[static_cast<size_t>(g)] % 2 == own.order.parity()) return false;
    EXPECT_EQ(passed_to_[static_cast<size_t>(g)], own.num_turns + 1) << "one phase ahead";
    begin(g);
    return true;
  }

  const Turns& turns() const { return turns_; }

 private:
  struct Warpgroup {
    explicit Warpgroup(int idx) : order(idx) {}
    sync::TurnOrder order;
    size_t next_idx = 0;  // of the tiles that come
    size_t tile_idx = 0;
    uint32_t num_turns = 0;
    bool is_running = false;
  };
  Warpgroup& of(int g) { return warpgroups_[static_cast<size_t>(g)]; }
  const Warpgroup& of(int g) const { return warpgroups_[static_cast<size_t>(g)]; }

  void take(int g) {
    Warpgroup& own = of(g);
    do {
      own.tile_idx = own.next_idx++;
    } while (own.tile_idx < tiles_.size() && !own.order.takes(tiles_[own.tile_idx]));
  }
  void pass(int g) { ++passed_to_[static_cast<size_t>(1 - g)]; }
  void begin(int g) {
    Warpgroup& own = of(g);
    for (size_t i = 0; i < own.tile_idx; ++i) {
      EXPECT_TRUE(is_ended_[i]) << "stages of tile " << i << " may still hold earlier contents";
    }
    own.order.advance();
    ++own.num_turns;
    own.is_running = true;
    turns_.of.push_back(g);
    turns_.started.emplace_back(g, own.tile_idx);
    if (own.order.starts_first()) pass(g);
  }
  void end(int g) {
    Warpgroup& own = of(g);
    own.is_running = false;
    is_ended_[own.tile_idx] = true;
    if (!own.order.starts_first()) pass(g);
    take(g);
  }

  const Tiles& tiles_;
  std::vector<bool> is_ended_;  // somebody has waited for all its stages
  std::array<uint32_t, 2> passed_to_{};
  std::array<Warpgroup, 2> warpgroups_{Warpgroup(0), Warpgroup(1)};
  Turns turns_;
};

Turns run(const Tiles& tiles, std::mt19937& random) {
  Model model(tiles);
  while (model.has_work(0) || model.has_work(1)) {
    const int first = static_cast<int>(random() % 2);
    const bool moved = (model.has_work(first) && model.step(first)) ||
                       (model.has_work(1 - first) && model.step(1 - first));
    if (!moved) {
      ADD_FAILURE() << "both wait";
      break;
    }
  }
  return model.turns();
}

void expect_turns(const Tiles& tiles, const Turns& turns) {
  std::vector<std::vector<int>> parts(tiles.size());
  for (size_t i = 0; i < turns.of.size(); ++i) {
    EXPECT_EQ(turns.of[i], static_cast<int>(i % 2)) << "turn " << i;
  }
  for (const auto& [g, tile_idx] : turns.started) parts[tile_idx].push_back(g);
  int owner = 0;  // of the next tile of one warpgroup
  for (size_t i = 0; i < tiles.size(); ++i) {
    const std::vector<int> expected =
        tiles[i] ? std::vector<int>{owner, 1 - owner} : std::vector<int>{owner};
    EXPECT_EQ(parts[i], expected) << "tile " << i;
    if (!tiles[i]) owner = 1 - owner;
  }
}

TEST(CudaTurnOrder, AnySequenceOfTilesHasAlternatingTurns) {
  std::mt19937 random(3);
  constexpr size_t kTiles = 7;
  for (uint32_t sequence = 0; sequence < 1u << kTiles; ++sequence) {
    Tiles tiles(kTiles);
    for (size_t i = 0; i < kTiles; ++i) tiles[i] = (sequence >> i & 1) != 0;
    for (int round = 0; round < 8; ++round) {
      expect_turns(tiles, run(tiles, random));
      ASSERT_FALSE(testing::Test::HasFailure()) << "sequence " << sequence;
    }
  }
}

TEST(CudaTurnOrder, ManyTiles) {
  std::mt19937 random(5);
  for (const uint32_t shared_of_eight : {0u, 1u, 4u, 7u, 8u}) {
    Tiles tiles(500);
    for (size_t i = 0; i < tiles.size(); ++i) tiles[i] = random() % 8 < shared_of_eight;
    expect_turns(tiles, run(tiles, random));
  }
}

// A warp keeps its state as one word while a tile is finished.
TEST(CudaTurnOrder, IsOneWord) {
  sync::TurnOrder order(1);
  EXPECT_FALSE(order.takes(false)) << "the first is warpgroup 0's";
  EXPECT_TRUE(order.takes(true));
  EXPECT_TRUE(order.starts_first());
  order.advance();
  sync::TurnOrder other(0);
  other.set(order.word());
  EXPECT_TRUE(other.starts_first());
  EXPECT_EQ(other.parity(), 1u);
  EXPECT_TRUE(other.takes(false));
  EXPECT_FALSE(other.starts_first());
}

}  // namespace
}  // namespace flashmoe::cuda
