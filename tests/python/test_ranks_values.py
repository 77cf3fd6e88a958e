"""W ranks give what one rank gives, within the error of plain PyTorch; T may be anything."""

import time
from dataclasses import replace

import pytest
import torch
from flashmoe import compare, passes
from flashmoe.cases import Case
from flashmoe.inputs import DTYPES, make_operands
from ranks_common import SMALL, open_groups


def assert_as_exact_as_plain(case, groups, dtype, steps):
    """All outputs and gradients of all steps are as near to fp64 as plain PyTorch in `dtype`.
    Returns the outputs of the last step."""
    tallies = {}
    for seed, tokens in enumerate(steps):
        operands = make_operands(case, tokens, dtype, seed)
        result = passes.engine_pass(case, operands, dtype, groups, gradients=True)
        ids = operands.topk_ids
        if case.fused_router:
            ids = [routed.topk_ids for routed in result.routed]
            _, problem = compare.id_problem(case, operands, ids, DTYPES[dtype])
            assert problem is None, problem
        oracle = passes.reference_pass(case, operands, ids, torch.float64, True, mirrored=True)
        plain = passes.reference_pass(case, operands, ids, DTYPES[dtype], True)
        compare.tally(tallies, case, ids, result.outputs, oracle, plain)
    for name, tally in tallies.items():
        assert tally.passed, f"{name}: {tally.reason}"
    return result.outputs


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_as_exact_as_plain(num_ranks, dtype):
    with open_groups(num_ranks) as groups:
        assert_as_exact_as_plain(SMALL, groups, dtype, SMALL.steps(num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_tokens_of_all_ranks_on_one_rank(num_ranks):
    """The same tokens, split over W ranks and all on one: as far apart as the error of either."""
    case = replace(SMALL, ids="uniform", router_bias=False, aux_gradients=False)
    tokens = case.steps(num_ranks)[0]
    split = make_operands(case, tokens, "fp64")
    joined = replace(
        split,
        **{
            name: [torch.cat(getattr(split, name))]
            for name in ("x", "grad_y", "topk_ids", "topk_weights")
        },
    )
    with open_groups(num_ranks) as groups, open_groups(1) as alone:
        ours = passes.engine_pass(case, split, "fp64", groups, True).outputs
        one = passes.engine_pass(case, joined, "fp64", alone, True).outputs
    for name, parts in ours.items():
        exact = torch.cat(one[name])
        # half of the digits: far above rounding, far below any row that is wrong
        assert (torch.cat(parts) - exact).abs().max() <= 2.0**-26 * exact.abs().max(), name


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_tokens_shrink_from_4096_to_1(num_ranks):
    """Rows of an earlier, larger step are never read."""
    case = Case("ranks/shrink", hidden=16, intermediate=8, experts=6, top_k=2, ids="sentinels")
    steps = [(4096,) * num_ranks, (1,) * num_ranks, (0,) * num_ranks, (3,) * num_ranks]
    with open_groups(num_ranks) as groups:
        assert_as_exact_as_plain(case, groups, "fp32", steps)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_without_tokens_take_turns(num_ranks):
    steps = [
        tuple(0 if rank == step % num_ranks else 20 + rank for rank in range(num_ranks))
        for step in range(2 * num_ranks)
    ]
    with open_groups(num_ranks) as groups:
        assert_as_exact_as_plain(SMALL, groups, "fp32", [*steps, (0,) * num_ranks, steps[0]])


def test_rank_with_all_tokens():
    with open_groups(4) as groups:
        assert_as_exact_as_plain(SMALL, groups, "fp32", [(0, 0, 129, 0)])


@pytest.mark.parametrize("ids", ["one_expert", "one_rank", "duplicates", "no_expert"])
def test_uneven_routing(ids):
    case = replace(SMALL, ids=ids, router_bias=False, aux_gradients=False)
    with open_groups(3) as groups:
        assert_as_exact_as_plain(case, groups, "fp32", case.steps(3))


def test_growing_sizes_on_one_group():
    """Layers of different hidden size, experts and top_k share a group's memory."""
    shapes = [(16, 4, 2, 30), (64, 8, 3, 30), (8, 16, 8, 200), (64, 4, 1, 7)]
    with open_groups(2) as groups:
        for hidden, experts, top_k, tokens in shapes:
            case = Case("ranks/grow", hidden=hidden, intermediate=24, experts=experts, top_k=top_k)
            assert_as_exact_as_plain(case, groups, "fp32", [(tokens, tokens + 3)])


def test_results_are_moved_once_all_ranks_have_been_called(monkeypatch):
    """On CUDA a move between GPUs orders the launches of two ranks, which wait for each other."""
    happened = []
    run_rank, moved = passes.run_rank, passes.moved

    def late(call, gradients):
        result = run_rank(call, gradients)
        time.sleep(0.2 * (call.options["group"].rank == 0))
        happened.append("called")
        return result

    def noted(*arguments):
        happened.append("moved")
        return moved(*arguments)

    monkeypatch.setattr(passes, "run_rank", late)
    monkeypatch.setattr(passes, "moved", noted)
    with open_groups(2) as groups:
        operands = make_operands(SMALL, SMALL.steps(2)[0], "fp32")
        passes.engine_pass(SMALL, operands, "fp32", groups, gradients=False)
    assert happened == ["called"] * 2 + ["moved"] * 2
