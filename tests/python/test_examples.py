"""The examples run, and what they say holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run(script, *options, cwd):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=cwd,
        env={**os.environ, "MPLCONFIGDIR": str(cwd)},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def train(tmp_path, *options, ranks=(1, 2, 4)):
    """What train_bytes.py says with --json; its picture is checked to be one."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "picture.png"
    said = json.loads(run("train_bytes.py", *options, "--json", "--out", picture, cwd=tmp_path))
    assert picture.read_bytes().startswith(PNG) and picture.stat().st_size > 20_000
    plain, *ours = said["runs"]
    assert plain["ranks"] == 0 and [one["ranks"] for one in ours] == list(ranks)
    return said


def test_quickstart(tmp_path):
    lines = run("quickstart.py", cwd=tmp_path).splitlines()
    assert lines[0].startswith("tokens per expert [")
    assert float(lines[-1].split()[-1]) < 2.0**-12  # half the digits of fp32


def test_losses_lie_on_each_other(tmp_path):
    """In fp64: a wrong gradient anywhere would part the curves by far more than half the digits."""
    said = train(tmp_path, "--small", "--steps", 30, "--dtype", "float64")
    assert said["largest_difference"] < 2.0**-26
    for one in said["runs"]:
        assert one["tokens_per_expert"] == said["runs"][0]["tokens_per_expert"]
        assert sum(one["tokens_per_expert"]) == 2 * said["tokens_per_step"]
    assert said["below_entropy"]
    assert said["runs"][0]["first_loss"] > said["unigram_entropy"] > 2


@pytest.mark.slow
def test_single_precision_starts_at_rounding_scale(tmp_path):
    """Half the digits of fp32, over steps too few for an expert's choice to turn."""
    said = train(tmp_path, "--small", "--steps", 8)
    assert said["largest_difference"] < 2.0**-12
    for one in said["runs"]:
        assert len(one["losses"]) == 8
        assert one["losses"][-1] < one["losses"][0] - 0.5


def test_bf16_experts_follow_the_plain_model(tmp_path):
    """Steps over which the losses fall by half differ by a few roundings of bf16."""
    options = ("--small", "--steps", 30, "--dtype", "bfloat16", "--ranks", 1, 2)
    said = train(tmp_path, *options, ranks=(1, 2))
    assert said["below_entropy"]
    for one in said["runs"][1:]:
        assert 0 < one["difference"]["10"] < 2.0**-9 * one["first_loss"]
        assert abs(one["final_loss"] / said["runs"][0]["final_loss"] - 1) < 2.0**-8


@pytest.mark.slow
def test_long_form_is_well_below_the_entropy(tmp_path):
    """A larger model and batch, half as long as by default: under 85 % of the unigram entropy."""
    said = train(tmp_path, "--steps", 100)
    for one in said["runs"]:
        assert one["final_loss"] < 0.85 * said["unigram_entropy"]
        assert one["difference"]["10"] < 2.0**-12


@pytest.mark.slow
def test_selection_bias_balances_the_experts(tmp_path):
    """At least twice as well as no balancing, and at no price in the loss of the first steps."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "picture.png"
    options = ("--small", "--steps", 40, "--json", "--out", picture)
    said = json.loads(run("train_balance.py", *options, cwd=tmp_path))
    assert picture.read_bytes().startswith(PNG) and picture.stat().st_size > 20_000
    plain, balanced = said["runs"]
    assert balanced["final_violation"] < plain["final_violation"] / 2
    assert balanced["final_loss"] < 1.02 * plain["final_loss"] < 6
    for one in (plain, balanced):
        assert sum(one["slots_per_expert"]) == 2 * 8 * 48  # top_k, sequences, bytes of each


@pytest.mark.slow
def test_wrong_ranks_are_named(tmp_path):
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_bytes.py"), "--ranks", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "--ranks 3" in result.stderr
