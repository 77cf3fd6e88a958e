"""scripts/run_gpu.py without a GPU: its steps, and that a step over its limit leaves nothing."""

import importlib.util
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = ["values", "behaviour", "products", "backward", "training", "programs", "ranks",
         "ranks_backward", "ranks_more", "sanitize", "bench", "backward_bench",
         "ranks_bench", "ranks_backward_bench"]  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_gpu", ROOT / "scripts" / "run_gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def arguments(**changes):
    usual = {"quick": False, "out": Path("out"), "cases": None, "seconds": None, "ranks": 2}
    return Namespace(**usual | {"steps": STEPS} | changes)


@pytest.mark.parametrize("quick", [False, True])
def test_every_gpu_test_belongs_to_a_step(quick, script):
    steps = script.planned(arguments(quick=quick))
    named = {word for step in steps for word in step.command if word.startswith("tests/")}
    there = {f"tests/cuda/{path.name}" for path in (ROOT / "tests" / "cuda").glob("test_*.py")}
    assert named == there
    assert all(0 < step.limit_s <= 300 for step in steps)
    assert all(step.limit_s <= 120 for step in steps if step.name.startswith("backward"))


def test_an_unknown_step_is_named(script):
    with pytest.raises(SystemExit, match="nothing: known are values"):
        script.planned(arguments(steps=["nothing"]))


def test_a_step_over_its_limit_leaves_no_process(script, tmp_path):
    child = "import time; print('begun', flush=True); time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    step = script.Step("slow", [sys.executable, "-c", parent], 3)
    passed, last, seconds = script.run(step, tmp_path, dict(os.environ))
    assert not passed and last == "over its time limit" and seconds < 10
    log = (tmp_path / "slow.log").read_text()
    assert "begun" in log
    pid = int(log.split("child ")[1].split()[0])
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child of the step lives on")


def test_a_step_over_its_limit_tells_what_failed_and_what_hangs(script, tmp_path):
    (tmp_path / "pytest.ini").touch()
    conftest = (ROOT / "tests" / "cuda" / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest.replace("autouse=True", "autouse=False"))
    (tmp_path / "test_two.py").write_text(
        "import time\n\n"
        "def test_wrong():\n    assert 2 + 2 == 5, 'the sum'\n\n"
        "def test_slow():\n    time.sleep(60)\n"
    )
    command = [*script.PYTEST, "-o", "faulthandler_timeout=1", str(tmp_path)]
    step = script.Step("two", command, 6)
    passed, last, seconds = script.run(step, tmp_path, script.environment(None))
    assert not passed and last == "over its time limit" and seconds < 6 + script.GRACE_S
    log = (tmp_path / "two.log").read_text()
    told, ended = log.split("= FAILURES =")
    assert "failed test_two.py::test_wrong: " in told and "AssertionError: the sum" in told
    assert "test_two.py::test_slow" in told and "in test_slow" in told, "the stack of what hangs"
    assert "1 failed" in ended


def test_every_test_ends_before_its_step(script):
    for step in script.planned(arguments()):
        if step.command[:3] == list(script.PYTEST[:3]):
            limit = max(i for i, word in enumerate(step.command) if word == "--timeout") + 1
            assert float(step.command[limit]) < step.limit_s, step.name


def test_the_benchmark_of_ranks_starts_each_number_of_them_once(script):
    plan = script.ranks_plan(arguments(ranks=8))
    assert [world for world, _ in plan] == [8, 4, 2]
    names = [[case.name for case in cases] for _, cases in plan]
    assert len(set(names[0])) == len(names[0]) == 5 + 8 and names[1:] == [["seed"], ["seed"]]
    quick = script.ranks_plan(arguments(ranks=8, quick=True, cases="mixtral"))
    assert [(world, [case.name for case in cases]) for world, cases in quick] == [(8, ["mixtral"])]


def test_the_benchmark_of_ranks_draws_what_it_measured(script, monkeypatch, tmp_path, capsys):
    from flashmoe import bench_ranks, plots

    drawn = []
    record = {"case": "seed", "gpu": "NVIDIA H200", "part": "ranks", "floor": None}
    monkeypatch.setattr(bench_ranks, "check_gpus", lambda ranks: None)
    monkeypatch.setattr(bench_ranks, "run_bench", lambda plan, seconds: iter([record] * 2))
    for shown in ("row", "table", "timeline"):
        monkeypatch.setattr(bench_ranks, shown, lambda one, name=shown: name)
    for name in ("plot_ranks", "plot_timeline", "plot_scaling"):
        monkeypatch.setattr(plots, name, lambda one, path: drawn.append(path.name))
    script.ranks_bench(arguments(out=tmp_path, seconds=0.5))
    assert drawn == ["ranks.png", "ranks_timeline.png", "ranks_scaling.png"]
    assert len((tmp_path / "h200-ranks.jsonl").read_text().splitlines()) == 2
    assert "table" in capsys.readouterr().out
    script.ranks_bench(arguments(out=tmp_path, seconds=0.5, quick=True))
    assert len(drawn) == 5


@pytest.mark.parametrize("quick", [False, True])
def test_the_benchmark_of_the_backward_of_ranks_draws_what_it_measured(
    quick, script, monkeypatch, tmp_path, capsys
):
    from flashmoe import bench_ranks, bench_ranks_backward, plots

    asked = []

    def run_bench(plan, seconds):
        asked.append(([(world, [case.name for case in cases]) for world, cases in plan], seconds))
        record = {"case": "seed", "gpu": "NVIDIA H200", "part": "ranks-backward"}
        return iter([record] * len(plan))

    monkeypatch.setattr(bench_ranks, "check_gpus", lambda ranks: None)
    monkeypatch.setattr(bench_ranks_backward, "run_bench", run_bench)
    for shown in ("row", "table", "timeline"):
        monkeypatch.setattr(bench_ranks_backward, shown, lambda one, name=shown: name)
    for name in ("plot_ranks", "plot_timeline"):
        monkeypatch.setattr(plots, name, lambda one, path: asked.append(path.name))
    [step] = script.planned(
        arguments(out=tmp_path, quick=quick, ranks=4, seconds=0.5, steps=["ranks_backward_bench"])
    )
    monkeypatch.setattr(sys, "argv", step.command[1:])
    assert script.main() == 0
    cases = ["qwen3-30b", "seed", "mixtral"] + ["deepseek-v3"] * (not quick)
    expected = [([(4, cases)], 0.5), "ranks_backward.png", "ranks_backward_timeline.png"]
    assert asked == expected
    assert len((tmp_path / "h200-ranks-backward.jsonl").read_text().splitlines()) == 1
    assert "timeline" in capsys.readouterr().out
    command = step.command[1:]
    command[command.index("--cases") + 1] = "nothing"
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="no case of 4 ranks matches 'nothing'"):
        script.main()


def test_the_benchmark_of_the_backward_draws_what_it_measured(
    script, monkeypatch, tmp_path, capsys
):
    from flashmoe import bench_backward, plots

    asked = []

    def run_bench(pattern, seconds):
        asked.append((pattern, seconds))
        record = {"case": "seed", "gpu": "NVIDIA H200", "part": "backward"}
        return iter([record] * (pattern != "nothing"))

    monkeypatch.setattr(bench_backward, "run_bench", run_bench)
    for shown in ("row", "table", "timeline"):
        monkeypatch.setattr(bench_backward, shown, lambda one, name=shown: name)
    monkeypatch.setattr(plots, "plot_backward", lambda one, path: asked.append(path.name))
    monkeypatch.chdir(tmp_path)
    command = ["run_gpu.py", "--only-backward-bench", "--out", str(tmp_path), "--seconds", "0.5"]
    monkeypatch.setattr(sys, "argv", command)
    assert script.main() == 0
    assert asked == [("*", 0.5), "backward.png"]
    assert len((tmp_path / "h200-backward.jsonl").read_text().splitlines()) == 1
    assert "timeline" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--cases", "nothing"])
    with pytest.raises(SystemExit, match="no case of the backward matches 'nothing'"):
        script.main()
