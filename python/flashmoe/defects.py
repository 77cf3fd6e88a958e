"""Wrong calls for the support cases: each entry of `DEFECTS` spoils the call of one rank."""

from __future__ import annotations

from dataclasses import replace

import torch

from .inputs import make_operands
from .passes import rank_call


def spoil(case, call, rank, ranks, group):
    """The call as `case.defect` has it. `rank_*` defects are on the last rank only."""
    if not case.defect or (case.defect.startswith("rank_") and rank != ranks - 1):
        return call
    return DEFECTS[case.defect](case, call, rank, ranks, group)


def narrower(tensor, dim):
    """The tensor without the last index of a dimension."""
    return tensor.narrow(dim, 0, tensor.shape[dim] - 1).contiguous()


def with_x(change):
    """A defect of x."""
    return lambda case, call, *_: replace(call, x=change(call.x))


def with_weight(name, change):
    """A defect of an expert weight or bias."""
    return lambda case, call, *_: replace(
        call, weights=call.weights | {name: change(call.weights[name])}
    )


def with_routing(name, change):
    """A defect of an operand of the routing."""
    return lambda case, call, *_: replace(
        call, routing=call.routing | {name: change(call.routing[name])}
    )


def filled_at(value, *index):
    """A change that puts `value` at one index."""

    def change(tensor):
        spoiled = tensor.clone()
        spoiled[index] = value
        return spoiled

    return change


def other_case(**changes):
    """The call of a case that differs in `changes` (dtype: the name of its dtype)."""

    def defect(case, call, rank, ranks, group):
        options = dict(changes)
        dtype = options.pop("dtype", case.dtypes[0])
        other = replace(case, defect="", **options)
        operands = make_operands(other, other.steps(ranks)[0], dtype)
        return rank_call(other, operands, dtype, rank, ranks, group)

    return defect


DEFECTS = {
    "x_hidden": with_x(lambda x: narrower(x, 1)),
    "x_dtype": with_x(lambda x: x.to(torch.int32)),
    "x_rank": with_x(lambda x: x[0, 0]),
    "w_up_shape": with_weight("w_up", lambda w: narrower(w, 1)),
    "w_up_dtype": with_weight("w_up", lambda w: w.to(torch.float64)),
    "w_down_shape": with_weight("w_down", lambda w: narrower(w, 1)),
    "b_up_shape": with_weight("b_up", lambda b: narrower(b, 1)),
    "ids_dtype": with_routing("topk_ids", lambda ids: ids.float()),
    "ids_shape": with_routing("topk_ids", lambda ids: narrower(ids, 0)),
    "id_low": with_routing("topk_ids", filled_at(-2, 3, 1)),
    "nan_router": with_routing("w_router", filled_at(float("nan"), 5, 7)),
    "inf_router": with_routing("w_router", filled_at(float("inf"), 5, 7)),
    "rank_nan_router": with_routing("w_router", filled_at(float("nan"), 5, 7)),
    "rank_hidden": other_case(hidden=128),
    "rank_dtype": other_case(dtype="fp64"),
    "rank_w_up_shape": with_weight("w_up", lambda w: narrower(w, 1)),
}
