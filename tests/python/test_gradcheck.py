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

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "run_gradcheck.py"
sys.path.insert(0, str(SCRIPT.parent))
import run_gradcheck  # noqa: E402


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
    named = {f"experts/{name}" for name in run_gradcheck.ACTIVATIONS}
    named |= {f"router/{name}" for name in run_gradcheck.ROUTINGS}
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
    case = run_gradcheck.layer("experts/one", 2, ids="uniform", bias=True)
    rows = {}
    groups = flashmoe.local_group(2)
    run_gradcheck.check_layer(case, run_gradcheck.Ranks(groups), 0, rows)
    for group in groups:
        group.close()
    assert {name for name, row in rows.items() if row.failure} == {tensor}


def test_capacity_drops_slots():
    """The layers with a capacity are there for the slots that they drop."""
    dropping = 0
    for case in run_gradcheck.routed_layers(1, quick=True):
        if case.capacity_factor:
            operands = run_gradcheck.make_operands(case, case.steps(1)[0], "fp64", 0)
            (group,) = flashmoe.local_group(1)
            with group:
                call = passes.rank_call(case, operands, "fp64", 0, 1, group)
                dropping += int(passes.call_layer(call)[1].dropped) > 0
    assert dropping > 0
