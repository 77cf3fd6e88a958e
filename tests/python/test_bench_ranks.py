"""`flashmoe bench --ranks`: its arithmetic, its ranks, its records and PNGs, without a GPU.

The ranks are processes over the CPU engine; for what is asked of a GPU, `fake_gpu` answers.
"""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import fake_gpu
import flashmoe
import pytest
import torch
from flashmoe import bench_ranks, cli, plots, rank_peers, rank_timing
from flashmoe.bench import OURS
from flashmoe.cases import Case
from flashmoe.inputs import make_operands
from flashmoe.passes import on_all_ranks, rank_call, run_rank
from flashmoe.rank_processes import on_ranks
from flashmoe.rank_traffic import overlap, traffic_of

# qwen3-30b, so that it has a floor and a goal
CASE = Case("qwen3-30b", tokens=(40,), hidden=64, intermediate=64, experts=8, top_k=3)


@pytest.fixture(autouse=True)
def few_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# ---- what travels ----------------------------------------------------------------------------


def test_rows_are_counted_once_a_token_and_owner():
    ids = [torch.tensor([[0, 1, 2], [3, 2, -1]]), torch.tensor([[0, 3, 1]])]
    traffic = traffic_of(ids, experts=4, row_bytes=10)
    assert traffic.rows == [[1, 2], [1, 1]]
    assert traffic.rows_plain == [[2, 3], [2, 1]]
    assert (traffic.rows_sent(), traffic.rows_sent(plain=True)) == (3, 5)
    assert traffic.expert_rows() == [4, 4]
    slots = [2 * 3 * 8 + 2 * 4, 1 * 3 * 8 + 2 * 4]  # metadata of each rank: slots, counts
    assert traffic.link_bytes() == [[0, 30 + slots[0]], [30 + slots[1], 0]]
    assert traffic.link_bytes(plain=True) == [[0, 50 + slots[0]], [50 + slots[1], 0]]
    assert traffic.bytes_sent() == 60 + sum(slots)
    assert traffic.load_most_over_mean() == 1.0


def test_a_backward_sends_two_rows_and_gets_a_number_a_slot_as_well():
    ids = [torch.tensor([[0, 1, 2], [3, 2, -1]]), torch.tensor([[0, 3, 1]])]
    traffic = traffic_of(ids, experts=4, row_bytes=10, backward=True)
    forward = traffic_of(ids, experts=4, row_bytes=10)
    assert traffic.rows_sent() == forward.rows_sent()
    slots = [2 * 3 * 8 + 2 * 4, 1 * 3 * 8 + 2 * 4]
    there, back = 2 * 2 * 10 + 1 * 10, 2 * 1 * 10 + 2 * 10
    # rank 1 has three slots of rank 0, which has two of rank 1
    assert traffic.link_bytes() == [[0, there + 2 * 4 + slots[0]], [back + 3 * 4 + slots[1], 0]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_are_those_that_the_cpu_engine_sends(ranks):
    case = Case("traffic", hidden=64, experts=16, top_k=5)
    operands = make_operands(case, [50 + 7 * rank for rank in range(ranks)], "fp32")
    groups = flashmoe.local_group(ranks)
    calls = [rank_call(case, operands, "fp32", r, ranks, groups[r]) for r in range(ranks)]
    made = on_all_ranks(lambda rank: run_rank(calls[rank], False), ranks)
    sent = [group.stats() for group in groups]
    traffic = traffic_of([routed.topk_ids for _, routed in made], 16, case.hidden * 4)
    assert traffic.rows_sent() == sum(one["rows_sent"] for one in sent)
    assert traffic.rows_sent(plain=True) == sum(one["rows_sent_plain"] for one in sent)
    assert traffic.expert_rows() == [one["rows"] for one in sent]
    for group in groups:
        group.close()


def test_overlap_is_what_the_launch_hides_of_the_shorter():
    assert overlap(fused_us=1000, compute_us=1000, communication_us=200) == 1
    assert overlap(fused_us=1200, compute_us=1000, communication_us=200) == 0
    assert overlap(fused_us=1050, compute_us=1000, communication_us=200) == 0.75
    assert overlap(fused_us=300, compute_us=100, communication_us=250) == 0.5
    assert overlap(fused_us=1, compute_us=1, communication_us=0) == 0


# ---- what is measured ------------------------------------------------------------------------


@pytest.mark.parametrize("name", bench_ranks.TARGETS)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_one_gpu_has_the_rows_and_experts_of_a_rank(name, world):
    case = bench_ranks.rank_cases()[name]
    alone = bench_ranks.one_gpu(case, world)
    assert alone.experts * world == case.experts
    assert alone.tokens[0] * alone.top_k == case.tokens[0] * case.top_k
    assert alone.top_k <= alone.experts
    bench_ranks.TARGETS[name][world]


def test_the_cases_are_those_that_have_a_floor():
    assert list(bench_ranks.rank_cases()) == list(bench_ranks.TARGETS)
    assert [c.name for c in bench_ranks.planned("seed,qwen*", 4)[0][1]] == [
        "qwen3-30b", "qwen3-30b-t64", "seed",
    ]  # fmt: skip
    assert bench_ranks.planned("nothing", 2) == []


def test_the_study_has_each_size_once():
    plan = bench_ranks.planned("*", 8, "scaling")
    assert [world for world, _ in plan] == [2, 4, 8]
    assert [[case.name for case in cases] for _, cases in plan[:2]] == [["seed"]] * 2
    sizes = [(case.tokens[0], case.experts) for case in plan[2][1]]
    assert len(set(sizes)) == len(sizes) == 9
    assert {tokens for tokens, experts in sizes if experts == 64} == set(bench_ranks.STUDY_TOKENS)
    assert {experts for tokens, experts in sizes if tokens == 8192} == set(
        bench_ranks.STUDY_EXPERTS
    )
    assert [world for world, _ in bench_ranks.planned("*", 2, "scaling")] == [2]


def test_cases_that_the_ranks_cannot_divide_are_left_out():
    [(_, cases)] = bench_ranks.planned("*", 16)
    assert [case.name for case in cases] == ["qwen3-30b", "qwen3-30b-t64", "seed", "deepseek-v3"]
    assert [len(cases) for _, cases in bench_ranks.planned("*", 16, "scaling")] == [1, 1, 1, 8]


@pytest.mark.parametrize(
    ("name", "world", "us", "figure", "met"),
    [
        ("mixtral", 2, 1040.0, 1.04, "goal"),
        ("mixtral", 2, 1080.0, 1.08, "floor"),
        ("mixtral", 2, 1081.0, 1.081, "no"),
        ("mixtral", 3, 1000.0, 1.0, ""),
        (bench_ranks.DECODE, 2, 1014.9, 14.9, "goal"),
        (bench_ranks.DECODE, 2, 1030.0, 30.0, "floor"),
        (bench_ranks.DECODE, 4, 1001.0, 1.0, "floor"),
        (bench_ranks.DECODE, 8, 1046.0, 46.0, "no"),
        ("seed-t1024", 2, 1000.0, 1.0, ""),
    ],
)
def test_a_figure_is_held_against_floor_and_goal(name, world, us, figure, met):
    times = {OURS: us, bench_ranks.REFERENCE: 1000.0}
    judged = bench_ranks.judged(bench_ranks.TARGETS, name, world, times)
    assert (judged["figure"], judged["met"]) == (figure, met)


# ---- times of ranks --------------------------------------------------------------------------


class StepTimer(rank_timing.HostTimer):
    """A run takes what its contender returns."""

    def prepare(self):
        pass

    def timed(self, contender):
        return 0.0, contender() * 1e-6


def test_a_round_counts_with_its_slowest_rank():
    other = {"ours": [30.0, 10.0, 50.0], "one-gpu": [5.0, 5.0, 5.0]}
    mine = {"ours": [10.0, 20.0, 60.0], "one-gpu": [6.0, 4.0, 9.0]}
    for name, expected in (("ours", 30.0), ("one-gpu", 6.0)):
        assert rank_timing.slowest(mine[name], lambda own, n=name: [own, other[n]]) == expected


def test_contenders_take_turns_in_an_order_that_all_ranks_have():
    orders = []
    for _ in range(2):
        called = []
        contenders = {name: lambda n=name, c=called: c.append(n) or 1.0 for name in "abc"}
        runs = rank_timing.run_rounds(contenders, 9, StepTimer())
        assert {name: len(ones) for name, ones in runs.items()} == dict.fromkeys("abc", 9)
        rounds = [tuple(called[at : at + 3]) for at in range(0, 27, 3)]
        assert all(sorted(one) == ["a", "b", "c"] for one in rounds) and len(set(rounds)) > 2
        orders.append(rounds)
    assert orders[0] == orders[1]


def test_the_first_third_of_the_rounds_is_warm_up():
    assert (rank_timing.WARM_UP_ROUNDS, rank_timing.LEAST_ROUNDS) == (4, 5)
    taken = iter([99.0] * 4 + [90.0, 6.0, 8.0, 50.0, 50.0])
    timer = StepTimer()
    timer.timed = lambda contender: (0.0, next(taken) * 1e-6)
    times = rank_timing.sustained({"ours": None}, 0.0, timer, lambda own: [own])
    assert times.us == pytest.approx({"ours": 29.0})


def test_all_ranks_make_as_many_rounds():
    """As the slowest has time for; a rank alone in a round would wait for ever."""
    contenders = {"ours": lambda: 7.0, "one-gpu": lambda: 3.0}

    def with_a_slow_rank(own):
        return [own, own * 0 + 100.0 if isinstance(own, float) else own]

    times = rank_timing.sustained(contenders, 1.0, StepTimer(), with_a_slow_rank)
    assert times.us == pytest.approx({"ours": 7.0, "one-gpu": 3.0})
    assert (times.clocks, times.powers) == ([0.0, 0.0], [0.0, 0.0])
    assert rank_timing.burst(contenders, StepTimer(), lambda own: [own]) == pytest.approx(times.us)


# ---- ranks as processes ----------------------------------------------------------------------


def counting(rank, items):
    for item in range(items):
        yield rank, item, os.getpid()


def failing(rank, how):
    yield "begun"
    if rank == 1 and how == "raise":
        raise ValueError("expert weights of rank 1")
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def test_the_items_of_rank_0_arrive():
    made = list(on_ranks(2, counting, 3))
    assert [one[:2] for one in made] == [(0, 0), (0, 1), (0, 2)]
    with pytest.raises(ProcessLookupError):
        os.kill(made[0][2], 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "text"),
    [("raise", "rank 1: ValueError: expert weights"), ("kill", "rank 1: its process ended")],
)
def test_a_rank_that_fails_ends_all(how, text):
    with pytest.raises(RuntimeError, match=text):
        list(on_ranks(2, failing, how))


# ---- the bench as a whole --------------------------------------------------------------------


@pytest.fixture(scope="module")
def records():
    return fake_gpu.rank_records(bench_ranks, CASE)


def test_a_record_says_what_was_measured(records):
    first, second = records
    assert first["case"] == "qwen3-30b" and first["ranks"] == 2 and first["gpu"] == "NVIDIA H200"
    assert first["reference"] == "one-gpu" and first["part"] == "ranks" and first["launches"] == 1
    assert first["over_one_gpu"] == pytest.approx(first["us"] / first["reference_us"], rel=1e-3)
    assert first["ratio"] == pytest.approx(first["reference_us"] / first["us"], rel=1e-3)
    assert (first["floor"], first["goal"]) == (1.12, 1.05)
    assert first["bitwise"] is True and 0 < first["error_ratio"] < 1.5
    assert list(first["eager_peers"]) == [rank_peers.TORCH] and first["peers_absent"] == {}
    assert first["rows_sent"] < first["rows_sent_plain"]
    assert first["bytes_sent"] < first["bytes_sent_plain"]
    assert first["overlap"] == pytest.approx(
        (first["communication_us"] + first["reference_us"] - first["us"])
        / min(first["communication_us"], first["reference_us"]),
        rel=0.01, abs=0.01,
    )  # fmt: skip
    assert first["links"]["nvlinks"] == 18
    assert [(p["from"], p["to"]) for p in first["links"]["pairs"]] == [(0, 1), (1, 0)]
    assert len(first["phases_us"]) == len(first["sm_clock_mhz"]) == 2
    assert first["driver"] == "580.1"
    assert (second["one_gpu_tokens"], second["one_gpu_experts"], second["one_gpu_top_k"]) == (
        80, 1, 1,
    )  # fmt: skip
    json.dumps(records)


def test_the_table_has_a_line_a_record(records):
    head, first, second, foot = bench_ranks.table(records).splitlines()
    assert len(first) <= len(head) and first.split()[:2] == ["qwen3-30b", "2"]
    assert second.split()[0] == "seed" and first.endswith("same")
    assert "NVIDIA H200, bf16: 18 NVLinks a GPU, neighbours 400 400 GB/s" in foot
    lines = bench_ranks.timeline(records).splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["qwen3-30b", "0"], ["qwen3-30b", "1"], ["seed", "0"], ["seed", "1"],
    ]  # fmt: skip
    assert bench_ranks.table([]).count("\n") == 0


@pytest.mark.slow
def test_the_cpu_engine_in_place_of_gpus(tmp_path):
    """Without links there is no exchange to time."""
    [record] = bench_ranks.run_bench([(4, [CASE])], seconds=0.02, device="cpu")
    assert record["ranks"] == 4 and record["gpu"] is None
    assert record["communication_us"] is None and record["overlap"] is None
    shown = bench_ranks.table([record])
    assert "CPU engine, bf16. us" in shown and "copies: the CPU engine has no links" in shown


class LoneSeat:
    """Of rank 0 of two on a GPU, whose peer says the same."""

    device, rank, world = "cuda", 0, 2
    timer = StepTimer()

    def everyone(self, value):
        return [value] * 2


def test_what_cannot_be_measured_beside_the_times_is_said(monkeypatch, records):
    def no_access(*pair):
        raise RuntimeError("device 0 cannot reach device 1\nand more")

    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(bench_ranks, "active_nvlinks", lambda: 0)
    monkeypatch.setattr(bench_ranks.doctor, "measured_link", no_access)
    monkeypatch.setattr(rank_peers, "copy_us", no_access)
    traffic = traffic_of([torch.tensor([[0]])] * 2, 2, 8)
    reason = "device 0 cannot reach device 1"
    links = bench_ranks.measure_links(LoneSeat())
    assert links == {"nvlinks": 0, "pairs": [], "absent": reason}
    assert bench_ranks.measure_communication(traffic, LoneSeat()) == (None, reason)
    record = records[0] | {"links": links, "communication_us": None, "overlap": None,
                           "communication_absent": reason}  # fmt: skip
    lines = bench_ranks.table([record]).splitlines()
    assert lines[-2:] == [f"copies: {reason}", f"links: {reason}"]


def wrong_peer(rank, on):
    """The peer of two ranks, of which one gives other values."""
    spec = bench_ranks.Spec(2, [CASE], "bf16", 0.1, "cpu")
    seat = bench_ranks.make_seat(rank, spec)
    call, _ = bench_ranks.make_calls(CASE, torch.bfloat16, seat)
    y, _ = flashmoe.passes.call_layer(call)
    y = -y if rank == on else y
    with torch.no_grad():
        yield (
            [
                list(one)
                for one in rank_peers.find(CASE, call, y.detach(), seat.exchange, seat.everyone)
            ],
            rank_peers.find(replace(CASE, bias=True), call, y, seat.exchange, seat.everyone)[1][
                rank_peers.TORCH
            ],
        )
    seat.alone.close()
    seat.group.close()


@pytest.mark.slow
def test_a_peer_that_is_wrong_on_one_rank_counts_on_none():
    [((names, absent), reason)] = on_ranks(2, wrong_peer, 1)
    assert names == [] and absent == [rank_peers.TORCH]
    assert "biases" in reason
    [((names, absent), _)] = on_ranks(2, wrong_peer, None)
    assert names == [rank_peers.TORCH] and absent == []


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def faked(monkeypatch, records, tmp_path):
    """The command with the records that there are, in a checkout of its own."""
    monkeypatch.setattr(bench_ranks, "check_gpus", lambda ranks: None)
    monkeypatch.setattr(bench_ranks, "run_bench", lambda plan, **options: iter(records))
    monkeypatch.setattr(flashmoe.bench, "ROOT", tmp_path)
    (tmp_path / "include" / "flashmoe").mkdir(parents=True)
    return tmp_path / "benchmarks" / "results" / "h200-ranks.jsonl"


def test_the_command_writes_shows_and_draws(faked, capsys, tmp_path, records):
    files = [tmp_path / "ratio.png", tmp_path / "timeline.png"]
    command = ["bench", "--device", "cuda", "--ranks", "2", "--write"]
    assert cli.main([*command, "--plot", str(files[0]), "--timeline", str(files[1])]) == 0
    out = capsys.readouterr().out
    assert out.startswith("case ") and "phases: when the first cluster" in out
    assert [json.loads(line) for line in faked.read_text().splitlines()] == records
    assert all(one.stat().st_size > 5000 for one in files)
    assert cli.main([*command, "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown == records and len(faked.read_text().splitlines()) == 4


def test_the_study_is_drawn_with_the_records_there_are(faked, capsys, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "plot_scaling", lambda records, path: drawn.extend(records))
    command = ["bench", "--device", "cuda", "--ranks", "2", "--study", "scaling", "--write"]
    assert cli.main([*command, "--plot", "x.png"]) == 0
    assert len(drawn) == 4  # two that are written, two of this run: plots take the newest


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--ranks", "2"], "--ranks is given with device cpu"),
        (["--study", "scaling"], "--study is given"),
        (["--device", "cuda", "--ranks", "2", "--case", "nothing"], "no case of several ranks"),
    ],
)
def test_wrong_options_are_named(faked, capsys, arguments, text):
    assert cli.main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(bench_ranks.bench_cuda, "check_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    bench_ranks.check_gpus(2)
    for ranks in (1, 3):
        with pytest.raises(ValueError, match=f"ranks is {ranks}; accepted: 2 to 2"):
            bench_ranks.check_gpus(ranks)


# ---- PNGs ------------------------------------------------------------------------------------


def made_up(case, ranks, us, **sizes):
    """A record as plots read it."""
    record = {
        "case": case, "ranks": ranks, "dtype": "bf16", "gpu": "NVIDIA H200", "source": "abc",
        "direction": "forward",
        "tokens": 8192, "experts": 64, "us": us, "reference": "one-gpu", "reference_us": 900.0,
        "eager_peers": {rank_peers.TORCH: 4 * us},
    }  # fmt: skip
    times = {OURS: us, bench_ranks.REFERENCE: 900.0}
    return record | bench_ranks.judged(bench_ranks.TARGETS, case, ranks, times) | sizes


def test_the_scaling_study_as_a_png(tmp_path):
    study = [made_up("seed", ranks, 900.0 + ranks) for ranks in (2, 4)]
    study += [made_up(f"seed-t{t}", 4, t / 9, tokens=t, eager_peers={}) for t in (1024, 2048)]
    study += [made_up(f"seed-e{e}", 4, 900.0 + e, experts=e) for e in (8, 128)]
    path = tmp_path / "scaling.png"
    plots.plot_scaling([made_up("qwen3-30b", 2, 1e6), *study], path)
    assert path.stat().st_size > 5000
    with pytest.raises(ValueError, match="no record of the scaling study"):
        plots.plot_scaling([made_up("mixtral", 2, 1.0)], path)


def test_the_newest_record_of_a_case_is_drawn():
    old, other, new = made_up("seed", 2, 1.0), made_up("seed", 4, 2.0), made_up("seed", 2, 3.0)
    assert [one["us"] for one in plots.newest([old, other, new])] == [3.0, 2.0]


def test_bounds_of_decode_are_drawn_as_multiples(tmp_path):
    decode, dense = made_up(bench_ranks.DECODE, 4, 930.0), made_up("mixtral", 4, 930.0)
    assert plots.bound_of(decode, "floor") == pytest.approx(1 + 35 / 900)
    assert plots.bound_of(dense, "goal") == 1.05
    plots.plot_ranks([decode, dense, made_up("seed-t1024", 4, 1000.0)], tmp_path / "a.png")


def test_ranks_are_aligned_where_their_plans_end():
    early = {"route": 50.0, "plan": 20.0, "up": 600.0, "combine": 90.0}
    late = {"route": 55.0, "plan": 25.0, "push": 300.0, "up": 10.0, "return": 40.0}
    lanes = dict(plots.lanes_of([early, late]))
    assert lanes["rank 0, tiles"] == [
        ("route", 10.0, 60.0), ("plan", 60.0, 80.0), ("up", 80.0, 680.0), ("combine", 680.0, 770.0),
    ]  # fmt: skip
    assert lanes["rank 1, tiles"][-1] == ("up", 80.0, 90.0)
    assert lanes["rank 1, rows"] == [("push", 80.0, 380.0), ("return", 50.0, 90.0)]
    assert "rank 0, rows" not in lanes
    assert (bench_ranks.launch_us(early), bench_ranks.launch_us(late)) == (760.0, 90.0)
    assert set(plots.SPAN_NAMES) == set(bench_ranks.PHASES) - {"weight"}
    assert set(plots.SPAN_COLOURS) == set(plots.BACKWARD_NAMES) == set(bench_ranks.PHASES)


def test_the_roofline_is_drawn_from_the_records_there_are(tmp_path):
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "h200-layer.jsonl"
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    plots.plot_roofline(records[-5:], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 5000
