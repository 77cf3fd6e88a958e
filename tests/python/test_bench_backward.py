"""`flashmoe bench --direction backward`: its arithmetic, its peers, its records and PNG, without a
GPU: the CPU engine computes, and `fake_gpu` answers what is asked of a GPU."""

import json
import math
import sys
from dataclasses import replace

import fake_gpu
import fake_peers
import flashmoe
import pytest
import torch
from flashmoe import (
    backward_peers,
    backward_quality,
    bench_backward,
    bench_cuda,
    cli,
    passes,
)
from flashmoe.bench import OURS
from flashmoe.bench_backward import RECOMPUTED, REFERENCE
from flashmoe.bench_peers import GROUPED, LIGER, SONIC
from flashmoe.cases import Case
from flashmoe.config import Routing
from flashmoe.inputs import Operands, unpack
from flashmoe.models import LLAMA4_LAYER
from flashmoe.rank_processes import on_ranks

CASE = Case("qwen3-30b", tokens=(40,), hidden=64, intermediate=64, experts=8, top_k=3)
SCOUT = replace(CASE, name="scout", top_k=1, **LLAMA4_LAYER)
IDLE = replace(CASE, name="seed", tokens=(3,), experts=16, top_k=2)  # some experts have no row
MANY = [
    CASE,
    SCOUT,
    IDLE,
    replace(CASE, bias=True, router_bias=True, layout="interleaved_transposed"),
    replace(CASE, routing=Routing(score="sigmoid", scale=2.5), selection_bias=True),
    replace(CASE, layout="separate", capacity_factor=0.5),
]


@pytest.fixture
def group():
    [one] = flashmoe.local_group(1)
    with one:
        yield one


@pytest.fixture
def installed(monkeypatch):
    """SonicMoE and liger-kernel; gives the list of what was called."""
    seen = []
    for name, module in fake_peers.modules(seen).items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def calls_of(case, group, dtype=torch.bfloat16):
    return bench_backward.make_calls(case, dtype, group, device="cpu")


@torch.no_grad()
def backwards_of(case, calls, group):
    return {name: bench_backward.make_backward(case, c, group) for name, c in calls.items()}


# ---- what is timed ---------------------------------------------------------------------------


def test_the_cases_are_those_that_have_a_floor():
    assert [case.name for case in bench_backward.planned()] == list(bench_backward.TARGETS)
    assert all(case.tokens == (8192,) for case in bench_backward.planned())
    assert [case.name for case in bench_backward.planned("mixtral*,seed")] == ["mixtral", "seed"]


@pytest.mark.parametrize("case", MANY, ids=range(len(MANY)))
def test_the_launch_gives_what_autograd_gives(case, group):
    calls = calls_of(case, group)
    for name, backward in backwards_of(case, calls, group).items():
        assert ("z" in backward.saved) == (name == OURS)
        made = bench_backward.as_leaves(calls[name], backward.run())
        expected = backward_peers.ours(calls[name]).gradients()
        assert made.keys() == expected.keys() >= {"x", "w_router", "w_up", "w_down"}
        assert all(torch.equal(made[leaf], expected[leaf]) for leaf in made)


@pytest.mark.parametrize("case", [CASE, SCOUT], ids=["rows", "transposed"])
def test_the_reference_is_the_four_products(case, group):
    call = calls_of(case, group)[OURS]
    rows = math.ceil(case.tokens[0] * case.top_k / case.experts)
    with torch.no_grad():
        da, dx, dw_down, dw_up = bench_backward.bare_products(case, call)()
    assert da.shape == (case.experts, rows, case.intermediate)
    assert dx.shape == (case.experts, rows, case.hidden)
    assert dw_down.shape == call.weights["w_down"].shape
    assert dw_up.shape == call.weights["w_up"].shape
    depth = {da: case.hidden, dx: 2 * case.intermediate, dw_down: rows, dw_up: rows}
    flops = sum(2 * product.numel() * summed for product, summed in depth.items())
    assert flops == 12 * rows * case.experts * case.hidden * case.intermediate


@pytest.mark.parametrize(
    ("name", "ratio", "met"),
    [
        ("qwen3-30b", 0.9, "goal"),
        ("qwen3-30b", 0.89, "floor"),
        ("seed", 0.72, "floor"),
        ("seed", 0.719, "no"),
    ],
)
def test_a_ratio_is_held_against_floor_and_goal(name, ratio, met):
    assert bench_backward.judged(name, ratio)["met"] == met


# ---- how exact it is -------------------------------------------------------------------------


def natural_operands(case, call):
    """The call's operands as `passes.reference_pass` takes them."""
    natural = unpack(call.weights, case.layout, case.activation_spec.gated)
    tensors = natural | call.routing
    wide = {name: tensor.detach().double() for name, tensor in tensors.items()}
    return Operands(x=[call.x.detach().double()], grad_y=[call.grad_y.double()], **wide)


@pytest.mark.parametrize("case", MANY, ids=range(len(MANY)))
def test_expert_by_expert_is_the_whole_layer_in_fp64(case, group):
    """The tallies of the oracle against itself, computed whole, are 0."""
    call = calls_of(case, group)[OURS]
    with torch.no_grad():
        _, routed = passes.call_layer(call)
    ids = routed.topk_ids
    whole = passes.reference_pass(case, natural_operands(case, call), [ids], torch.float64, True)
    natural = {name: parts[0] for name, parts in whole.items() if name.startswith("grad_")}
    wide = replace(
        call,
        x=call.x.detach().double().requires_grad_(),
        routing={
            name: t.detach().double().requires_grad_(name != "selection_bias")
            for name, t in call.routing.items()
        },
        weights={name: t.detach().double().requires_grad_() for name, t in call.weights.items()},
        grad_y=call.grad_y.double(),
    )
    exact = backward_quality.plain_gradients(case, wide, ids)
    packed = {name: exact[name] for name in call.weights}
    others = {name: gradient for name, gradient in exact.items() if name not in packed}
    apart = others | unpack(packed, case.layout, case.activation_spec.gated)
    assert {f"grad_{name}" for name in apart} == natural.keys()
    for name, gradient in apart.items():
        torch.testing.assert_close(gradient, natural[f"grad_{name}"])
    [found] = backward_quality.tallies(case, call, ids, {"exact": exact}, exact).values()
    assert found.keys() == exact.keys()
    assert all(tally.error < 1e-12 and not tally.problem for tally in found.values())


def test_a_wrong_gradient_is_found(group, monkeypatch):
    calls = calls_of(IDLE, group)
    backwards = backwards_of(IDLE, calls, group)
    quality = bench_backward.measure_quality(IDLE, calls[OURS], backwards)
    assert quality["error_failures"] == {} and quality["error_ratio"] < 1.5
    assert quality["bitwise"] is True and quality["recomputed_bitwise"] is True
    assert quality["error_ratios"].keys() == {
        "grad_x", "grad_w_router", "grad_w_up", "grad_w_down",
    }  # fmt: skip
    assert quality["recomputed_error_ratios"].keys() == quality["error_ratios"].keys()
    assert quality["experts_hit"] < 16 and quality["error_tokens"] == 3
    launch = bench_backward.Backward.launch

    def wrong(self):
        launch(self)
        if "z" not in self.saved:
            self.gradients["w_up"][0, 3] += 1  # of one expert of the variant without Z
            self.gradients["w_down"][:] *= 1.1 + 0.1 * torch.rand(())

    monkeypatch.setattr(bench_backward.Backward, "launch", wrong)
    quality = bench_backward.measure_quality(IDLE, calls[OURS], backwards)
    assert set(quality["error_failures"]) == {
        f"{RECOMPUTED}, grad_w_up", f"{RECOMPUTED}, grad_w_down",
    }  # fmt: skip
    assert quality["bitwise"] is True and quality["recomputed_bitwise"] is False


def test_gradients_that_are_not_written_are_found(group, monkeypatch):
    calls = calls_of(CASE, group)
    backwards = backwards_of(CASE, calls, group)
    monkeypatch.setattr(bench_backward.Backward, "launch", lambda self: None)
    quality = bench_backward.measure_quality(CASE, calls[OURS], backwards)
    assert quality["error_ratio"] == math.inf
    assert "not finite" in quality["error_failures"][f"{OURS}, grad_x"]


# ---- peers -----------------------------------------------------------------------------------


def found(case, group):
    calls = calls_of(case, group)
    expected = backward_peers.ours(calls[OURS]).gradients()
    with torch.no_grad():
        return backward_peers.find(case, calls[OURS], expected)


@pytest.mark.parametrize(
    ("routing", "of_sonic"),
    [(Routing(), "its own router"), (Routing(score="sigmoid"), "given routing")],
    ids=["softmax", "sigmoid"],
)
def test_peers_give_the_gradients(routing, of_sonic, installed, group):
    peers, absent = found(replace(CASE, routing=routing), group)
    assert set(peers) == {GROUPED, SONIC, LIGER}, absent
    assert installed == [of_sonic, LIGER]
    assert peers[SONIC].gradients()["w_up"].shape == (8, 128, 64)


def test_the_transposed_layer_has_one_peer(installed, group):
    peers, absent = found(SCOUT, group)
    assert set(peers) == {GROUPED} and set(absent) == {SONIC, LIGER}, absent


@pytest.mark.parametrize("leaf", ["x", "w_router", "w_up", "w_down"])
def test_a_peer_with_another_gradient_does_not_count(leaf, installed, group, monkeypatch):
    make = backward_peers.liger

    def wrong(case, call):
        def natural(name, gradient):
            return gradient * 1.5 if name == leaf else gradient

        return replace(make(case, call), natural=natural)

    monkeypatch.setitem(backward_peers.MAKERS, LIGER, wrong)
    peers, absent = found(CASE, group)
    assert set(peers) == {GROUPED, SONIC}
    assert absent[LIGER].startswith("gives other values") and absent[LIGER].endswith(f"grad_{leaf}")


def test_what_is_not_installed_is_said(monkeypatch, group):
    for name in ("sonicmoe", "liger_kernel"):
        monkeypatch.setitem(sys.modules, name, None)
    peers, absent = found(CASE, group)
    assert set(peers) == {GROUPED}
    assert absent[SONIC].startswith("not installed: sonic-moe (")


# ---- the bench as a whole --------------------------------------------------------------------


def fake_gpu_bench(rank, cases):
    """`bench_backward.run_bench` on a GPU that is not there, with peers that are not there."""
    fake_gpu.install()
    sys.modules.update(fake_peers.modules([]))
    bench_backward.bench_peers.versions = lambda names: {LIGER: "0.8.5"}
    bench_cuda.check_device = lambda: None
    bench_cuda.measure_ceilings = lambda: {"peak_tflops": 700.0, "read_gb_per_s": 4300.0}
    bench_backward.planned = lambda pattern: cases
    yield from bench_backward.run_bench("*", seconds=0.05)


@pytest.fixture(scope="module")
def records():
    """Of two cases on a GPU that is not there."""
    return list(on_ranks(1, fake_gpu_bench, [CASE, SCOUT]))


def test_a_record_says_what_was_measured(records):
    first, second = records
    assert first["case"] == "qwen3-30b" and first["direction"] == "backward"
    assert first["gpu"] == "NVIDIA H200" and first["part"] == "backward"
    assert first["reference"] == REFERENCE and first["launches"] == 1
    assert first["ratio"] == pytest.approx(first["reference_us"] / first["us"], rel=1e-3)
    ratio = first["reference_us"] / first["recomputed_us"]
    assert first["recomputed_ratio"] == pytest.approx(ratio, rel=1e-3)
    assert (first["floor"], first["goal"]) == (0.78, 0.90)
    assert first["bitwise"] is True and first["recomputed_bitwise"] is True
    assert 0 < first["error_ratio"] == max(first["error_ratios"].values()) < 1.5
    assert first["error_failures"] == {} and first["peers_absent"] == {}
    contenders = [OURS, RECOMPUTED, GROUPED, SONIC, LIGER]
    assert list(first["memory"]) == list(first["step_eager_us"]) == contenders
    assert list(first["backward_eager_us"]) == contenders
    assert list(first["step_us"]) == contenders[:-1]  # liger-kernel reads on the host
    assert first["memory"][OURS]["scratch_bytes"] > 0
    assert first["memory"][GROUPED]["scratch_bytes"] == 0
    assert {"up", "down", "weight"} <= set(first["phases_us"]) & set(first["recomputed_phases_us"])
    assert first["tflops"] == pytest.approx(
        12 * 40 * 3 * 64 * 64 / first["us"] / 1e6, abs=0.06
    )  # fmt: skip
    assert second["layout"] == "transposed" and list(second["memory"])[2:] == [GROUPED]
    json.dumps(records)


def test_the_table_has_a_line_a_record_and_a_layer(records):
    head, first, second, _, of_steps, *rest = bench_backward.table(records).splitlines()
    assert len(first) <= len(head) and first.split()[0] == "qwen3-30b" and first.endswith("same")
    assert second.split()[0] == "scout" and "saved MiB" in of_steps
    assert [line.split()[0] for line in rest[:8]] == ["qwen3-30b"] * 5 + ["scout"] * 3
    assert rest[4].split()[1:3] == [LIGER, "-"] and rest[3].split()[1] == SONIC
    assert "NVIDIA H200, bf16" in rest[8]
    broken = records[0] | {"error_failures": {"ours, grad_x": "not finite"}, "bitwise": False}
    shown = bench_backward.table([broken])
    assert "qwen3-30b: ours, grad_x: not finite" in shown and "DIFFER" in shown
    lines = bench_backward.timeline(records).splitlines()
    assert lines[1].split()[0] == "qwen3-30b" and "weight" in lines[0]
    assert bench_backward.table([]).count("\n") == 2


def test_memory_is_what_is_held_between_and_at_most(monkeypatch):
    """Bytes that torch says at each question: before, after the forward, the most."""
    x = torch.ones(4, 8, requires_grad=True)
    answers = iter([1000, 1000 + 128 + 700])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(answers))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5000)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    trained = backward_peers.Trained(lambda: x * 2, {"x": x}, torch.ones(4, 8))
    memory = bench_backward.memory_of(trained)
    assert memory == {"saved_bytes": 700, "peak_bytes": 4000, "scratch_bytes": 0}

    class Scratch:
        sizes = iter([300, 500])

        def stats(self):
            return {"scratch_bytes": next(self.sizes)}

    answers = iter([1000, 1128])
    memory = bench_backward.memory_of(trained, Scratch())
    assert memory == {"saved_bytes": 0, "peak_bytes": 4500, "scratch_bytes": 500}


def test_a_backward_that_runs_once_is_not_timed_by_itself(monkeypatch):
    x = torch.ones(4, 8, requires_grad=True)
    once = iter([()])

    class Once(backward_peers.Trained):
        def backward(self):
            def run():
                try:
                    return next(once)
                except StopIteration:
                    raise RuntimeError("saved tensors are gone") from None

            return run

    def sustained(contenders, seconds, cold):
        return dict.fromkeys(contenders, seconds), 0, 0, ""

    monkeypatch.setattr(bench_backward, "sustained", sustained)
    layers = {
        name: kind(lambda: x * 2, {"x": x}, torch.ones(4, 8))
        for name, kind in ((OURS, backward_peers.Trained), (LIGER, Once))
    }
    assert bench_backward.measure_alone(layers, 0.5, None) == {OURS: 0.5}
    [gradient] = layers[OURS].backward()()
    assert torch.equal(gradient, torch.full((4, 8), 2.0))


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def faked(monkeypatch, records, tmp_path):
    """The command with the records that there are, in a checkout of its own."""
    monkeypatch.setattr(bench_cuda, "check_device", lambda: None)
    monkeypatch.setattr(bench_backward, "run_bench", lambda pattern, **options: iter(records))
    monkeypatch.setattr(flashmoe.bench, "ROOT", tmp_path)
    (tmp_path / "include" / "flashmoe").mkdir(parents=True)
    return tmp_path / "benchmarks" / "results" / "h200-backward.jsonl"


def test_the_command_writes_shows_and_draws(faked, capsys, tmp_path, records):
    png = tmp_path / "backward.png"
    command = ["bench", "--device", "cuda", "--direction", "backward", "--write"]
    assert cli.main([*command, "--plot", str(png), "--timeline"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("case ") and "phases: when the first cluster" in out
    assert [json.loads(line) for line in faked.read_text().splitlines()] == records
    assert png.stat().st_size > 5000
    assert cli.main([*command, "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == records and len(faked.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--direction is backward with device cpu"),
        (["--device", "cuda", "--explain"], "accepted without --explain"),
        (["--device", "cuda", "--case", "gpt*"], "no GPU case of the backward matches 'gpt*'"),
    ],
)
def test_wrong_options_are_named(faked, capsys, arguments, text):
    assert cli.main(["bench", "--direction", "backward", *arguments]) == 2
    assert text in capsys.readouterr().err
