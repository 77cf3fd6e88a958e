"""Checks every element of every gradient of the layer.

    python scripts/run_gradcheck.py [--device cuda] [--ranks N ...] [--quick] [--json]
    torchrun --nproc_per_node N scripts/run_gradcheck.py [--quick] [--json]
    mpirun -np N python -u scripts/run_gradcheck.py [--quick] [--json]

Without a launcher the ranks are threads, 1, 2 and 3 of them unless --ranks says otherwise; under
torchrun, mpirun or srun they are its processes. On CUDA a rank has a GPU of its own: 1 and 2 of
them, as far as there are GPUs. There, and on the CPU with --dtype bf16 fp16, each element is held
against fp64 within a bound that follows from the dtype (gradcheck_rounded.py). In fp64, which only
the CPU takes, each layer is checked in three ways:

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
import gradcheck_rounded
import torch
from flashmoe import launch, passes, reference
from flashmoe.cases import Case
from flashmoe.inputs import Operands, make_operands
from gradcheck_layers import SHARED, Ranks, joined, layers_of, merged, worst

REFERENCE_BAR = 2.0**-26
# The defaults of torch.autograd.gradcheck.
STEP, ABSOLUTE, RELATIVE = 1e-6, 1e-5, 1e-3


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


def loss(call: passes.RankCall) -> float:
    """This rank's part of the loss whose gradients arrive."""
    y, routed = passes.call_layer(call)
    value = (y * call.grad_y).sum()
    if call.grad_weights is not None:
        value = value + (routed.topk_weights * call.grad_weights).sum()
        value = value + (routed.logits * call.grad_logits).sum()
    return value.item()


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
    for name, cases in layers_of(ranks.world, quick).items():
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


def places(ranks: list[int] | None, device: str) -> Iterator[Ranks]:
    """The processes of the launcher, else ranks as threads; each closed after use."""
    launched = launch.detect()
    if launched is not None:
        if ranks not in (None, [launched.world]):
            raise ValueError(f"--ranks: {launched.kind} started {launched.world} processes")
        with launch.torch_process_group() as process_group:
            yield Ranks([], process_group)
        return
    on_cuda = device == "cuda"
    for world in ranks or ([1, 2][: torch.cuda.device_count()] if on_cuda else [1, 2, 3]):
        groups = flashmoe.local_group(world, device="cuda" if on_cuda else None)
        for group in groups:
            group.set("num_threads", 1)  # the layers are tiny
        yield Ranks(groups)
        for group in groups:
            group.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks every gradient of the layer.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("fp64", *gradcheck_rounded.DTYPES),
        nargs="+",
        help="default: fp64, on CUDA bf16 and fp16",
    )
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="default: 1 2 3, on CUDA 1 2, or the launcher's"
    )
    parser.add_argument("--quick", action="store_true", help="few layers of each kind")
    parser.add_argument("--json", action="store_true", help="one object a row, last a summary")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    dtypes = options.dtype or (gradcheck_rounded.DTYPES if on_cuda else ("fp64",))
    if on_cuda and "fp64" in dtypes:
        parser.error("--dtype fp64: accepted with --device cuda are bf16 and fp16")
    if on_cuda and max(options.ranks or [1]) > torch.cuda.device_count():
        parser.error(f"--ranks: a rank a GPU, of which there are {torch.cuda.device_count()}")
    torch.set_num_threads(1)  # the tensors are tiny
    launched = launch.detect()
    silent = launched is not None and launched.rank > 0

    def say(text: str) -> None:
        if not silent:
            print(text, flush=True)

    def show(row: Row | gradcheck_rounded.Row) -> None:
        if options.json:
            say(json.dumps(asdict(row) | {"passed": not row.failure}))
        else:
            say(line(row) if isinstance(row, Row) else gradcheck_rounded.line(row))

    start = time.perf_counter()
    rows: list[Any] = []
    for ranks in places(options.ranks, options.device):
        for dtype in dtypes:
            in_fp64 = dtype == "fp64"
            if not options.json:
                say(HEADING if in_fp64 else gradcheck_rounded.HEADING)
            if in_fp64:
                rows += check(ranks, options.quick, show)
            else:
                rows += gradcheck_rounded.check(ranks, options, dtype, show)
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
