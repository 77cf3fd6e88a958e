// The names under which Python passes the fields of the C structs: one table per struct.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <variant>

#include "flashmoe/c_api.h"

namespace flashmoe::bindings {

template <class Args>
struct TensorField {
  std::string_view name;
  fm_tensor Args::*member;
};

template <class Struct>
using NumberMember =
    std::variant<int32_t Struct::*, uint32_t Struct::*, int64_t Struct::*, double Struct::*>;

template <class Struct>
struct NumberField {
  std::string_view name;
  NumberMember<Struct> member;
};

inline constexpr std::array kForwardFields{
    TensorField<fm_forward_args>{"x", &fm_forward_args::x},
    TensorField<fm_forward_args>{"w_router", &fm_forward_args::w_router},
    TensorField<fm_forward_args>{"router_bias", &fm_forward_args::router_bias},
    TensorField<fm_forward_args>{"selection_bias", &fm_forward_args::selection_bias},
    TensorField<fm_forward_args>{"topk_ids", &fm_forward_args::topk_ids},
    TensorField<fm_forward_args>{"topk_weights", &fm_forward_args::topk_weights},
    TensorField<fm_forward_args>{"w_gate", &fm_forward_args::w_gate},
    TensorField<fm_forward_args>{"w_up", &fm_forward_args::w_up},
    TensorField<fm_forward_args>{"w_down", &fm_forward_args::w_down},
    TensorField<fm_forward_args>{"b_up", &fm_forward_args::b_up},
    TensorField<fm_forward_args>{"b_down", &fm_forward_args::b_down},
    TensorField<fm_forward_args>{"y", &fm_forward_args::y},
    TensorField<fm_forward_args>{"logits", &fm_forward_args::logits},
    TensorField<fm_forward_args>{"tokens_per_expert", &fm_forward_args::tokens_per_expert},
    TensorField<fm_forward_args>{"dropped", &fm_forward_args::dropped},
    TensorField<fm_forward_args>{"z", &fm_forward_args::z},
};

inline constexpr std::array kBackwardFields{
    TensorField<fm_backward_args>{"x", &fm_backward_args::x},
    TensorField<fm_backward_args>{"w_router", &fm_backward_args::w_router},
    TensorField<fm_backward_args>{"router_bias", &fm_backward_args::router_bias},
    TensorField<fm_backward_args>{"selection_bias", &fm_backward_args::selection_bias},
    TensorField<fm_backward_args>{"topk_ids", &fm_backward_args::topk_ids},
    TensorField<fm_backward_args>{"topk_weights", &fm_backward_args::topk_weights},
    TensorField<fm_backward_args>{"w_gate", &fm_backward_args::w_gate},
    TensorField<fm_backward_args>{"w_up", &fm_backward_args::w_up},
    TensorField<fm_backward_args>{"w_down", &fm_backward_args::w_down},
    TensorField<fm_backward_args>{"b_up", &fm_backward_args::b_up},
    TensorField<fm_backward_args>{"b_down", &fm_backward_args::b_down},
    TensorField<fm_backward_args>{"logits", &fm_backward_args::logits},
    TensorField<fm_backward_args>{"z", &fm_backward_args::z},
    TensorField<fm_backward_args>{"grad_y", &fm_backward_args::grad_y},
    TensorField<fm_backward_args>{"grad_weights", &fm_backward_args::grad_weights},
    TensorField<fm_backward_args>{"grad_logits", &fm_backward_args::grad_logits},
    TensorField<fm_backward_args>{"grad_x", &fm_backward_args::grad_x},
    TensorField<fm_backward_args>{"grad_topk_weights", &fm_backward_args::grad_topk_weights},
    TensorField<fm_backward_args>{"grad_w_router", &fm_backward_args::grad_w_router},
    TensorField<fm_backward_args>{"grad_router_bias", &fm_backward_args::grad_router_bias},
    TensorField<fm_backward_args>{"grad_w_gate", &fm_backward_args::grad_w_gate},
    TensorField<fm_backward_args>{"grad_w_up", &fm_backward_args::grad_w_up},
    TensorField<fm_backward_args>{"grad_w_down", &fm_backward_args::grad_w_down},
    TensorField<fm_backward_args>{"grad_b_up", &fm_backward_args::grad_b_up},
    TensorField<fm_backward_args>{"grad_b_down", &fm_backward_args::grad_b_down},
};

inline constexpr std::array kLayerFields{
    NumberField<fm_layer>{"dtype", &fm_layer::dtype},
    NumberField<fm_layer>{"hidden", &fm_layer::hidden},
    NumberField<fm_layer>{"intermediate", &fm_layer::intermediate},
    NumberField<fm_layer>{"num_experts", &fm_layer::num_experts},
    NumberField<fm_layer>{"top_k", &fm_layer::top_k},
    NumberField<fm_layer>{"activation", &fm_layer::activation},
    NumberField<fm_layer>{"gated", &fm_layer::gated},
    NumberField<fm_layer>{"gate_layout", &fm_layer::gate_layout},
    NumberField<fm_layer>{"weight_on_input", &fm_layer::weight_on_input},
    NumberField<fm_layer>{"act_alpha", &fm_layer::act_alpha},
    NumberField<fm_layer>{"act_limit", &fm_layer::act_limit},
    NumberField<fm_layer>{"up_offset", &fm_layer::up_offset},
    NumberField<fm_layer>{"capacity_factor", &fm_layer::capacity_factor},
    NumberField<fm_layer>{"score", &fm_layer::score},
    NumberField<fm_layer>{"renormalize", &fm_layer::renormalize},
    NumberField<fm_layer>{"scale", &fm_layer::scale},
    NumberField<fm_layer>{"num_groups", &fm_layer::num_groups},
    NumberField<fm_layer>{"top_groups", &fm_layer::top_groups},
    NumberField<fm_layer>{"group_top", &fm_layer::group_top},
    NumberField<fm_layer>{"layer_id", &fm_layer::layer_id},
};

// phase_seconds and phase_flops are arrays and are added by hand.
inline constexpr std::array kStatsFields{
    NumberField<fm_stats>{"epoch", &fm_stats::epoch},
    NumberField<fm_stats>{"rows", &fm_stats::rows},
    NumberField<fm_stats>{"rows_sent", &fm_stats::rows_sent},
    NumberField<fm_stats>{"rows_sent_plain", &fm_stats::rows_sent_plain},
    NumberField<fm_stats>{"bytes_sent", &fm_stats::bytes_sent},
    NumberField<fm_stats>{"bytes_sent_plain", &fm_stats::bytes_sent_plain},
    NumberField<fm_stats>{"scratch_bytes", &fm_stats::scratch_bytes},
    NumberField<fm_stats>{"allocated_bytes", &fm_stats::allocated_bytes},
    NumberField<fm_stats>{"symmetric_bytes", &fm_stats::symmetric_bytes},
    NumberField<fm_stats>{"num_tasks", &fm_stats::num_tasks},
    NumberField<fm_stats>{"num_threads", &fm_stats::num_threads},
    NumberField<fm_stats>{"seconds", &fm_stats::seconds},
};

// struct_size and flags precede the tensors, device and stream follow: a tensor added to the header
// must be added here too.
static_assert(sizeof(fm_forward_args) == 8 + kForwardFields.size() * sizeof(fm_tensor) + 16);
static_assert(sizeof(fm_backward_args) == 8 + kBackwardFields.size() * sizeof(fm_tensor) + 16);

}  // namespace flashmoe::bindings
