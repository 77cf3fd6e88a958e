"""One case on the engine and on the reference: three passes over the same operands.

`engine_pass` is FlashMoE over W ranks; `reference_pass` in fp64 with every index space mirrored is
the oracle (it sums in another order than anything under test); `reference_pass` in the layer's
dtype is plain PyTorch, the yardstick. A result maps an output's name to a list of tensors, one a
rank; gradients of expert weights have one entry with all E experts, in natural form (gate, up and
down apart).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from . import reference
from .inputs import DTYPES, LAYOUTS, in_memory_form, on_device, pack, unpack

EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


def wide_dtype(dtype):
    """The dtype of routing: fp64 for an fp64 layer, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def routing_dtypes(case, dtype):
    """Dtypes of the router's weight and bias, of external weights and of external ids."""
    wide = wide_dtype(dtype)
    of_router = wide if case.wide_router else dtype
    of_slots, ids = (dtype, torch.int32) if case.narrow_slots else (wide, torch.int64)
    return of_router, of_slots, ids


# ---- the engine -------------------------------------------------------------------------------


@dataclass
class RankCall:
    """The arguments of one rank's call, its differentiable leaves and the gradients that arrive."""

    x: torch.Tensor
    routing: dict[str, torch.Tensor]  # w_router and biases, or topk_ids and topk_weights
    weights: dict[str, torch.Tensor]  # packed, this rank's experts
    options: dict
    grad_y: torch.Tensor
    grad_weights: torch.Tensor | None = None
    grad_logits: torch.Tensor | None = None

    def leaves(self):
        """Name -> tensor that gets a gradient."""
        routed = ("w_router", "router_bias", "topk_weights")
        chosen = {name: self.routing[name] for name in routed if name in self.routing}
        return {"x": self.x} | chosen | self.weights


def rank_call(case, operands, dtype_name, rank, ranks, group):
    """The call that `rank` of `ranks` makes for a case."""
    dtype = DTYPES[dtype_name]
    wide = wide_dtype(dtype)
    local = case.experts // ranks
    mine = slice(rank * local, (rank + 1) * local)
    weights = {
        name: in_memory_form(whole[mine].to(dtype), case.layout)
        if name.startswith("w_")
        else whole[mine].to(dtype)
        for name, whole in pack(operands, case.layout).items()
    }
    of_router, of_slots, ids_dtype = routing_dtypes(case, dtype)
    if case.fused_router:
        routing = {"w_router": operands.w_router.to(of_router)}
        if operands.router_bias is not None:
            routing["router_bias"] = operands.router_bias.to(of_router)
        if operands.selection_bias is not None:
            routing["selection_bias"] = operands.selection_bias.to(wide)
    else:
        routing = {
            "topk_ids": operands.topk_ids[rank].to(ids_dtype),
            "topk_weights": operands.topk_weights[rank].to(of_slots),
        }
    call = RankCall(
        x=operands.x[rank].to(dtype),
        routing=routing,
        weights=weights,
        options=call_options(case, group),
        grad_y=operands.grad_y[rank].to(dtype),
    )
    if operands.grad_weights is not None:
        call.grad_weights = operands.grad_weights[rank].to(wide)
        call.grad_logits = operands.grad_logits[rank].to(wide)
    return call


def call_options(case, group):
    """Keyword arguments of `flashmoe.moe` or `flashmoe.experts` for a case."""
    order, transposed, _ = LAYOUTS[case.layout]
    options = {
        "activation": case.activation,
        "num_experts": case.experts,
        "interleaved": order == "interleaved",
        "transposed": transposed,
        "weight_on_input": case.weight_on_input,
        "capacity_factor": case.capacity_factor,
        "save_z": case.save_z,
        "group": group,
    }
    if case.fused_router:
        options |= {"top_k": case.top_k, "routing": case.routing}
    return options


def operator_call(case, call):
    """(operands by name, LayerConfig): a call as the operators of `ops` take it."""
    from . import functional

    keys = ("activation", "num_experts", "interleaved", "weight_on_input", "capacity_factor")
    options = {key: call.options[key] for key in keys}
    config = functional._config(
        case.top_k, case.routing, "w_gate" in call.weights, layer_id=0, **options
    )
    operands = {"x": call.x} | call.routing | call.weights
    transposed = call.options["transposed"]
    return {
        name: functional._operand(name, tensor, transposed) for name, tensor in operands.items()
    }, config


def call_layer(call):
    """(y, RoutingResult or None) of one rank."""
    import flashmoe

    weights = dict(call.weights)
    w_up, w_down = weights.pop("w_up"), weights.pop("w_down")
    if "topk_ids" in call.routing:
        ids, topk_weights = call.routing["topk_ids"], call.routing["topk_weights"]
        y = flashmoe.experts(call.x, ids, topk_weights, w_up, w_down, **weights, **call.options)
        return y, None
    routing = dict(call.routing)
    w_router = routing.pop("w_router")
    return flashmoe.moe(call.x, w_router, w_up, w_down, **routing, **weights, **call.options)


def run_rank(call, gradients, after_forward=None):
    """One rank's forward and, with `gradients`, backward: (outputs by name, RoutingResult).
    `after_forward` is called between the two."""
    leaves = call.leaves()
    if gradients:
        for leaf in leaves.values():
            leaf.requires_grad_(True)
    y, routed = call_layer(call)
    if after_forward:
        after_forward()
    outputs = {"y": y.detach()}
    if routed is not None:
        outputs |= {"topk_weights": routed.topk_weights.detach(), "logits": routed.logits.detach()}
    if gradients:
        ends, arriving = [y], [call.grad_y]
        if call.grad_weights is not None:
            ends += [routed.topk_weights, routed.logits]
            arriving += [call.grad_weights, call.grad_logits]
        grads = torch.autograd.grad(ends, list(leaves.values()), arriving)
        outputs |= {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return outputs, routed


@dataclass
class EngineResult:
    """Outputs of all ranks in natural form, and what the router of each rank returned."""

    outputs: dict[str, list[torch.Tensor]]
    routed: list  # RoutingResult of each rank, or None


def engine_pass(case, operands, dtype_name, groups, gradients):
    """All ranks, each in a thread of its own with its group of `groups`; several ranks of operands
    on CUDA each on a GPU of its own. Raises what the first failing rank raised."""
    ranks, home = len(groups), operands.x[0].device
    placed = [operands] * ranks
    if home.type == "cuda" and ranks > 1:
        placed = [on_device(operands, f"cuda:{rank}") for rank in range(ranks)]
        reserve(groups, case, max(len(x) for x in operands.x))
    calls = [
        rank_call(case, placed[rank], dtype_name, rank, ranks, group)
        for rank, group in enumerate(groups)
    ]

    results = on_all_ranks(lambda rank: run_rank(calls[rank], gradients), ranks)
    for result in results:
        if isinstance(result, Exception):
            raise result
    # Not by the ranks' own threads: a copy between two GPUs holds up both of their streams until
    # it is done. Behind the launch of one rank and ahead of that of another, whose peer it then
    # waits for, it would be done when the wait of the launch runs out.
    results = [moved(outputs, routed, home) for outputs, routed in results]
    return gather(case, [outputs for outputs, _ in results], [routed for _, routed in results])


def reserve(groups, case, tokens):
    """Room for a case on CUDA, where the first call of one rank would make it for that one."""
    for group in groups:
        group.reserve(tokens, hidden=case.hidden, top_k=case.top_k, num_experts=case.experts)


def moved(outputs, routed, device):
    """What `run_rank` returns, on a torch device."""
    outputs = {name: tensor.to(device) for name, tensor in outputs.items()}
    if routed is not None:
        routed = type(routed)(*(part.detach().to(device) for part in routed))
    return outputs, routed


def on_all_ranks(function, ranks):
    """[function(rank) or the exception it raised, for each rank], ranks as threads."""

    def guarded(rank):
        try:
            return function(rank)
        except Exception as error:  # handed to the caller, who judges or raises it
            return error

    if ranks == 1:
        return [guarded(0)]
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(guarded, range(ranks)))


def gather(case, outputs, routed):
    """An `EngineResult` from what each rank returned: local experts joined, layout undone."""
    per_rank, packed = {}, {}
    for name in outputs[0]:
        parts = [one[name] for one in outputs]
        bare = name.removeprefix("grad_")
        if name.startswith("grad_") and bare in EXPERT_WEIGHTS:
            packed[bare] = torch.cat(parts)
        else:
            per_rank[name] = parts
    natural = unpack(packed, case.layout, case.activation_spec.gated)
    return EngineResult(per_rank | {f"grad_{name}": [g] for name, g in natural.items()}, routed)


# ---- the reference ----------------------------------------------------------------------------


def reference_pass(case, operands, topk_ids, dtype, gradients, mirrored=False):
    """Outputs by name from plain PyTorch in `dtype`, with the given ids of every rank.

    The experts see the tokens of all ranks as one batch; the router runs rank by rank. `mirrored`
    reverses tokens, hidden, intermediate and experts: the same layer, summed in another order.
    """
    leaves = reference_leaves(case, operands, dtype, gradients)
    ends, arriving = [], []
    if case.fused_router:
        routed = [
            route_rank(case, leaves, rank, ids, mirrored) for rank, ids in enumerate(topk_ids)
        ]
        logits, weights = [list(part) for part in zip(*routed, strict=True)]
        outputs = {"topk_weights": weights, "logits": logits}
        if operands.grad_weights is not None:
            ends += weights + logits
            arriving += operands.grad_weights + operands.grad_logits
    else:
        weights, outputs = leaves["topk_weights"], {}
    outputs["y"] = reference_experts(case, operands, leaves, topk_ids, weights, mirrored)
    ends += outputs["y"]
    arriving += operands.grad_y
    if gradients:
        grads = gradients_of(ends, arriving, leaves)
        outputs |= {f"grad_{name}": grad for name, grad in grads.items()}
    return {name: [part.detach() for part in parts] for name, parts in outputs.items()}


def reference_leaves(case, operands, dtype, gradients):
    """Name -> list of leaf tensors. The router has one copy a rank: its gradient is per rank."""
    ranks = len(operands.x)
    of_router, of_slots, _ = routing_dtypes(case, dtype)
    leaves = {"x": [x.to(dtype) for x in operands.x]}
    for name in ("w_router", "router_bias"):
        value = getattr(operands, name)
        if value is not None:
            leaves[name] = [value.to(of_router, copy=True) for _ in range(ranks)]
    if operands.topk_weights is not None:
        leaves["topk_weights"] = [weights.to(of_slots) for weights in operands.topk_weights]
    for name in EXPERT_WEIGHTS:
        value = getattr(operands, name)
        if value is not None:
            leaves[name] = [value.to(dtype)]
    return {
        name: [part.detach().requires_grad_(gradients) for part in parts]
        for name, parts in leaves.items()
    }


def route_rank(case, leaves, rank, topk_ids, mirrored):
    """Logits [T, E] and weights [T, k] of one rank for given ids."""
    x, w_router = leaves["x"][rank], leaves["w_router"][rank]
    bias = leaves["router_bias"][rank] if "router_bias" in leaves else None
    if mirrored:
        logits = reference.router_logits(x.flip(0, 1), w_router.flip(1), bias).flip(0)
    else:
        logits = reference.router_logits(x, w_router, bias)
    return logits, reference.topk_weights(logits, topk_ids, case.routing)


def reference_experts(case, operands, leaves, topk_ids, weights, mirrored):
    """y [T, H] of every rank; drops are counted rank by rank, then all tokens are one batch."""
    tokens = [len(ids) for ids in topk_ids]
    kept = [
        ids.masked_fill(~reference.kept_slots(ids, case.experts, case.capacity_factor), -1)
        for ids in topk_ids
    ]
    weights_of_experts = {name: leaves[name][0] for name in EXPERT_WEIGHTS if name in leaves}
    natural = replace(operands, **weights_of_experts)
    x, ids, weights = torch.cat(leaves["x"]), torch.cat(kept), torch.cat(list(weights))
    if mirrored:
        natural = mirror(natural)
        x, weights = x.flip(0, 1), weights.flip(0)
        ids = torch.where(ids < 0, ids, case.experts - 1 - ids).flip(0)
    order, transposed, _ = LAYOUTS[case.layout]
    y = reference.experts(
        x,
        ids,
        weights,
        **pack(natural, case.layout),
        activation=case.activation_spec,
        interleaved=order == "interleaved",
        transposed=transposed,
        weight_on_input=case.weight_on_input,
    )
    return list((y.flip(0, 1) if mirrored else y).split(tokens))


def mirror(operands):
    """The expert weights with experts, hidden and intermediate reversed."""
    return replace(
        operands,
        **{
            name: getattr(operands, name).flip(tuple(range(getattr(operands, name).dim())))
            for name in EXPERT_WEIGHTS
            if getattr(operands, name) is not None
        },
    )


def gradients_of(ends, arriving, leaves):
    """Name -> list of gradients; zeros where nothing reaches a leaf."""
    live = [idx for idx, end in enumerate(ends) if end.requires_grad]
    flat = [part for parts in leaves.values() for part in parts]
    found = [None] * len(flat)
    if live:
        found = torch.autograd.grad(
            [ends[idx] for idx in live],
            flat,
            [arriving[idx].to(ends[idx].dtype) for idx in live],
            allow_unused=True,
        )
    filled = iter(
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(flat, found, strict=True)
    )
    return {name: [next(filled) for _ in parts] for name, parts in leaves.items()}
