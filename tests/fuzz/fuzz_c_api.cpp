// Fuzzer over the C ABI: bytes become a group and a few calls on all of its ranks, mostly good,
// with some fields spoiled: sizes, shapes, strides, dtypes, presence, values, options, struct
// sizes, null pointers. Whatever comes, every call returns a status in time, a failure has a text,
// and nothing is read or written outside of the operands (their buffers are as small as their
// strides allow).
//
// One thing that no callee can check is left out: a tensor whose shape and strides reach beyond its
// memory. Such a tensor is made absent.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "flashmoe/c_api.h"

namespace {

constexpr double kTimeoutSeconds = 0.25;  // when an input makes the ranks' epochs differ
constexpr double kSlowSeconds = 20;
constexpr int64_t kMostElements = 1 << 16;  // of a buffer

[[noreturn]] void broken(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

// Decisions, taken from the input; zeros when it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  uint64_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  uint64_t word() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }
  int64_t below(int64_t count) {
    const uint64_t bits = count > 256 ? byte() << 8 | byte() : byte();
    return static_cast<int64_t>(bits % static_cast<uint64_t>(count));
  }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool chance(int percent) { return below(100) >= 100 - percent; }

  int64_t odd_integer() {
    constexpr int64_t kLast = std::numeric_limits<int64_t>::max();
    constexpr int64_t kOdd[] = {-1,        0,          1,         2,         3,          7,
                                8,         64,         1024,      1025,      1 << 20,    INT32_MAX,
                                INT32_MIN, -2,         kLast,     kLast - 1, -kLast,     -kLast - 1,
                                kLast / 2, kLast / 64, 1LL << 33, 1LL << 40, 4294967296, 255};
    return chance(20) ? static_cast<int64_t>(word()) : kOdd[below(std::size(kOdd))];
  }
  double odd_number() {
    constexpr double kOdd[] = {0,        -0.0,      1,     -1,  0.5,   1e-300,       1e300, NAN,
                               INFINITY, -INFINITY, 1e-45, 3.5, 65504, 2147483648.0, -7,    1e9};
    if (!chance(20)) return kOdd[below(std::size(kOdd))];
    const uint64_t bits = word();
    double value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

 private:
  const uint8_t* data_;
  size_t size_, at_ = 0;
};

int64_t element_bytes(int32_t dtype) {
  if (dtype == FM_BF16 || dtype == FM_F16) return 2;
  return dtype == FM_F32 || dtype == FM_I32 ? 4 : 8;
}

// Range of element offsets that a tensor reaches.
struct Reach {
  bool small = true;
  int64_t low = 0, high = 0;
};

Reach reach_of(const fm_tensor& t) {
  __extension__ using Wide = __int128;
  Wide low = 0, high = 0;
  for (int i = 0; i < std::clamp(t.ndim, 0, 3); ++i) {
    if (t.shape[i] <= 0) continue;
    const Wide step = Wide{t.shape[i] - 1} * t.stride[i];
    (step < 0 ? low : high) += step;
  }
  if (high - low > kMostElements) return {.small = false};
  return {true, static_cast<int64_t>(low), static_cast<int64_t>(high)};
}

// The memory of the operands of one call.
class Memory {
 public:
  explicit Memory(Input& input) : input_(input) {}

  // Gives the tensor memory of the size that it needs, to the byte, so that a sanitizer sees one
  // element too much.
  void allocate(fm_tensor& t, bool floats) {
    const Reach reach = reach_of(t);
    if (!reach.small) {
      t.data = nullptr;
      return;
    }
    const int64_t bytes = element_bytes(t.dtype);
    const int64_t count = reach.high - reach.low + 1;
    const int64_t shift = input_.chance(1) ? 1 : 0;  // misaligned
    blocks_.push_back(std::make_unique<uint8_t[]>(static_cast<size_t>(count * bytes + shift)));
    uint8_t* begin = blocks_.back().get() + shift;
    fill(begin, count, t.dtype, floats);
    t.data = begin - reach.low * bytes;
  }

 private:
  void fill(uint8_t* to, int64_t count, int32_t dtype, bool floats) {
    const bool odd = input_.chance(10);
    const auto mix = input_.byte();
    for (int64_t i = 0; i < count; ++i) {
      const bool odd_here = odd && input_.chance(5);
      const auto number = static_cast<double>((i * 37 + static_cast<int64_t>(mix)) % 23 - 11) / 8;
      const double value = odd_here ? input_.odd_number() : number;
      const int64_t id =
          odd_here ? input_.odd_integer() : (i * 7 + static_cast<int64_t>(mix)) % 9 - 1;
      store(to, i, dtype, floats ? value : 0, id);
    }
  }
  static void store(uint8_t* to, int64_t i, int32_t dtype, double value, int64_t id) {
    const auto narrow = static_cast<float>(value);
    uint32_t bits = 0;
    std::memcpy(&bits, &narrow, sizeof(bits));
    const auto half = static_cast<uint16_t>(bits >> 16);  // a bf16, and some fp16
    const auto small_id = static_cast<int32_t>(std::clamp<int64_t>(id, INT32_MIN, INT32_MAX));
    const auto put = [&](const auto& element) {
      std::memcpy(to + i * static_cast<int64_t>(sizeof(element)), &element, sizeof(element));
    };
    switch (dtype) {
      case FM_F32:
        return put(narrow);
      case FM_BF16:
      case FM_F16:
        return put(half);
      case FM_I32:
        return put(small_id);
      case FM_I64:
        return put(id);
      default:
        return put(value);
    }
  }

  Input& input_;
  std::vector<std::unique_ptr<uint8_t[]>> blocks_;
};

fm_layer make_layer(Input& in, int32_t world) {
  fm_layer layer{};
  layer.struct_size = sizeof(layer);
  layer.dtype = static_cast<int32_t>(in.below(4));
  layer.hidden = in.between(1, 20);
  layer.intermediate = in.between(1, 12);
  layer.num_experts = world * in.between(1, 4);
  layer.top_k = in.between(1, std::min<int64_t>(layer.num_experts, 3));
  layer.activation = static_cast<int32_t>(in.below(6));
  layer.gated = static_cast<int32_t>(in.below(2));
  layer.gate_layout = layer.gated != 0 ? static_cast<int32_t>(in.below(3)) : 0;
  layer.weight_on_input = in.chance(20) ? 1 : 0;
  layer.act_alpha = 1;
  layer.capacity_factor = in.chance(25) ? 0.5 : 0;
  layer.score = static_cast<int32_t>(in.below(4));
  layer.renormalize = static_cast<int32_t>(in.below(2));
  layer.scale = 1;
  return layer;
}

void spoil_layer(Input& in, fm_layer& layer) {
  int64_t* const sizes[] = {&layer.hidden,   &layer.intermediate, &layer.num_experts,
                            &layer.top_k,    &layer.num_groups,   &layer.top_groups,
                            &layer.group_top};
  double* const numbers[] = {&layer.act_alpha, &layer.act_limit, &layer.up_offset,
                             &layer.capacity_factor, &layer.scale};
  int32_t* const names[] = {&layer.dtype,       &layer.activation,      &layer.gated,
                            &layer.gate_layout, &layer.weight_on_input, &layer.score,
                            &layer.renormalize};
  switch (in.below(4)) {
    case 0:
      *sizes[in.below(std::size(sizes))] = in.odd_integer();
      return;
    case 1:
      *numbers[in.below(std::size(numbers))] = in.odd_number();
      return;
    case 2:
      *names[in.below(std::size(names))] = static_cast<int32_t>(in.odd_integer());
      return;
    default:
      layer.struct_size = static_cast<uint32_t>(in.below(2 * sizeof(layer)));
  }
}

// One tensor of an argument struct with the shape that it should have.
struct Field {
  fm_tensor* tensor;
  std::vector<int64_t> shape;
  int32_t dtype;
  int percent;  // how often it is there
};

void spoil_tensor(Input& in, fm_tensor& t) {
  const int dimension = static_cast<int>(in.below(3));
  switch (in.below(5)) {
    case 0:
      t.shape[dimension] =
          in.chance(50) ? t.shape[dimension] + in.between(-2, 2) : in.odd_integer();
      if (t.shape[dimension] > kMostElements) t.stride[dimension] = 0;
      return;
    case 1:
      t.stride[dimension] =
          in.chance(50) ? t.stride[dimension] + in.between(-3, 3) : in.odd_integer();
      return;
    case 2:
      t.dtype = in.chance(50) ? static_cast<int32_t>(in.between(-1, 7))
                              : static_cast<int32_t>(in.odd_integer());
      return;
    case 3:
      t.ndim = in.chance(50) ? static_cast<int32_t>(in.between(-1, 5))
                             : static_cast<int32_t>(in.odd_integer());
      return;
    default:
      std::swap(t.stride[0], t.stride[std::clamp(t.ndim - 1, 0, 2)]);
  }
}

void make_tensors(Input& in, Memory& memory, const std::vector<Field>& fields) {
  const int spoiled =
      in.chance(50) ? static_cast<int>(in.below(static_cast<int64_t>(fields.size()))) : -1;
  for (size_t f = 0; f < fields.size(); ++f) {
    const Field& field = fields[f];
    fm_tensor& t = *field.tensor;
    if (!in.chance(field.percent)) continue;
    t.dtype = field.dtype;
    t.ndim = static_cast<int32_t>(field.shape.size());
    int64_t extent = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      t.shape[i] = field.shape[static_cast<size_t>(i)];
      t.stride[i] = extent;
      extent *= std::max<int64_t>(t.shape[i], 1);
    }
    if (t.ndim == 3 && in.chance(20)) {  // a transposed view
      t.stride[1] = 1;
      t.stride[2] = t.shape[1];
    }
    if (static_cast<int>(f) == spoiled) spoil_tensor(in, t);
    memory.allocate(t, t.dtype < FM_I32);
  }
  if (in.chance(
          3)) {  // an operand in the place of another one, of the same extent or a smaller one
    const auto pick = [&]() -> fm_tensor& {
      return *fields[static_cast<size_t>(in.below(static_cast<int64_t>(fields.size())))].tensor;
    };
    fm_tensor &one = pick(), &other = pick();
    if (std::memcmp(one.shape, other.shape, sizeof(one.shape)) == 0 &&
        std::memcmp(one.stride, other.stride, sizeof(one.stride)) == 0 &&
        element_bytes(one.dtype) <= element_bytes(other.dtype) && other.data != nullptr) {
      one.data = other.data;
    }
  }
}

// Sizes that a call's tensors have.
struct Sizes {
  int64_t tokens = 0, local = 0, up = 0, all_up = 0;
  int32_t wide = FM_F32;
  bool router = false, separate = false;

  Sizes(Input& in, const fm_layer& l, int32_t world)
      : tokens(in.chance(15) ? 0 : in.between(1, in.chance(20) ? 140 : 12)),
        local(l.num_experts / world),
        all_up(l.gated == 0 ? l.intermediate : 2 * l.intermediate),
        wide(l.dtype == FM_F64 ? FM_F64 : FM_F32),
        router(in.chance(40)),
        separate(l.gated != 0 && l.gate_layout == FM_GATE_SEPARATE) {
    up = separate ? l.intermediate : all_up;
  }
};

// The operands that both directions share.
template <class Args>
std::vector<Field> shared_fields(Input& in, Args& a, const fm_layer& l, const Sizes& s) {
  const int32_t ids = in.chance(50) ? FM_I64 : FM_I32;
  const int routed = s.router ? 100 : 0;
  return {
      {&a.x, {s.tokens, l.hidden}, l.dtype, 100},
      {&a.w_router, {l.num_experts, l.hidden}, l.dtype, routed},
      {&a.router_bias, {l.num_experts}, l.dtype, routed / 2},
      {&a.selection_bias, {l.num_experts}, s.wide, routed / 4},
      {&a.topk_ids, {s.tokens, l.top_k}, ids, 100},
      {&a.topk_weights, {s.tokens, l.top_k}, s.wide, 100},
      {&a.w_gate, {s.local, l.intermediate, l.hidden}, l.dtype, s.separate ? 100 : 0},
      {&a.w_up, {s.local, s.up, l.hidden}, l.dtype, 100},
      {&a.w_down, {s.local, l.hidden, l.intermediate}, l.dtype, 100},
      {&a.b_up, {s.local, s.all_up}, l.dtype, 40},
      {&a.b_down, {s.local, l.hidden}, l.dtype, 40},
      {&a.logits, {s.tokens, l.num_experts}, s.wide, routed},
  };
}

// One rank's operands of one call, made before the ranks start: the input is read by one thread.
struct RankCall {
  std::unique_ptr<Memory> memory;
  fm_layer layer{};
  fm_forward_args forward{};
  fm_backward_args backward{};
  enum class Kind { kForward, kBackward, kRefuse, kAbort, kNull } kind = Kind::kForward;
  bool null_layer = false;
};

std::vector<Field> forward_fields(Input& in, fm_forward_args& a, const fm_layer& l,
                                  const Sizes& s) {
  auto fields = shared_fields(in, a, l, s);
  fields.push_back({&a.y, {s.tokens, l.hidden}, l.dtype, 100});
  fields.push_back({&a.tokens_per_expert, {l.num_experts}, FM_I64, 50});
  fields.push_back({&a.dropped, {1}, FM_I64, 50});
  fields.push_back({&a.z, {s.tokens * l.top_k + 8 * s.local + 8, s.all_up}, l.dtype, 10});
  return fields;
}

std::vector<Field> backward_fields(Input& in, fm_backward_args& a, const fm_layer& l,
                                   const Sizes& s) {
  auto fields = shared_fields(in, a, l, s);
  const int routed = s.router ? 60 : 0;
  const auto add = [&](fm_tensor& tensor, std::vector<int64_t> shape, int32_t dtype, int percent) {
    fields.push_back({&tensor, std::move(shape), dtype, percent});
  };
  add(a.grad_y, {s.tokens, l.hidden}, l.dtype, 100);
  add(a.grad_x, {s.tokens, l.hidden}, l.dtype, 100);
  add(a.grad_weights, {s.tokens, l.top_k}, s.wide, routed);
  add(a.grad_logits, {s.tokens, l.num_experts}, s.wide, routed);
  add(a.grad_topk_weights, {s.tokens, l.top_k}, s.wide, s.router ? 0 : 60);
  add(a.grad_w_router, {l.num_experts, l.hidden}, l.dtype, routed);
  add(a.grad_router_bias, {l.num_experts}, l.dtype, routed);
  add(a.grad_w_gate, {s.local, l.intermediate, l.hidden}, l.dtype, s.separate ? 60 : 0);
  add(a.grad_w_up, {s.local, s.up, l.hidden}, in.chance(30) ? s.wide : l.dtype, 60);
  add(a.grad_w_down, {s.local, l.hidden, l.intermediate}, l.dtype, 60);
  add(a.grad_b_up, {s.local, s.all_up}, l.dtype, 40);
  add(a.grad_b_down, {s.local, l.hidden}, l.dtype, 40);
  return fields;
}

RankCall make_call(Input& in, const fm_layer& agreed, int32_t world, RankCall::Kind kind) {
  RankCall call;
  call.memory = std::make_unique<Memory>(in);
  call.layer = agreed;
  call.kind = kind;
  call.null_layer = in.chance(1);
  if (in.chance(15)) spoil_layer(in, call.layer);
  const Sizes sizes(in, agreed, world);
  fm_forward_args& forward = call.forward;
  fm_backward_args& backward = call.backward;
  forward.struct_size = in.chance(2) ? static_cast<uint32_t>(in.below(3000)) : sizeof(forward);
  backward.struct_size = in.chance(2) ? static_cast<uint32_t>(in.below(3000)) : sizeof(backward);
  if (in.chance(3)) forward.flags = static_cast<uint32_t>(in.odd_integer());
  if (in.chance(2)) forward.device_type = static_cast<int32_t>(in.odd_integer());
  if (in.chance(2)) forward.device = static_cast<int32_t>(in.odd_integer());
  backward.flags = static_cast<uint32_t>(in.chance(90) ? in.below(8) : in.odd_integer());
  make_tensors(in, *call.memory,
               kind == RankCall::Kind::kForward ? forward_fields(in, forward, agreed, sizes)
                                                : backward_fields(in, backward, agreed, sizes));
  return call;
}

void expect_text(fm_status status) {
  if (status < FM_OK || status > FM_VERSION_MISMATCH) broken("a status that is none");
  if (status != FM_OK && std::strlen(fm_last_error()) == 0) broken("a failure without a text");
  if (status == FM_INTERNAL) broken(fm_last_error());
}

// How the launches ended: a fuzzer whose calls are all refused at the door tests the door alone.
std::atomic<uint64_t> good_launches{0}, failed_launches{0};

void expect_launch(fm_status status) {
  ++(status == FM_OK ? good_launches : failed_launches);
  expect_text(status);
}

void run(fm_group group, const RankCall& call) {
  const fm_layer* layer = call.null_layer ? nullptr : &call.layer;
  switch (call.kind) {
    case RankCall::Kind::kForward:
      return expect_launch(fm_forward(group, layer, &call.forward));
    case RankCall::Kind::kBackward:
      return expect_launch(fm_backward(group, layer, &call.backward));
    case RankCall::Kind::kRefuse:
      return expect_text(fm_group_refuse(group, call.null_layer ? nullptr : "the fuzzer refuses"));
    case RankCall::Kind::kAbort:
      return expect_text(fm_group_abort(group, call.null_layer ? nullptr : "the fuzzer aborts"));
    default:
      return expect_text(fm_forward(group, layer, nullptr));
  }
}

// Calls that need no peers, in the middle of everything.
void probe(Input& in, fm_group group, const fm_layer& layer) {
  constexpr const char* kKeys[] = {"num_threads", "jitter_us", "epoch",  "max_sms",
                                   "device",      "",          "timeout"};
  const char* key = kKeys[in.below(std::size(kKeys))];
  double value = in.odd_number();
  if (std::string(key) == "num_threads") value = std::min(value, 5.0);
  if (std::string(key) == "jitter_us") value = std::min(value, 50.0);
  expect_text(fm_group_set(group, in.chance(3) ? nullptr : key, value));
  fm_stats stats{};
  stats.struct_size = in.chance(10) ? static_cast<uint32_t>(in.below(600)) : sizeof(stats);
  expect_text(fm_group_stats(group, in.chance(3) ? nullptr : &stats));
  fm_capacity capacity{sizeof(fm_capacity), 0, in.odd_integer(), in.odd_integer(), in.odd_integer(),
                       in.odd_integer()};
  if (in.chance(10)) capacity.struct_size = static_cast<uint32_t>(in.below(100));
  expect_text(fm_group_reserve(group, in.chance(3) ? nullptr : &capacity));
  int64_t rows = 0;
  expect_text(fm_z_rows(group, &layer, in.odd_integer(), in.chance(3) ? nullptr : &rows));
  int32_t rank = 0, world = 0;
  expect_text(
      fm_group_rank(group, in.chance(3) ? nullptr : &rank, in.chance(3) ? nullptr : &world));
  const char* text = nullptr;
  fm_forward_args args{};
  args.struct_size = sizeof(args);
  expect_text(
      fm_explain(group, &layer, in.chance(10) ? nullptr : &args, in.chance(3) ? nullptr : &text));
}

void spoiled_creations(Input& in) {
  fm_group groups[64] = {};  // as many as a group may have
  const auto world = static_cast<int32_t>(in.chance(80) ? in.between(-1, 4) : in.odd_integer());
  fm_status status = fm_group_create_local(world, in.chance(10) ? nullptr : groups);
  expect_text(status);
  for (fm_group group : groups) expect_text(fm_group_destroy(group));
  std::string token(static_cast<size_t>(in.below(260)), 'f');
  for (char& letter : token) {
    if (in.chance(5)) letter = static_cast<char>(in.byte());
  }
  if (!token.empty()) token += std::to_string(getpid());
  fm_group alone = nullptr;
  const auto rank = static_cast<int32_t>(in.chance(60) ? 0 : in.odd_integer());
  status = fm_group_create_shm(in.chance(3) ? nullptr : token.c_str(), rank, 1,
                               in.chance(3) ? nullptr : &alone);
  expect_text(status);
  expect_text(fm_group_destroy(alone));
  int32_t number = 0;
  expect_text(fm_group_rank(nullptr, &number, &number));
}

RankCall::Kind choose_kind(Input& in, RankCall::Kind usual) {
  if (in.chance(94)) return usual;
  return static_cast<RankCall::Kind>(in.below(5));
}

void fuzz(Input& in) {
  if (in.chance(5)) spoiled_creations(in);
  const auto world = static_cast<int32_t>(in.chance(60) ? 1 : in.between(2, 3));
  fm_group groups[3] = {};
  expect_text(fm_group_create_local(world, groups));
  for (int32_t rank = 0; rank < world; ++rank) {
    expect_text(fm_group_set(groups[rank], "timeout_s", kTimeoutSeconds));
    expect_text(fm_group_set(groups[rank], "num_threads", static_cast<double>(in.between(1, 3))));
  }
  const int64_t calls = in.between(1, 4);
  for (int64_t i = 0; i < calls; ++i) {
    const fm_layer layer = make_layer(in, world);
    const auto usual = in.chance(50) ? RankCall::Kind::kForward : RankCall::Kind::kBackward;
    std::vector<RankCall> ranks;
    for (int32_t rank = 0; rank < world; ++rank) {
      ranks.push_back(make_call(in, layer, world, choose_kind(in, usual)));
    }
    if (in.chance(20)) probe(in, groups[in.below(world)], layer);
    std::vector<std::thread> threads;
    for (int32_t rank = 1; rank < world; ++rank) {
      threads.emplace_back([&, rank] { run(groups[rank], ranks[static_cast<size_t>(rank)]); });
    }
    run(groups[0], ranks[0]);
    for (auto& thread : threads) thread.join();
  }
  for (int32_t rank = 0; rank < world; ++rank) expect_text(fm_group_destroy(groups[rank]));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto start = std::chrono::steady_clock::now();
  Input input(data, size);
  fuzz(input);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  if (taken.count() > kSlowSeconds) broken("an input took longer than its waits may");
  return 0;
}

// Of many inputs, about half of the launches succeed: else it is the door alone that is tested.
extern "C" void fuzz_report() {
  std::printf("%lu launches succeeded, %lu failed with a status\n", good_launches.load(),
              failed_launches.load());
  const uint64_t all = good_launches + failed_launches;
  if (all > 1000 && good_launches < all / 4) broken("hardly any launch succeeds");
}
