"""How exact gradients of one rank's layer are, at sizes whose fp64 layer would not fit on a GPU.

The oracle is the reference in fp64, one expert at a time: an expert's gradients depend on its own
rows alone, and what flows into tokens and routing weights is added up over the experts. The
yardstick is the reference in the layer's dtype, whole, by autograd.
"""

from __future__ import annotations

import torch

from . import reference
from .compare import Tally
from .inputs import LAYOUTS
from .passes import gradients_of

ROUTER = ("w_router", "router_bias")


@torch.enable_grad()
def plain_gradients(case, call, topk_ids):
    """Name -> gradient of plain PyTorch in the layer's dtype, for given ids. call: its leaves
    require gradients."""
    leaves = call.leaves()
    y, _ = reference.moe(
        call.x,
        **call.routing,
        **call.weights,
        topk_ids=topk_ids,
        top_k=case.top_k,
        routing=case.routing,
        **expert_options(case),
    )
    return dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), call.grad_y), strict=True)
    )


def expert_options(case):
    """Keyword arguments of `reference.experts` for a case."""
    order, transposed, _ = LAYOUTS[case.layout]
    return {
        "activation": case.activation_spec,
        "interleaved": order == "interleaved",
        "transposed": transposed,
        "weight_on_input": case.weight_on_input,
        "capacity_factor": case.capacity_factor,
    }


def tallies(case, call, topk_ids, made, plain):
    """Variant -> name -> `Tally` of gradients against fp64.

    made: variant -> name -> gradient. plain: name -> gradient, the yardstick. topk_ids [T, k]: the
    layer's own choice.
    """
    found: dict[str, dict[str, Tally]] = {variant: {} for variant in made}

    def add(name, oracle, samples, expert_idx=None):
        part = slice(None) if expert_idx is None else slice(expert_idx, expert_idx + 1)
        for variant, gradients in made.items():
            tally = found[variant].setdefault(name, Tally(f"grad_{name}"))
            tally.add(None, gradients[name][part], oracle, plain[name][part], samples)

    kept = reference.kept_slots(topk_ids, case.experts, case.capacity_factor)
    slots = int(kept.sum())
    routed = route_in_fp64(case, call, topk_ids)
    grad_x = torch.zeros_like(routed["x"])
    grad_weights = torch.zeros_like(routed["topk_weights"])
    for expert_idx in range(case.experts):
        own_ids = torch.where(kept & (topk_ids == expert_idx), 0, -1)
        of_expert = expert_gradients(case, call, routed, own_ids, expert_idx)
        grad_x += of_expert.pop("x")
        grad_weights += of_expert.pop("topk_weights")
        samples = int((own_ids == 0).sum()) * min(case.hidden, case.intermediate)
        for name, gradient in of_expert.items():
            add(name, gradient, samples, expert_idx)
    of_router = router_gradients(routed, grad_weights)
    add("x", grad_x + of_router.pop("x"), slots)
    for name, gradient in of_router.items():
        add(name, gradient, slots)
    return found


@torch.enable_grad()
def route_in_fp64(case, call, topk_ids):
    """x, w_router, router_bias (leaves) and the weights of given ids, in fp64."""
    leaves = {"x": call.x} | {name: call.routing[name] for name in ROUTER if name in call.routing}
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    logits = reference.router_logits(wide["x"], wide["w_router"], wide.get("router_bias"))
    return wide | {"topk_weights": reference.topk_weights(logits, topk_ids, case.routing)}


@torch.enable_grad()
def expert_gradients(case, call, routed, own_ids, expert_idx):
    """Name -> fp64 gradient that one expert gives to x, the weights of slots and its own operands
    ([1, ...]). own_ids [T, k]: 0 where a slot is the expert's, else -1."""
    leaves = {name: routed[name].detach().requires_grad_() for name in ("x", "topk_weights")}
    own = slice(expert_idx, expert_idx + 1)
    weights = {
        name: weight[own].detach().double().requires_grad_()
        for name, weight in call.weights.items()
    }
    options = expert_options(case) | {"capacity_factor": None}  # dropped slots are -1 already
    y = reference.experts(leaves["x"], own_ids, leaves["topk_weights"], **weights, **options)
    parts = {name: [leaf] for name, leaf in (leaves | weights).items()}
    return {name: gradient for name, [gradient] in gradients_of([y], [call.grad_y], parts).items()}


def router_gradients(routed, grad_weights):
    """Name -> fp64 gradient that flows through the weights of slots into x and the router."""
    leaves = {name: [routed[name]] for name in ("x", *ROUTER) if name in routed}
    made = gradients_of([routed["topk_weights"]], [grad_weights], leaves)
    return {name: gradient for name, [gradient] in made.items()}
