"""What the GPU tests of the layer share: a small layer on the GPU, and what a machine may lack."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import flashmoe
import torch
from flashmoe import _core, check, compare, reference
from flashmoe.cases import LIMIT, TIGHT_LIMIT, Case
from flashmoe.config import Activation, Routing
from flashmoe.inputs import DTYPES

# one option of each kind in every row: kinds meet that the case table has one by one
MIXED = [
    Case("mixed/0", routing=Routing(score="sigmoid", num_groups=4, top_groups=2, scale=2.5),
         selection_bias=True, experts=16, top_k=4, layout="interleaved", bias=True),
    Case("mixed/1", routing=Routing(score="topk_softmax"), router_bias=True, top_k=4,
         activation=Activation(alpha=1.702, limit=TIGHT_LIMIT, up_offset=1.0), bias=True,
         layout="interleaved_transposed", capacity_factor=0.7),
    Case("mixed/2", routing=Routing(score="sigmoid", renormalize=False), top_k=1,
         weight_on_input=True, layout="transposed", activation="geglu"),
    Case("mixed/3", routing=Routing(score="sqrt_softplus", scale=1.5), selection_bias=True,
         activation=Activation(limit=LIMIT), layout="separate", capacity_factor=1.0),
    Case("mixed/4", ids="sentinels", top_k=3, activation="relu2", bias=True, layout="transposed",
         capacity_factor=0.6),
    Case("mixed/5", ids="duplicates", top_k=3, activation="geglu_tanh", layout="strided",
         weight_on_input=True, bias=True),
    Case("mixed/6", wide_router=True, router_bias=True, activation="reglu",
         layout="separate_transposed", bias=True),
    Case("mixed/7", routing=Routing(num_groups=2, top_groups=1, group_top=1), selection_bias=True,
         activation="gelu", layout="transposed_view", bias=True, weight_on_input=True),
]  # fmt: skip


@cache
def what_is_missing() -> str | None:
    """Why the layer cannot run here on CUDA tensors, in one line; None if it can."""
    if not torch.cuda.is_available():
        return "a CUDA GPU that torch can use"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"a Hopper GPU (sm_90): this is {torch.cuda.get_device_name()}"
    if "built without CUDA" in _core.build_info():
        return "a build of flashmoe with CUDA (FLASHMOE_CUDA=ON)"
    return None


@dataclass
class Layer:
    """Operands and options of one layer with a fused router on the GPU."""

    x: torch.Tensor
    w_router: torch.Tensor
    w_up: torch.Tensor
    w_down: torch.Tensor
    top_k: int
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, group=None, x=None):
        """(y, RoutingResult) of one call."""
        x = self.x if x is None else x
        weights = (self.w_router, self.w_up, self.w_down)
        return flashmoe.moe(x, *weights, top_k=self.top_k, group=group, **self.options)

    def outputs(self, group=None, x=None):
        """All outputs of one call, copied."""
        y, routed = self(group, x)
        return [tensor.clone() for tensor in (y, *routed)]

    def with_x(self, *shape, seed):
        """The same layer on other tokens."""
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(*shape, self.x.shape[-1], device="cuda", generator=generator)
        return replace(self, x=x.to(self.x.dtype))


def make_layer(
    tokens=300,
    hidden=256,
    intermediate=192,
    experts=16,
    top_k=4,
    dtype=torch.bfloat16,
    seed=0,
    **options,
):
    """A layer with a gated SiLU, drawn from a seed."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, scale=1.0):
        values = torch.randn(*shape, device="cuda", generator=generator) * scale
        return values.to(dtype)

    return Layer(
        x=normal(tokens, hidden),
        w_router=normal(experts, hidden, scale=1.5 * hidden**-0.5),
        w_up=normal(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        w_down=normal(experts, hidden, intermediate, scale=intermediate**-0.5),
        top_k=top_k,
        options=options,
    )


def same_bits(one, other):
    """Whether two lists of tensors agree in every bit (NaN too)."""
    return all(check.same_bits(*pair) for pair in zip(one, other, strict=True))


def may_differ(case, operands, dtype):
    """[T] bool: tokens where two of the best k + 1 scores, or the last group chosen and the next
    one, are closer than fp32 rounding of the logits allows to tell apart. operands: on the host."""
    x, routing, bias = operands.x[0], case.routing, operands.selection_bias
    logits = reference.router_logits(x, operands.w_router, operands.router_bias)
    margin = compare.selection_margin(case, operands, x, logits, DTYPES[dtype])
    best, place = reference.selection_scores(logits, routing, bias).sort(dim=-1, descending=True)
    slack = margin.gather(-1, place)
    close = best[:, :-1] - best[:, 1:] <= slack[:, :-1] + slack[:, 1:]
    tied = close[:, : case.top_k].any(-1)
    if routing.num_groups > 1:
        scores = reference.scores(logits, routing.score)
        scores = scores if bias is None else scores + bias
        of_groups = reference.group_scores(scores, routing).sort(-1, descending=True).values
        if routing.top_groups < routing.num_groups:
            gap = of_groups[:, routing.top_groups - 1] - of_groups[:, routing.top_groups]
            tied |= gap <= 2 * routing.group_top * margin.amax(-1)
    return tied


def finish(group):
    """Waits for the GPU and raises what a launch of the group reported."""
    torch.cuda.synchronize()
    group.stats()
