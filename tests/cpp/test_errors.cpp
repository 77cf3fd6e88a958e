// Bad input: every check names the argument, what was given and what is accepted, before anything
// is touched.
#include "layer_case.h"

namespace flashmoe::test {
namespace {

// A good call on one rank; each test spoils one thing.
class BadInput : public testing::Test {
 protected:
  BadInput()
      : rng_(1),
        c_(rng_, plain_layer(FM_F32, 8, 4, 4, 2), options(false)),
        routed_(rng_, plain_layer(FM_F32, 8, 4, 4, 2), options(true)),
        group_(1) {}

  static CaseOptions options(bool router) {
    CaseOptions o{.world = 1, .tokens = {6}};
    o.biases = true;
    o.router = o.router_bias = o.selection_bias = router;
    return o;
  }

  using Spoil = std::function<void(fm_layer&, fm_forward_args&)>;
  using SpoilBackward = std::function<void(fm_layer&, fm_backward_args&)>;

  void expect_forward(const Spoil& spoil, fm_status status,
                      std::initializer_list<const char*> words, bool router = false) {
    LayerCase& c = router ? routed_ : c_;
    fm_layer layer = c.layer;
    c.poison_outputs();
    const auto before = c.output_bytes();
    auto args = c.ranks[0].forward_args();
    spoil(layer, args);
    expect_error(outcome(fm_forward(group_[0], &layer, &args)), status, words);
    EXPECT_EQ(c.output_bytes(), before) << "nothing is written by a call that is refused";
  }
  void expect_backward(const SpoilBackward& spoil, fm_status status,
                       std::initializer_list<const char*> words, bool router = false) {
    LayerCase& c = router ? routed_ : c_;
    fm_layer layer = c.layer;
    auto args = c.ranks[0].backward_args(false);
    spoil(layer, args);
    expect_error(outcome(fm_backward(group_[0], &layer, &args)), status, words);
  }

  Rng rng_;
  LayerCase c_, routed_;
  Ranks group_;
};

TEST_F(BadInput, TheUnspoiledCallsAreGood) {
  auto args = c_.ranks[0].forward_args();
  expect_ok(outcome(fm_forward(group_[0], &c_.layer, &args)));
  args = routed_.ranks[0].forward_args();
  expect_ok(outcome(fm_forward(group_[0], &routed_.layer, &args)));
  const auto back = routed_.ranks[0].backward_args(false);
  expect_ok(outcome(fm_backward(group_[0], &routed_.layer, &back)));
}

TEST_F(BadInput, LayerFields) {
  struct Field {
    const char* name;
    std::function<void(fm_layer&)> spoil;
    const char* given;
  };
  const std::vector<Field> fields{
      {"dtype", [](fm_layer& l) { l.dtype = FM_I32; }, "4"},
      {"hidden", [](fm_layer& l) { l.hidden = 0; }, "0"},
      {"intermediate", [](fm_layer& l) { l.intermediate = -1; }, "-1"},
      {"num_experts", [](fm_layer& l) { l.num_experts = 0; }, "0"},
      {"num_experts", [](fm_layer& l) { l.num_experts = 5000; }, "5000"},
      {"top_k", [](fm_layer& l) { l.top_k = 5; }, "5"},
      {"top_k", [](fm_layer& l) { l.top_k = 0; }, "0"},
      {"activation", [](fm_layer& l) { l.activation = 17; }, "17"},
      {"gate_layout", [](fm_layer& l) { l.gate_layout = -2; }, "-2"},
      {"act_limit", [](fm_layer& l) { l.act_limit = -1; }, "-1"},
      {"act_alpha", [](fm_layer& l) { l.act_alpha = NAN; }, "nan"},
      {"up_offset", [](fm_layer& l) { l.up_offset = INFINITY; }, "inf"},
      {"capacity_factor", [](fm_layer& l) { l.capacity_factor = -0.5; }, "-0.5"},
      {"score", [](fm_layer& l) { l.score = 9; }, "9"},
      {"scale", [](fm_layer& l) { l.scale = NAN; }, "nan"},
      {"num_groups", [](fm_layer& l) { l.num_groups = 3; }, "3"},
      {"top_groups", [](fm_layer& l) { l.num_groups = 2, l.top_groups = 3; }, "3"},
      {"group_top", [](fm_layer& l) { l.num_groups = 2, l.top_groups = 1; }, "0"},
      {"top_k", [](fm_layer& l) { l.num_groups = 4, l.top_groups = l.group_top = 1; }, "2"},
  };
  for (const Field& field : fields) {
    expect_forward([&](fm_layer& l, fm_forward_args&) { field.spoil(l); }, FM_INVALID_VALUE,
                   {field.name, field.given, "expected"});
  }
}

TEST_F(BadInput, ShapesAndPresence) {
  const auto tensor = [](fm_tensor fm_forward_args::*member, auto change) {
    return [=](fm_layer&, fm_forward_args& a) {
      change(a.*member);
    };
  };
  const auto longer = [](fm_tensor& t) {
    ++t.shape[0];
  };
  const auto wider = [](fm_tensor& t) {
    ++t.shape[t.ndim - 1];
  };
  const auto flat = [](fm_tensor& t) {
    t.ndim = 1;
  };
  const auto absent = [](fm_tensor& t) {
    t = fm_tensor{};
  };
  using Args = fm_forward_args;
  expect_forward(tensor(&Args::x, flat), FM_INVALID_VALUE, {"x has 1 dimensions", "[T, H]"});
  expect_forward(tensor(&Args::x, wider), FM_INVALID_VALUE, {"x has shape [6, 9]", "[6, 8]"});
  expect_forward(tensor(&Args::y, longer), FM_INVALID_VALUE, {"y has shape [7, 8]", "[6, 8]"});
  expect_forward(tensor(&Args::w_up, wider), FM_INVALID_VALUE, {"w_up", "[4, 8, 9]", "[4, 8, 8]"});
  expect_forward(tensor(&Args::w_down, longer), FM_INVALID_VALUE, {"w_down", "[5, 8, 4]"});
  expect_forward(tensor(&Args::b_up, wider), FM_INVALID_VALUE, {"b_up", "[4, 9]", "[4, 8]"});
  expect_forward(tensor(&Args::b_down, flat), FM_INVALID_VALUE, {"b_down has 1 dimensions"});
  expect_forward(tensor(&Args::topk_ids, wider), FM_INVALID_VALUE, {"topk_ids", "[6, 3]"});
  expect_forward(tensor(&Args::topk_weights, longer), FM_INVALID_VALUE, {"topk_weights"});
  expect_forward(tensor(&Args::tokens_per_expert, longer), FM_INVALID_VALUE,
                 {"tokens_per_expert", "[5]", "[4]"});
  expect_forward(tensor(&Args::dropped, longer), FM_INVALID_VALUE, {"dropped", "[2]"});
  for (const auto& [member, name] : {std::pair{&Args::x, "x is missing"},
                                     {&Args::y, "y is missing"},
                                     {&Args::w_up, "w_up is missing"},
                                     {&Args::w_down, "w_down is missing"},
                                     {&Args::topk_ids, "topk_ids is missing"},
                                     {&Args::topk_weights, "topk_weights is missing"}}) {
    expect_forward(tensor(member, absent), FM_INVALID_VALUE, {name});
  }
  expect_forward(tensor(&Args::w_router, wider), FM_INVALID_VALUE, {"w_router", "[4, 9]"}, true);
  expect_forward(tensor(&Args::router_bias, longer), FM_INVALID_VALUE, {"router_bias"}, true);
  expect_forward(tensor(&Args::selection_bias, longer), FM_INVALID_VALUE, {"selection_bias"}, true);
  expect_forward(tensor(&Args::logits, wider), FM_INVALID_VALUE, {"logits", "[6, 5]"}, true);
  expect_forward([](fm_layer& l, fm_forward_args&) { l.gate_layout = FM_GATE_SEPARATE; },
                 FM_INVALID_VALUE, {"w_gate is missing"});
  expect_forward([](fm_layer&, fm_forward_args& a) { a.w_gate = a.w_up; }, FM_INVALID_VALUE,
                 {"w_gate", "not separate"});
}

TEST_F(BadInput, Dtypes) {
  using Args = fm_forward_args;
  for (const auto& [member, name] :
       {std::pair{&Args::x, "x is float64, expected float32"},
        {&Args::w_up, "w_up is float64"},
        {&Args::b_down, "b_down is float64"},
        {&Args::y, "y is float64"},
        {&Args::topk_ids, "topk_ids is float64, expected int32 or int64"},
        {&Args::topk_weights, "topk_weights is float64"},
        {&Args::dropped, "dropped is float64, expected int64"}}) {
    expect_forward([&, m = member](fm_layer&, Args& a) { (a.*m).dtype = FM_F64; }, FM_INVALID_TYPE,
                   {name});
  }
  expect_forward([](fm_layer&, Args& a) { a.w_router.dtype = FM_BF16; }, FM_INVALID_TYPE,
                 {"w_router is bfloat16, expected float32"}, true);
  expect_forward([](fm_layer&, Args& a) { a.x.dtype = 42; }, FM_INVALID_TYPE, {"an unknown dtype"});
}

TEST_F(BadInput, StridesAlignmentAndOverlap) {
  using Args = fm_forward_args;
  expect_forward([](fm_layer&, Args& a) { std::swap(a.x.stride[0], a.x.stride[1]); },
                 FM_INVALID_VALUE, {"x has strides", "contiguous rows"});
  expect_forward([](fm_layer&, Args& a) { a.x.stride[0] = 4; }, FM_INVALID_VALUE,
                 {"x has strides [4, 1]"});
  expect_forward([](fm_layer&, Args& a) { a.w_up.stride[2] = 2, a.w_up.stride[1] = 16; },
                 FM_INVALID_VALUE, {"w_up has strides", "contiguous"});
  expect_forward([](fm_layer&, Args& a) { a.x.data = static_cast<char*>(a.x.data) + 2; },
                 FM_INVALID_VALUE, {"x is not aligned", "4 bytes"});
  expect_forward([](fm_layer&, Args& a) { a.y.data = a.x.data; }, FM_INVALID_VALUE,
                 {"y shares memory with x"});
  using Back = fm_backward_args;
  expect_backward([](fm_layer&, Back& a) { a.grad_x.data = a.grad_y.data; }, FM_INVALID_VALUE,
                  {"grad_x shares memory with grad_y"});
  expect_backward([](fm_layer&, Back& a) { a.grad_x.data = a.x.data; }, FM_INVALID_VALUE,
                  {"grad_x shares memory with x"});
}

TEST_F(BadInput, Gradients) {
  using Back = fm_backward_args;
  expect_backward([](fm_layer&, Back& a) { a.grad_y = fm_tensor{}; }, FM_INVALID_VALUE,
                  {"grad_y is missing"});
  expect_backward([](fm_layer&, Back& a) { ++a.grad_w_up.shape[2]; }, FM_INVALID_VALUE,
                  {"grad_w_up", "[4, 8, 9]"});
  expect_backward([](fm_layer&, Back& a) { a.grad_w_down.dtype = FM_F16; }, FM_INVALID_TYPE,
                  {"grad_w_down is float16"});
  expect_backward([](fm_layer&, Back& a) { ++a.grad_b_up.shape[0]; }, FM_INVALID_VALUE,
                  {"grad_b_up"});
  expect_backward([](fm_layer&, Back& a) { ++a.grad_topk_weights.shape[1]; }, FM_INVALID_VALUE,
                  {"grad_topk_weights", "[6, 3]"});
  expect_backward([](fm_layer&, Back& a) { a.logits = fm_tensor{}; }, FM_INVALID_VALUE,
                  {"logits is missing"}, true);
  expect_backward([](fm_layer&, Back& a) { ++a.grad_w_router.shape[0]; }, FM_INVALID_VALUE,
                  {"grad_w_router"}, true);
}

TEST_F(BadInput, RoutingThatHasNoMeaning) {
  c_.ranks[0].named("topk_ids").set(-2, 1, 1);
  auto args = c_.ranks[0].forward_args();
  expect_error(outcome(fm_forward(group_[0], &c_.layer, &args)), FM_ROUTING,
               {"topk_ids[1, 1]", "-2", "0..3"});
  for (const double bad : {double{NAN}, double{INFINITY}}) {
    routed_.ranks[0].named("x").set(bad, 4, 0);
    args = routed_.ranks[0].forward_args();
    expect_error(outcome(fm_forward(group_[0], &routed_.layer, &args)), FM_ROUTING,
                 {"token 4", "rank 0", "finite"});
  }
}

TEST_F(BadInput, SavedRowsThatAreTooFew) {
  Buffer z(FM_F32, {3, 8});
  auto args = c_.ranks[0].forward_args();
  args.z = z.tensor();
  expect_error(outcome(fm_forward(group_[0], &c_.layer, &args)), FM_INVALID_VALUE,
               {"z has 3 rows", "fm_z_rows"});
}

TEST_F(BadInput, VersionsAndNulls) {
  auto args = c_.ranks[0].forward_args();
  fm_layer layer = c_.layer;
  expect_error(outcome(fm_forward(nullptr, &layer, &args)), FM_INVALID_VALUE, {"group is null"});
  expect_error(outcome(fm_forward(group_[0], nullptr, &args)), FM_INVALID_VALUE,
               {"fm_layer is null"});
  expect_error(outcome(fm_forward(group_[0], &layer, nullptr)), FM_INVALID_VALUE,
               {"fm_forward_args is null"});
  // A newer caller's struct, one that was not set, and one that ends inside a field.
  for (const uint32_t size : {uint32_t{sizeof(layer) + 8}, 0u, uint32_t{sizeof(layer) - 4}}) {
    layer.struct_size = size;
    expect_error(outcome(fm_forward(group_[0], &layer, &args)), FM_VERSION_MISMATCH,
                 {"fm_layer.struct_size is", "set it to sizeof", fm_version()});
  }
  fm_backward_args back = c_.ranks[0].backward_args(false);
  back.struct_size += 8;
  layer.struct_size = sizeof(layer);
  expect_error(outcome(fm_backward(group_[0], &layer, &back)), FM_VERSION_MISMATCH,
               {"fm_backward_args.struct_size is"});
  // An older caller: fields that it does not know are absent.
  layer.struct_size = sizeof(layer);
  args.struct_size = offsetof(fm_forward_args, logits);
  expect_ok(outcome(fm_forward(group_[0], &layer, &args)));
}

TEST(GroupArguments, AreChecked) {
  fm_group group = nullptr;
  for (const int32_t world : {0, -1, 65}) {
    expect_error(outcome(fm_group_create_local(world, &group)), FM_INVALID_VALUE,
                 {"world is", "1..64"});
  }
  expect_error(outcome(fm_group_create_shm("t", 2, 2, &group)), FM_INVALID_VALUE,
               {"rank is 2", "0..1"});
  for (const char* token : {"", "a/b", static_cast<const char*>(nullptr)}) {
    expect_error(outcome(fm_group_create_shm(token, 0, 2, &group)), FM_INVALID_VALUE, {"token is"});
  }
  const Ranks two(2);
  expect_error(outcome(fm_group_set(two[0], "speed", 1)), FM_INVALID_VALUE,
               {"'speed' is unknown", "timeout_s"});
  expect_error(outcome(fm_group_set(two[0], "timeout_s", -1)), FM_INVALID_VALUE,
               {"timeout_s is -1", "expected a number"});
  expect_error(outcome(fm_group_set(two[0], "num_threads", 2e9)), FM_INVALID_VALUE,
               {"num_threads is 2e+09", "expected a whole number"});
  int32_t rank = -1, world = -1;
  expect_ok(outcome(fm_group_rank(two[1], &rank, &world)));
  EXPECT_EQ(rank, 1);
  EXPECT_EQ(world, 2);
  fm_stats stats{};
  expect_error(outcome(fm_group_stats(two[0], &stats)), FM_VERSION_MISMATCH,
               {"fm_stats.struct_size"});
  expect_ok(outcome(fm_group_destroy(nullptr)));
}

TEST(GroupArguments, ExpertsMustDivideOverTheRanks) {
  Rng rng(1);
  LayerCase c(rng, plain_layer(FM_F32, 8, 4, 4, 2), {.world = 2, .tokens = {3, 3}});
  c.layer.num_experts = 5;
  const Ranks group(2);
  for (const Outcome& result : c.forward(group)) {
    expect_error(result, FM_INVALID_VALUE, {"num_experts is 5", "multiple of the 2 ranks"});
  }
}

TEST(GroupArguments, ZRowsHoldTheSlotsAndOfSeveralRanksMore) {
  const fm_layer layer = plain_layer(FM_F32, 8, 4, 4, 2);
  int64_t rows = -1;
  const Ranks two(2), one(1);
  expect_ok(outcome(fm_z_rows(one[0], &layer, 10, &rows)));
  EXPECT_EQ(rows, 80) << "20 slots, four experts that begin on multiples of 16";
  expect_ok(outcome(fm_z_rows(two[0], &layer, 10, &rows)));
  EXPECT_EQ(rows, 96) << "25 slots";
}

TEST(GroupArguments, ResultsNeedAPlace) {
  const fm_layer layer = plain_layer(FM_F32, 8, 4, 4, 2);
  const Ranks group(1);
  int32_t number = 0;
  expect_error(outcome(fm_group_create_local(2, nullptr)), FM_INVALID_VALUE, {"out is null"});
  expect_error(outcome(fm_group_create_shm("token", 0, 1, nullptr)), FM_INVALID_VALUE,
               {"out is null"});
  expect_error(outcome(fm_group_rank(group[0], nullptr, &number)), FM_INVALID_VALUE, {"rank"});
  expect_error(outcome(fm_group_rank(group[0], &number, nullptr)), FM_INVALID_VALUE, {"world"});
  expect_error(outcome(fm_z_rows(group[0], &layer, 10, nullptr)), FM_INVALID_VALUE, {"rows"});
}

TEST(GroupArguments, SizesThatOverflowAreRefused) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  const Ranks group(1);
  int64_t rows = 0;
  fm_layer layer = plain_layer(FM_F32, 8, 4, 4, 2);
  for (const int64_t tokens : {int64_t{-1}, int64_t{1} << 30, kHuge}) {
    expect_error(outcome(fm_z_rows(group[0], &layer, tokens, &rows)), FM_INVALID_VALUE,
                 {std::to_string(tokens).c_str(), "2^31"});
  }
  layer.intermediate = kHuge;
  expect_error(outcome(fm_z_rows(group[0], &layer, 1, &rows)), FM_INVALID_VALUE, {"intermediate"});
}

TEST_F(BadInput, ATensorThatNoMemoryHoldsIsRefused) {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 2;
  expect_forward([](fm_layer&, fm_forward_args& a) { a.x.stride[0] = kHuge; }, FM_INVALID_VALUE,
                 {"x has shape", "memory"});
  expect_forward([](fm_layer&, fm_forward_args& a) { a.topk_ids.stride[0] = -kHuge; },
                 FM_INVALID_VALUE, {"topk_ids has shape", "memory"});
}

TEST(Environment, ABadValueIsNamed) {
  setenv("FLASHMOE_TIMEOUT_S", "soon", 1);
  fm_group group = nullptr;
  expect_error(outcome(fm_group_create_self(&group)), FM_INVALID_VALUE,
               {"FLASHMOE_TIMEOUT_S", "soon", "expected a number"});
  unsetenv("FLASHMOE_TIMEOUT_S");
}

TEST(Version, IsTold) {
  EXPECT_NE(std::string(fm_version()).find('.'), std::string::npos);
  EXPECT_EQ(std::string(fm_build_info()).rfind("cpu: ", 0), 0u);
}

}  // namespace
}  // namespace flashmoe::test
