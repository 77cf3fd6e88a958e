// The router's products in the backward, without a GPU: every product of an element of grad_logits
// and one of W_router or X is added exactly once, by a model of the tensor core's operands.
#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "cuda/tile/router_walk.h"

namespace flashmoe::cuda {
namespace {

using tile::RouterProduct;
using tile::RouterTask;
using tile::RouterUnit;

constexpr int32_t kLanes = 32;

// Small whole numbers: sums of their products are exact, in any order.
std::vector<double> draw(int64_t count, std::mt19937& random) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) value = static_cast<double>(random() % 31) - 15;
  return values;
}

struct Sizes {
  int32_t tokens;
  int32_t hidden;
  int32_t num_experts;
};

// grad_logits as in scratch: rounded up with zeros. N: W_router [E, H], or X [T, H].
struct Operands {
  Sizes sizes;
  int32_t stride;
  std::vector<double> logits;
  std::vector<double> n;
  int32_t n_rows;

  Operands(const Sizes& s, RouterProduct product, std::mt19937& random)
      : sizes(s),
        stride(config::router_padded(s.num_experts)),
        logits(static_cast<size_t>(config::router_padded(s.tokens)) * static_cast<size_t>(stride)),
        n_rows(product == RouterProduct::kGradX ? s.num_experts : s.tokens) {
    n = draw(int64_t{n_rows} * s.hidden, random);
    const std::vector<double> values = draw(int64_t{s.tokens} * s.num_experts, random);
    for (int32_t t = 0; t < s.tokens; ++t) {
      for (int32_t e = 0; e < s.num_experts; ++e) {
        logits[at(t, e)] = values[static_cast<size_t>(t * s.num_experts + e)];
      }
    }
  }
  size_t at(int32_t t, int32_t e) const {
    return static_cast<size_t>(t) * static_cast<size_t>(stride) + static_cast<size_t>(e);
  }
  double n_at(int32_t row, int32_t column) const {
    return n[static_cast<size_t>(row) * static_cast<size_t>(sizes.hidden) +
             static_cast<size_t>(column)];
  }
};

// mma.m16n8k8 of the PTX manual, on the registers of a warp: a[i] of lane (g, t) is row g + 8 (i %
// 2), column t + 4 (i / 2); b[i] row t + 4 i, column g; d[i] row g + 8 (i / 2), column 2 t + i % 2.
struct Registers {
  double a[kLanes][4];
  double b[kLanes][2];
  double d[kLanes][4];
};

void multiply(Registers& r) {
  double a[16][8];
  double b[8][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4;
    const int t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][t + 4 * (i / 2)] = r.a[lane][i];
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = r.b[lane][i];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2);
      const int column = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 8; ++k) r.d[lane][i] += a[row][k] * b[k][column];
    }
  }
}

// The elements of grad_logits and of W_router or X that a lane has of a step.
struct LaneOperands {
  double m[2][2];  // [row][depth]
  double n[2][4];  // [depth][column]
};

template <RouterProduct kProduct>
LaneOperands load(const Operands& operands, const tile::RouterLane<kProduct>& lane,
                  const RouterUnit& unit, int32_t depth, int32_t end) {
  LaneOperands values{};
  for (int32_t k = 0; k < 2; ++k) {
    const int32_t at_depth = depth + lane.depth(k);
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t m = unit.m + lane.row(i);
      const size_t at =
          kProduct == RouterProduct::kGradX ? operands.at(m, at_depth) : operands.at(at_depth, m);
      EXPECT_LT(at, operands.logits.size());
      values.m[i][k] = operands.logits.at(at);
    }
    for (int32_t j = 0; j < tile::kRouterLaneColumns; ++j) {
      const int32_t row = plan::min_of(at_depth, end - 1);
      EXPECT_LT(row, operands.n_rows);
      values.n[k][j] = operands.n_at(row, unit.n + lane.column(j));
    }
  }
  return values;
}

// Into the registers of the unit's p-th product, as stage::RouterMultiplier does.
template <RouterProduct kProduct>
void set_registers(Registers& r, int32_t lane, int32_t p, const LaneOperands& values) {
  for (int32_t k = 0; k < 2; ++k) {
    if (kProduct == RouterProduct::kGradX) {
      for (int32_t j = 0; j < 2; ++j) r.a[lane][2 * k + j] = values.n[k][p / 2 * 2 + j];
      r.b[lane][k] = values.m[p % 2][k];
    } else {
      for (int32_t i = 0; i < 2; ++i) r.a[lane][2 * k + i] = values.m[i][k];
      r.b[lane][k] = values.n[k][p];
    }
  }
}

// A unit as stage::RouterMultiplier makes it; add(row of M, column, sum) of each of its elements.
template <RouterProduct kProduct, class Add>
void make_unit(const Operands& operands, const tile::RouterWalk<kProduct>& walk,
               const RouterUnit& unit, const Add& add) {
  using Lane = tile::RouterLane<kProduct>;
  const tile::RouterDepth depth = walk.depth(unit);
  std::vector<Registers> products(tile::kRouterProducts, Registers{});
  for (int32_t step = 0; step < depth.num_steps; ++step) {
    for (int32_t l = 0; l < kLanes; ++l) {
      const LaneOperands values =
          load(operands, Lane{l}, unit, depth.begin + step * tile::kRouterDepth, depth.end);
      for (int32_t p = 0; p < tile::kRouterProducts; ++p) {
        set_registers<kProduct>(products[static_cast<size_t>(p)], l, p, values);
      }
    }
    for (Registers& product : products) multiply(product);
  }
  for (int32_t l = 0; l < kLanes; ++l) {
    for (int32_t i = 0; i < Lane::kSumRows; ++i) {
      for (int32_t j = 0; j < Lane::kSumColumns; ++j) {
        const tile::RouterSum at = Lane::sum_at(i, j);
        add(unit.m + Lane{l}.sum_row(i), unit.n + Lane{l}.sum_column(j),
            products[static_cast<size_t>(at.product)].d[l][at.index]);
      }
    }
  }
}

// All units, by the runs that warps take, against the product element by element.
template <RouterProduct kProduct>
void expect_product(const Sizes& s, std::mt19937& random) {
  constexpr bool kIsX = kProduct == RouterProduct::kGradX;
  SCOPED_TRACE(testing::Message() << s.tokens << " tokens, hidden " << s.hidden << ", "
                                  << s.num_experts << " experts");
  const Operands operands(s, kProduct, random);
  const tile::RouterRuns runs(s.tokens, s.hidden, s.num_experts, true, true, false);
  tile::RouterWalk<kProduct> walk{s.tokens, s.hidden, s.num_experts};
  if (kIsX) walk.run_rows = runs.x_run_rows();
  const int32_t segments = kIsX ? 1 : walk.num_segments();
  const int32_t rows = walk.rows();
  std::vector<double> sums(static_cast<size_t>(rows) * static_cast<size_t>(s.hidden));
  std::vector<int32_t> times(sums.size());
  for (int32_t idx = 0; idx < (kIsX ? runs.num_shares() : runs.num_sums()); ++idx) {
    if (!kIsX && runs.run_at(idx).task == RouterTask::kBias) continue;
    RouterUnit unit = walk.run_at(kIsX ? idx : runs.run_at(idx).idx);
    do {
      ASSERT_LT(unit.segment, segments);
      make_unit<kProduct>(operands, walk, unit, [&](int32_t row, int32_t column, double sum) {
        ASSERT_LT(column, s.hidden);
        if (row >= rows) return;
        const size_t at =
            static_cast<size_t>(row) * static_cast<size_t>(s.hidden) + static_cast<size_t>(column);
        sums[at] += sum;
        ++times[at];
      });
      if (testing::Test::HasFailure()) return;
    } while (walk.advance(unit));
  }
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t column = 0; column < s.hidden; ++column) {
      const size_t at =
          static_cast<size_t>(row) * static_cast<size_t>(s.hidden) + static_cast<size_t>(column);
      double expected = 0.0;
      for (int32_t k = 0; k < operands.n_rows; ++k) {
        expected += operands.logits[kIsX ? operands.at(row, k) : operands.at(k, row)] *
                    operands.n_at(k, column);
      }
      ASSERT_EQ(times[at], segments) << "row " << row << ", column " << column;
      ASSERT_EQ(sums[at], expected) << "row " << row << ", column " << column;
    }
  }
}

const Sizes kSizes[] = {
    {1, 64, 1},    {16, 64, 16},  {17, 128, 8}, {64, 64, 7},    {65, 64, 1024},
    {333, 192, 6}, {127, 64, 33}, {8, 64, 2},   {1001, 64, 20},
};
// Runs of grad_x have two units, and the last one of a column has one.
constexpr Sizes kLongRuns = {4099, 1024, 8};

TEST(CudaRouterWalk, AddsEveryProductOfGradXOnce) {
  std::mt19937 random(3);
  for (const Sizes& sizes : kSizes) expect_product<RouterProduct::kGradX>(sizes, random);
}

TEST(CudaRouterWalk, AddsEveryProductOfGradWRouterOnce) {
  std::mt19937 random(5);
  for (const Sizes& sizes : kSizes) expect_product<RouterProduct::kGradWeight>(sizes, random);
}

TEST(CudaRouterWalk, RunsOfManyUnitsAddEveryProductOfGradXOnce) {
  const auto& [tokens, hidden, num_experts] = kLongRuns;
  ASSERT_EQ(tile::RouterRuns(tokens, hidden, num_experts, true, true, false).x_run_rows(),
            2 * tile::kRouterRows);
  std::mt19937 random(7);
  expect_product<RouterProduct::kGradX>(kLongRuns, random);
}

// Every run of a task is given out once, and words are added up once.
TEST(CudaRouterWalk, RunsAreEverythingThatIsAskedFor) {
  for (const Sizes& s : kSizes) {
    for (const bool has_weight : {false, true}) {
      for (const bool has_bias : {false, true}) {
        const tile::RouterRuns runs(s.tokens, s.hidden, s.num_experts, has_weight, has_bias, false);
        const tile::RouterWalk<RouterProduct::kGradWeight> weight{s.tokens, s.hidden,
                                                                  s.num_experts};
        tile::RouterWalk<RouterProduct::kGradX> x{s.tokens, s.hidden, s.num_experts};
        x.run_rows = runs.x_run_rows();
        const int32_t of_weight = s.num_experts * s.hidden;
        int32_t word = has_weight ? 0 : of_weight;
        std::map<RouterTask, int32_t> next;
        for (int32_t idx = 0; idx < runs.num_sums(); ++idx) {
          const tile::RouterRun run = runs.run_at(idx);
          EXPECT_EQ(run.idx, next[run.task]++);
        }
        for (int32_t idx = 0; idx < runs.num_reductions(); ++idx) {
          EXPECT_EQ(runs.words_begin(idx), word);
          word = runs.words_end(idx);
        }
        const int32_t of_segment = plan::ceil_div(s.num_experts, tile::kRouterBiasExperts);
        EXPECT_EQ(next[RouterTask::kBias], has_bias ? weight.num_segments() * of_segment : 0);
        EXPECT_EQ(next[RouterTask::kGradWeight], has_weight ? weight.num_runs() : 0);
        EXPECT_EQ(runs.num_shares(), x.num_runs());
        const tile::RouterRuns without(s.tokens, s.hidden, s.num_experts, has_weight, has_bias,
                                       true);
        EXPECT_EQ(without.num_shares(), 0) << "tiles";
        EXPECT_EQ(without.num_sums(), next[RouterTask::kBias]) << "others are tiles";
        EXPECT_EQ(without.num_reductions(), runs.num_reductions());
        EXPECT_EQ(word, of_weight + (has_bias ? s.num_experts : 0));
      }
    }
  }
}

TEST(CudaRouterWalk, WithoutTokensThereAreOnlyZerosToWrite) {
  const tile::RouterRuns runs(0, 64, 8, true, true, false);
  EXPECT_EQ(runs.num_shares(), 0);
  EXPECT_EQ(runs.num_sums(), 0);
  EXPECT_EQ(runs.words_end(runs.num_reductions() - 1), 8 * 64 + 8);
  EXPECT_EQ(tile::RouterRuns().num_reductions(), 0);
}

// What a lane loads and stores at once is contiguous, on multiples of its size.
template <RouterProduct kProduct>
void expect_contiguous() {
  constexpr bool kIsX = kProduct == RouterProduct::kGradX;
  for (int32_t l = 0; l < kLanes; ++l) {
    const tile::RouterLane<kProduct> lane{l};
    // Pairs of grad_logits: two depths of a token, or two experts.
    EXPECT_EQ((kIsX ? lane.depth(1) : lane.row(1)) - (kIsX ? lane.depth(0) : lane.row(0)), 1);
    EXPECT_EQ((kIsX ? lane.depth(0) : lane.row(0)) % 2, 0);
    EXPECT_EQ((kIsX ? lane.row(1) - lane.row(0) : lane.depth(1) - lane.depth(0)), kIsX ? 8 : 1);
    EXPECT_EQ(lane.column(0) % tile::kRouterLaneColumns, 0);
    EXPECT_EQ(lane.column(3), lane.column(0) + 3);
    EXPECT_EQ(lane.sum_column(0) % lane.kSumColumns, 0);
    for (int32_t j = 0; j < lane.kSumColumns; ++j) {
      EXPECT_EQ(lane.sum_column(j), lane.sum_column(0) + j);
    }
  }
}

TEST(CudaRouterWalk, LanesLoadAndStoreContiguousElements) {
  expect_contiguous<RouterProduct::kGradX>();
  expect_contiguous<RouterProduct::kGradWeight>();
}

}  // namespace
}  // namespace flashmoe::cuda
