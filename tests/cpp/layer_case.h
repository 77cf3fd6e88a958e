// A layer with random operands, run through the C ABI on W ranks.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "buffer.h"
#include "support.h"

namespace flashmoe::test {

inline fm_layer plain_layer(int32_t dtype, int64_t hidden, int64_t intermediate, int64_t experts,
                            int64_t top_k) {
  fm_layer layer{};
  layer.struct_size = sizeof(layer);
  layer.dtype = dtype;
  layer.hidden = hidden;
  layer.intermediate = intermediate;
  layer.num_experts = experts;
  layer.top_k = top_k;
  layer.gated = 1;
  layer.act_alpha = 1;
  layer.scale = 1;
  layer.renormalize = 1;
  return layer;
}

// What a case has beside the layer.
struct CaseOptions {
  int32_t world = 1;
  std::vector<int64_t> tokens;  // of each rank
  bool biases = false;
  bool router = false;  // fused; else ids and weights come from outside
  bool router_bias = false;
  bool selection_bias = false;
  bool transposed = false;      // expert weights stored with their last two dimensions swapped
  int64_t gap = 0;              // elements between rows
  bool wide_gradients = false;  // weight gradients in fp32 (fp64) and accumulated
  bool wide_router = false;     // router weight in fp32 (fp64)
  double sentinels = 0.0;       // share of slots without an expert
  bool duplicates = false;
  bool save_z = false;  // W = 1 only
  int32_t id_dtype = FM_I64;
  int32_t device_type = FM_DEVICE_HOST;  // on CUDA rank r has device r
};

// Operands and results of one rank, by the field names of the C ABI.
struct RankOperands {
  std::map<std::string, Buffer> in, out, grad;

  Buffer& named(const std::string& name) {
    for (auto* set : {&in, &out, &grad}) {
      if (const auto found = set->find(name); found != set->end()) return found->second;
    }
    static Buffer absent;
    return absent;
  }
  fm_tensor tensor(const std::string& name) { return named(name).tensor(); }

  fm_forward_args forward_args() {
    fm_forward_args a{};
    a.struct_size = sizeof(a);
    fill_shared(a);
    a.y = tensor("y");
    a.tokens_per_expert = tensor("tokens_per_expert");
    a.dropped = tensor("dropped");
    return a;
  }
  fm_backward_args backward_args(bool accumulate) {
    fm_backward_args a{};
    a.struct_size = sizeof(a);
    fill_shared(a);
    if (accumulate) a.flags = FM_ACCUMULATE_W_GATE | FM_ACCUMULATE_W_UP | FM_ACCUMULATE_W_DOWN;
    a.grad_y = tensor("grad_y");
    a.grad_x = tensor("grad_x");
    a.grad_topk_weights = tensor("grad_topk_weights");
    a.grad_w_router = tensor("grad_w_router");
    a.grad_router_bias = tensor("grad_router_bias");
    a.grad_w_gate = tensor("grad_w_gate");
    a.grad_w_up = tensor("grad_w_up");
    a.grad_w_down = tensor("grad_w_down");
    a.grad_b_up = tensor("grad_b_up");
    a.grad_b_down = tensor("grad_b_down");
    return a;
  }

 private:
  template <class Args>
  void fill_shared(Args& a) {
    a.x = tensor("x");
    a.w_router = tensor("w_router");
    a.router_bias = tensor("router_bias");
    a.selection_bias = tensor("selection_bias");
    a.topk_ids = tensor("topk_ids");
    a.topk_weights = tensor("topk_weights");
    a.w_gate = tensor("w_gate");
    a.w_up = tensor("w_up");
    a.w_down = tensor("w_down");
    a.b_up = tensor("b_up");
    a.b_down = tensor("b_down");
    a.logits = tensor("logits");
    a.z = tensor("z");
  }
};

class LayerCase {
 public:
  fm_layer layer;
  CaseOptions options;
  std::vector<RankOperands> ranks;

  LayerCase(Rng& rng, const fm_layer& layer_in, const CaseOptions& options_in)
      : layer(layer_in), options(options_in) {
    if (!options.router && options.id_dtype == FM_I32) wide_weights_ = rng.chance(0.5);
    for (int32_t rank = 0; rank < options.world; ++rank) make_rank(rng, rank);
  }

  int64_t gates() const { return layer.gated ? 2 : 1; }
  int64_t local_experts() const { return layer.num_experts / options.world; }
  bool separate() const { return layer.gated && layer.gate_layout == FM_GATE_SEPARATE; }
  int32_t acc_dtype() const { return layer.dtype == FM_F64 ? FM_F64 : FM_F32; }

  // Element of an up weight, its bias, or a gradient of either, in canonical order: gate rows, then
  // up rows. prefix "" or "grad_".
  double up_weight(const std::string& prefix, int64_t expert, int64_t row, int64_t col) {
    RankOperands& owner = ranks[static_cast<size_t>(expert / local_experts())];
    const bool is_up = row >= layer.intermediate;
    const bool gate_tensor = separate() && !is_up;
    const int64_t at = separate() && is_up ? row - layer.intermediate : up_row(row);
    return owner.named(prefix + (gate_tensor ? "w_gate" : "w_up"))
        .get(expert % local_experts(), at, col);
  }
  double up_bias(const std::string& prefix, int64_t expert, int64_t row) {
    return of_expert(prefix + "b_up", expert, up_row(row), 0);
  }
  double of_expert(const std::string& name, int64_t expert, int64_t i, int64_t j) {
    RankOperands& owner = ranks[static_cast<size_t>(expert / local_experts())];
    return owner.named(name).get(expert % local_experts(), i, j);
  }

  // New tokens, routing and gradients of y for the same weights.
  void refill_tokens(Rng& rng, const std::vector<int64_t>& tokens) {
    options.tokens = tokens;
    for (int32_t rank = 0; rank < options.world; ++rank) make_tokens(rng, rank);
  }
  void poison_outputs() {
    for (auto& rank : ranks) {
      for (auto& [name, buffer] : rank.out) buffer.poison();
      for (auto& [name, buffer] : rank.grad) buffer.poison();
    }
    if (!options.wide_gradients) return;
    for (auto& rank : ranks) {
      for (const char* name : {"grad_w_gate", "grad_w_up", "grad_w_down"}) {
        Buffer& grad = rank.named(name);
        if (!grad.present()) continue;
        grad.each([&](int64_t i, int64_t j, int64_t k) { grad.set(kBefore, i, j, k); });
      }
    }
  }
  static constexpr double kBefore = 0.5;  // in an accumulated gradient before the launch

  std::vector<Outcome> forward(const Ranks& group) {
    return launch([&](int32_t r) {
      fm_forward_args args = ranks[static_cast<size_t>(r)].forward_args();
      set_device(args, r);
      return fm_forward(group[r], &layer, &args);
    });
  }
  std::vector<Outcome> backward(const Ranks& group) {
    return launch([&](int32_t r) {
      auto args = ranks[static_cast<size_t>(r)].backward_args(options.wide_gradients);
      set_device(args, r);
      return fm_backward(group[r], &layer, &args);
    });
  }

  // Every output of every rank, one after the other.
  std::vector<uint8_t> output_bytes() const {
    std::vector<uint8_t> all;
    for (const auto& rank : ranks) {
      for (const auto* set : {&rank.out, &rank.grad}) {
        for (const auto& [name, buffer] : *set) {
          all.insert(all.end(), buffer.bytes().begin(), buffer.bytes().end());
        }
      }
    }
    return all;
  }

 private:
  int64_t up_row(int64_t row) const {
    if (!layer.gated || layer.gate_layout != FM_GATE_INTERLEAVED) return row;
    return row < layer.intermediate ? 2 * row : 2 * (row - layer.intermediate) + 1;
  }

  template <class Args>
  void set_device(Args& args, int32_t rank) const {
    args.device_type = options.device_type;
    args.device = options.device_type == FM_DEVICE_CUDA ? rank : 0;
  }

  std::vector<Outcome> launch(const std::function<fm_status(int32_t)>& call) {
    std::vector<Outcome> results(static_cast<size_t>(options.world));
    on_ranks(options.world, [&](int32_t r) { results[static_cast<size_t>(r)] = outcome(call(r)); });
    return results;
  }

  void make_rank(Rng& rng, int32_t rank) {
    RankOperands& r = ranks.emplace_back();
    const Order order = options.transposed ? Order::kColumnMajor : Order::kRowMajor;
    const int64_t up_rows = separate() ? layer.intermediate : gates() * layer.intermediate;
    const auto weight = [&](const std::string& name, int64_t rows, int64_t cols) {
      auto& w = r.in[name] = Buffer(layer.dtype, {local_experts(), rows, cols}, order, options.gap);
      w.fill(rng, 1.5 / std::sqrt(static_cast<double>(cols)));
      const int32_t dtype = options.wide_gradients ? acc_dtype() : layer.dtype;
      r.grad["grad_" + name] = Buffer(dtype, {local_experts(), rows, cols}, order, options.gap);
    };
    const auto bias = [&](const std::string& name, int64_t cols) {
      (r.in[name] = Buffer(layer.dtype, {local_experts(), cols})).fill(rng, 0.5);
      r.grad["grad_" + name] = Buffer(layer.dtype, {local_experts(), cols});
    };
    if (separate()) weight("w_gate", layer.intermediate, layer.hidden);
    weight("w_up", up_rows, layer.hidden);
    weight("w_down", layer.hidden, layer.intermediate);
    if (options.biases) {
      bias("b_up", gates() * layer.intermediate);
      bias("b_down", layer.hidden);
    }
    if (options.router) make_router(rng, rank);
    r.out["tokens_per_expert"] = Buffer(FM_I64, {layer.num_experts});
    r.out["dropped"] = Buffer(FM_I64, {1});
    make_tokens(rng, rank);
  }

  // Every rank holds the same router.
  void make_router(Rng& rng, int32_t rank) {
    RankOperands& r = ranks[static_cast<size_t>(rank)];
    const int32_t dtype = options.wide_router ? acc_dtype() : layer.dtype;
    r.in["w_router"] = Buffer(dtype, {layer.num_experts, layer.hidden});
    r.grad["grad_w_router"] = Buffer(dtype, {layer.num_experts, layer.hidden});
    if (options.router_bias) {
      r.in["router_bias"] = Buffer(dtype, {layer.num_experts});
      r.grad["grad_router_bias"] = Buffer(acc_dtype(), {layer.num_experts});
    }
    if (options.selection_bias) r.in["selection_bias"] = Buffer(acc_dtype(), {layer.num_experts});
    for (const char* name : {"w_router", "router_bias", "selection_bias"}) {
      if (r.in.count(name) == 0) continue;
      if (rank == 0) {
        r.in[name].fill(rng, std::string(name) == "w_router" ? 1.0 : 0.2);
      } else {
        r.in[name] = ranks[0].in[name];
      }
    }
  }

  void make_tokens(Rng& rng, int32_t rank) {
    RankOperands& r = ranks[static_cast<size_t>(rank)];
    const int64_t tokens = options.tokens[static_cast<size_t>(rank)];
    const auto rows = [&] {
      return Buffer(layer.dtype, {tokens, layer.hidden}, Order::kRowMajor, options.gap);
    };
    (r.in["x"] = rows()).fill(rng, 1.0);
    (r.in["grad_y"] = rows()).fill(rng, 1.0);
    r.out["y"] = rows();
    r.grad["grad_x"] = rows();
    const std::vector<int64_t> slots{tokens, layer.top_k};
    const int32_t weight_dtype = wide_weights_ ? acc_dtype() : layer.dtype;
    if (options.router) {
      r.out["logits"] = Buffer(acc_dtype(), {tokens, layer.num_experts});
      r.out["topk_ids"] = Buffer(options.id_dtype, slots);
      r.out["topk_weights"] = Buffer(acc_dtype(), slots);
    } else {
      (r.in["topk_weights"] = Buffer(weight_dtype, slots)).fill(rng, 1.0);
      r.grad["grad_topk_weights"] = Buffer(weight_dtype, slots);
      choose_ids(rng, r.in["topk_ids"] = Buffer(options.id_dtype, slots));
    }
    if (options.save_z) {
      const int64_t bound = tokens * layer.top_k + 16 * (layer.num_experts + 1);
      r.out["z"] = Buffer(layer.dtype, {bound, gates() * layer.intermediate});
    }
  }

  void choose_ids(Rng& rng, Buffer& ids) const {
    const int64_t hot = rng.chance(0.3) ? rng.between(0, layer.num_experts - 1) : -1;
    ids.each([&](int64_t t, int64_t j, int64_t) {
      if (rng.chance(options.sentinels)) {
        ids.set(rng.chance(0.5) ? -1.0 : static_cast<double>(layer.num_experts + 3), t, j);
        return;
      }
      if (hot >= 0 && (j == 0 || options.duplicates) && rng.chance(0.7)) {
        ids.set(static_cast<double>(hot), t, j);
        return;
      }
      const int64_t first = rng.between(0, layer.num_experts - 1);
      ids.set(static_cast<double>((first + (options.duplicates ? 0 : j)) % layer.num_experts), t,
              j);
    });
  }

  bool wide_weights_ = true;  // top-k weights in fp32 (fp64)
};

// Runs the case once on a group of its own, without jitter, and returns every output's bytes.
inline std::vector<uint8_t> calm_bytes(LayerCase c, bool backward) {
  const Ranks group(c.options.world);
  c.poison_outputs();
  expect_all_ok(c.forward(group));
  if (backward) expect_all_ok(c.backward(group));
  return c.output_bytes();
}

}  // namespace flashmoe::test
