// The layer of a case written plainly: once in long double (what is right) and once in the layer's
// own precision (how far a plain implementation of that precision is from it).
#pragma once

#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/activation.h"
#include "cpu/types.h"
#include "layer_case.h"

namespace flashmoe::test {

// Results by name; expert tensors for all experts, token tensors for all ranks one after the other.
using Results = std::map<std::string, std::vector<double>>;

// Computes in R and rounds every stored tensor to T, as a plain implementation of dtype T does.
template <class R, class T>
class PlainLayer {
 public:
  explicit PlainLayer(LayerCase& c)
      : c_(c), l_(c.layer), H_(l_.hidden), I_(l_.intermediate), G_(c.gates()), E_(l_.num_experts) {
    load_weights();
  }

  Results run(bool backward) {
    grad_up_.assign(up_.size(), R(0));
    grad_down_.assign(down_.size(), R(0));
    grad_up_bias_.assign(up_bias_.size(), R(0));
    grad_down_bias_.assign(down_bias_.size(), R(0));
    for (int32_t rank = 0; rank < c_.options.world; ++rank) run_rank(rank, backward);
    if (!backward) return std::move(results_);
    const R before = c_.options.wide_gradients ? R(LayerCase::kBefore) : R(0);
    put("grad_up", grad_up_, before);
    put("grad_w_down", grad_down_, before);
    if (c_.options.biases) {
      put("grad_b_up", grad_up_bias_, R(0));
      put("grad_b_down", grad_down_bias_, R(0));
    }
    return std::move(results_);
  }

 private:
  static R store(R value) {
    if constexpr (std::is_same_v<R, T>) {
      return value;
    } else {
      return static_cast<R>(static_cast<T>(value));
    }
  }
  void put(const std::string& name, const std::vector<R>& values, R before) {
    auto& to = results_[name];
    for (const R value : values) to.push_back(static_cast<double>(store(value + before)));
  }

  void load_weights() {
    up_.resize(static_cast<size_t>(E_ * G_ * I_ * H_));
    down_.resize(static_cast<size_t>(E_ * H_ * I_));
    up_bias_.assign(static_cast<size_t>(E_ * G_ * I_), R(0));
    down_bias_.assign(static_cast<size_t>(E_ * H_), R(0));
    for (int64_t e = 0; e < E_; ++e) {
      for (int64_t i = 0; i < G_ * I_; ++i) {
        if (c_.options.biases) up_bias_[e * G_ * I_ + i] = c_.up_bias("", e, i);
        for (int64_t h = 0; h < H_; ++h) {
          up_[(e * G_ * I_ + i) * H_ + h] = c_.up_weight("", e, i, h);
        }
      }
      for (int64_t h = 0; h < H_; ++h) {
        if (c_.options.biases) down_bias_[e * H_ + h] = c_.of_expert("b_down", e, h, 0);
        for (int64_t i = 0; i < I_; ++i) {
          down_[(e * H_ + h) * I_ + i] = c_.of_expert("w_down", e, h, i);
        }
      }
    }
  }

  static R sigmoid(R x) { return R(1) / (R(1) + std::exp(-x)); }

  // Values and slopes of the activation: by the definition, or, in the layer's own precision, by
  // the engine's elementary functions (test_activation.cpp holds those against the definition).
  std::pair<std::vector<R>, std::vector<R>> act(const std::vector<R>& x) const {
    std::vector<R> values(x.size()), slopes(x.size());
    if constexpr (!std::is_same_v<R, long double>) {
      const std::vector<R> ones(x.size(), R(1));
      cpu::activate_backward<R>({.kind = l_.activation, .gated = false, .alpha = l_.act_alpha},
                                {x.data(), nullptr, 1}, ones.data(), values.data(), slopes.data(),
                                nullptr, static_cast<int64_t>(x.size()));
    } else {
      for (size_t i = 0; i < x.size(); ++i) std::tie(values[i], slopes[i]) = definition(x[i]);
    }
    return {values, slopes};
  }
  std::pair<R, R> definition(R x) const {
    const R one(1), half(0.5), alpha(l_.act_alpha);
    switch (l_.activation) {
      case FM_SILU: {
        const R s = sigmoid(alpha * x);
        return {x * s, s * (one + alpha * x * (one - s))};
      }
      case FM_GELU_ERF: {
        const R cdf = half * std::erfc(-x * std::sqrt(half));
        const R pdf = std::exp(-half * x * x) / std::sqrt(R(2) * std::acos(R(-1)));
        return {x * cdf, cdf + x * pdf};
      }
      case FM_GELU_TANH: {
        const R scale = std::sqrt(R(2) / std::acos(R(-1))), cubic(0.044715);
        const R t = std::tanh(scale * (x + cubic * x * x * x));
        const R inner = scale * (one + R(3) * cubic * x * x);
        return {half * x * (one + t), half * (one + t) + half * x * (one - t * t) * inner};
      }
      case FM_RELU:
        return {std::max(x, R(0)), x > 0 ? one : R(0)};
      case FM_RELU2:
        return {x > 0 ? x * x : R(0), x > 0 ? R(2) * x : R(0)};
      default:
        return {x, one};
    }
  }

  // The forward of one slot, kept for its backward.
  struct Slot {
    int64_t token, j, expert;
    R weight;
    std::vector<R> x, z, gate, gate_slope, up, hidden, y;
  };

  Slot slot_forward(int64_t token, int64_t j, int64_t expert, R weight, const std::vector<R>& x) {
    Slot s{token, j, expert, weight, x, {}, {}, {}, {}, {}, {}};
    if (l_.weight_on_input) {
      for (R& value : s.x) value = store(value * weight);
    }
    s.z = product(up_.data() + expert * G_ * I_ * H_, G_ * I_, H_, s.x,
                  up_bias_.data() + expert * G_ * I_);
    const R limit(l_.act_limit);
    std::vector<R> gates(s.z.begin(), s.z.begin() + I_);
    for (R& gate : gates) gate = limit > 0 ? std::min(gate, limit) : gate;
    std::tie(s.gate, s.gate_slope) = act(gates);
    for (int64_t i = 0; i < I_; ++i) {
      s.gate[i] = store(s.gate[i]);
      if (gates[i] != s.z[i]) s.gate_slope[i] = R(0);
      R up(1);
      if (l_.gated) {
        up = s.z[I_ + i];
        if (limit > 0) up = std::clamp(up, -limit, limit);
        up = store(up + R(l_.up_offset));
      }
      s.up.push_back(up);
      s.hidden.push_back(store(s.gate[i] * up));
    }
    s.y =
        product(down_.data() + expert * H_ * I_, H_, I_, s.hidden, down_bias_.data() + expert * H_);
    return s;
  }

  // weight[rows][cols] x + bias, rounded.
  static std::vector<R> product(const R* weight, int64_t rows, int64_t cols,
                                const std::vector<R>& x, const R* bias) {
    std::vector<R> out(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
      R sum(0);
      for (int64_t j = 0; j < cols; ++j) sum += weight[i * cols + j] * x[j];
      out[i] = store(sum + bias[i]);
    }
    return out;
  }
  // weight^T v, rounded; and grad += v x^T, grad_bias += v.
  static std::vector<R> product_back(const R* weight, int64_t rows, int64_t cols,
                                     const std::vector<R>& v, const std::vector<R>& x, R* grad,
                                     R* grad_bias) {
    std::vector<R> out(static_cast<size_t>(cols), R(0));
    for (int64_t i = 0; i < rows; ++i) {
      grad_bias[i] += v[i];
      for (int64_t j = 0; j < cols; ++j) {
        out[j] += weight[i * cols + j] * v[i];
        grad[i * cols + j] += v[i] * x[j];
      }
    }
    for (R& value : out) value = store(value);
    return out;
  }

  // Adds the slot's share to grad_x and returns the gradient of its weight.
  R slot_backward(const Slot& s, const std::vector<R>& x, const R* grad_y, R* grad_x) {
    std::vector<R> grad_row(grad_y, grad_y + H_);
    R grad_weight(0);
    if (!l_.weight_on_input) {
      for (int64_t h = 0; h < H_; ++h) grad_weight += s.y[h] * grad_y[h];
      for (R& value : grad_row) value = store(value * s.weight);
    }
    const auto grad_hidden = product_back(down_.data() + s.expert * H_ * I_, H_, I_, grad_row,
                                          s.hidden, grad_down_.data() + s.expert * H_ * I_,
                                          grad_down_bias_.data() + s.expert * H_);
    std::vector<R> grad_z(static_cast<size_t>(G_ * I_));
    const R limit(l_.act_limit);
    for (int64_t i = 0; i < I_; ++i) {
      grad_z[i] = store(store(grad_hidden[i] * s.up[i]) * s.gate_slope[i]);
      if (!l_.gated) continue;
      const bool clamped = limit > 0 && std::abs(s.z[I_ + i]) > limit;
      grad_z[I_ + i] = clamped ? R(0) : store(grad_hidden[i] * s.gate[i]);
    }
    auto grad_in = product_back(up_.data() + s.expert * G_ * I_ * H_, G_ * I_, H_, grad_z, s.x,
                                grad_up_.data() + s.expert * G_ * I_ * H_,
                                grad_up_bias_.data() + s.expert * G_ * I_);
    for (int64_t h = 0; h < H_; ++h) {
      if (l_.weight_on_input) {
        grad_weight += grad_in[h] * x[h];
        grad_in[h] = store(grad_in[h] * s.weight);
      }
      grad_x[h] = store(grad_x[h] + grad_in[h]);
    }
    return grad_weight;
  }

  void run_rank(int32_t rank, bool backward) {
    RankOperands& r = c_.ranks[static_cast<size_t>(rank)];
    const int64_t tokens = c_.options.tokens[static_cast<size_t>(rank)], k = l_.top_k;
    const int64_t capacity = slot_capacity(tokens * k);
    std::vector<int64_t> seen(static_cast<size_t>(E_), 0);
    std::vector<R> grad_router(static_cast<size_t>(E_ * H_), R(0));
    std::vector<R> grad_router_bias(static_cast<size_t>(E_), R(0));
    int64_t dropped = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<R> x(static_cast<size_t>(H_)), grad_y(x), y(x.size(), R(0)), grad_x(y);
      for (int64_t h = 0; h < H_; ++h) {
        x[h] = r.named("x").get(t, h);
        grad_y[h] = r.named("grad_y").get(t, h);
      }
      std::vector<R> grad_weights(static_cast<size_t>(k), R(0));
      for (int64_t j = 0; j < k; ++j) {
        const auto expert = static_cast<int64_t>(r.named("topk_ids").get(t, j));
        if (expert < 0 || expert >= E_) continue;
        if (seen[expert]++ >= capacity) {
          ++dropped;
          continue;
        }
        const Slot slot = slot_forward(t, j, expert, R(r.named("topk_weights").get(t, j)), x);
        for (int64_t h = 0; h < H_; ++h) {
          const R share = l_.weight_on_input ? slot.y[h] : store(slot.weight * slot.y[h]);
          y[h] = store(y[h] + share);
        }
        if (backward) {
          grad_weights[j] = slot_backward(slot, x, grad_y.data(), grad_x.data());
        }
      }
      put("y", y, R(0));
      if (!backward) continue;
      if (c_.options.router) {
        add_router_gradients(r, t, x, grad_weights, grad_x, grad_router, grad_router_bias);
      } else {
        put("grad_topk_weights", grad_weights, R(0));
      }
      put("grad_x", grad_x, R(0));
    }
    for (const int64_t count : seen) results_["tokens_per_expert"].push_back(double(count));
    results_["dropped"].push_back(static_cast<double>(dropped));
    if (!backward || !c_.options.router) return;
    put("grad_w_router", grad_router, R(0));
    if (c_.options.router_bias) put("grad_router_bias", grad_router_bias, R(0));
  }

  int64_t slot_capacity(int64_t slots) const {
    if (l_.capacity_factor == 0) return slots;
    return static_cast<int64_t>(
        std::ceil(l_.capacity_factor * static_cast<double>(slots) / static_cast<double>(E_)));
  }

  // d (loss) / d (logits), from the gradients of the chosen weights: by the definition, one score
  // and its derivative per expert.
  void add_router_gradients(RankOperands& r, int64_t t, const std::vector<R>& x,
                            const std::vector<R>& grad_weights, std::vector<R>& grad_x,
                            std::vector<R>& grad_router, std::vector<R>& grad_bias) {
    const int64_t k = l_.top_k;
    std::vector<int64_t> ids;
    for (int64_t j = 0; j < k; ++j) {
      ids.push_back(static_cast<int64_t>(r.named("topk_ids").get(t, j)));
    }
    std::vector<R> logits(static_cast<size_t>(E_));
    for (int64_t e = 0; e < E_; ++e) logits[e] = r.named("logits").get(t, e);
    const bool soft = l_.score == FM_SCORE_SOFTMAX, soft_top = l_.score == FM_SCORE_TOPK_SOFTMAX;
    const R top = *std::max_element(logits.begin(), logits.end());
    R total(0);
    for (int64_t e = 0; e < E_ && soft; ++e) total += std::exp(logits[e] - top);
    for (int64_t j = 0; j < k && soft_top; ++j) total += std::exp(logits[ids[j]] - top);
    std::vector<R> raw, slope;  // of the chosen
    R sum(1e-20);
    for (int64_t j = 0; j < k; ++j) {
      const R x_j = logits[ids[j]];
      if (soft || soft_top) {
        raw.push_back(std::exp(x_j - top) / total);
      } else if (l_.score == FM_SCORE_SIGMOID) {
        raw.push_back(sigmoid(x_j));
        slope.push_back(raw[j] * (R(1) - raw[j]));
      } else {
        raw.push_back(std::sqrt(std::log1p(std::exp(x_j))));
        slope.push_back(sigmoid(x_j) / (R(2) * raw[j]));
      }
      sum += raw[j];
    }
    std::vector<R> grad_raw(grad_weights), grad_logits(static_cast<size_t>(E_), R(0));
    R mean(0), dot(0);
    for (int64_t j = 0; j < k; ++j) mean += grad_weights[j] * raw[j] / sum;
    for (int64_t j = 0; j < k; ++j) {
      if (l_.renormalize) grad_raw[j] = (grad_raw[j] - mean) / sum;
      grad_raw[j] *= R(l_.scale);
      dot += grad_raw[j] * raw[j];
    }
    for (int64_t e = 0; e < E_ && soft; ++e) {
      grad_logits[e] = -std::exp(logits[e] - top) / total * dot;
    }
    for (int64_t j = 0; j < k; ++j) {
      if (soft) grad_logits[ids[j]] += raw[j] * grad_raw[j];
      if (soft_top) grad_logits[ids[j]] += raw[j] * (grad_raw[j] - dot);
      if (!soft && !soft_top) grad_logits[ids[j]] += slope[j] * grad_raw[j];
    }
    for (int64_t h = 0; h < H_; ++h) {
      R share(0);
      for (int64_t e = 0; e < E_; ++e) {
        share += grad_logits[e] * R(r.named("w_router").get(e, h));
        grad_router[e * H_ + h] += grad_logits[e] * x[h];
      }
      grad_x[h] = store(grad_x[h] + store(share));
    }
    for (int64_t e = 0; e < E_; ++e) grad_bias[e] += grad_logits[e];
  }

  LayerCase& c_;
  const fm_layer& l_;
  const int64_t H_, I_, G_, E_;
  std::vector<R> up_, down_, up_bias_, down_bias_;
  std::vector<R> grad_up_, grad_down_, grad_up_bias_, grad_down_bias_;
  Results results_;
};

// The engine's outputs in the order of PlainLayer's.
inline Results collect(LayerCase& c, bool backward) {
  Results results;
  const auto add = [&](const std::string& name) {
    for (auto& rank : c.ranks) {
      const Buffer& b = rank.named(name);
      if (!b.present()) continue;
      auto& to = results[name];
      b.each([&](int64_t i, int64_t j, int64_t k) { to.push_back(b.get(i, j, k)); });
    }
  };
  for (const char* name : {"y", "tokens_per_expert", "dropped"}) add(name);
  if (!backward) return results;
  for (const char* name : {"grad_x", "grad_topk_weights", "grad_w_router", "grad_router_bias",
                           "grad_w_down", "grad_b_down"}) {
    add(name);
  }
  for (int64_t e = 0; e < c.layer.num_experts; ++e) {
    for (int64_t i = 0; i < c.gates() * c.layer.intermediate; ++i) {
      if (c.options.biases) results["grad_b_up"].push_back(c.up_bias("grad_", e, i));
      for (int64_t h = 0; h < c.layer.hidden; ++h) {
        results["grad_up"].push_back(c.up_weight("grad_", e, i, h));
      }
    }
  }
  return results;
}

// Adds every output to the yardstick; counts must be exact.
inline void add_to(Yardstick& yardstick, LayerCase& c, bool backward) {
  const Results got = collect(c, backward);
  const Results exact = PlainLayer<long double, long double>(c).run(backward);
  cpu::with_dtype(c.layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Results plain = PlainLayer<cpu::Acc<T>, T>(c).run(backward);
    for (const auto& [name, want] : exact) {
      ASSERT_TRUE(got.count(name)) << name;
      if (name == "dropped" || name == "tokens_per_expert") {
        EXPECT_EQ(got.at(name), want) << name;
      } else {
        yardstick.add(name, got.at(name), plain.at(name), want);
      }
    }
  });
}

inline double epsilon_of(int32_t dtype) {
  return cpu::with_dtype(dtype, [](auto zero) {
    return static_cast<double>(std::numeric_limits<decltype(zero)>::epsilon());
  });
}

inline void expect_within_yardstick(LayerCase& c, bool backward) {
  Yardstick yardstick(epsilon_of(c.layer.dtype));
  add_to(yardstick, c, backward);
  yardstick.check();
}

// Activation, layout of the gates, capacity and weights of a layer, drawn.
inline void draw_options(Rng& rng, fm_layer& layer) {
  layer.activation = rng.between32(FM_SILU, FM_IDENTITY);
  layer.gated = rng.chance(0.7) ? 1 : 0;
  layer.gate_layout = rng.between32(FM_GATE_CONCATENATED, FM_GATE_SEPARATE);
  layer.weight_on_input = rng.chance(0.3) ? 1 : 0;
  if (layer.activation == FM_SILU && rng.chance(0.4)) layer.act_alpha = 1.702;
  if (layer.gated && rng.chance(0.3)) layer.act_limit = 0.8;
  if (layer.gated && rng.chance(0.3)) layer.up_offset = 1;
  if (rng.chance(0.3)) layer.capacity_factor = rng.pick({0.25, 0.5, 1.0, 1.25});
  layer.score = rng.between32(FM_SCORE_SOFTMAX, FM_SCORE_SQRT_SOFTPLUS);
  layer.renormalize = rng.chance(0.5) ? 1 : 0;
  layer.scale = rng.pick({1.0, 2.5});
}

}  // namespace flashmoe::test
