// FlashMoE for C++20: one mixture-of-experts layer, forward and backward, over an expert-parallel
// group. A thin, header-only layer over the C ABI (flashmoe/c_api.h, which defines every option).
//
//   flashmoe::Layer layer(flashmoe::Group::alone(), {.dtype = flashmoe::Dtype::f32,
//                                                    .hidden = 64, .intermediate = 128,
//                                                    .num_experts = 8, .top_k = 2});
//   layer.experts({.x = {x, {tokens, 64}}, .topk_ids = {ids, {tokens, 2}}, ...});
//
// A Group owns one rank's end of the group; a Layer shares it. Tensors are views of memory that the
// caller owns: std::span or pointer, with the extents in elements. Every failure is an exception of
// one of the types below, whose what() names the operand, what was given and what is accepted.
//
// T tokens of this rank, H hidden size, I expert intermediate size, E experts in all, k experts per
// token, W ranks, E_loc = E / W experts held by a rank, G = 2 for a gated MLP, else 1.
#ifndef FLASHMOE_FLASHMOE_H_
#define FLASHMOE_FLASHMOE_H_

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "flashmoe/c_api.h"

namespace flashmoe {
// What a program compiles in has names of its own, apart from those of the library's inside.
inline namespace api {

// ---- errors -------------------------------------------------------------------------------------

// The base of all of them.
class Error : public std::runtime_error {
 public:
  Error(fm_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  fm_status status() const noexcept { return status_; }

 private:
  fm_status status_;
};

template <fm_status kStatus>
class ErrorOf : public Error {
 public:
  explicit ErrorOf(const std::string& text) : Error(kStatus, text) {}
};

// A shape, stride, id or option that is not accepted.
struct InvalidValueError : ErrorOf<FM_INVALID_VALUE> {
  using ErrorOf::ErrorOf;
};
// A dtype or device that is not accepted.
struct InvalidTypeError : ErrorOf<FM_INVALID_TYPE> {
  using ErrorOf::ErrorOf;
};
// Non-finite router logits, or an expert id below -1.
struct RoutingError : ErrorOf<FM_ROUTING> {
  using ErrorOf::ErrorOf;
};
// The ranks disagree, or a peer refused its call: the text names rank and field.
struct RankMismatchError : ErrorOf<FM_MISMATCH> {
  using ErrorOf::ErrorOf;
};
// A bounded wait ran out, or the process of the rank waited for has ended: the text names rank,
// phase and epoch.
struct WaitTimeoutError : ErrorOf<FM_TIMEOUT> {
  using ErrorOf::ErrorOf;
};
// The group was aborted, here or by a peer.
struct GroupAbortedError : ErrorOf<FM_ABORTED> {
  using ErrorOf::ErrorOf;
};
struct OutOfMemoryError : ErrorOf<FM_OUT_OF_MEMORY> {
  using ErrorOf::ErrorOf;
};
// Valid, but not by this engine or build.
struct UnsupportedError : ErrorOf<FM_UNSUPPORTED> {
  using ErrorOf::ErrorOf;
};
// The library that is loaded does not know the structs that this header has.
struct VersionMismatchError : ErrorOf<FM_VERSION_MISMATCH> {
  using ErrorOf::ErrorOf;
};
struct InternalError : ErrorOf<FM_INTERNAL> {
  using ErrorOf::ErrorOf;
};

namespace detail {

[[noreturn]] inline void raise(fm_status status, const std::string& text) {
  switch (status) {
    case FM_INVALID_VALUE:
      throw InvalidValueError(text);
    case FM_INVALID_TYPE:
      throw InvalidTypeError(text);
    case FM_ROUTING:
      throw RoutingError(text);
    case FM_MISMATCH:
      throw RankMismatchError(text);
    case FM_TIMEOUT:
      throw WaitTimeoutError(text);
    case FM_ABORTED:
      throw GroupAbortedError(text);
    case FM_OUT_OF_MEMORY:
      throw OutOfMemoryError(text);
    case FM_UNSUPPORTED:
      throw UnsupportedError(text);
    case FM_VERSION_MISMATCH:
      throw VersionMismatchError(text);
    default:
      throw InternalError(text);
  }
}

inline void check(fm_status status) {
  if (status != FM_OK) raise(status, fm_last_error());
}

}  // namespace detail

// ---- tensors ------------------------------------------------------------------------------------

enum class Dtype : int32_t {
  f64 = FM_F64,
  f32 = FM_F32,
  bf16 = FM_BF16,
  f16 = FM_F16,
  i32 = FM_I32,
  i64 = FM_I64
};

// The dtype of an element type. C++20 has no 16-bit floating types: specialise it for yours
// (`template <> struct flashmoe::ElementType<__nv_bfloat16> { static constexpr auto kDtype = ...`),
// or name the dtype when you make the view.
template <class T>
struct ElementType;
template <>
struct ElementType<double> {
  static constexpr Dtype kDtype = Dtype::f64;
};
template <>
struct ElementType<float> {
  static constexpr Dtype kDtype = Dtype::f32;
};
template <>
struct ElementType<int32_t> {
  static constexpr Dtype kDtype = Dtype::i32;
};
template <>
struct ElementType<int64_t> {
  static constexpr Dtype kDtype = Dtype::i64;
};

using Extents = std::initializer_list<int64_t>;

// A strided tensor of up to three dimensions that somebody else owns. Void is void
// for tensors that a launch writes, const void for those that it reads. Empty: absent.
template <class Void>
class BasicView {
  template <class T>
  using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;

 public:
  BasicView() = default;

  // Row-major: the last extent is contiguous.
  BasicView(Void* data, Dtype dtype, Extents shape) {
    tensor_.data = const_cast<void*>(data);
    tensor_.dtype = static_cast<int32_t>(dtype);
    set(tensor_.shape, shape, "extents");
    tensor_.ndim = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (int32_t dim = tensor_.ndim - 1; dim >= 0; --dim) {
      tensor_.stride[dim] = stride;
      stride *= tensor_.shape[dim] > 0 ? tensor_.shape[dim] : 1;
    }
  }
  template <class T>
  requires(!std::is_void_v<T> && std::is_convertible_v<T*, Void*>) BasicView(T* data, Extents shape)
      : BasicView(data, ElementType<std::remove_const_t<T>>::kDtype, shape) {}
  // Raises InvalidValueError unless the span has as many elements as the extents.
  template <class T>
  requires(std::is_convertible_v<T*, Void*>) BasicView(std::span<T> data, Extents shape)
      : BasicView(data.data(), shape) {
    check_size(data.size());
  }
  template <class T>
  BasicView(const std::vector<T>& data, Extents shape) requires(std::is_const_v<Void>)
      : BasicView(std::span(data), shape) {}
  template <class T>
  BasicView(std::vector<T>& data, Extents shape) : BasicView(std::span<Element<T>>(data), shape) {}
  // What is written may be read.
  template <class Other>
  requires(std::is_same_v<Other, void>&& std::is_const_v<Void>)
      BasicView(const BasicView<Other>& other)  // NOLINT(google-explicit-constructor)
      : tensor_(other.native()) {}

  // The same memory with these strides, in elements: transposed or padded tensors.
  BasicView strided(Extents strides) const {
    BasicView view = *this;
    if (static_cast<int32_t>(strides.size()) != tensor_.ndim) {
      detail::raise(FM_INVALID_VALUE, std::to_string(strides.size()) + " strides for " +
                                          std::to_string(tensor_.ndim) + " extents");
    }
    set(view.tensor_.stride, strides, "strides");
    return view;
  }

  explicit operator bool() const { return tensor_.data != nullptr; }
  const fm_tensor& native() const { return tensor_; }

 private:
  static void set(int64_t (&target)[3], Extents values, const char* what) {
    if (values.size() > std::size(target)) {
      detail::raise(FM_INVALID_VALUE,
                    std::to_string(values.size()) + " " + what + "; at most 3 are accepted");
    }
    std::copy(values.begin(), values.end(), target);
  }
  void check_size(size_t given) const {
    int64_t elements = 1;
    for (int32_t dim = 0; dim < tensor_.ndim; ++dim) elements *= tensor_.shape[dim];
    if (static_cast<int64_t>(given) == elements) return;
    detail::raise(FM_INVALID_VALUE, "a span of " + std::to_string(given) +
                                        " elements for extents of " + std::to_string(elements));
  }

  fm_tensor tensor_{};
};

using View = BasicView<void>;
using ConstView = BasicView<const void>;

// ---- groups -------------------------------------------------------------------------------------

// One rank's end of an expert-parallel group; the last copy releases it. A group is used by one
// launch at a time. A second thread waits for its turn on a group of one rank; on a larger one it
// gets UnsupportedError and the group is aborted.
class Group {
 public:
  // One rank.
  static Group alone() {
    fm_group handle = nullptr;
    detail::check(fm_group_create_self(&handle));
    return Group(handle);
  }
  // W ranks as threads of this process: give each element to its own thread.
  static std::vector<Group> local(int32_t world) {
    std::vector<fm_group> handles(static_cast<size_t>(world > 0 ? world : 1));
    detail::check(fm_group_create_local(world, handles.data()));
    std::vector<Group> groups;
    groups.reserve(handles.size());
    for (const fm_group handle : handles) groups.push_back(Group(handle));
    return groups;
  }
  // W processes of one machine. `token` names the group: the same text on every rank, never used
  // before. Collective; raises WaitTimeoutError when a rank stays away for FLASHMOE_TIMEOUT_S.
  static Group processes(const std::string& token, int32_t rank, int32_t world) {
    fm_group handle = nullptr;
    detail::check(fm_group_create_shm(token.c_str(), rank, world, &handle));
    return Group(handle);
  }

  int32_t rank() const { return place().first; }
  int32_t world() const { return place().second; }

  // The options of fm_group_set.
  void set(const char* key, double value) { detail::check(fm_group_set(get(), key, value)); }
  // Bound of every wait; zero: none.
  void set_timeout(std::chrono::duration<double> timeout) { set("timeout_s", timeout.count()); }
  // Compute threads of this rank; 0: automatic.
  void set_num_threads(int num_threads) { set("num_threads", num_threads); }

  // CUDA, several ranks: fm_group_reserve; struct_size is filled in.
  void reserve(fm_capacity capacity) {
    capacity.struct_size = sizeof(capacity);
    detail::check(fm_group_reserve(get(), &capacity));
  }

  // Ends every wait of every rank: GroupAbortedError there, from then on.
  void abort(const std::string& reason) { detail::check(fm_group_abort(get(), reason.c_str())); }
  // Takes part in the peers' launch as a rank that refuses it: RankMismatchError there. For a rank
  // that found an error before it could launch.
  void refuse(const std::string& reason) { detail::check(fm_group_refuse(get(), reason.c_str())); }

  // What the last launch did on this rank; all 0 if its call failed.
  fm_stats stats() const {
    fm_stats stats{};
    stats.struct_size = sizeof(stats);
    detail::check(fm_group_stats(get(), &stats));
    return stats;
  }

  fm_group get() const { return handle_.get(); }

 private:
  explicit Group(fm_group handle)
      : handle_(handle, [](fm_group last) { fm_group_destroy(last); }) {}

  std::pair<int32_t, int32_t> place() const {
    std::pair<int32_t, int32_t> place;
    detail::check(fm_group_rank(get(), &place.first, &place.second));
    return place;
  }

  std::shared_ptr<std::remove_pointer_t<fm_group>> handle_;
};

// ---- the layer ----------------------------------------------------------------------------------

// The function between the two expert products; fm_layer says what the numbers mean.
struct Activation {
  fm_activation kind = FM_SILU;
  bool gated = true;
  double alpha = 1.0;
  double limit = 0.0;
  double up_offset = 0.0;
};

// How router logits become ids and weights. Unused when they come from outside.
struct Routing {
  fm_score score = FM_SCORE_SOFTMAX;
  bool renormalize = true;
  double scale = 1.0;
  int64_t num_groups = 1;
  int64_t top_groups = 1;
  int64_t group_top = 2;
};

struct LayerConfig {
  Dtype dtype = Dtype::f32;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t num_experts = 0;  // over all ranks; a multiple of W
  int64_t top_k = 0;
  Activation activation{};
  fm_gate_layout gate_layout = FM_GATE_CONCATENATED;
  bool weight_on_input = false;
  double capacity_factor = 0.0;  // 0: dropless
  Routing routing{};
  int64_t layer_id = 0;  // tells layers of the same sizes apart: must agree between the ranks
};

// Experts of this rank: w_up [E_loc, G*I, H], w_down [E_loc, H, I], w_gate [E_loc, I, H] with
// FM_GATE_SEPARATE only, b_up [E_loc, G*I], b_down [E_loc, H].
template <class V>
struct BasicExperts {
  V w_up{}, w_down{}, w_gate{}, b_up{}, b_down{};
};
using Experts = BasicExperts<ConstView>;
using ExpertGradients = BasicExperts<View>;

// weight [E, H], bias [E], selection_bias [E]: added to the scores for the choice only.
struct Router {
  ConstView weight{}, bias{}, selection_bias{};
};

// Forward of tokens that are already routed. The rest is optional: z [fm_z_rows, G*I] keeps the
// pre-activations for the backward (one rank), tokens_per_expert [E] and dropped [1] are int64.
struct ExpertsForward {
  ConstView x;             // [T, H]
  ConstView topk_ids;      // [T, k] int32 or int64; -1 and >= E: no expert
  ConstView topk_weights;  // [T, k]
  Experts experts;
  View y;  // [T, H] out
  View z{}, tokens_per_expert{}, dropped{};
};

// Forward with the router in the launch: ids, weights and logits come out.
struct MoeForward {
  ConstView x;
  Router router;
  Experts experts;
  View topk_ids;      // [T, k] int32 or int64, out
  View topk_weights;  // [T, k] out
  View logits;        // [T, E] f32 (f64), out; a backward needs them
  View y;
  View z{}, tokens_per_expert{}, dropped{};
};

// Gradients of an ExpertsForward. grad_x is always written; what is absent is not computed. flags:
// fm_backward_flags.
struct ExpertsBackward {
  ConstView x, topk_ids, topk_weights;
  Experts experts;
  ConstView grad_y;
  View grad_x;
  View grad_topk_weights{};
  ExpertGradients grad_experts{};
  ConstView z{};
  uint32_t flags = 0;
};

// Gradients of a MoeForward; grad_weights and grad_logits are those that arrive at its outputs.
struct MoeBackward {
  ConstView x;
  Router router;
  ConstView topk_ids, topk_weights, logits;
  Experts experts;
  ConstView grad_y;
  View grad_x;
  View grad_w_router{}, grad_router_bias{};
  ExpertGradients grad_experts{};
  ConstView grad_weights{}, grad_logits{}, z{};
  uint32_t flags = 0;
};

// A layer on a group. All ranks of the group call the same functions in the same order.
class Layer {
 public:
  Layer(Group group, const LayerConfig& config) : group_(std::move(group)) {
    layer_.struct_size = sizeof(layer_);
    layer_.dtype = static_cast<int32_t>(config.dtype);
    layer_.hidden = config.hidden;
    layer_.intermediate = config.intermediate;
    layer_.num_experts = config.num_experts;
    layer_.top_k = config.top_k;
    layer_.activation = config.activation.kind;
    layer_.gated = config.activation.gated ? 1 : 0;
    layer_.gate_layout = config.gate_layout;
    layer_.weight_on_input = config.weight_on_input ? 1 : 0;
    layer_.act_alpha = config.activation.alpha;
    layer_.act_limit = config.activation.limit;
    layer_.up_offset = config.activation.up_offset;
    layer_.capacity_factor = config.capacity_factor;
    layer_.score = config.routing.score;
    layer_.renormalize = config.routing.renormalize ? 1 : 0;
    layer_.scale = config.routing.scale;
    layer_.num_groups = config.routing.num_groups;
    layer_.top_groups = config.routing.top_groups;
    layer_.group_top = config.routing.group_top;
    layer_.layer_id = config.layer_id;
  }

  // From now on all tensors lie on a CUDA device and launches are queued on `stream` (a
  // cudaStream_t; null: the default stream). Nothing waits for them: what fails on the device is
  // raised by the next call of this group and by Group::stats, once.
  void use_cuda(int32_t device, void* stream) {
    device_type_ = FM_DEVICE_CUDA;
    device_ = device;
    stream_ = stream;
  }

  void experts(const ExpertsForward& call) {
    fm_forward_args args = forward_args(call);
    run(args);
  }
  void moe(const MoeForward& call) {
    fm_forward_args args = forward_args(call);
    set_router(args, call.router);
    args.logits = call.logits.native();
    run(args);
  }
  void experts_backward(const ExpertsBackward& call) {
    fm_backward_args args = backward_args(call);
    args.grad_topk_weights = call.grad_topk_weights.native();
    run(args);
  }
  void moe_backward(const MoeBackward& call) {
    fm_backward_args args = backward_args(call);
    set_router(args, call.router);
    args.logits = call.logits.native();
    args.grad_weights = call.grad_weights.native();
    args.grad_logits = call.grad_logits.native();
    args.grad_w_router = call.grad_w_router.native();
    args.grad_router_bias = call.grad_router_bias.native();
    run(args);
  }

  // Rows of the tensor z for `tokens` tokens; of several ranks (CUDA alone) see fm_z_rows.
  int64_t z_rows(int64_t tokens) const {
    int64_t rows = 0;
    detail::check(fm_z_rows(group_.get(), &layer_, tokens, &rows));
    return rows;
  }

  const Group& group() const { return group_; }

 private:
  // What both forwards, and both backwards, have in common.
  template <class Args, class Call>
  Args shared_args(const Call& call) const {
    Args args{};
    args.struct_size = sizeof(args);
    args.x = call.x.native();
    args.topk_ids = call.topk_ids.native();
    args.topk_weights = call.topk_weights.native();
    args.w_gate = call.experts.w_gate.native();
    args.w_up = call.experts.w_up.native();
    args.w_down = call.experts.w_down.native();
    args.b_up = call.experts.b_up.native();
    args.b_down = call.experts.b_down.native();
    args.z = call.z.native();
    args.device_type = device_type_;
    args.device = device_;
    args.stream = stream_;
    return args;
  }
  template <class Call>
  fm_forward_args forward_args(const Call& call) const {
    auto args = shared_args<fm_forward_args>(call);
    args.y = call.y.native();
    args.tokens_per_expert = call.tokens_per_expert.native();
    args.dropped = call.dropped.native();
    return args;
  }
  template <class Call>
  fm_backward_args backward_args(const Call& call) const {
    auto args = shared_args<fm_backward_args>(call);
    args.flags = call.flags;
    args.grad_y = call.grad_y.native();
    args.grad_x = call.grad_x.native();
    args.grad_w_gate = call.grad_experts.w_gate.native();
    args.grad_w_up = call.grad_experts.w_up.native();
    args.grad_w_down = call.grad_experts.w_down.native();
    args.grad_b_up = call.grad_experts.b_up.native();
    args.grad_b_down = call.grad_experts.b_down.native();
    return args;
  }
  template <class Args>
  static void set_router(Args& args, const Router& router) {
    args.w_router = router.weight.native();
    args.router_bias = router.bias.native();
    args.selection_bias = router.selection_bias.native();
  }

  void run(const fm_forward_args& args) { detail::check(fm_forward(group_.get(), &layer_, &args)); }
  void run(const fm_backward_args& args) {
    detail::check(fm_backward(group_.get(), &layer_, &args));
  }

  Group group_;
  fm_layer layer_{};
  int32_t device_type_ = FM_DEVICE_HOST;
  int32_t device_ = 0;
  void* stream_ = nullptr;
};

inline std::string version() { return fm_version(); }
// What the library that is loaded can do, in one line.
inline std::string build_info() { return fm_build_info(); }

}  // namespace api
}  // namespace flashmoe

#endif  // FLASHMOE_FLASHMOE_H_
