"""The command line: run, check and bench, their JSON, exit codes and one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

import flashmoe  # noqa: E402
from flashmoe import check, cli, models  # noqa: E402

TINY = ["--tokens", "24", "--hidden", "64", "--intermediate", "64", "--experts", "8",
        "--top-k", "2", "--repeat", "1"]  # fmt: skip

# The fields of benchmarks/results/*.jsonl, in their order.
BENCH_FIELDS = [
    "case", "direction", "tokens", "hidden", "intermediate", "experts", "top_k", "dtype", "ranks",
    "device", "gpu", "us", "reference", "reference_us", "ratio", "error_ratio", "bitwise",
    "launches", "peers", "source", "date",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The reference's operators are tiny here: threads would cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command line in this process."""
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments):
    """(exit code, the JSON objects of stdout)."""
    code, out, _ = run(capsys, *arguments, "--json")
    return code, [json.loads(line) for line in out.splitlines()]


# ---- run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_run_reports_what_it_did(capsys, ranks):
    code, [report] = run_json(capsys, "run", *TINY, "--ranks", ranks)
    assert code == 0
    assert report["passed"] is True
    assert report["ranks"] == int(ranks)
    assert report["sizes"]["hidden"] == 64
    assert sum(report["tokens_per_expert"]) == 24 * 2 * int(ranks)
    assert {"y", "grad_x", "grad_w_router", "grad_w_up", "grad_w_down"} <= report["errors"].keys()
    assert all(one["ratio"] <= one["bar"] for one in report["errors"].values())
    assert report["bitwise"] is True
    for direction in ("forward", "backward"):
        assert report["times"][direction]["seconds"] > 0
        assert report["times"][direction]["phases"]["up"]["flops"] > 0
    sent = report["traffic"]["forward"]
    assert (sent["rows_sent"] > 0) == (ranks == "2")
    assert sent["rows_sent"] <= sent["rows_sent_plain"]


def test_run_counts_the_products_of_the_layer(capsys):
    _, [report] = run_json(capsys, "run", *TINY, "--ranks", "1")
    products = 2 * 3 * 24 * 2 * 64 * 64
    assert report["times"]["forward"]["flops"] >= products


def test_run_shows_people_sizes_load_traffic_times_and_errors(capsys):
    code, out, _ = run(capsys, "run", *TINY, "--ranks", "2")
    assert code == 0
    for text in ("qwen3-30b-a3b", "Tokens per expert", "without dedup", "GFLOP/s", "grad_w_down",
                 "passed: all"):  # fmt: skip
        assert text in out


@pytest.mark.parametrize("model", models.MODELS)
def test_run_knows_every_model(model):
    report = flashmoe.run_moe(ranks=2, model=model, scale=64, tokens=48, repeats=1, quiet=True)
    assert report.passed, report.reasons


@pytest.mark.slow
def test_run_in_processes(capsys):
    code, [report] = run_json(capsys, "run", *TINY, "--ranks", "2", "--processes")
    assert code == 0
    assert report["launch"] == "processes"
    assert report["traffic"]["forward"]["rows_sent"] > 0


@pytest.mark.slow
def test_an_error_in_a_process_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "soon")
    code, out, err = run(capsys, "run", *TINY, "--processes", "--json")
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1].startswith("flashmoe: ValueError: FLASHMOE_TIMEOUT_S is 'soon'")


@pytest.mark.slow
def test_run_joins_the_processes_of_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "flashmoe", "run", *TINY, "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    [report] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert report["launch"] == "torchrun"
    assert report["ranks"] == 2
    assert report["passed"] is True


def test_run_fails_where_an_output_is_wrong(capsys, monkeypatch):
    from flashmoe import passes

    def doubled(*arguments):
        result = gather(*arguments)
        result.outputs["y"][0][3, 5] += 1
        return result

    gather = passes.gather
    monkeypatch.setattr(passes, "gather", doubled)
    code, [report] = run_json(capsys, "run", *TINY, "--ranks", "1")
    assert code == 1
    assert report["passed"] is False
    assert "token 3, hidden 5" in report["reasons"][0]


def test_the_models_are_listed(capsys):
    _, listed = run_json(capsys, "run", "--list")
    assert [model["name"] for model in listed] == list(models.MODELS)
    code, out, _ = run(capsys, "run", "--list")
    assert code == 0
    assert all(name in out for name in models.MODELS)


def test_auto_scale_stays_within_the_budget():
    for model in models.MODELS.values():
        scale = models.fitting_scale(model, ranks=2, tokens=256, cores=2, memory_bytes=8 << 30)
        small = models.scaled(model, scale, 2)
        assert small.parameters <= 4e7
        assert 20 * small.forward_flops(512) <= 4e11


# ---- check --------------------------------------------------------------------------------------


def test_check_prints_a_record_a_case_and_a_summary(capsys):
    code, [*records, summary] = run_json(capsys, "check", "--case", "tokens/3", "--gradients")
    assert code == 0
    assert summary == {"passed": len(records), "failed": 0, "skipped": 0}
    assert len(records) == len(check.planned("tokens/3", True))
    for record in records:
        assert record["case"] == "tokens/3"
        assert record["status"] == "passed"
        assert record["error_ratio"] <= record["bar"]
        assert record["bitwise"] is True
        assert record["outputs"].keys() >= {"y", "grad_x", "grad_w_up"}


def test_check_fails_with_the_first_mismatch(capsys, monkeypatch):
    from flashmoe import passes

    def spoiled(*arguments):
        result = gather(*arguments)
        result.outputs["y"][0][1, 2] += 1
        return result

    gather = passes.gather
    monkeypatch.setattr(passes, "gather", spoiled)
    arguments = ("check", "--case", "tokens/3:fp32:w1")
    code, [record, summary] = run_json(capsys, *arguments)
    assert code == 1
    assert summary == {"passed": 0, "failed": 1, "skipped": 0}
    assert "token 1, hidden 2" in record["reason"]
    code, out, _ = run(capsys, *arguments)
    assert code == 1
    assert "FAILED" in out
    assert "token 1, hidden 2" in out


def test_a_skip_names_what_is_missing(capsys):
    code, [record, summary] = run_json(
        capsys, "check", "--case", "ids/one_rank:bf16*", "--ranks", "1"
    )
    assert code == 0
    assert summary == {"passed": 0, "failed": 0, "skipped": 1}
    assert record["reason"] == "needs more than one rank"
    _, [record, _] = run_json(capsys, "check", "--case", "tokens/3:bf16:w1", "--device", "cuda")
    assert record["status"] == "skipped"
    assert "cuda" in record["reason"]


def test_check_on_other_ranks_and_dtype(capsys):
    arguments = ("check", "--case", "size/odd", "--ranks", "4", "--dtype", "fp64")
    code, [record, _] = run_json(capsys, *arguments)
    assert code == 0
    assert (record["ranks"], record["dtype"]) == (4, "fp64")


# ---- bench --------------------------------------------------------------------------------------


def test_bench_records(capsys, monkeypatch, tmp_path):
    from flashmoe import bench, cases

    small = cases.Case("speed/small", modes=("speed",), tokens=(64,))
    monkeypatch.setattr(cases, "CASES", (small,))
    monkeypatch.setattr(bench, "results_path", lambda: tmp_path / "here-cpu.jsonl")
    plot = tmp_path / "bench.png"
    arguments = ("bench", "--seconds", "0.05", "--write", "--plot", str(plot))
    code, records = run_json(capsys, *arguments)
    assert code == 0
    assert [(r["dtype"], r["direction"], r["save_z"]) for r in records] == [
        (dtype, direction, save_z)
        for dtype in ("fp32", "bf16")
        for direction, save_z in bench.DIRECTIONS
    ]
    for record in records:
        assert list(record)[: len(BENCH_FIELDS)] == BENCH_FIELDS
        assert record["ratio"] == pytest.approx(record["reference_us"] / record["us"], rel=1e-2)
        assert record["launches"] == (1 if record["direction"] == "forward" else 2)
        assert record["bitwise"] is True
    written = (tmp_path / "here-cpu.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == records
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(capsys, "bench", "--seconds", "0.05", "--dtype", "fp32")
    assert code == 0
    assert "grouped_mm" in out


def test_the_peers_of_bench_are_the_same_layer():
    from flashmoe import bench, cases
    from flashmoe.inputs import make_operands

    case = cases.Case("peers", tokens=(50,), top_k=3)
    operands = make_operands(case, (50,), "fp32")
    exact = bench.plain_layer(case, operands, torch.float64, bench.loop_experts, True)()
    for experts in (bench.loop_experts, bench.grouped_experts):
        results = bench.plain_layer(case, operands, torch.float32, experts, True)()
        for ours, expected in zip(results, exact, strict=True):
            eps = torch.finfo(torch.float32).eps
            terms = case.hidden + case.intermediate + case.experts
            assert (ours - expected).norm() <= terms * eps * expected.norm()


def test_source_hash_follows_the_sources():
    from flashmoe import bench

    assert bench.source_hash() == bench.source_hash()
    assert len(bench.source_hash()) == 12


def test_bench_explains_a_case_on_several_ranks(capsys, monkeypatch):
    from flashmoe import cases

    chosen = (
        cases.Case("ranks/two", tokens=(50,), experts=8, modes=("speed",), dtypes=("fp32",)),
        cases.Case("ranks/odd", tokens=(50,), experts=9, modes=("speed",), dtypes=("fp32",)),
    )
    monkeypatch.setattr(cases, "CASES", chosen)
    code, out, _ = run(capsys, "bench", "--explain", "--ranks", "2", "--case", "ranks/*")
    assert code == 0
    assert "ranks/two fp32\n  block: at most" in out
    assert "9 experts cannot be divided among 2 ranks" in out


# ---- errors and start ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["run", "--model", "no-such-model"], "known are qwen3-30b-a3b"),
        (["run", "--model", "phi-3.5-moe"], "sparsemixer"),
        (["run", "--experts", "7", "--ranks", "2"], "experts is 7; accepted: a multiple of 2"),
        (["run", "--experts", "4", "--top-k", "6"], "top_k is 6"),
        (["run", "--device", "cuda", "--ranks", "99"], "accepted on cuda: to"),
        (["run", "--hidden", "64", "--scale", "1", "--experts", "3"], "experts is 3"),
        (["check", "--case", "nothing/like-it"], "no case matches 'nothing/like-it'"),
        (["bench", "--case", "nothing/like-it"], "no speed case matches"),
        (["bench", "--device", "cuda"], "torch sees no CUDA device"),
        (["bench", "--ranks", "2"], "--ranks is given with device cpu"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(capsys, arguments, mentions):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("flashmoe: ")
    assert err.count("\n") == 1
    assert mentions in err


@pytest.mark.parametrize(
    "arguments", [["run", "--ranks", "0"], ["run", "--tokens", "-1"], ["frobnicate"], []]
)
def test_a_wrong_option_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_help_loads_neither_torch_nor_rich():
    code = (
        "import sys; from flashmoe import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(sorted({'torch', 'rich', 'numpy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run | check | bench" in done.stdout


def test_the_package_is_a_command():
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe", "run", "--help"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--processes" in done.stdout
