"""Every element of every gradient of a 16-bit layer, against fp64 within a bound of its own.

What rounding may do to an element depends on what it is the sum of, so it is measured: the layer is
computed in fp64 SAMPLES times, each time with every operand element moved up or down by eps, twice
the most that one rounding to the dtype moves it. Each number that the engine stores on its way (the
pre-activations, the activations, their gradients, the rows of dX) is rounded once, which the
element feels as it feels an operand's rounding. Accepted is an error of at most the sum of

    twice the most that any of the moves does to the element: a ReLU or a clamp that rounding can
        switch is switched in some of the samples, but the engine may switch others with it
    eps / 2 * |element|, the rounding of the result
    FLOOR * largest element of the tensor, what is left of sums in fp32 that cancel (at most 2^8
        terms, 2^-24 each)

A term that is wrong or missing is a multiple of it.

The experts are those that the engine chose, after a check that rounding allows its choice.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from flashmoe import compare, passes
from flashmoe.cases import Case
from flashmoe.inputs import DTYPES as TORCH_DTYPES
from flashmoe.inputs import Operands, make_operands, on_device
from gradcheck_layers import Ranks, joined, layers_of, merged, worst

DTYPES = ("bf16", "fp16")
SAMPLES = 32
FLOOR = 2.0**-16
# CUDA takes multiples of 64. Few tokens, so that a single row counts in every sum.
SIZES = {"hidden": 64, "intermediate": 128}
TOKENS = (40, 0, 33, 17)

Gradients = dict[str, list[torch.Tensor]]


@dataclass
class Row:
    """One line of the table: a tensor over the layers of a group."""

    case: str
    dtype: str
    ranks: int
    tensor: str
    layers: int = 0
    elements: int = 0
    error_rel: float = 0.0  # largest error over the tensor's largest element
    error_of_bound: float = 0.0  # largest error over what is accepted of its element
    failure: str = ""

    def add(self, ours: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
        """Takes in one tensor, its reference and what is accepted, element by element."""
        self.layers += 1
        self.elements += ours.numel()
        if ours.numel() == 0:
            return
        error = (ours - exact).abs().nan_to_num(nan=math.inf)
        share = torch.where(error == 0, 0.0, error / bound)
        self.error_rel = max(self.error_rel, over(error.max().item(), exact.abs().max().item()))
        self.error_of_bound = max(self.error_of_bound, share.max().item())
        if not self.error_of_bound <= 1:
            far = torch.where(share > 1, ours, exact)
            self.failure = self.failure or f"{worst(far, exact)} in the reference"


def over(error: float, largest: float) -> float:
    """error / largest, with 0 / 0 = 0."""
    return 0.0 if error == 0 else error / largest if largest else math.inf


def sized(case: Case, world: int) -> Case:
    """The layer in sizes that CUDA takes."""
    tokens = tuple(TOKENS[rank % len(TOKENS)] for rank in range(world))
    return replace(case, tokens=(tokens,), **SIZES)


def moved(operands: Operands, by: float, generator: torch.Generator) -> Operands:
    """Every element times 1 + by or 1 - by; ids and the selection bias as they are."""

    def one(name: str, value: Any) -> Any:
        if value is None or name in ("topk_ids", "selection_bias"):
            return value
        if isinstance(value, list):
            return [one(name, part) for part in value]
        signs = torch.randint(2, value.shape, generator=generator) * 2 - 1
        return value * (1 + by * signs)

    return Operands(**{name: one(name, value) for name, value in vars(operands).items()})


def exact_gradients(case: Case, operands: Operands, ids: list[torch.Tensor]) -> Gradients:
    return merged(
        passes.reference_pass(case, operands, ids, torch.float64, gradients=True, mirrored=True)
    )


def bounds(
    case: Case, operands: Operands, ids: list[torch.Tensor], exact: Gradients, dtype: str
) -> dict[str, torch.Tensor]:
    """What is accepted of each element of each gradient."""
    eps = torch.finfo(TORCH_DTYPES[dtype]).eps
    generator = torch.Generator().manual_seed(0)
    whole = {name: joined(parts) for name, parts in exact.items()}
    peaks = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    for _ in range(SAMPLES):
        sample = exact_gradients(case, moved(operands, eps, generator), ids)
        for name, parts in sample.items():
            change = (joined(parts) - whole[name]).abs()
            peaks[name] = peaks[name].maximum(change)
    accepted = {}
    for name, gradient in whole.items():
        size = gradient.abs()
        largest = size.max() if size.numel() else 0.0
        accepted[name] = 2 * peaks[name] + eps / 2 * size + FLOOR * largest
    return accepted


def on_rank(
    case: Case, operands: Operands, dtype: str, device: str, rank: int, world: int, group: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Outputs and routing of one rank, on the host; on CUDA each rank has a GPU."""
    if device == "cuda":
        device = f"cuda:{rank % torch.cuda.device_count()}"
    call = passes.rank_call(case, on_device(operands, device), dtype, rank, world, group)
    return passes.moved(*passes.run_rank(call, gradients=True), torch.device("cpu"))


def check_layer(
    case: Case, ranks: Ranks, dtype: str, device: str, seed: int, rows: dict[str, Row]
) -> None:
    """Adds one layer to the rows of its group, tensor by tensor."""
    world = ranks.world
    (tokens,) = case.steps(world)
    operands = make_operands(case, tokens, dtype, seed)
    results = ranks.run(
        lambda rank, group: on_rank(case, operands, dtype, device, rank, world, group)
    )
    outputs, routed = zip(*results, strict=True)
    ours = merged(passes.gather(case, list(outputs), []).outputs)
    ids = operands.topk_ids
    if case.fused_router:
        ids = [one.topk_ids for one in routed]
        _, problem = compare.id_problem(case, operands, ids, TORCH_DTYPES[dtype])
        if problem:
            raise RuntimeError(problem)
    exact = exact_gradients(case, operands, ids)
    if ours.keys() != exact.keys():
        raise RuntimeError(f"gradients {sorted(ours)}, the reference has {sorted(exact)}")
    accepted = bounds(case, operands, ids, exact, dtype)
    for name, parts in ours.items():
        row = rows.setdefault(name, Row(case.name, dtype, world, name))
        row.add(joined(parts).double(), joined(exact[name]), accepted[name])


HEADING = (
    f"{'case':24} {'dtype':5} {'ranks':>5} {'tensor':12} {'layers':>6} {'elements':>8}  "
    f"{'error rel':>9} {'of bound':>8}  verdict"
)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"{row.case:24} {row.dtype:5} {row.ranks:5} {row.tensor:12} {row.layers:6} "
        f"{row.elements:8}  {row.error_rel:9.1e} {row.error_of_bound:8.2f}  "
        + (f"FAIL: {row.failure}" if row.failure else "ok")
    )


def check(
    ranks: Ranks, options: argparse.Namespace, dtype: str, show: Callable[[Row], None]
) -> Iterator[Row]:
    """All layers on these ranks: their rows, shown group by group as they are done."""
    for name, cases in layers_of(ranks.world, options.quick).items():
        rows: dict[str, Row] = {}
        for seed, case in enumerate(cases):
            try:
                layer = sized(case, ranks.world)
                check_layer(layer, ranks, dtype, options.device, seed, rows)
            except Exception as error:
                row = rows.setdefault("-", Row(name, dtype, ranks.world, "-"))
                row.failure = row.failure or f"{type(error).__name__}: {error} ({case.layout})"
        for row in rows.values():
            show(row)
            yield row
