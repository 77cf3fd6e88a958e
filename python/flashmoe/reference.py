"""The layer in plain PyTorch: the oracle of every test (in fp64) and its yardstick (in the layer's
own dtype).

`experts` and `moe` take the arguments of `flashmoe.experts` and `flashmoe.moe` (except `group` and
`save_z`), run on one rank with all E experts, and are differentiable by autograd. They are written
the way a model file writes its experts (a loop over the experts that were hit, one `index_add_`
each), so that "as exact as plain PyTorch" means something. Shapes: T tokens, H hidden, I
intermediate, E experts, k experts per token, G = 2 for a gated MLP, else 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .config import resolve_activation


class ReferenceResult(NamedTuple):
    """What `moe` returns beside y: the fields of `flashmoe.RoutingResult`."""

    topk_ids: torch.Tensor  # [T, k] int64
    topk_weights: torch.Tensor  # [T, k] fp32, fp64 for an fp64 layer
    logits: torch.Tensor  # [T, E] fp32, fp64 for an fp64 layer
    tokens_per_expert: torch.Tensor  # [E] int64, slots routed, drops included
    dropped: torch.Tensor  # [1] int64, slots over capacity


def experts(
    x,
    topk_ids,
    topk_weights,
    w_up,
    w_down,
    *,
    w_gate=None,
    b_up=None,
    b_down=None,
    activation="swiglu",
    num_experts=None,
    interleaved=False,
    transposed=False,
    weight_on_input=False,
    capacity_factor=None,
):
    """The routed experts: y[t] = sum_j w[t,j] * expert_{id[t,j]}(x[t]).

    x [T, H], topk_ids [T, k] integers (-1 and >= E: no expert), topk_weights [T, k], w_up
    [E, G*I, H] ([E, I, H] beside `w_gate`), w_down [E, H, I], b_up [E, G*I], b_down [E, H];
    `transposed`: the last two dimensions of the weights are swapped. Returns y [T, H] in x's dtype.
    """
    num_experts = num_experts or w_up.shape[0]
    activation = resolve_activation(activation)
    kept = kept_slots(topk_ids, num_experts, capacity_factor)
    weights = topk_weights.to(x.dtype)
    ups = w_up if w_gate is None else torch.cat([w_gate, w_up], dim=2 if transposed else 1)
    # unbind: its backward stacks the experts' gradients, where indexing would add E full tensors
    ups, downs = ups.unbind(0), w_down.unbind(0)
    y = torch.zeros_like(x)
    for expert_idx in topk_ids[kept].unique().tolist():
        token_idx, slot_idx = torch.where((topk_ids == expert_idx) & kept)
        weight = weights[token_idx, slot_idx, None]
        rows = x[token_idx] * weight if weight_on_input else x[token_idx]
        up, down = ups[expert_idx], downs[expert_idx]
        if transposed:
            up, down = up.t(), down.t()
        z = F.linear(rows, up, None if b_up is None else b_up[expert_idx])
        a = activate(z, activation, interleaved)
        out = F.linear(a, down, None if b_down is None else b_down[expert_idx])
        y.index_add_(0, token_idx, out if weight_on_input else out * weight)
    return y


def moe(
    x,
    w_router,
    w_up,
    w_down,
    *,
    top_k,
    routing,
    router_bias=None,
    selection_bias=None,
    topk_ids=None,
    capacity_factor=None,
    **expert_options,
):
    """Router and experts. w_router [E, H]; `topk_ids` replaces the router's own choice (the weights
    then belong to the given ids). Returns (y [T, H], ReferenceResult).
    """
    num_experts = w_router.shape[0]
    logits = router_logits(x, w_router, router_bias)
    if topk_ids is None:
        topk_ids = choose(selection_scores(logits, routing, selection_bias), top_k)
    weights = topk_weights(logits, topk_ids, routing)
    y = experts(
        x, topk_ids, weights, w_up, w_down, capacity_factor=capacity_factor, **expert_options
    )
    routed = kept_slots(topk_ids, num_experts, None)
    kept = kept_slots(topk_ids, num_experts, capacity_factor)
    counts = torch.bincount(topk_ids[routed], minlength=num_experts)
    dropped = (routed.sum() - kept.sum()).reshape(1)
    return y, ReferenceResult(topk_ids, weights, logits, counts, dropped)


def router_logits(x, w_router, router_bias=None):
    """Logits [T, E] in fp32 (fp64 for fp64 x), whatever the dtype of x and the router."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = None if router_bias is None else router_bias.to(dtype)
    return F.linear(x.to(dtype), w_router.to(dtype), bias)


def scores(logits, score):
    """Scores [.., E] of all experts before the choice, for a `Routing.score` name."""
    if score == "softmax":
        return logits.softmax(-1)
    if score == "topk_softmax":
        return logits
    if score == "sigmoid":
        return logits.sigmoid()
    if score == "sqrt_softplus":
        # logaddexp: F.softplus turns linear above 20, which is not exact in fp64
        return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()
    raise ValueError(f"unknown score {score!r}")


def selection_scores(logits, routing, selection_bias=None):
    """What the choice looks at, [T, E]: scores plus `selection_bias`, and -inf for the experts of
    groups that are not among the `top_groups` best (a group's score: the sum of its `group_top`
    best selection scores; of equal groups the lowest wins). Not differentiable.
    """
    selection = scores(logits.detach(), routing.score)
    if selection_bias is not None:
        selection = selection + selection_bias.to(selection.dtype)
    if routing.num_groups <= 1:
        return selection
    eligible = eligible_groups(group_scores(selection, routing), routing.top_groups)
    members = selection.shape[-1] // routing.num_groups
    return selection.masked_fill(~eligible.repeat_interleave(members, dim=-1), -math.inf)


def group_scores(selection, routing):
    """Score of each group [T, num_groups]: the sum of its `group_top` best selection scores."""
    members = selection.unflatten(-1, (routing.num_groups, -1))
    return members.topk(min(routing.group_top, members.shape[-1]), dim=-1).values.sum(-1)


def eligible_groups(scores_of_groups, top_groups):
    """Which groups stay, [T, num_groups] bool; of equal groups the lowest wins."""
    best = choose(scores_of_groups, top_groups)
    return torch.zeros_like(scores_of_groups, dtype=torch.bool).scatter(-1, best, True)


def choose(selection, top_k):
    """Ids [T, k] of the best selection scores, best first; of equal scores the lowest id wins."""
    order = torch.sort(selection, dim=-1, descending=True, stable=True).indices
    return order[..., :top_k].contiguous()


def topk_weights(logits, topk_ids, routing):
    """Weights [T, k] of chosen experts, differentiable in the logits."""
    if routing.score == "topk_softmax":
        weights = logits.gather(-1, topk_ids).softmax(-1)
    else:
        weights = scores(logits, routing.score).gather(-1, topk_ids)
    if routing.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scale


def kept_slots(topk_ids, num_experts, capacity_factor):
    """Which slots [T, k] have an expert and room there: the first ceil(c*T*k/E) slots of each
    expert, in slot order t*k + j. Call it once per source rank: capacity is counted per rank.
    """
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    if not capacity_factor:
        return valid
    capacity = math.ceil(capacity_factor * topk_ids.numel() / num_experts)
    experts_of_slots = topk_ids.masked_fill(~valid, num_experts).flatten().long()
    earlier = F.one_hot(experts_of_slots, num_experts + 1).cumsum(0) - 1
    place = earlier.gather(1, experts_of_slots[:, None]).view_as(topk_ids)
    return valid & (place < capacity)


def activate(z, activation, interleaved=False):
    """A [rows, I] from the pre-activations Z [rows, G*I]."""
    if not activation.gated:
        return nonlinearity(clamp_gate(z, activation.limit), activation)
    gate, up = (z[..., 0::2], z[..., 1::2]) if interleaved else z.chunk(2, dim=-1)
    if activation.limit:
        up = at_most(-at_most(-up, activation.limit), activation.limit)
    if activation.up_offset:
        up = up + activation.up_offset
    return nonlinearity(clamp_gate(gate, activation.limit), activation) * up


def clamp_gate(gate, limit):
    """The value that goes into the nonlinearity: bounded above by `limit` where there is one."""
    return at_most(gate, limit) if limit else gate


def at_most(values, limit):
    """The values, bounded above. On the bound itself gradients pass; those of torch.clamp did in
    PyTorch 2.11 and do not in 2.15."""
    return torch.where(values > limit, limit, values)


def nonlinearity(gate, activation):
    """The activation's function of one value, for an `Activation.kind` name."""
    kind = activation.kind
    if kind == "silu":
        return F.silu(gate) if activation.alpha == 1 else gate * (activation.alpha * gate).sigmoid()
    if kind == "gelu":
        return F.gelu(gate)
    if kind == "gelu_tanh":
        return F.gelu(gate, approximate="tanh")
    if kind == "relu":
        return gate.relu()
    if kind == "relu2":
        return gate.relu().square()
    if kind == "identity":
        return gate
    raise ValueError(f"unknown activation kind {kind!r}")
