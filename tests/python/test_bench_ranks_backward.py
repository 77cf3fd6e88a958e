"""`flashmoe bench --direction backward --ranks`: its plan, its quality, its records and PNGs,
without a GPU: the CPU engine computes on ranks as processes, and `fake_gpu` answers for a GPU."""

import json
import math
from dataclasses import replace

import fake_gpu
import flashmoe
import pytest
import torch
from flashmoe import (
    backward_quality,
    bench_backward,
    bench_ranks,
    bench_ranks_backward,
    cli,
    compare,
    passes,
    plots,
    rank_peers,
)
from flashmoe.bench import OURS
from flashmoe.cases import Case
from flashmoe.config import Routing
from flashmoe.inputs import Operands, unpack
from flashmoe.rank_processes import on_ranks

# qwen3-30b, so that it has a floor and a goal
CASE = Case("qwen3-30b", tokens=(40,), hidden=64, intermediate=64, experts=8, top_k=3)
MANY = {
    "idle experts": replace(CASE, tokens=(3,), experts=16, top_k=2),
    "biases": replace(CASE, bias=True, layout="interleaved_transposed"),
    "capacity": replace(CASE, weight_on_input=True, layout="separate", capacity_factor=0.5),
    "sigmoid": replace(CASE, routing=Routing(score="sigmoid", scale=2.5)),
}


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# ---- what is measured ------------------------------------------------------------------------


def test_the_cases_are_those_of_the_forward_but_decode():
    [(world, cases)] = bench_ranks_backward.planned("*", 2)
    assert world == 2 and [case.name for case in cases] == [
        "qwen3-30b", "seed", "mixtral", "deepseek-v3",
    ]  # fmt: skip
    assert {case.name for case in cases} == set(bench_ranks_backward.TARGETS)
    assert all(case.tokens == (8192,) for case in cases)
    [(_, cases)] = bench_ranks_backward.planned("mixtral,deep*", 16)
    assert [case.name for case in cases] == ["deepseek-v3"]
    assert bench_ranks_backward.planned("qwen3-30b-t64", 2) == []


@pytest.mark.parametrize(
    ("world", "us", "met"),
    [(2, 1060.0, "goal"), (2, 1120.0, "floor"), (2, 1121.0, "no"), (4, 1000.0, "")],
)
def test_a_figure_is_held_against_floor_and_goal(world, us, met):
    times = {OURS: us, bench_ranks.REFERENCE: 1000.0}
    judged = bench_ranks.judged(bench_ranks_backward.TARGETS, "seed", world, times)
    assert (judged["met"], judged["figure"]) == (met, us / 1000)


# ---- how exact it is -------------------------------------------------------------------------


def in_fp64(call):
    """The call's leaves and arriving gradient, widened."""

    def wide(tensors):
        return {name: one.detach().double().requires_grad_() for name, one in tensors.items()}

    [x] = wide({"x": call.x}).values()
    grad_y = call.grad_y.double()
    return replace(call, x=x, routing=wide(call.routing), weights=wide(call.weights), grad_y=grad_y)


def detached(tensors):
    return {name: one.detach() for name, one in tensors.items()}


def joined(case, of_ranks):
    """Expert tensors of all ranks in natural form, all experts joined."""
    weights = {name: torch.cat([one[name] for one in of_ranks]) for name in of_ranks[0]}
    return unpack(weights, case.layout, case.activation_spec.gated)


def differences(case, ranks):
    """Name -> how far gradients of ranks, each (x, grad_y, w_router, weights, ids, gradients), are
    from those of the whole layer in fp64, relative in norm."""
    x, grad_y, w_router, weights, ids, made = (list(one) for one in zip(*ranks, strict=True))
    operands = Operands(x=x, grad_y=grad_y, w_router=w_router[0], **joined(case, weights))
    whole = passes.reference_pass(case, operands, ids, torch.float64, True)
    own = {name: [one[name] for one in made] for name in ("x", "w_router")}
    experts = joined(case, [{name: one[name] for name in weights[0]} for one in made])
    own |= {name: [gradient] for name, gradient in experts.items()}
    assert {f"grad_{name}" for name in own} == {name for name in whole if name.startswith("grad_")}
    return {
        name: float((torch.cat(parts) - torch.cat(whole[f"grad_{name}"])).norm())
        / float(torch.cat(parts).norm())
        for name, parts in own.items()
    }


def quality_rank(rank, case, world):
    """Differences of the yardstick in fp64 from the whole layer, the oracle's errors of that
    yardstick, and the quality of ours."""
    seat = bench_ranks.make_seat(rank, bench_ranks.Spec(world, [case], "bf16", 0.05, "cpu"))
    call, _ = bench_ranks_backward.make_calls(case, torch.bfloat16, seat)
    with torch.no_grad():
        ours = bench_backward.make_backward(case, call, seat.group)
        quality, _ = bench_ranks_backward.measure_quality(case, call, ours, seat)
    ids, ranks, wide = ours.saved["topk_ids"], rank_peers.Ranks(seat.exchange), in_fp64(call)
    exact = detached(backward_quality.plain_gradients(case, wide, ids, ranks))
    tallies = backward_quality.tallies(case, call, ids, {"exact": exact}, exact, ranks)["exact"]
    operands = (wide.x.detach(), wide.grad_y, wide.routing["w_router"].detach())
    of_ranks = seat.everyone((*operands, detached(wide.weights), ids, exact))
    errors = seat.everyone({name: one.error for name, one in tallies.items()})
    yield differences(case, of_ranks), errors, quality
    seat.alone.close()
    seat.group.close()


def assert_exact(case, world):
    [(found, errors, quality)] = on_ranks(world, quality_rank, case, world)
    assert max(found.values()) < 1e-12, found
    assert len(errors) == world and all(max(one.values()) < 1e-12 for one in errors), errors
    assert quality["error_failures"] == {} and quality["bitwise"] is True
    assert 0 < quality["error_ratio"] == max(quality["error_ratios"].values()) < 1.5
    assert {"grad_x", "grad_w_router", "grad_w_up", "grad_w_down"} <= set(quality["error_ratios"])


def test_gradients_of_ranks_are_held_against_the_whole_layer():
    assert_exact(CASE, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", MANY.values(), ids=MANY)
def test_gradients_of_more_layers_are_held_against_the_whole_layer(case, world):
    assert_exact(case, world)


def wrong_rank(rank, world):
    """The quality where rank 1 spoils an expert's gradient, anew in each launch; and its peers."""
    seat = bench_ranks.make_seat(rank, bench_ranks.Spec(world, [CASE], "bf16", 0.05, "cpu"))
    call, _ = bench_ranks_backward.make_calls(CASE, torch.bfloat16, seat)
    launch = bench_backward.Backward.launch

    def wrong(self):
        launch(self)
        if rank == 1:
            self.gradients["w_up"][2, 5] += 1 + torch.rand(())

    bench_backward.Backward.launch = wrong
    with torch.no_grad():
        ours = bench_backward.make_backward(CASE, call, seat.group)
        quality, _ = bench_ranks_backward.measure_quality(CASE, call, ours, seat)
        expected = {name: -one if rank == 1 else one for name, one in ours.gradients.items()}
        peers = rank_peers.find_trained(CASE, call, expected, seat.exchange, seat.everyone)
    yield quality, [list(one.items()) for one in peers]
    seat.alone.close()
    seat.group.close()


def test_what_is_wrong_on_one_rank_is_told_by_all():
    [(quality, (peers, [(absent, reason)]))] = on_ranks(2, wrong_rank, 2)
    assert quality["bitwise"] is False and list(quality["error_failures"]) == ["grad_w_up"]
    assert "rank 1: expert 6, intermediate 5" in quality["error_failures"]["grad_w_up"]
    assert peers == [] and absent == rank_peers.TORCH
    assert reason.startswith("gives other values") and reason.endswith("grad_x")


def test_tallies_of_ranks_are_one():
    parts = []
    for error in (1.0, 3.0):
        tally = compare.Tally("grad_x")
        oracle = torch.ones(2, 8, dtype=torch.float64)
        made = oracle.clone()
        made[1, 4] += error
        tally.add(None, made, oracle, oracle + 1, 16)
        parts.append(tally)
    whole = compare.pooled(parts)
    assert whole.ratio == pytest.approx(math.sqrt((1 + 9) / 32)) and whole.samples == 32
    assert whole.passed and whole.worst.startswith("rank 1: token 1, hidden 4: 4")
    parts[0].problem = "not finite"
    assert compare.pooled(parts).reason == "rank 0: not finite"


# ---- the bench as a whole --------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    return fake_gpu.rank_records(bench_ranks_backward, CASE)


def test_a_record_says_what_was_measured(records):
    first, second = records
    assert first["case"] == "qwen3-30b" and first["ranks"] == 2 and first["gpu"] == "NVIDIA H200"
    assert first["direction"] == "backward" and first["part"] == "ranks-backward"
    assert first["reference"] == "one-gpu" and first["launches"] == 1
    assert first["over_one_gpu"] == pytest.approx(first["us"] / first["reference_us"], rel=1e-3)
    assert (first["floor"], first["goal"]) == (1.12, 1.06)
    assert first["bitwise"] is True and first["error_failures"] == {}
    assert 0 < first["error_ratio"] == max(first["error_ratios"].values()) < 1.5
    assert list(first["step_eager_us"]) == [OURS, "one-gpu", rank_peers.TORCH]
    assert first["peers_absent"] == {} and first["peers"] == {}
    assert first["rows_sent"] < first["rows_sent_plain"]
    assert first["communication_us"] > 0 and first["overlap"] is not None
    assert first["links"]["nvlinks"] == 18 and len(first["sm_clock_mhz"]) == 2
    assert [{"plan", "up", "weight", "down"} <= set(one) for one in first["phases_us"]] == [
        True
    ] * 2
    assert first["tflops"] == pytest.approx(12 * 40 * 3 * 64 * 64 / first["us"] / 1e6, abs=0.06)
    assert (second["one_gpu_tokens"], second["one_gpu_experts"], second["one_gpu_top_k"]) == (
        80, 1, 1,
    )  # fmt: skip
    json.dumps(records)


def test_the_table_has_a_line_a_record(records):
    head, first, second, foot = bench_ranks_backward.table(records).splitlines()
    assert len(first) <= len(head) and first.split()[:2] == ["qwen3-30b", "2"]
    assert second.split()[0] == "seed" and first.endswith("same")
    assert "step: forward + backward under autograd" in foot and "NVIDIA H200, bf16" in foot
    lines = bench_ranks_backward.timeline(records).splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["qwen3-30b", "0"], ["qwen3-30b", "1"], ["seed", "0"], ["seed", "1"],
    ]  # fmt: skip
    broken = records[0] | {"error_failures": {"grad_x": "rank 1: not finite"}, "bitwise": False}
    alone = broken | {"step_eager_us": {OURS: 5.0}, "peers_absent": {rank_peers.TORCH: "fails"}}
    shown = bench_ranks_backward.table([alone])
    assert "qwen3-30b: grad_x: rank 1: not finite" in shown and "DIFFER" in shown
    assert f"{rank_peers.TORCH}: fails" in shown
    assert bench_ranks_backward.table([]).count("\n") == 0


@pytest.mark.slow
def test_the_cpu_engine_in_place_of_gpus():
    [record] = bench_ranks_backward.run_bench([(4, [CASE])], seconds=0.02, device="cpu")
    assert record["ranks"] == 4 and record["gpu"] is None and record["z_kept"] is False
    assert record["communication_us"] is None and record["floor"] is None
    assert "CPU engine, bf16. us" in bench_ranks_backward.table([record])


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def faked(monkeypatch, records, tmp_path):
    """The command with the records that there are, in a checkout of its own."""
    monkeypatch.setattr(bench_ranks, "check_gpus", lambda ranks: None)
    monkeypatch.setattr(bench_ranks_backward, "run_bench", lambda plan, **options: iter(records))
    monkeypatch.setattr(flashmoe.bench, "ROOT", tmp_path)
    (tmp_path / "include" / "flashmoe").mkdir(parents=True)
    return tmp_path / "benchmarks" / "results" / "h200-ranks-backward.jsonl"


COMMAND = ["bench", "--direction", "backward", "--device", "cuda", "--ranks", "2"]


def test_the_command_writes_shows_and_draws(faked, capsys, monkeypatch, tmp_path, records):
    labels = []
    figures = plots.canvas().Figure
    monkeypatch.setattr(figures, "savefig", lambda self, path, **how: labels.append(texts_of(self)))
    command = [*COMMAND, "--write", "--plot", "ratio.png", "--timeline", "timeline.png"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith("case ") and "phases: when the first cluster" in out
    assert [json.loads(line) for line in faked.read_text().splitlines()] == records
    timeline, ratios = labels
    assert "gradients of activations" in timeline and "up tiles" not in timeline
    assert any("one-GPU backward" in text for text in ratios)
    assert cli.main([*COMMAND, "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == records


def texts_of(figure):
    """All texts of a figure."""
    return [one.get_text() for one in figure.findobj(match=lambda one: hasattr(one, "get_text"))]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["--case", "qwen3-30b-t64"],
            "no case of the backward of several ranks matches 'qwen3-30b",
        ),
        (["--study", "scaling"], "--direction is backward; accepted without --study"),
        (["--explain"], "--direction is backward; accepted without --explain"),
        (["--device", "cpu"], "--direction is backward with device cpu"),
    ],
)
def test_wrong_options_are_named(faked, capsys, arguments, text):
    assert cli.main([*COMMAND, *arguments]) == 2
    assert text in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(bench_ranks.bench_cuda, "check_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(COMMAND) == 2
    assert "ranks is 2; accepted: 2 to 1" in capsys.readouterr().err
