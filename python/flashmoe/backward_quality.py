"""How exact gradients of a layer are, at sizes whose fp64 layer would not fit on a GPU.

The oracle is the reference in fp64, one expert at a time: an expert's gradients depend on its own
rows alone, and what flows into tokens and routing weights is added up over the experts. The
yardstick is the reference in the layer's dtype, all experts of a rank at once, by autograd.

Of several ranks each has the gradients of its own experts, from the tokens of all, and parts of all
tokens' gradients, which are added up: `ranks` is the way to the others' tokens, `OneRank` where
there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import reference
from .compare import Tally
from .inputs import LAYOUTS
from .passes import gradients_of, wide_dtype

ROUTER = ("w_router", "router_bias")


class OneRank:
    """All tokens are this rank's."""

    rank, world = 0, 1

    def joined(self, own):
        """The tensors of all ranks, one behind the other."""
        return own

    def own_of_sum(self, parts):
        """This rank's tokens of the sum over ranks of `parts`, which have the tokens of all."""
        return parts


@dataclass(frozen=True)
class Batch:
    """What experts get of the tokens of all ranks. ids [T, k]: 0 is the first expert of this rank,
    -1 those of other ranks and slots that are dropped."""

    x: torch.Tensor
    topk_weights: torch.Tensor
    grad_y: torch.Tensor
    ids: torch.Tensor


def batch_of(case, call, x, topk_weights, topk_ids, ranks):
    """The `Batch` of all ranks: x and weights are leaves of their own, in the dtypes given."""
    kept = reference.kept_slots(topk_ids, case.experts, case.capacity_factor)
    ids = ranks.joined(torch.where(kept, topk_ids.long(), -1))
    local = case.experts // ranks.world
    first = ranks.rank * local
    return Batch(
        ranks.joined(x.detach()).requires_grad_(),
        ranks.joined(topk_weights.detach()).requires_grad_(),
        ranks.joined(call.grad_y),
        torch.where((ids >= first) & (ids < first + local), ids - first, -1),
    )


@torch.enable_grad()
def plain_gradients(case, call, topk_ids, ranks=None):
    """Name -> gradient of plain PyTorch in the layer's dtype, for given ids [T, k] of this rank;
    sums over ranks in fp32 or wider. call: its leaves require gradients."""
    ranks = ranks or OneRank()
    routed = {name: leaf for name, leaf in call.leaves().items() if name in ("x", *ROUTER)}
    routed["topk_weights"] = route(case, routed, topk_ids)
    batch = batch_of(case, call, call.x, routed["topk_weights"], topk_ids, ranks)
    y = reference.experts(
        batch.x, batch.ids, batch.topk_weights, **call.weights, **expert_options(case)
    )
    leaves = {"x": batch.x, "topk_weights": batch.topk_weights} | call.weights
    made = torch.autograd.grad(y, list(leaves.values()), batch.grad_y)
    gradients = dict(zip(leaves, made, strict=True))
    grad_weights = ranks.own_of_sum(gradients.pop("topk_weights"))
    grad_x = ranks.own_of_sum(gradients["x"].to(wide_dtype(call.x.dtype))).to(call.x.dtype)
    of_router = router_gradients(routed, grad_weights)
    return gradients | of_router | {"x": grad_x + of_router["x"]}


def expert_options(case):
    """Keyword arguments of `reference.experts` for a case."""
    order, transposed, _ = LAYOUTS[case.layout]
    return {
        "activation": case.activation_spec,
        "interleaved": order == "interleaved",
        "transposed": transposed,
        "weight_on_input": case.weight_on_input,
    }


def tallies(case, call, topk_ids, made, plain, ranks=None):
    """Variant -> name -> `Tally` of this rank's gradients against fp64.

    made: variant -> name -> gradient. plain: name -> gradient, the yardstick. topk_ids [T, k]: the
    layer's own choice.
    """
    ranks = ranks or OneRank()
    local = case.experts // ranks.world
    found: dict[str, dict[str, Tally]] = {variant: {} for variant in made}

    def add(name, oracle, samples, expert_idx=None):
        part, first = slice(None), 0
        if expert_idx is not None:
            part, first = slice(expert_idx, expert_idx + 1), ranks.rank * local + expert_idx
        for variant, gradients in made.items():
            tally = found[variant].setdefault(name, Tally(f"grad_{name}"))
            tally.add(None, gradients[name][part], oracle, plain[name][part], samples, first)

    routed = route_in_fp64(case, call, topk_ids)
    batch = batch_of(case, call, routed["x"], routed["topk_weights"], topk_ids, ranks)
    grad_x = torch.zeros_like(batch.x)
    grad_weights = torch.zeros_like(batch.topk_weights)
    for expert_idx in range(local):
        own_ids = torch.where(batch.ids == expert_idx, 0, -1)
        of_expert = expert_gradients(case, call, batch, own_ids, expert_idx)
        grad_x += of_expert.pop("x")
        grad_weights += of_expert.pop("topk_weights")
        samples = int((own_ids == 0).sum()) * min(case.hidden, case.intermediate)
        for name, gradient in of_expert.items():
            add(name, gradient, samples, expert_idx)
    slots = int(reference.kept_slots(topk_ids, case.experts, case.capacity_factor).sum())
    of_router = router_gradients(routed, ranks.own_of_sum(grad_weights))
    add("x", ranks.own_of_sum(grad_x) + of_router.pop("x"), slots)
    for name, gradient in of_router.items():
        add(name, gradient, slots)
    return found


def ratios_of(tallies):
    """Error ratio of every gradient, by its name in records. tallies: name -> `Tally`."""
    return {f"grad_{name}": round(one.ratio, 4) for name, one in tallies.items()}


def failures_of(tallies):
    """Why a gradient is wrong (not finite, above its bar, not 0 where it must be), of all that
    are."""
    return {f"grad_{name}": one.reason for name, one in tallies.items() if not one.passed}


def route(case, leaves, topk_ids):
    """The weights [T, k] of given ids, differentiable in x and the router. leaves: by name."""
    logits = reference.router_logits(leaves["x"], leaves["w_router"], leaves.get("router_bias"))
    return reference.topk_weights(logits, topk_ids, case.routing)


@torch.enable_grad()
def route_in_fp64(case, call, topk_ids):
    """x, w_router, router_bias (leaves) and the weights of given ids, in fp64."""
    leaves = {"x": call.x} | {name: call.routing[name] for name in ROUTER if name in call.routing}
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    return wide | {"topk_weights": route(case, wide, topk_ids)}


@torch.enable_grad()
def expert_gradients(case, call, batch, own_ids, expert_idx):
    """Name -> fp64 gradient that one expert of this rank gives to x, the weights of slots and its
    own operands ([1, ...]). own_ids [T, k]: 0 where a slot is the expert's, else -1."""
    own = slice(expert_idx, expert_idx + 1)
    weights = {
        name: weight[own].detach().double().requires_grad_()
        for name, weight in call.weights.items()
    }
    y = reference.experts(batch.x, own_ids, batch.topk_weights, **weights, **expert_options(case))
    leaves = {"x": batch.x, "topk_weights": batch.topk_weights} | weights
    parts = {name: [leaf] for name, leaf in leaves.items()}
    return {name: one for name, [one] in gradients_of([y], [batch.grad_y], parts).items()}


def router_gradients(routed, grad_weights):
    """Name -> gradient that flows through the weights of slots into x and the router."""
    leaves = {name: [routed[name]] for name in ("x", *ROUTER) if name in routed}
    made = gradients_of([routed["topk_weights"]], [grad_weights], leaves)
    return {name: gradient for name, [gradient] in made.items()}
