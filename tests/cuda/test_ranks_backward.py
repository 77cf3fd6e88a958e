"""The backward of two ranks on two GPUs: every gradient against fp64, with plain PyTorch on one GPU
as the yardstick; bits, orders, graphs and faults. Gradients are NaN before they are written."""

import math
import threading
import time
from contextlib import suppress
from dataclasses import replace

import flashmoe
import pytest
import torch
from cuda_products import count_graph_nodes
from flashmoe import check, ops
from flashmoe.bench_cuda import PHASES
from flashmoe.cases import Case
from flashmoe.errors import (
    GroupAbortedError,
    RankMismatchError,
    WaitTimeoutError,
)
from gpu_ranks import (
    MORE_CASES,
    TIMEOUT_S,
    Processes,
    finish_all,
    finished,
    in_one_process,
    shards,
    synchronize,
)
from layer_common import MIXED, make_layer, same_bits

RANKS = 2
WRAP = 2**32  # after the last epoch before it comes 2
WAITED = r"rank 0 waited .* s in phase .*rank 1: epoch \d+, expected \d+, seen"
TABLE = [
    (case.key(dtype, ranks), case, dtype)
    for _, case, dtype, ranks in check.planned(gradients=True, device="cuda", ranks=RANKS)
    if not check.missing_for(replace(case, save_z=False), dtype, ranks, "cpu")
    if case.probe == "compare" and not case.refused
]
PROCESS_CASE = Case("ranks/processes", hidden=256, intermediate=192, experts=16, top_k=4, bias=True)
PROCESS_TOKENS = (300, 129)
SIZES = ((1, 700), (700, 1), (0, 64), (65, 0), (0, 0), (513, 1025), (3, 3), (2000, 2048))
pytestmark = pytest.mark.usefixtures("loaded", "poisoned_gradients")


@pytest.fixture
def loaded():
    """Kernels that fill are loaded: loading one waits for the launches of its GPU."""
    for rank in range(RANKS):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            torch.full((1,), math.nan, dtype=dtype, device=f"cuda:{rank}")
    synchronize()


@pytest.fixture(scope="module")
def processes():
    made = Processes()
    yield made
    made.close()


# ---- values ----------------------------------------------------------------------------------


def run_case(case, dtype, pool):
    record = check.Record(case.name, dtype, RANKS, "gradients", device="cuda")
    check.check_case(case, record, pool)
    assert record.status == "passed", record.reason


@pytest.mark.parametrize(("case", "dtype"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_case_table(case, dtype, pool):
    run_case(case, dtype, pool)


@pytest.mark.parametrize("case", [*MORE_CASES, *MIXED], ids=lambda case: case.name)
def test_more_cases(case, pool):
    run_case(case.on_ranks(RANKS).on_cuda(), "bf16", pool)


@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_kept_z(case, pool):
    """Of ranks/one_rank and the like more rows come than were made room for: made again."""
    run_case(replace(case, save_z=True), "bf16", pool)


def test_float16(pool):
    run_case(MORE_CASES[0], "fp16", pool)


# ---- one process -----------------------------------------------------------------------------


def leaves_of(layer):
    return [layer.x, layer.w_router, layer.w_up, layer.w_down]


def forward_all(layers, groups):
    """The outputs y of all ranks, called in turn by this thread."""
    made = []
    for layer, group in zip(layers, groups, strict=True):
        for leaf in leaves_of(layer):
            leaf.requires_grad_()
        made.append(layer(group)[0])
    return made


def arriving(y, seed=1):
    generator = torch.Generator(y.device).manual_seed(seed)
    return torch.randn(*y.shape, device=y.device, generator=generator).to(y.dtype)


def backward_all(layers, ends):
    """Gradients of the leaves of all ranks, called in turn by this thread."""
    return [
        torch.autograd.grad(y, leaves_of(layer), arriving(y))
        for layer, y in zip(layers, ends, strict=True)
    ]


def gradients(layers, groups):
    return backward_all(layers, forward_all(layers, groups))


@pytest.mark.parametrize("tokens", [(500, 300), (3000, 2500), (700, 0)], ids=str)
@pytest.mark.parametrize("keeper", range(RANKS))
def test_one_rank_alone_keeps_z(keeper, tokens, groups):
    """The other one makes it, of rows of x that it wants before those of grad y."""
    layers = shards(tokens=tokens)
    expected = finished(gradients(layers, groups), groups)
    layers[keeper] = replace(layers[keeper], options=layers[keeper].options | {"save_z": True})
    made = finished(gradients(layers, groups), groups)
    for rank in range(RANKS):
        for one, other in zip(made[rank], expected[rank], strict=True):
            exact = other.double()
            assert (one.double() - exact).norm() <= 2**-7 * exact.norm()


def test_one_thread_and_one_thread_a_rank_give_the_same_bits(groups):
    layers = shards()
    in_turn = finished(gradients(layers, groups), groups)
    made = [None, None]

    def work(rank):
        y, _ = layers[rank](groups[rank])
        made[rank] = torch.autograd.grad(y, leaves_of(layers[rank]), arriving(y))

    for _ in range(20):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(finished(made, groups), in_turn, strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("max_sms", [0, 6, 66])
def test_hundred_runs_give_the_same_bits(max_sms, groups):
    layers = shards(tokens=(1500, 700), experts=32, hidden=512, capacity_factor=0.9)
    expected = finished(gradients(layers, groups), groups)
    for group in groups:
        group.set("max_sms", max_sms)
    kept = [[tensor.to(f"cuda:{rank}") for tensor in one] for rank, one in enumerate(expected)]
    differs = [torch.zeros(1, dtype=torch.int64, device=f"cuda:{rank}") for rank in range(RANKS)]
    for _ in range(100):
        for rank, made in enumerate(gradients(layers, groups)):
            for one, other in zip(made, kept[rank], strict=True):
                differs[rank] += (one.view(torch.uint8) != other.view(torch.uint8)).any()
    finish_all(groups)
    assert [int(one) for one in differs] == [0, 0]


def test_tokens_change_from_call_to_call(groups):
    layers = [shards(tokens=tokens) for tokens in SIZES]
    expected = [finished(gradients(pair, groups), groups) for pair in layers]
    made = [(step % len(SIZES), gradients(layers[step % len(SIZES)], groups)) for step in range(80)]
    finish_all(groups)
    for idx, outputs in made:
        for one, other in zip(outputs, expected[idx], strict=True):
            assert same_bits([tensor.cpu() for tensor in one], other), SIZES[idx]


def test_gradients_of_experts_that_no_token_chose_are_zero(groups):
    layers = shards(tokens=(0, 0))
    for _, w_router, w_up, w_down in finished(gradients(layers, groups), groups):
        assert not w_router.any() and not w_up.any() and not w_down.any()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_forward_forward_backward_backward(order, groups):
    """Two microbatches in flight on one group: what a region holds belongs to the last launch."""
    both = [shards(tokens=(500, 300)), shards(tokens=(200, 700), seed=5)]
    expected = [finished(gradients(layers, groups), groups) for layers in both]
    for _ in range(5):
        ends = [forward_all(layers, groups) for layers in both]
        for which in order:
            made = finished(backward_all(both[which], ends[which]), groups)
            for one, other in zip(made, expected[which], strict=True):
                assert same_bits(one, other)


def test_main_grad_is_added_to(groups):
    layers = shards()
    plain = finished(gradients(layers, groups), groups)
    for layer in layers:
        for weight in (layer.w_up, layer.w_down):
            weight.main_grad = torch.full(weight.shape, 3.0, device=weight.device)
    ends = forward_all(layers, groups)
    for y in ends:
        y.backward(arriving(y))
    finish_all(groups)
    for layer, expected in zip(layers, plain, strict=True):
        for weight, gradient in zip((layer.w_up, layer.w_down), expected[2:], strict=True):
            exact = gradient.double()
            error = (weight.main_grad.cpu() - 3.0 - exact).norm() / exact.norm()
            assert error < 2**-8


def saved_for(layer, group):
    """What a backward of the layer is launched with, and where its gradients go."""
    leaves = dict(zip(("x", "w_router", "w_up", "w_down"), leaves_of(layer), strict=True))
    y, routed = layer(group)
    saved = {name: leaf.detach() for name, leaf in leaves.items()} | {
        "topk_ids": routed.topk_ids,
        "topk_weights": routed.topk_weights.detach(),
        "logits": routed.logits.detach(),
        "grad_y": arriving(y),
    }
    return saved, {name: torch.full_like(saved[name], math.nan) for name in leaves}


def test_a_backward_is_one_kernel_a_rank_and_replays_to_the_same_bits(groups):
    layers = shards(tokens=(500, 300))
    expected = finished(gradients(layers, groups), groups)
    config = flashmoe.config.LayerConfig(top_k=4).encode()
    operands = [saved_for(*pair) for pair in zip(layers, groups, strict=True)]
    graphs = []
    for (saved, made), group in zip(operands, groups, strict=True):
        name = flashmoe.group.resolve(group)[0]
        with torch.cuda.device(saved["x"].device):
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                ops.launch_backward(saved, made, config, name)
        assert count_graph_nodes(graph) == ["kernel"]
        graph.instantiate()
        graphs.append(graph)
    for _ in range(50):
        for _, made in operands:
            for tensor in made.values():
                tensor.fill_(math.nan)
        for graph in graphs:
            graph.replay()
    results = finished([list(made.values()) for _, made in operands], groups)
    assert all(same_bits(*pair) for pair in zip(results, expected, strict=True))


def test_scratch_grows_without_waiting_for_a_rank(groups):
    """Forwards and backwards of one rank, larger and larger, ahead of the other's."""
    sizes = [(16, 5), (300, 200), (1500, 700), (4000, 3000)]
    layers = [shards(tokens=tokens) for tokens in sizes]
    for pair in layers:
        for layer in pair:
            for leaf in leaves_of(layer):
                leaf.requires_grad_()
    ready = [[arriving(layer.x.detach()) for layer in pair] for pair in layers]
    synchronize()
    made = [[], []]
    start = time.monotonic()
    for rank in range(RANKS):
        for pair, grads in zip(layers, ready, strict=True):
            y, _ = pair[rank](groups[rank])
            made[rank].append(torch.autograd.grad(y, leaves_of(pair[rank]), grads[rank]))
    assert time.monotonic() - start < 20
    finish_all(groups)
    for idx, pair in enumerate(layers):
        again = finished(gradients(pair, groups), groups)
        for rank in range(RANKS):
            assert same_bits([tensor.cpu() for tensor in made[rank][idx]], again[rank])


def test_memory_is_taken_once(groups):
    layers = shards(tokens=(1000, 400))
    for _ in range(2):
        finished(gradients(layers, groups), groups)
    free = [torch.cuda.mem_get_info(rank)[0] for rank in range(RANKS)]
    before = [group.stats()["symmetric_bytes"] for group in groups]
    for _ in range(10):
        finished(gradients(layers, groups), groups)
    assert [torch.cuda.mem_get_info(rank)[0] for rank in range(RANKS)] == free
    assert [group.stats()["symmetric_bytes"] for group in groups] == before


def test_phases_of_a_backward(groups):
    layers = shards(tokens=(1000, 400))
    finished(gradients(layers, groups), groups)
    for group in groups:
        stats = group.stats()
        phases = dict(zip(PHASES, stats["phase_seconds"], strict=True))
        assert phases["plan"] > 0
        assert 0 < phases["push"] <= stats["seconds"]
        # In a layer this small the first cluster may have no tile of a product: its phase is 0.
        in_turn = sum(phases[n] for n in ("route", "plan", "up", "weight", "down", "combine"))
        assert in_turn == pytest.approx(stats["seconds"], rel=1e-6)


def test_epochs_across_the_wrap():
    layers = [shards(tokens=tokens) for tokens in SIZES[:4]]
    made = flashmoe.local_group(RANKS, device="cuda", max_tokens=4096)
    for group in made:
        group.set("epoch", float(WRAP - 21))
    expected = [finished(gradients(pair, made), made) for pair in layers]
    for step in range(40):
        again = finished(gradients(layers[step % 4], made), made)
        assert all(same_bits(*pair) for pair in zip(again, expected[step % 4], strict=True))
    assert made[0].stats()["epoch"] == made[1].stats()["epoch"] < 200
    for group in made:
        group.close()


# ---- faults, in one process --------------------------------------------------------------------


def assert_new_group_works():
    fresh = flashmoe.local_group(RANKS, device="cuda", max_tokens=1024)
    for made in finished(gradients(shards(), fresh), fresh):
        assert all(tensor.isfinite().all() for tensor in made)
    y, _ = make_layer()()
    assert y.isfinite().all()
    for group in fresh:
        group.close()


def test_a_wait_for_a_rank_that_never_calls_backward(groups):
    layers = shards()
    finished(gradients(layers, groups), groups)
    ends = forward_all(layers, groups)
    finish_all(groups)
    for group in groups:
        group.set("timeout_s", TIMEOUT_S)
    start = time.monotonic()
    torch.autograd.grad(ends[0], leaves_of(layers[0]), arriving(ends[0]))
    synchronize()
    with pytest.raises(WaitTimeoutError, match=WAITED):
        groups[0].stats()
    assert TIMEOUT_S <= time.monotonic() - start < TIMEOUT_S + 1
    with pytest.raises(GroupAbortedError, match="rank 0 waited"):
        torch.autograd.grad(ends[1], leaves_of(layers[1]), arriving(ends[1]))
    assert_new_group_works()


def test_a_late_backward_is_no_fault(groups):
    layers = shards()
    expected = finished(gradients(layers, groups), groups)
    made = []
    for layer, y in zip(layers, forward_all(layers, groups), strict=True):
        made.append(torch.autograd.grad(y, leaves_of(layer), arriving(y)))
        time.sleep(1.0)
    for one, other in zip(finished(made, groups), expected, strict=True):
        assert same_bits(one, other)


def test_a_forward_against_a_backward_is_named_on_every_rank(groups):
    layers = shards()
    expected = finished(gradients(layers, groups), groups)
    ends = forward_all(layers, groups)
    finish_all(groups)
    torch.autograd.grad(ends[0], leaves_of(layers[0]), arriving(ends[0]))
    layers[1](groups[1])
    synchronize()
    for group in groups:
        with pytest.raises(RankMismatchError, match=r"direction .* differs between ranks"):
            group.stats()
    for one, other in zip(finished(gradients(layers, groups), groups), expected, strict=True):
        assert same_bits(one, other)


def test_abort_from_another_thread_frees_the_wait(groups):
    layers = shards()
    finished(gradients(layers, groups), groups)
    ends = forward_all(layers, groups)
    finish_all(groups)
    torch.autograd.grad(ends[0], leaves_of(layers[0]), arriving(ends[0]))
    time.sleep(0.1)
    when = []

    def abort():
        when.append(time.monotonic())
        groups[1].abort("the user pressed stop")

    timer = threading.Timer(0.2, abort)
    timer.start()
    torch.cuda.synchronize(0)
    assert time.monotonic() - when[0] < 0.1
    timer.join()
    with pytest.raises(GroupAbortedError, match="the user pressed stop"):
        groups[0].stats()
    assert_new_group_works()


@pytest.mark.parametrize("delay", [0.0, 0.0002, 0.0005, 0.001, 0.002])
def test_an_abort_in_the_middle_of_a_backward_ends_it(delay, groups):
    """In whatever phase it finds the ranks: all end, and a new group works."""
    layers = shards(tokens=(4000, 3000), hidden=1024, intermediate=512)
    finished(gradients(layers, groups), groups)
    ends = forward_all(layers, groups)
    finish_all(groups)
    timer = threading.Timer(delay, lambda: groups[1].abort("the user pressed stop"))
    start = time.monotonic()
    timer.start()
    with suppress(GroupAbortedError):
        backward_all(layers, ends)
    timer.join()
    synchronize()
    assert time.monotonic() - start < 5
    with pytest.raises(GroupAbortedError, match="the user pressed stop"):
        layers[0](groups[0])
    assert_new_group_works()


# ---- processes -------------------------------------------------------------------------------


def run_both(processes, **changes):
    options = {"gradients": True} | changes
    return processes.values("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS, **options)


def assert_same_arrays(one, other):
    for rank in range(RANKS):
        for a, b in zip(one[rank], other[rank], strict=True):
            assert a.tobytes() == b.tobytes(), f"rank {rank}"


def assert_survivor_is_well(processes):
    processes[0].start("is_well")
    assert processes[0].value()
    processes.join()
    assert_same_arrays(run_both(processes), in_one_process(PROCESS_CASE, PROCESS_TOKENS, True))


def assert_timed_out(answer):
    assert answer.error == "WaitTimeoutError", f"{answer.error}: {answer.text}"
    assert TIMEOUT_S <= answer.seconds < TIMEOUT_S + 1
    for word in ("rank 0 waited", "phase", "rank 1", "epoch", "expected", "seen"):
        assert word in answer.text, answer.text


def test_processes_give_the_bits_of_one_process(processes):
    processes.join()
    expected = in_one_process(PROCESS_CASE, PROCESS_TOKENS, True)
    assert_same_arrays(run_both(processes), expected)
    assert_same_arrays(run_both(processes, count=50), expected)


def test_a_process_that_is_killed_between_forward_and_backward_is_named(processes):
    processes.join(timeout_s=TIMEOUT_S)
    run_both(processes)
    processes[0].start("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS, gradients=True)
    processes[1].start("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS)
    processes[1].value()
    processes[1].kill()
    assert_timed_out(processes[0].answer())
    assert_survivor_is_well(processes)


def test_a_late_process_is_no_fault(processes):
    processes.join()
    first = run_both(processes)
    assert_same_arrays(run_both(processes, delay=[0.0, 2.0]), first)
