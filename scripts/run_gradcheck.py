"""Checks every element of every gradient of the layer, in fp64.

    python scripts/run_gradcheck.py [--ranks N ...] [--quick] [--json]
    torchrun --nproc_per_node N scripts/run_gradcheck.py [--quick] [--json]
    mpirun -np N python -u scripts/run_gradcheck.py [--quick] [--json]

Without a launcher the ranks are threads, 1, 2 and 3 of them unless --ranks says otherwise; under
torchrun, mpirun or srun they are its processes. Each layer is checked in three ways:

reference    each element against an independent fp64 PyTorch layer (flashmoe.reference), which sums
             in another order; accepted up to 2^-26 of the tensor's largest element: half of the
             digits, far above rounding and far below any term that is wrong or missing
differences  each element against the central difference of the loss, summed over all ranks, with
             the step and the tolerances that torch.autograd.gradcheck has by default
gradcheck    torch.autograd.gradcheck: the whole Jacobian of all outputs (one rank only)

The table has one line a tensor and group of layers, with the largest errors of the group: absolute,
and relative to the largest element of their tensor. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import flashmoe
import torch
from flashmoe import launch, passes, reference
from flashmoe.cases import Case
from flashmoe.inputs import LAYOUTS, Operands, make_operands

REFERENCE_BAR = 2.0**-26
# The defaults of torch.autograd.gradcheck.
STEP, ABSOLUTE, RELATIVE = 1e-6, 1e-5, 1e-3

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


@dataclass
class Row:
    """One line of the table: a tensor over the layers of a group."""

    case: str
    ranks: int
    tensor: str
    layers: int = 0
    elements: int = 0
    reference_abs: float = 0.0
    reference_rel: float = 0.0
    difference_abs: float = 0.0
    difference_rel: float = 0.0
    gradcheck: bool | None = None
    failure: str = ""

    def add(self, ours: torch.Tensor, exact: torch.Tensor, differences: torch.Tensor) -> None:
        """Takes in one tensor, its reference and its central differences, element by element."""
        self.layers += 1
        self.elements += ours.numel()
        if ours.numel() == 0:
            return
        error, relative = distance(ours, exact)
        self.reference_abs = max(self.reference_abs, error)
        self.reference_rel = max(self.reference_rel, relative)
        if not relative <= REFERENCE_BAR:
            self.failure = self.failure or f"{worst(ours, exact)} in the reference"
        error, relative = distance(ours, differences)
        self.difference_abs = max(self.difference_abs, error)
        self.difference_rel = max(self.difference_rel, relative)
        if not torch.allclose(ours, differences, rtol=RELATIVE, atol=ABSOLUTE):
            self.failure = self.failure or f"{worst(ours, differences)} by differences"


def distance(ours: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Largest error, and the same over the largest element; infinite where NaN is."""
    error = (ours - other).abs().nan_to_num(nan=math.inf).max().item()
    largest = other.abs().max().item()
    return error, (0.0 if error == 0 else error / largest if largest else math.inf)


def worst(ours: torch.Tensor, other: torch.Tensor) -> str:
    """The element that is furthest off, with both values."""
    flat_idx = int((ours - other).abs().nan_to_num(nan=math.inf).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat_idx), ours.shape)]
    return f"element {index} is {ours.flatten()[flat_idx]:.9g}, {other.flatten()[flat_idx]:.9g}"


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


def loss(call: passes.RankCall) -> float:
    """This rank's part of the loss whose gradients arrive."""
    y, routed = passes.call_layer(call)
    value = (y * call.grad_y).sum()
    if call.grad_weights is not None:
        value = value + (routed.topk_weights * call.grad_weights).sum()
        value = value + (routed.logits * call.grad_logits).sum()
    return value.item()


SHARED = ("w_router", "router_bias")


def differences(calls: list[passes.RankCall], rank: int) -> list[tuple[int, str, torch.Tensor]]:
    """This rank's part of the central differences: (owner, name, tensor) of every rank's leaves.

    All ranks move the same element of the same owner at a time; the router belongs to rank 0 and
    is moved on every rank.
    """
    found = []
    for owner, call in enumerate(calls):
        for name, leaf in call.leaves().items():
            if name in SHARED and owner > 0:
                continue
            moved = calls[rank].leaves()[name].detach()
            moves = owner == rank or name in SHARED
            slopes = torch.empty(leaf.shape, dtype=torch.float64)
            for index in product(*map(range, leaf.shape)):
                slopes[index] = slope(calls[rank], moved[index] if moves else None)
            found.append((owner, name, slopes))
    return found


@torch.no_grad()
def slope(call: passes.RankCall, element: torch.Tensor | None) -> float:
    """Central difference of this rank's loss in a view of one element, or with nothing moved."""
    start = None if element is None else element.item()
    values = []
    for step in (STEP, -STEP):
        if element is not None:
            element.fill_(start + step)
        values.append(loss(call))
    if element is not None:
        element.fill_(start)
    return (values[0] - values[1]) / (2 * STEP)


def jacobian_failure(call: passes.RankCall) -> str:
    """What torch.autograd.gradcheck says of one rank alone; "" if all is well."""
    leaves = call.leaves()

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        by_name = dict(zip(leaves, tensors, strict=True))
        moved = replace(
            call,
            x=by_name["x"],
            routing={name: by_name.get(name, value) for name, value in call.routing.items()},
            weights={name: by_name[name] for name in call.weights},
        )
        y, routed = passes.call_layer(moved)
        return (y,) if routed is None else (y, routed.topk_weights, routed.logits)

    tensors = [leaf.detach().requires_grad_() for leaf in leaves.values()]
    try:
        torch.autograd.gradcheck(function, tensors)
    except RuntimeError as error:  # GradcheckError is one
        return " ".join(str(error).split())[:300]
    return ""


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


def reference_gradients(case: Case, operands: Operands) -> dict[str, list[torch.Tensor]]:
    """Gradients of the independent layer, with its own choice of experts."""
    ids = operands.topk_ids
    if ids is None:
        ids = []
        for x in operands.x:
            logits = reference.router_logits(x, operands.w_router, operands.router_bias)
            scores = reference.selection_scores(logits, case.routing, operands.selection_bias)
            ids.append(reference.choose(scores, case.top_k))
    return merged(
        passes.reference_pass(case, operands, ids, torch.float64, gradients=True, mirrored=True)
    )


def difference_gradients(
    case: Case, parts: list[list[tuple[int, str, torch.Tensor]]]
) -> dict[str, list[torch.Tensor]]:
    """Central differences of the summed loss, from the parts of all ranks, in natural form."""
    by_rank: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    for leaves in zip(*parts, strict=True):
        owner, name, _ = leaves[0]
        by_rank[owner][f"grad_{name}"] = torch.stack([slopes for _, _, slopes in leaves]).sum(0)
    for name in SHARED:
        if f"grad_{name}" in by_rank[0]:
            nothing = torch.zeros_like(by_rank[0][f"grad_{name}"])
            for gradients in by_rank[1:]:
                gradients[f"grad_{name}"] = nothing
    return merged(passes.gather(case, by_rank, []).outputs)


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The tensors of all ranks in one."""
    return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def check_layer(case: Case, ranks: Ranks, seed: int, rows: dict[str, Row]) -> None:
    """Adds one layer to the rows of its group, tensor by tensor."""
    world = ranks.world
    (tokens,) = case.steps(world)
    operands = make_operands(case, tokens, "fp64", seed)

    def on_rank(rank: int, group: Any) -> tuple[dict, list, str | None]:
        own = copy.deepcopy(operands)  # its elements are moved, and threads share memory
        calls = [passes.rank_call(case, own, "fp64", r, world, group) for r in range(world)]
        outputs, _ = passes.run_rank(calls[rank], gradients=True)
        with torch.no_grad():
            found = differences(calls, rank)
        return outputs, found, jacobian_failure(calls[rank]) if world == 1 else None

    outputs, found, failures = zip(*ranks.run(on_rank), strict=True)
    ours = merged(passes.gather(case, list(outputs), []).outputs)
    exact = reference_gradients(case, operands)
    by_differences = difference_gradients(case, list(found))
    if not ours.keys() == exact.keys() == by_differences.keys():
        raise RuntimeError(f"gradients {sorted(ours)}, the reference has {sorted(exact)}")
    for name in ours:
        row = rows.setdefault(name, Row(case.name, world, name))
        row.add(*(joined(parts[name]) for parts in (ours, exact, by_differences)))
        if failures[0] is not None:
            row.gradcheck = row.gradcheck is not False and failures[0] == ""
            row.failure = row.failure or failures[0]


HEADING = (
    f"{'case':24} {'ranks':>5} {'tensor':12} {'layers':>6} {'elements':>8}  "
    f"{'reference abs':>13} {'rel':>8}  {'difference abs':>14} {'rel':>8}  {'gradcheck':9}  verdict"
)


def line(row: Row) -> str:
    """A row of the table."""
    jacobian = {None: "-", True: "ok", False: "FAIL"}[row.gradcheck]
    return (
        f"{row.case:24} {row.ranks:5} {row.tensor:12} {row.layers:6} {row.elements:8}  "
        f"{row.reference_abs:13.1e} {row.reference_rel:8.1e}  "
        f"{row.difference_abs:14.1e} {row.difference_rel:8.1e}  {jacobian:9}  "
        + (f"FAIL: {row.failure}" if row.failure else "ok")
    )


def check(ranks: Ranks, quick: bool, show: Callable[[Row], None]) -> Iterator[Row]:
    """All layers on these ranks: their rows, shown group by group as they are done."""
    groups: dict[str, list[Case]] = {}
    for make in (routed_layers, expert_layers):
        for case in make(ranks.world, quick):
            groups.setdefault(case.name, []).append(case)
    for name, cases in groups.items():
        rows: dict[str, Row] = {}
        for seed, case in enumerate(cases):
            try:
                check_layer(case, ranks, seed, rows)
            except Exception as error:
                row = rows.setdefault("-", Row(name, ranks.world, "-"))
                row.failure = row.failure or f"{type(error).__name__}: {error} ({case.layout})"
        for row in rows.values():
            show(row)
            yield row


def places(ranks: list[int] | None) -> Iterator[Ranks]:
    """The processes of the launcher, else ranks as threads; each closed after use."""
    launched = launch.detect()
    if launched is not None:
        if ranks not in (None, [launched.world]):
            raise ValueError(f"--ranks: {launched.kind} started {launched.world} processes")
        with launch.torch_process_group() as process_group:
            yield Ranks([], process_group)
        return
    for world in ranks or [1, 2, 3]:
        groups = flashmoe.local_group(world)
        for group in groups:
            group.set("num_threads", 1)  # the layers are tiny
        yield Ranks(groups)
        for group in groups:
            group.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks every gradient of the layer, in fp64.")
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2 3, or the launcher's")
    parser.add_argument("--quick", action="store_true", help="few layers of each kind")
    parser.add_argument("--json", action="store_true", help="one object a row, last a summary")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are tiny
    launched = launch.detect()
    silent = launched is not None and launched.rank > 0

    def show(row: Row) -> None:
        if not silent:
            text = (
                json.dumps(asdict(row) | {"passed": not row.failure}) if options.json else line(row)
            )
            print(text, flush=True)

    if not silent and not options.json:
        print(HEADING)
    start = time.perf_counter()
    rows = [row for ranks in places(options.ranks) for row in check(ranks, options.quick, show)]
    failed = sum(bool(row.failure) for row in rows)
    elements, seconds = sum(row.elements for row in rows), time.perf_counter() - start
    if options.json and not silent:
        summary = {"passed": len(rows) - failed, "failed": failed, "elements": elements}
        print(json.dumps(summary | {"seconds": round(seconds, 1)}))
    elif not silent:
        print(f"{elements} elements checked in {seconds:.0f} s")
        print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
