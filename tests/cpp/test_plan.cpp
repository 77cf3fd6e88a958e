// Properties of src/plan over random configurations: routing, rows, blocks, region tables, epochs.
#include <numeric>
#include <set>

#include "cluster.h"
#include "plan/layout.h"
#include "plan/rows.h"

namespace flashmoe::test {
namespace {

using plan::Epoch;
using plan::Problem;

// --- epochs ---------------------------------------------------------------------------------

// `count` epochs of consecutive launches, starting at `first`.
std::vector<Epoch> launches(Epoch first, int count) {
  std::vector<Epoch> epochs{first};
  while (static_cast<int>(epochs.size()) < count) epochs.push_back(plan::next_epoch(epochs.back()));
  return epochs;
}

TEST(Epoch, NextIsNeverZeroAlternatesBanksAndHasAnInverse) {
  for (const Epoch first : {0u, 1000u, 0x7ffffff0u, 0xfffffff0u}) {
    const auto epochs = launches(plan::next_epoch(first), 64);
    for (size_t i = 1; i < epochs.size(); ++i) {
      EXPECT_NE(epochs[i], 0u);
      EXPECT_NE(plan::bank_of(epochs[i]), plan::bank_of(epochs[i - 1])) << epochs[i];
      EXPECT_NE(epochs[i], epochs[i - 1]);
    }
    for (size_t i = 2; i < epochs.size(); ++i) {
      EXPECT_EQ(plan::previous_epoch(epochs[i]), epochs[i - 1]);
      EXPECT_EQ(plan::credit_epoch(epochs[i]), epochs[i - 2]);
      EXPECT_EQ(plan::bank_of(plan::credit_epoch(epochs[i])), plan::bank_of(epochs[i]));
    }
  }
}

// A rank that has finished launch m gives credit for launch n exactly when m >= n - 2.
TEST(Epoch, CreditOrdersLaunchesAcrossTheWrap) {
  for (const Epoch first : {2u, 0x7ffffff0u, 0xffffffc0u}) {
    const auto epochs = launches(first, 200);
    for (int n = 4; n < 200; ++n) {
      for (int done = std::max(0, n - 8); done <= std::min(199, n + 2); ++done) {
        EXPECT_EQ(plan::has_credit(epochs[done], epochs[n]), done >= n - 2)
            << "launch " << epochs[n] << ", done " << epochs[done];
      }
    }
  }
}

TEST(Epoch, FreshMemoryGivesCreditToTheFirstTwoLaunchesOnly) {
  const auto epochs = launches(plan::next_epoch(0), 3);
  EXPECT_TRUE(plan::has_credit(0, epochs[0]));
  EXPECT_TRUE(plan::has_credit(0, epochs[1]));
  EXPECT_FALSE(plan::has_credit(0, epochs[2]));
}

// Ranks run ahead of each other as far as the credit allows; no bank is written before its reader
// has left the launch that used it.
TEST(Epoch, SimulatedRanksNeverOverwriteABankInUse) {
  for_seeds(rounds(40), [](Rng& rng) {
    const int world = rng.between32(2, 4);
    const auto epochs = launches(0xfffffe00u, 1200);
    std::vector<int> started(world, 0), finished(world, 0);  // launches of each rank
    int widest = 0;
    for (int turn = 0; turn < 20000; ++turn) {
      const int rank = rng.between32(0, world - 1);
      if (started[rank] > finished[rank]) {
        // It may leave launch n once all metadata of n is there, that is, all have started it.
        const bool all =
            std::all_of(started.begin(), started.end(), [&](int n) { return n >= started[rank]; });
        if (all) finished[rank] = started[rank];
        continue;
      }
      const int next = started[rank] + 1;
      if (next >= 1200) continue;
      const bool credit = std::all_of(finished.begin(), finished.end(), [&](int done) {
        return plan::has_credit(done == 0 ? 0xfffffdffu : epochs[done], epochs[next]);
      });
      if (!credit) continue;
      for (int reader = 0; reader < world; ++reader) {
        const int reading = started[reader] > finished[reader] ? started[reader] : 0;
        if (reading == 0 || reading == next) continue;
        ASSERT_NE(plan::bank_of(epochs[reading]), plan::bank_of(epochs[next]));
        widest = std::max(widest, next - reading);
      }
      started[rank] = next;
    }
    EXPECT_EQ(widest, 1);
    EXPECT_GT(*std::min_element(finished.begin(), finished.end()), 100);
  });
}

TEST(Epoch, PublishedMeansEqual) {
  for (const Epoch epoch : {1u, 2u, 77u, 0xffffffffu}) {
    EXPECT_TRUE(plan::is_published(epoch, epoch));
    EXPECT_FALSE(plan::is_published(0, epoch));
    EXPECT_FALSE(plan::is_published(plan::next_epoch(epoch), epoch));
    EXPECT_FALSE(plan::is_published(plan::previous_epoch(epoch), epoch));
  }
}

// --- routing --------------------------------------------------------------------------------

TEST(Routing, SentinelsAreMinusOneAndFromEUp) {
  EXPECT_FALSE(plan::is_routed(-1, 4));
  EXPECT_FALSE(plan::is_routed(4, 4));
  EXPECT_FALSE(plan::is_routed(int64_t{1} << 40, 4));
  EXPECT_TRUE(plan::is_routed(0, 4));
  EXPECT_TRUE(plan::is_routed(3, 4));
}

TEST(Routing, HistogramScanAndRankAgreeWithCounting) {
  for_seeds(rounds(1500), [](Rng& rng) {
    const Problem p = random_problem(rng);
    std::vector<int32_t> ids(static_cast<size_t>(p.slots()));
    for (auto& id : ids) id = rng.between32(-1, static_cast<int32_t>(p.num_experts) + 1);
    const RankedSlots ranked = rank_slots_by_tiles(p, ids);
    std::vector<int32_t> seen(static_cast<size_t>(p.num_experts), 0);
    for (size_t s = 0; s < ids.size(); ++s) {
      const bool routed = ids[s] >= 0 && ids[s] < p.num_experts;
      ASSERT_EQ(ranked.ranks[s], routed ? seen[static_cast<size_t>(ids[s])]++ : -1) << "slot " << s;
    }
    EXPECT_EQ(ranked.totals, seen);
  });
}

// ceil(c * T * k / E), at most all slots, in exact arithmetic: c is a multiple of 1/64.
TEST(Routing, CapacityIsTheDocumentedCeiling) {
  for_seeds(rounds(5000), [](Rng& rng) {
    Problem p = random_problem(rng);
    p.tokens = rng.between(0, rng.chance(0.1) ? 100000000 : 3000);
    const int64_t c64 = rng.between(1, 64 * 4);
    // Smallest n with n * E * 64 >= c64 * T * k.
    int64_t expected = c64 * p.slots() / (64 * p.num_experts);
    while (expected * p.num_experts * 64 < c64 * p.slots()) ++expected;
    expected = std::min(expected, p.slots());
    const int64_t capacity = plan::expert_capacity(static_cast<double>(c64) / 64.0, p);
    ASSERT_EQ(capacity, expected) << c64 << "/64 * " << p.slots() << " / " << p.num_experts;
    ASSERT_EQ(plan::expert_capacity(0.0, p), p.slots());
    for (int64_t place = std::max<int64_t>(0, capacity - 2); place < capacity + 2; ++place) {
      ASSERT_EQ(plan::is_kept(static_cast<int32_t>(place), capacity), place < expected);
    }
    ASSERT_FALSE(plan::is_kept(-1, capacity));
  });
}

// --- rows and blocks ------------------------------------------------------------------------

TEST(Problem, StepsVisitEverySourceOnceStartingAtHome) {
  for (int32_t world = 1; world <= 9; ++world) {
    for (int32_t rank = 0; rank < world; ++rank) {
      const Problem p{.world = world, .rank = rank};
      std::set<int32_t> sources;
      EXPECT_EQ(p.source_of_step(0), rank);
      for (int32_t step = 0; step < world; ++step) {
        sources.insert(p.source_of_step(step));
        EXPECT_EQ(p.step_of_source(p.source_of_step(step)), step);
      }
      EXPECT_EQ(static_cast<int32_t>(sources.size()), world);
    }
  }
}

// Every kept slot has one row; an expert's rows are consecutive and aligned, its sources in step
// order, slot order inside a source.
TEST(Rows, EveryKeptSlotHasItsRowInOrder) {
  for_seeds(rounds(1500), [](Rng& rng) {
    const Cluster cluster(rng);
    for (int32_t owner = 0; owner < cluster.world(); ++owner) {
      const Problem& p = cluster.problems[owner];
      const int64_t align = rng.pick<int64_t>({1, 8, 16, 64});
      const Placed placed = place(cluster, owner, align);
      int64_t row = 0;
      for (int64_t e = 0; e < p.local_experts(); ++e) {
        row = (row + align - 1) / align * align;
        ASSERT_EQ(placed.begin[e], row);
        for (int32_t step = 0; step < p.world; ++step) {
          ASSERT_EQ(placed.segments[e * p.world + step], row);
          const auto slots =
              cluster.kept_slots(p.source_of_step(step), owner * p.local_experts() + e);
          for (size_t i = 0; i < slots.size(); ++i, ++row) {
            ASSERT_EQ(plan::step_of_row(p, placed.segments.data(), e, row), step);
            const int32_t slot_rank = cluster.ranks[p.source_of_step(step)][slots[i]];
            ASSERT_EQ(slot_rank, static_cast<int32_t>(i)) << "place inside the segment";
          }
        }
        ASSERT_EQ(placed.rows[e], row - placed.begin[e]);
      }
      ASSERT_EQ(placed.total, (row + align - 1) / align * align);
      ASSERT_EQ(placed.begin[p.local_experts()], placed.total);
      ASSERT_LE(placed.total, plan::max_rows(row, p.local_experts(), align));
    }
  });
}

TEST(Rows, OffsetsPassTwoToTheThirtyOne) {
  Problem p{.world = 4, .rank = 1, .num_experts = 8};
  const std::vector<int32_t> counts(8, 0x7fffffff);
  int64_t begin[3], rows[2], segments[8];
  const int64_t total = plan::place_rows(p, counts.data(), 8, begin, rows, segments);
  const int64_t expert = int64_t{4} * 0x7fffffff;
  EXPECT_EQ(rows[0], expert);
  EXPECT_EQ(begin[1], plan::align_up(expert, 8));
  EXPECT_EQ(segments[4 + 3], begin[1] + int64_t{3} * 0x7fffffff);
  EXPECT_EQ(total, begin[1] + plan::align_up(expert, 8));
  EXPECT_EQ(plan::step_of_row(p, segments, 1, begin[1] + expert - 1), 3);
}

TEST(Blocks, CoverEachExpertOnceAndSortByStep) {
  for_seeds(rounds(2000), [](Rng& rng) {
    const Cluster cluster(rng);
    const int32_t owner = rng.between32(0, cluster.world() - 1);
    const Problem& p = cluster.problems[owner];
    plan::BlockShape shape{.row_align = rng.pick<int64_t>({1, 8, 16}), .max_rows = 0};
    shape.max_rows = shape.row_align * rng.between(1, 16);
    const Placed placed = place(cluster, owner, shape.row_align);
    const int64_t bound = plan::max_blocks(placed.total, p.local_experts(), shape);
    std::vector<plan::Block> blocks(static_cast<size_t>(bound) + 1);
    const int64_t count = plan::make_blocks(p, shape, placed.begin.data(), placed.rows.data(),
                                            placed.segments.data(), blocks.data());
    ASSERT_LE(count, bound);
    std::vector<int64_t> next(placed.begin), tallest(placed.rows.size(), 0);
    for (int64_t b = 0; b < count; ++b) {
      const plan::Block& block = blocks[static_cast<size_t>(b)];
      const auto e = static_cast<size_t>(block.local_expert_idx);
      ASSERT_TRUE(b == 0 ||
                  blocks[static_cast<size_t>(b - 1)].local_expert_idx <= block.local_expert_idx);
      ASSERT_EQ(block.row_begin, next[e]) << "consecutive";
      ASSERT_EQ(block.row_begin % shape.row_align, 0);
      ASSERT_GT(block.num_rows, 0);
      ASSERT_EQ(block.padded_rows % shape.row_align, 0);
      ASSERT_LE(block.padded_rows, shape.max_rows);
      ASSERT_GE(block.padded_rows, block.num_rows);
      ASSERT_LT(block.padded_rows - block.num_rows, shape.row_align);
      ASSERT_LE(block.row_begin + block.padded_rows, placed.begin[e + 1]) << "inside the expert";
      ASSERT_EQ(block.step, plan::step_of_row(p, placed.segments.data(), block.local_expert_idx,
                                              block.row_begin + block.num_rows - 1));
      next[e] += block.num_rows;
      tallest[e] = std::max(tallest[e], block.padded_rows);
    }
    for (size_t e = 0; e < placed.rows.size(); ++e) {
      ASSERT_EQ(next[e] - placed.begin[e], placed.rows[e]) << "all rows of expert " << e;
      ASSERT_LE(tallest[e], plan::block_height(placed.rows[e], shape));
    }
    std::vector<int32_t> order(static_cast<size_t>(count));
    plan::sort_blocks_by_step(blocks.data(), count, p.world, order.data());
    std::vector<int32_t> expected(order.size());
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
      return blocks[static_cast<size_t>(a)].step < blocks[static_cast<size_t>(b)].step;
    });
    ASSERT_EQ(order, expected);
  });
}

// An expert with 0, 1, 63, 64, 65, 127, 128, 129 rows and many more than one block takes.
TEST(Blocks, SplitEvenly) {
  const plan::BlockShape shape{.row_align = 16, .max_rows = 192};
  for (int64_t rows = 0; rows < 3000; ++rows) {
    const int64_t count = plan::blocks_of_expert(rows, shape);
    const int64_t height = plan::block_height(rows, shape);
    EXPECT_EQ(count, (rows + 191) / 192);
    EXPECT_GE(height * count, rows);
    EXPECT_TRUE(rows == 0 || (height - shape.row_align) * count < rows) << rows << " rows";
  }
  const int64_t many = (int64_t{1} << 33) + 5;
  EXPECT_EQ(plan::blocks_of_expert(many, shape), many / 192 + 1);
  EXPECT_EQ(plan::max_blocks(many, 3, shape), many / 192 + 3);
}

// --- region tables --------------------------------------------------------------------------

template <class Table>
void expect_disjoint(const Table& table) {
  int64_t end = 0;
  for (int i = 0; i < Table::size(); ++i) {
    const plan::Region& region = table.regions[i];
    ASSERT_NE(region.name[0], '\0') << "region " << i << " was never added";
    ASSERT_GE(region.bytes, 0) << region.name;
    ASSERT_EQ(region.offset % plan::kRegionAlign, 0) << region.name;
    ASSERT_GE(region.offset, end) << region.name;
    ASSERT_LT(region.offset - end, plan::kRegionAlign) << "a gap before " << region.name;
    end = region.offset + region.bytes;
  }
  ASSERT_GE(table.total, end);
  ASSERT_LT(table.total - end, plan::kRegionAlign);
}

Problem big_problem(Rng& rng) {
  Problem p{.world = rng.between32(1, 16)};
  p.rank = rng.between32(0, p.world - 1);
  p.gates = rng.between32(1, 2);
  p.num_experts = p.world * rng.between(1, 32);
  p.top_k = rng.between(1, std::min<int64_t>(p.num_experts, 8));
  p.hidden = rng.between(1, 16384);
  p.intermediate = rng.between(1, 32768);
  // Around 2^31 elements in [T, H], and small.
  p.tokens =
      rng.chance(0.5) ? (int64_t{1} << 31) / p.hidden + rng.between(-2, 2) : rng.between(0, 300);
  p.tokens = std::max<int64_t>(p.tokens, 0);
  return p;
}

TEST(Tables, RegionsNeverOverlapAndHoldWhatTheySay) {
  for_seeds(rounds(3000), [](Rng& rng) {
    const Problem p = big_problem(rng);
    const auto element = rng.pick<int32_t>({2, 4, 8});
    const int32_t acc = element == 8 ? 8 : 4;
    const plan::SymmetricShape shape = symmetric_shape(p, p.tokens, element, rng.chance(0.5));
    const auto symmetric = plan::symmetric_table(shape);
    expect_disjoint(symmetric);
    const __int128 recv = __int128{p.world} * shape.token_cap * p.hidden * element;
    ASSERT_TRUE(symmetric[plan::Symmetric::kRecvX].bytes == recv);
    ASSERT_TRUE(symmetric[plan::Symmetric::kPartial].bytes == recv);
    ASSERT_TRUE(symmetric[plan::Symmetric::kRecvGrad].bytes == (shape.backward ? recv : 0));

    const plan::RouteShape route{.fused_router = rng.chance(0.5),
                                 .backward = shape.backward,
                                 .router_weight_bytes = rng.chance(0.5) ? 8 : 0,
                                 .acc_bytes = acc,
                                 .num_threads = rng.between(1, 128),
                                 .panel_bytes = rng.between(1, 100000000)};
    const auto route_table = plan::route_table(p, route);
    expect_disjoint(route_table);
    ASSERT_GE(route_table[plan::RouteScratch::kPanels].bytes,
              route.num_threads * route.panel_bytes);

    plan::RowShape rows{.rows = plan::align_up(p.slots(), 8)};
    rows.blocks = rows.rows / 256 + p.local_experts();
    rows.all_slots = p.slots() * p.world;
    rows.column_width = std::min<int64_t>(p.hidden, 512);
    rows.column_blocks = plan::ceil_div(p.hidden, 512);
    rows.weight_parts = 3;
    rows.element_bytes = element;
    rows.acc_bytes = acc;
    rows.backward = shape.backward;
    const auto row_table = plan::row_table(p, rows);
    expect_disjoint(row_table);
    ASSERT_TRUE(row_table[plan::RowScratch::kHiddenRows].bytes ==
                __int128{rows.rows} * p.intermediate * element);
    const int64_t slots = rows.column_blocks == 1 ? 1 : 2;
    ASSERT_TRUE(row_table[plan::RowScratch::kRing].bytes ==
                __int128{slots} * rows.rows * rows.column_width * element);
  });
}

TEST(Tables, FlagIndicesAreABijection) {
  for_seeds(rounds(300), [](Rng& rng) {
    Problem p = random_problem(rng);
    p.hidden = rng.between(1, 2000);
    const auto shape = symmetric_shape(p, rng.between(0, 300), 4, true);
    const auto table = plan::symmetric_table(shape);
    std::set<int64_t> push, returns;
    const int64_t chunks = plan::num_chunks(shape.token_cap);
    for (int32_t rank = 0; rank < p.world; ++rank) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        push.insert(plan::push_flag_index(shape, rank, chunk));
        for (int64_t c = 0; c < shape.column_blocks; ++c) {
          returns.insert(plan::return_flag_index(shape, rank, c, chunk));
        }
      }
    }
    ASSERT_EQ(static_cast<int64_t>(push.size()), p.world * chunks);
    ASSERT_EQ(static_cast<int64_t>(returns.size()), p.world * chunks * shape.column_blocks);
    ASSERT_TRUE(push.empty() || *push.rbegin() * 4 < table[plan::Symmetric::kPushFlags].bytes);
    ASSERT_TRUE(returns.empty() ||
                *returns.rbegin() * 4 < table[plan::Symmetric::kReturnFlags].bytes);
  });
}

}  // namespace
}  // namespace flashmoe::test
