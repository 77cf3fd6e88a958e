"""scripts/run_gradcheck.py: all gradients are right on threads and under torchrun, and a gradient
that is wrong in one element is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flashmoe
import pytest
from flashmoe import passes
from flashmoe.inputs import make_operands

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "run_gradcheck.py"
sys.path.insert(0, str(SCRIPT.parent))
import gradcheck_rounded  # noqa: E402
import run_gradcheck  # noqa: E402
from gradcheck_layers import ACTIVATIONS, ROUTINGS, layer, routed_layers  # noqa: E402


def run(*command):
    """(summary, rows) of a run of the script; it must exit with 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(
        [sys.executable, *map(str, command), "--json"],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    *rows, summary = [json.loads(line) for line in result.stdout.splitlines()]
    return summary, rows


@pytest.mark.slow
def test_quick_form_on_one_and_three_ranks():
    summary, rows = run(SCRIPT, "--quick", "--ranks", "1", "3")
    assert summary["failed"] == 0 and summary["passed"] == len(rows) > 60
    assert {row["ranks"] for row in rows} == {1, 3}
    tensors = {row["tensor"] for row in rows}
    weights = {"w_up", "w_down", "w_gate", "b_up", "b_down", "b_gate"}
    assert tensors == {"x", "topk_weights", "w_router", "router_bias"} | weights
    cases = {row["case"].split("/")[0] for row in rows}
    assert cases == {"router", "experts"}
    assert summary["elements"] == sum(row["elements"] for row in rows)
    assert all(row["gradcheck"] is (True if row["ranks"] == 1 else None) for row in rows)


@pytest.mark.slow
def test_full_form():
    summary, rows = run(SCRIPT)
    assert summary["failed"] == 0
    assert {row["ranks"] for row in rows} == {1, 2, 3}
    named = {f"experts/{name}" for name in ACTIVATIONS}
    named |= {f"router/{name}" for name in ROUTINGS}
    for world in (1, 2, 3):
        assert {row["case"] for row in rows if row["ranks"] == world} == named


@pytest.mark.slow
def test_torchrun():
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    summary, rows = run(*launcher, SCRIPT, "--quick")
    assert summary["failed"] == 0 and summary["passed"] == len(rows) > 30
    assert {row["ranks"] for row in rows} == {2}


@pytest.mark.parametrize("tensor", ["x", "topk_weights", "w_up", "w_down", "b_up", "b_down"])
def test_one_wrong_element_is_found(monkeypatch, tensor):
    """One element, in one rank's gradient, off by a millionth of the largest."""
    right = passes.run_rank

    def wrong(call, gradients, after_forward=None):
        outputs, routed = right(call, gradients, after_forward)
        grad = outputs[f"grad_{tensor}"]
        if call.options["group"].rank == 1:
            grad.view(-1)[-1] += 1e-6 * grad.abs().max()
        return outputs, routed

    monkeypatch.setattr(passes, "run_rank", wrong)
    case = layer("experts/one", 2, ids="uniform", bias=True)
    rows = {}
    groups = flashmoe.local_group(2)
    run_gradcheck.check_layer(case, run_gradcheck.Ranks(groups), 0, rows)
    for group in groups:
        group.close()
    assert {name for name, row in rows.items() if row.failure} == {tensor}


def test_capacity_drops_slots():
    """The layers with a capacity are there for the slots that they drop."""
    dropping = 0
    for case in routed_layers(1, quick=True):
        if case.capacity_factor:
            operands = make_operands(case, case.steps(1)[0], "fp64", 0)
            (group,) = flashmoe.local_group(1)
            with group:
                call = passes.rank_call(case, operands, "fp64", 0, 1, group)
                dropping += int(passes.call_layer(call)[1].dropped) > 0
    assert dropping > 0


def rounded_rows(world=1, dtype="bf16"):
    """The rows of one 16-bit layer with biases, and its gradients' check by itself."""
    case = layer("experts/one", world, ids="uniform", bias=True)
    rows = {}
    groups = flashmoe.local_group(world)
    case = gradcheck_rounded.sized(case, world)
    gradcheck_rounded.check_layer(case, run_gradcheck.Ranks(groups), dtype, "cpu", 0, rows)
    for group in groups:
        group.close()
    return rows


@pytest.mark.parametrize("dtype", gradcheck_rounded.DTYPES)
def test_rounded_gradients_are_within_their_bounds(dtype):
    rows = rounded_rows(2, dtype)
    assert len(rows) == 8 and not any(row.failure for row in rows.values())
    # far enough for chance, near enough to mean something
    assert 0.05 < max(row.error_of_bound for row in rows.values()) < 0.9


TENSORS = ("x", "topk_weights", "w_up", "w_down", "b_up", "b_down")


@pytest.mark.parametrize("tensor", TENSORS)
def test_one_wrong_element_of_a_rounded_gradient_is_found(monkeypatch, tensor):
    """An ordinary element, off by a fifth of the typical one, as where one of twenty rows
    is missing; NaN is found too."""
    right = passes.run_rank
    for wrong_value in (lambda typical: 0.2 * typical, lambda typical: float("nan")):

        def wrong(call, gradients, after_forward=None, wrong_value=wrong_value):
            outputs, routed = right(call, gradients, after_forward)
            grad = outputs[f"grad_{tensor}"]
            grad.view(-1)[-1] += wrong_value(grad.float().square().mean().sqrt())
            return outputs, routed

        monkeypatch.setattr(passes, "run_rank", wrong)
        rows = rounded_rows()
        assert {name for name, row in rows.items() if row.failure} == {tensor}


@pytest.mark.slow
def test_quick_form_in_16_bits():
    summary, rows = run(SCRIPT, "--quick", "--dtype", "bf16", "fp16", "--ranks", "1", "2")
    assert summary["failed"] == 0 and summary["passed"] == len(rows) > 120
    assert {row["dtype"] for row in rows} == {"bf16", "fp16"}
    assert {row["ranks"] for row in rows} == {1, 2}


def test_fp64_on_cuda_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_gradcheck.py", "--device", "cuda", "--dtype", "fp64"])
    with pytest.raises(SystemExit):
        run_gradcheck.main()
    assert "accepted with --device cuda are bf16 and fp16" in capsys.readouterr().err
