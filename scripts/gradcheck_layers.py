"""The layers of the gradient check, where its ranks are, and gradients in a form to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import flashmoe
import torch
from flashmoe import passes
from flashmoe.cases import Case
from flashmoe.inputs import LAYOUTS

SHARED = ("w_router", "router_bias")
ROUTINGS = {
    "softmax": {"routing": flashmoe.Routing()},
    "softmax_raw": {"routing": flashmoe.Routing(renormalize=False, scale=2.5)},
    "softmax_groups": {
        "routing": flashmoe.Routing(num_groups=2, top_groups=1, group_top=1),
        "selection_bias": True,
    },
    "topk_softmax": {"routing": flashmoe.Routing(score="topk_softmax", scale=0.7)},
    "sigmoid": {"routing": flashmoe.Routing(score="sigmoid"), "selection_bias": True},
    "sigmoid_raw": {"routing": flashmoe.Routing(score="sigmoid", renormalize=False)},
    "sigmoid_groups": {
        "routing": flashmoe.Routing(score="sigmoid", num_groups=2, top_groups=1, scale=2.5),
        "selection_bias": True,
    },
    "sqrt_softplus": {"routing": flashmoe.Routing(score="sqrt_softplus", scale=1.5)},
    "sqrt_softplus_raw": {
        "routing": flashmoe.Routing(score="sqrt_softplus", renormalize=False),
        "selection_bias": True,
    },
}

# The limits are low enough to bite: some values are clamped in every layer.
ACTIVATIONS = {
    **flashmoe.config.ACTIVATIONS,
    "gpt_oss": flashmoe.Activation("silu", alpha=1.702, limit=0.6, up_offset=1.0),
}
GATED_LAYOUTS = tuple(LAYOUTS)
PLAIN_LAYOUTS = ("concatenated", "transposed", "strided", "transposed_view")
IDS = ("uniform", "sentinels", "duplicates")
# Tokens of each rank: different, and none at all on one of three.
TOKENS = {1: (4,), 2: (4, 3), 3: (4, 0, 3)}


def layouts_of(activation: flashmoe.Activation) -> tuple[str, ...]:
    return GATED_LAYOUTS if activation.gated else PLAIN_LAYOUTS


def layer(name: str, world: int, **options: Any) -> Case:
    """A small layer whose sizes all differ."""
    tokens = TOKENS.get(world, tuple(3 + rank % 2 for rank in range(world)))
    sizes = {"hidden": 3, "intermediate": 2, "experts": max(4, 2 * world), "top_k": 2}
    return Case(name, tokens=(tokens,), **sizes, **options)


def choices(number: int, *lists: tuple[Any, ...]) -> list[Any]:
    """The digits of `number` in a mixed base: counting up gives every combination."""
    picked = []
    for options in lists:
        number, digit = divmod(number, len(options))
        picked.append(options[digit])
    return picked


BINARY = (False, True)


def routed_layers(world: int, quick: bool) -> Iterator[Case]:
    """Every router with every activation (on several ranks every fifth pair); the other options
    change from layer to layer. Gradients also arrive at the returned weights and logits."""
    number = 0
    for routing, (label, activation) in product(ROUTINGS, ACTIVATIONS.items()):
        number += 1
        if number % (11 if quick else 1 if world == 1 else 5):
            continue
        bias, capacity, on_input, save_z, router_bias = choices(
            number, BINARY, (None, 0.5), BINARY, BINARY, BINARY
        )
        layouts = layouts_of(activation)
        yield layer(
            f"router/{routing}",
            world,
            **ROUTINGS[routing],
            activation=ACTIVATIONS[label],
            bias=bias,
            router_bias=router_bias,
            capacity_factor=capacity,
            weight_on_input=on_input,
            save_z=save_z and world == 1,
            layout=layouts[number // 3 % len(layouts)],
            aux_gradients=True,
        )


def expert_layers(world: int, quick: bool) -> Iterator[Case]:
    """Activation x layout x bias x capacity x weight on input, on ids from outside: uniform, with
    sentinels, with duplicates in turn. Every third of the combinations, every seventh on several
    ranks: both odd, so that every pair of options occurs."""
    number = 0
    for label, activation in ACTIVATIONS.items():
        options = product(layouts_of(activation), BINARY, (None, 0.5), BINARY)
        for layout, bias, capacity, on_input in options:
            number += 1
            if number % (61 if quick else 3 if world == 1 else 7):
                continue
            ids = IDS[number // 3 % len(IDS)]
            yield layer(
                f"experts/{label}",
                world,
                ids=ids,
                activation=activation,
                bias=bias,
                capacity_factor=capacity,
                weight_on_input=on_input,
                save_z=world == 1 and number // 3 % 4 == 0,
                layout=layout,
            )


def layers_of(world: int, quick: bool) -> dict[str, list[Case]]:
    """All layers on so many ranks, by the group that they are shown in."""
    groups: dict[str, list[Case]] = {}
    for make in (routed_layers, expert_layers):
        for case in make(world, quick):
            groups.setdefault(case.name, []).append(case)
    return groups


@dataclass
class Ranks:
    """Where the ranks are: threads with a group each, or this process in a process group."""

    groups: list[Any]
    process_group: Any = None

    @property
    def world(self) -> int:
        return self.process_group.size() if self.process_group else len(self.groups)

    def run(self, function: Callable[[int, Any], Any]) -> list[Any]:
        """What function(rank, group) returned on every rank. Raises what the first one raised."""
        if self.process_group is None:
            results = passes.on_all_ranks(
                lambda rank: function(rank, self.groups[rank]), self.world
            )
        else:
            results = self._run_process(function)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def _run_process(self, function: Callable[[int, Any], Any]) -> list[Any]:
        results: list[Any] = [None] * self.world
        try:
            mine = function(self.process_group.rank(), self.process_group)
        except Exception as error:  # sent to all ranks, where it is raised
            mine = error
        torch.distributed.all_gather_object(results, mine, group=self.process_group)
        return results


def merged(results: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """Gradients without their prefix; the router's summed over the ranks."""
    gradients = {
        name.removeprefix("grad_"): parts
        for name, parts in results.items()
        if name.startswith("grad_")
    }
    for name in SHARED:
        if name in gradients:
            gradients[name] = [torch.stack(gradients[name]).sum(0)]
    return gradients


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The tensors of all ranks in one."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def worst(ours: torch.Tensor, other: torch.Tensor) -> str:
    """The element that is furthest off, with both values."""
    flat_idx = int((ours - other).abs().nan_to_num(nan=math.inf).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat_idx), ours.shape)]
    return f"element {index} is {ours.flatten()[flat_idx]:.9g}, {other.flatten()[flat_idx]:.9g}"
