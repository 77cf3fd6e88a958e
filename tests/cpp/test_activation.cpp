// Activations against their definitions, derivatives against central differences.
#include "cpu/activation.h"
#include "support.h"

namespace flashmoe::test {
namespace {

using cpu::ActivationSpec;

double definition(int32_t kind, double alpha, double x) {
  switch (kind) {
    case FM_SILU:
      return x / (1 + std::exp(-alpha * x));
    case FM_GELU_ERF:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case FM_GELU_TANH:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case FM_RELU:
      return x > 0 ? x : 0;
    case FM_RELU2:
      return x > 0 ? x * x : 0;
    default:
      return x;
  }
}

double definition(const ActivationSpec& spec, double gate, double up) {
  if (spec.limit > 0) {
    gate = std::min(gate, spec.limit);
    up = std::clamp(up, -spec.limit, spec.limit);
  }
  const double value = definition(spec.kind, spec.alpha, gate);
  return spec.gated ? value * (up + spec.up_offset) : value;
}

// One row of pre-activations, concatenated or interleaved.
template <class A>
struct Row {
  Row(Rng& rng, int64_t count_in, const ActivationSpec& spec)
      : count(count_in), interleaved(rng.chance(0.5)), z(rng.vector<A>(2 * count_in, -4.0, 4.0)) {
    // Central differences need points away from the kinks.
    for (A& value : z) {
      for (const double kink : {0.0, spec.limit, -spec.limit}) {
        if (std::abs(value - kink) < 1e-3) value = static_cast<A>(kink + 0.01);
      }
    }
  }
  int64_t stride() const { return interleaved ? 2 : 1; }
  int64_t up_at(int64_t i) const { return interleaved ? 2 * i + 1 : count + i; }
  cpu::PreActivation<A> view() const {
    return {z.data(), z.data() + (interleaved ? 1 : count), stride()};
  }
  double gate(int64_t i) const { return z[static_cast<size_t>(i * stride())]; }
  double up(int64_t i) const { return z[static_cast<size_t>(up_at(i))]; }

  int64_t count;
  bool interleaved;
  std::vector<A> z;
};

ActivationSpec random_spec(Rng& rng, int32_t kind) {
  ActivationSpec spec{.kind = kind, .gated = rng.chance(0.6)};
  if (kind == FM_SILU && rng.chance(0.5)) spec.alpha = 1.702;
  if (spec.gated && rng.chance(0.5)) spec.limit = rng.uniform(0.5, 3.0);
  if (spec.gated && rng.chance(0.5)) spec.up_offset = 1.0;
  return spec;
}

class Activation : public testing::TestWithParam<int32_t> {};

TEST_P(Activation, ValuesFollowTheDefinition) {
  for_seeds(rounds(60), [](Rng& rng) {
    const ActivationSpec spec = random_spec(rng, GetParam());
    const Row<double> row(rng, rng.between(1, 600), spec);
    std::vector<double> out(static_cast<size_t>(row.count), NAN);
    cpu::activate<double>(spec, row.view(), out.data(), row.count);
    const Row<float> narrow(rng, row.count, spec);
    std::vector<float> narrow_out(out.size(), NAN);
    cpu::activate<float>(spec, narrow.view(), narrow_out.data(), row.count);
    for (int64_t i = 0; i < row.count; ++i) {
      const double want = definition(spec, row.gate(i), row.up(i));
      ASSERT_NEAR(out[i], want, 1e-13 * (1 + std::abs(want))) << "element " << i;
      const double narrow_want = definition(spec, narrow.gate(i), narrow.up(i));
      ASSERT_NEAR(narrow_out[i], narrow_want, 2e-6 * (1 + std::abs(narrow_want)));
    }
  });
}

TEST_P(Activation, DerivativesFollowCentralDifferences) {
  for_seeds(rounds(60), [](Rng& rng) {
    const ActivationSpec spec = random_spec(rng, GetParam());
    const Row<double> row(rng, rng.between(1, 600), spec);
    const auto grad_out = rng.vector<double>(static_cast<size_t>(row.count));
    std::vector<double> value(grad_out.size(), NAN), again(value), grad(row.z.size(), NAN);
    double* grad_up = grad.data() + (row.interleaved ? 1 : row.count);
    cpu::activate<double>(spec, row.view(), value.data(), row.count);
    cpu::activate_backward<double>(spec, row.view(), grad_out.data(), again.data(), grad.data(),
                                   spec.gated ? grad_up : nullptr, row.count);
    ASSERT_EQ(value, again) << "both directions give the same value";
    constexpr double h = 1e-6;
    for (int64_t i = 0; i < row.count; ++i) {
      const double gate = row.gate(i), up = row.up(i);
      const auto slope = [&](double dg, double du) {
        return (definition(spec, gate + dg, up + du) - definition(spec, gate - dg, up - du)) /
               (2 * h) * grad_out[i];
      };
      // A central difference in double: h^2 truncation, eps / h cancellation.
      ASSERT_NEAR(grad[i * row.stride()], slope(h, 0), 1e-7) << "gate " << gate << ", up " << up;
      if (spec.gated) {
        ASSERT_NEAR(grad[row.up_at(i)], slope(0, h), 1e-7) << "gate " << gate << ", up " << up;
      } else {
        ASSERT_TRUE(std::isnan(grad[row.up_at(i)])) << "a plain activation has no up";
      }
    }
  });
}

// Gradients written over the pre-activations themselves, as the engine does.
TEST_P(Activation, GradientsMayReplaceTheirInput) {
  Rng rng(7);
  for (int round = 0; round < 10; ++round) {
    const ActivationSpec spec = random_spec(rng, GetParam());
    Row<double> row(rng, 300, spec);
    const auto grad_out = rng.vector<double>(300);
    std::vector<double> value(300), grad(row.z);
    const int64_t up = row.interleaved ? 1 : row.count;
    cpu::activate_backward<double>(spec, row.view(), grad_out.data(), value.data(), grad.data(),
                                   spec.gated ? grad.data() + up : nullptr, row.count);
    cpu::activate_backward<double>(spec, row.view(), grad_out.data(), value.data(), row.z.data(),
                                   spec.gated ? row.z.data() + up : nullptr, row.count);
    EXPECT_EQ(row.z, grad);
  }
}

TEST_P(Activation, NaNStaysInItsElement) {
  Rng rng(3);
  const ActivationSpec spec{.kind = GetParam(), .gated = true, .limit = 2.0};
  Row<double> row(rng, 20, spec);
  std::vector<double> clean(20), out(20);
  cpu::activate<double>(spec, row.view(), clean.data(), 20);
  row.z[static_cast<size_t>(5 * row.stride())] = NAN;
  cpu::activate<double>(spec, row.view(), out.data(), 20);
  EXPECT_TRUE(std::isnan(out[5]));
  out[5] = clean[5];
  EXPECT_EQ(out, clean);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Activation,
                         testing::Values(FM_SILU, FM_GELU_ERF, FM_GELU_TANH, FM_RELU, FM_RELU2,
                                         FM_IDENTITY));

}  // namespace
}  // namespace flashmoe::test
