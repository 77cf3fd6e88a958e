// Matrix products of the CPU engine against three loops.
#include "cpu/gemm.h"
#include "support.h"

namespace flashmoe::test {
namespace {

template <class T>
class Gemm : public testing::Test {};
using Dtypes = testing::Types<double, float, cpu::bf16, cpu::fp16>;
TYPED_TEST_SUITE(Gemm, Dtypes);

// A rows x cols matrix in either storage order, with a gap between its rows (columns).
template <class T>
struct Matrix {
  Matrix(Rng& rng, int64_t rows, int64_t cols) {
    const bool row_major = rng.chance(0.5);
    const int64_t gap = rng.pick<int64_t>({0, 0, 1, 5});
    row_stride = row_major ? cols + gap : 1;
    col_stride = row_major ? 1 : rows + gap;
    data = rng.vector<T>(static_cast<size_t>((rows + gap) * (cols + gap) + 1));
  }
  double operator()(int64_t i, int64_t j) const {
    return static_cast<double>(data[static_cast<size_t>(i * row_stride + j * col_stride)]);
  }
  cpu::MatrixView<T> view() const { return {data.data(), row_stride, col_stride}; }

  int64_t row_stride, col_stride;
  std::vector<T> data;
};

// Three loops, in long double and in the accumulation type.
template <class A>
void add_product(Yardstick& yardstick, const std::vector<A>& c, const std::vector<A>& before,
                 int64_t m, int64_t n, int64_t k, int64_t ldc, const auto& a, const auto& b,
                 bool accumulate) {
  std::vector<double> got, plain;
  std::vector<long double> exact;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const A start = accumulate ? before[i * ldc + j] : A(0);
      long double sum = 0;
      A plain_sum = 0;
      for (int64_t l = 0; l < k; ++l) {
        sum += static_cast<long double>(a(i, l)) * b(l, j);
        plain_sum += static_cast<A>(a(i, l)) * static_cast<A>(b(l, j));
      }
      got.push_back(c[i * ldc + j]);
      plain.push_back(plain_sum + start);
      exact.push_back(sum + start);
    }
    for (int64_t j = n; j < ldc; ++j) ASSERT_EQ(c[i * ldc + j], before[i * ldc + j]) << "the gap";
  }
  yardstick.add("product", got, plain, exact);
}

TYPED_TEST(Gemm, AgreesWithThreeLoops) {
  using T = TypeParam;
  using A = cpu::Acc<T>;
  const cpu::GemmThread one_thread;
  Yardstick yardstick(std::numeric_limits<A>::epsilon());
  for_seeds(rounds(240), [&](Rng& rng) {
    const auto size = [&](int64_t most) {
      return rng.chance(0.15) ? rng.between(0, 1) : rng.between(1, most);
    };
    const int64_t m = size(70), n = size(70), k = rng.chance(0.1) ? 300 : size(70);
    const Matrix<T> a(rng, m, k), b(rng, k, n);
    const int64_t ldc = n + rng.pick<int64_t>({0, 3});
    const auto before = rng.vector<A>(static_cast<size_t>(m * ldc));
    const bool accumulate = rng.chance(0.5);
    std::vector<A> c(before);
    cpu::gemm<T>(m, n, k, a.view(), b.view(), c.data(), ldc, accumulate);
    add_product(yardstick, c, before, m, n, k, ldc, a, b, accumulate);
    std::vector<A> again(before);
    cpu::gemm<T>(m, n, k, a.view(), b.view(), again.data(), ldc, accumulate);
    ASSERT_EQ(c, again) << "the same bits every time";
  });
  yardstick.check();
}

// Overwriting must not read what was there.
TYPED_TEST(Gemm, OverwritesNaN) {
  using T = TypeParam;
  using A = cpu::Acc<T>;
  const cpu::GemmThread one_thread;
  Rng rng(1);
  for (const int64_t k : {0, 1, 17, 300}) {
    const Matrix<T> a(rng, 9, k), b(rng, k, 5);
    std::vector<A> c(45, std::numeric_limits<A>::quiet_NaN());
    cpu::gemm<T>(9, 5, k, a.view(), b.view(), c.data(), 5, false);
    for (const A value : c) EXPECT_TRUE(std::isfinite(value)) << "k = " << k;
  }
}

}  // namespace
}  // namespace flashmoe::test
