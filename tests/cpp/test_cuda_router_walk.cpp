// The router's products in the backward, without a GPU: every product of an element of grad_logits
// and one of W_router or X is added exactly once, by a model of the tensor core's operands.
#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <tuple>
#include <vector>

#include "cuda/tile/router_walk.h"

namespace flashmoe::cuda {
namespace {

using tile::RouterProduct;
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

// A unit as stage::RouterMultiplier makes it; add(row of M, column, sum) of each of its elements.
template <RouterProduct kProduct, class Add>
void run_unit(const Operands& operands, const tile::RouterWalk<kProduct>& walk,
              const RouterUnit& unit, const Add& add) {
  using Lane = tile::RouterLane<kProduct>;
  constexpr bool kIsX = kProduct == RouterProduct::kGradX;
  const int32_t end = walk.depth_end(unit);
  std::vector<Registers> products(tile::kRouterLaneColumns, Registers{});
  for (int32_t depth = walk.depth_begin(unit); depth < end; depth += tile::kRouterDepth) {
    for (int32_t j = 0; j < tile::kRouterLaneColumns; ++j) {
      Registers& r = products[static_cast<size_t>(j)];
      for (int32_t l = 0; l < kLanes; ++l) {
        const Lane lane{l};
        for (int i = 0; i < 4; ++i) {
          const int32_t m = unit.m + lane.row(i % 2);
          const int32_t k = depth + lane.depth(i / 2);
          const size_t at = kIsX ? operands.at(m, k) : operands.at(k, m);
          ASSERT_LT(at, operands.logits.size());
          r.a[l][i] = operands.logits[at];
        }
        for (int i = 0; i < 2; ++i) {
          const int32_t k = plan::min_of(depth + lane.depth(i), end - 1);
          ASSERT_LT(k, operands.n_rows);
          r.b[l][i] = operands.n_at(k, unit.n + lane.operand_column(j));
        }
      }
      multiply(r);
    }
  }
  for (int32_t j = 0; j < tile::kRouterLaneColumns; ++j) {
    for (int32_t l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        add(unit.m + Lane{l}.row(i / 2), unit.n + Lane{l}.sum_column(i % 2, j),
            products[static_cast<size_t>(j)].d[l][i]);
      }
    }
  }
}

// All units, dealt to warps by runs, against the product element by element.
template <RouterProduct kProduct>
void expect_product(const Sizes& s, int32_t num_workers, std::mt19937& random) {
  constexpr bool kIsX = kProduct == RouterProduct::kGradX;
  const Operands operands(s, kProduct, random);
  const tile::RouterWalk<kProduct> walk{s.tokens, s.hidden, s.num_experts};
  const int32_t segments = kIsX ? 1 : walk.num_segments();
  const int32_t rows = walk.rows();
  std::vector<double> sums(static_cast<size_t>(rows) * static_cast<size_t>(s.hidden));
  std::vector<int32_t> times(sums.size());
  for (int32_t worker = 0; worker < num_workers; ++worker) {
    const tile::RouterRun run(walk.num_units(), worker, num_workers);
    RouterUnit unit = run.count > 0 ? walk.unit_at(run.first) : RouterUnit{};
    for (int32_t i = 0; i < run.count; ++i) {
      const RouterUnit expected = walk.unit_at(run.first + i);
      ASSERT_EQ(std::tie(unit.m, unit.n, unit.segment),
                std::tie(expected.m, expected.n, expected.segment));
      ASSERT_LT(unit.segment, segments);
      run_unit<kProduct>(operands, walk, unit, [&](int32_t row, int32_t column, double sum) {
        ASSERT_LT(column, s.hidden);
        if (row >= rows) return;
        const size_t at =
            static_cast<size_t>(row) * static_cast<size_t>(s.hidden) + static_cast<size_t>(column);
        sums[at] += sum;
        ++times[at];
      });
      if (testing::Test::HasFatalFailure()) return;
      unit = walk.after(unit);
    }
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

TEST(CudaRouterWalk, AddsEveryProductOfGradXOnce) {
  std::mt19937 random(3);
  for (const Sizes& sizes : kSizes) {
    for (const int32_t workers : {1, 8, 528}) {
      SCOPED_TRACE(testing::Message() << sizes.tokens << " tokens, hidden " << sizes.hidden << ", "
                                      << sizes.num_experts << " experts, " << workers << " warps");
      expect_product<RouterProduct::kGradX>(sizes, workers, random);
    }
  }
}

TEST(CudaRouterWalk, AddsEveryProductOfGradWRouterOnce) {
  std::mt19937 random(5);
  for (const Sizes& sizes : kSizes) {
    for (const int32_t workers : {1, 8, 528}) {
      SCOPED_TRACE(testing::Message() << sizes.tokens << " tokens, hidden " << sizes.hidden << ", "
                                      << sizes.num_experts << " experts, " << workers << " warps");
      expect_product<RouterProduct::kGradWeight>(sizes, workers, random);
    }
  }
}

TEST(CudaRouterWalk, WithoutTokensThereIsNothing) {
  EXPECT_EQ((tile::RouterWalk<RouterProduct::kGradX>{0, 64, 8}).num_units(), 0);
  EXPECT_EQ((tile::RouterWalk<RouterProduct::kGradWeight>{0, 64, 8}).num_units(), 0);
  EXPECT_EQ(tile::RouterRun(0, 3, 528).count, 0);
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
    EXPECT_EQ(lane.operand_column(0) % tile::kRouterLaneColumns, 0);
    EXPECT_EQ(lane.operand_column(3), lane.operand_column(0) + 3);
    EXPECT_EQ(lane.sum_column(0, 0) % (2 * tile::kRouterLaneColumns), 0);
    for (int32_t i = 0; i < 2 * tile::kRouterLaneColumns; ++i) {
      EXPECT_EQ(lane.sum_column(i / tile::kRouterLaneColumns, i % tile::kRouterLaneColumns),
                lane.sum_column(0, 0) + i);
    }
  }
}

TEST(CudaRouterWalk, LanesLoadAndStoreContiguousElements) {
  expect_contiguous<RouterProduct::kGradX>();
  expect_contiguous<RouterProduct::kGradWeight>();
}

}  // namespace
}  // namespace flashmoe::cuda
