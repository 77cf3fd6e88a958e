"""Two ranks on two GPUs: values, state and faults, as threads, as one thread and as processes."""

import signal
import threading
import time

import flashmoe
import pytest
import torch
from cuda_products import count_graph_nodes
from flashmoe import check
from flashmoe.cases import Case
from flashmoe.check import same_bits as same_tensors
from flashmoe.errors import (
    GroupAbortedError,
    OutOfMemoryError,
    RankMismatchError,
    RoutingError,
    UnsupportedError,
    WaitTimeoutError,
)
from flashmoe.inputs import make_operands, on_device
from flashmoe.passes import engine_pass, reference_pass
from gpu_ranks import (
    MORE_CASES,
    TIMEOUT_S,
    Processes,
    call_all,
    finish_all,
    finished,
    in_one_process,
    shards,
    synchronize,
)
from layer_common import make_layer, same_bits

RANKS = 2
REPLAYS = 200
WRAP = 2**32  # after the last epoch before it comes 2
TOO_MUCH = {"hidden": 65536}  # of a million tokens: more than any GPU has
WAITED = r"rank 0 waited .* s in phase (plan|push|combine) .*rank 1: epoch \d+, expected \d+, seen"
TABLE = [
    (mode, case, dtype)
    for mode, case, dtype, ranks in check.planned(device="cuda", ranks=RANKS, dtype="bf16")
    if RANKS in case.ranks and not case.refused and not case.save_z
]
PROCESS_CASE = Case("ranks/processes", hidden=256, intermediate=192, experts=16, top_k=4, bias=True)
PROCESS_TOKENS = (300, 129)


@pytest.fixture(scope="module")
def processes():
    made = Processes()
    yield made
    made.close()


# ---- values ----------------------------------------------------------------------------------


def run_case(case, dtype, pool):
    record = check.Record(case.name, dtype, RANKS, "values", device="cuda")
    check.check_case(case, record, pool)
    assert record.status == "passed", record.reason


@pytest.mark.parametrize(
    ("case", "dtype"), [row[1:] for row in TABLE], ids=[f"{row[0]}-{row[1].name}" for row in TABLE]
)
def test_case_table(case, dtype, pool):
    run_case(case, dtype, pool)


@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_more_cases(case, pool):
    run_case(case, "bf16", pool)


def test_float16(pool):
    run_case(MORE_CASES[0], "fp16", pool)


def test_the_cpu_engine_agrees():
    """Both are as near to fp64 as plain PyTorch, and so they are near to each other."""
    case = Case("ranks/cpu", ids="uniform", hidden=256, intermediate=128, experts=16, top_k=4)
    operands = make_operands(case, (200, 333), "bf16")
    results = {}
    for device in ("cpu", "cuda"):
        made = flashmoe.local_group(RANKS, device=device, max_tokens=333)
        results[device] = engine_pass(case, on_device(operands, device), "bf16", made, False)
        synchronize()
        for group in made:
            group.close()
    oracle = reference_pass(case, operands, operands.topk_ids, torch.float64, False, mirrored=True)
    plain = reference_pass(case, operands, operands.topk_ids, torch.bfloat16, False)
    for rank in range(RANKS):
        on_gpu, on_cpu = (results[d].outputs["y"][rank].cpu().double() for d in ("cuda", "cpu"))
        yardstick = (plain["y"][rank].double() - oracle["y"][rank]).norm()
        assert (on_gpu - on_cpu).norm() <= 2.5 * yardstick, f"rank {rank}"


def test_counts_are_of_the_ranks_own_tokens(groups):
    layers = shards(tokens=(300, 200), capacity_factor=0.8)
    outputs = finished(call_all(layers, groups), groups)
    for layer, (_, ids, _, _, tokens_per_expert, dropped) in zip(layers, outputs, strict=True):
        assert torch.equal(tokens_per_expert, ids.flatten().bincount(minlength=16))
        kept = tokens_per_expert.clamp(max=-(-4 * len(layer.x) * 8 // 160))
        assert int(dropped) == int((tokens_per_expert - kept).sum())


# ---- one process -----------------------------------------------------------------------------


def test_one_thread_and_one_thread_a_rank_give_the_same_bits(groups):
    layers = shards()
    in_turn = finished(call_all(layers, groups), groups)
    made = [None, None]

    def work(rank):
        y, routed = layers[rank](groups[rank])
        made[rank] = (y, *routed)

    for _ in range(20):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one, other in zip(finished(made, groups), in_turn, strict=True):
            assert same_bits(one, other)


@pytest.mark.parametrize("max_sms", [0, 6, 66])
def test_100_runs(max_sms, groups):
    layers = shards(tokens=(1500, 700), experts=32, hidden=512)
    first = finished(call_all(layers, groups), groups)
    for group in groups:
        group.set("max_sms", max_sms)
    differs = [torch.zeros(1, dtype=torch.int64, device=f"cuda:{rank}") for rank in range(RANKS)]
    kept = [[tensor.to(f"cuda:{rank}") for tensor in one] for rank, one in enumerate(first)]
    for _ in range(100):
        for rank, outputs in enumerate(call_all(layers, groups)):
            for one, other in zip(outputs, kept[rank], strict=True):
                differs[rank] += (one.view(torch.uint8) != other.view(torch.uint8)).any()
    finish_all(groups)
    assert [int(one) for one in differs] == [0, 0]


def test_tokens_change_from_call_to_call(groups):
    sizes = [(1, 700), (700, 1), (0, 64), (65, 0), (0, 0), (513, 1025), (3, 3), (2000, 2048)]
    layers = [shards(tokens=tokens) for tokens in sizes]
    expected = [finished(call_all(pair, groups), groups) for pair in layers]
    made = [(step % len(sizes), call_all(layers[step % len(sizes)], groups)) for step in range(400)]
    finish_all(groups)
    for idx, outputs in made:
        for one, other in zip(outputs, expected[idx], strict=True):
            assert same_bits([tensor.cpu() for tensor in one], other), sizes[idx]


def test_layers_and_groups_take_turns(groups):
    others = flashmoe.local_group(RANKS, device="cuda", max_tokens=4096)
    both = [groups, others]
    for one in both:
        one[0].reserve(4096, hidden=1024, top_k=8, num_experts=64)
    layers = [
        shards(),
        shards(experts=64, top_k=8, hidden=1024, tokens=(100, 900), seed=1),
        shards(experts=4, top_k=1, hidden=64, tokens=(17, 0), seed=2),
    ]
    expected = [finished(call_all(pair, groups), groups) for pair in layers]
    for step in range(60):
        used = both[step % 2]
        outputs = finished(call_all(layers[step % 3], used), used)
        assert all(same_bits(*pair) for pair in zip(outputs, expected[step % 3], strict=True))
    for group in others:
        group.close()


def capture(layer, group):
    """(graph, outputs) of a call, on the GPU of the layer."""
    with torch.cuda.device(layer.x.device):
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # torch's own stream for captures is of the device that captured first.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            y, routed = layer(group)
        return graph, (y, *routed)


def test_graphs_of_one_kernel_a_rank_follow_inputs_and_routing(groups):
    layers = shards(tokens=(500, 300), capacity_factor=0.9)
    eager = flashmoe.local_group(RANKS, device="cuda", max_tokens=4096)
    finished(call_all(layers, groups), groups)
    captured = [capture(*pair) for pair in zip(layers, groups, strict=True)]
    for graph, _ in captured:
        assert count_graph_nodes(graph) == ["kernel"]
        graph.instantiate()
    generators = [torch.Generator(f"cuda:{rank}").manual_seed(rank) for rank in range(RANKS)]
    differs = [torch.zeros(1, dtype=torch.int64, device=f"cuda:{rank}") for rank in range(RANKS)]

    def compare_with_eager():
        again = call_all(layers, eager)
        for rank, (_, outputs) in enumerate(captured):
            for one, other in zip(outputs, again[rank], strict=True):
                differs[rank] += (one.view(torch.uint8) != other.view(torch.uint8)).any()

    for replay in range(REPLAYS):
        shift = replay % 7 == 0
        for layer, generator in zip(layers, generators, strict=True):
            layer.x.normal_(generator=generator)
            layer.w_router.copy_(layer.w_router.roll(int(shift), dims=0))
        for _, outputs in captured:
            for tensor in outputs:
                tensor.fill_(-1)
        for graph, _ in captured:
            graph.replay()
        compare_with_eager()
    finish_all([*groups, *eager])
    assert [int(one) for one in differs] == [0, 0]
    for group in eager:
        group.close()


def test_a_graph_survives_a_reservation(groups):
    layers = shards()
    expected = finished(call_all(layers, groups), groups)
    captured = [capture(*pair) for pair in zip(layers, groups, strict=True)]
    for group in groups:
        group.reserve(6000)
    large = shards(tokens=(6000, 5000))
    finished(call_all(large, groups), groups)
    for graph, outputs in captured:
        outputs[0].fill_(-1)
        graph.instantiate()
    for graph, _ in captured:
        graph.replay()
    outputs = finished([outputs for _, outputs in captured], groups)
    assert all(same_bits(*pair) for pair in zip(outputs, expected, strict=True))


def test_memory_is_reported_and_taken_once(groups):
    layers = shards(tokens=(1000, 400))
    finished(call_all(layers, groups), groups)
    stats = [group.stats() for group in groups]
    free = [torch.cuda.mem_get_info(rank)[0] for rank in range(RANKS)]
    row_bytes = 3 * RANKS * 4096 * 256 * 2  # received, their gradients and partial rows
    for one in stats:
        assert row_bytes <= one["symmetric_bytes"] < 2 * row_bytes + (8 << 20)
    for _ in range(20):
        finished(call_all(layers, groups), groups)
    assert [torch.cuda.mem_get_info(rank)[0] for rank in range(RANKS)] == free
    assert [group.stats()["symmetric_bytes"] for group in groups] == [
        one["symmetric_bytes"] for one in stats
    ]


def test_ranks_that_share_a_gpu_take_a_part_each():
    made = flashmoe.local_group(RANKS, device="cuda", devices=[0, 0], max_tokens=1024)
    layers = shards()
    with pytest.raises(UnsupportedError, match=r"2 ranks share CUDA device 0.*max_sms"):
        layers[0](made[0])
    for group in made:
        group.close()


# ---- wrong calls and faults, in one process ----------------------------------------------------


def assert_new_group_works():
    fresh = flashmoe.local_group(RANKS, device="cuda", max_tokens=1024)
    layers = shards()
    outputs = finished(call_all(layers, fresh), fresh)
    assert all(one[0].isfinite().all() for one in outputs)
    y, _ = make_layer()()
    assert y.isfinite().all()
    for group in fresh:
        group.close()


def test_a_call_beyond_the_memory_says_what_to_reserve(groups):
    finished(call_all(shards(), groups), groups)
    large = shards(tokens=(300, 5000))
    large[0](groups[0])
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"5000 tokens.*made for 4096.*reserve\(max_tokens=5000"):
        large[1](groups[1])
    synchronize()
    assert time.monotonic() - start < 0.5
    with pytest.raises(GroupAbortedError, match=r"rank 1: .*reserve"):
        groups[0].stats()
    with pytest.raises(GroupAbortedError, match=r"rank 1: .*reserve"):
        large[0](groups[0])
    assert_new_group_works()


def test_a_reservation_makes_room(groups):
    finished(call_all(shards(), groups), groups)
    before = groups[0].stats()["symmetric_bytes"]
    for group in groups:
        group.reserve(5000, hidden=512)
    layers = shards(tokens=(300, 5000), hidden=512)
    outputs = finished(call_all(layers, groups), groups)
    assert outputs[1][0].isfinite().all()
    assert groups[0].stats()["symmetric_bytes"] > before


def test_a_capture_before_the_first_call_says_what_to_do(groups):
    layers = shards()
    with pytest.raises(ValueError, match="before capturing"):
        capture(layers[0], groups[0])
    assert_new_group_works()


def test_operands_on_another_gpu_are_named(groups):
    layers = shards()
    with pytest.raises(ValueError, match=r"rank 1 are on CUDA device 0.*rank's device is 1"):
        layers[0](groups[1])


def test_a_wait_for_a_rank_that_never_comes(groups):
    layers = shards()
    finished(call_all(layers, groups), groups)
    for group in groups:
        group.set("timeout_s", TIMEOUT_S)
    start = time.monotonic()
    layers[0](groups[0])
    synchronize()
    with pytest.raises(WaitTimeoutError, match=WAITED):
        groups[0].stats()
    assert TIMEOUT_S <= time.monotonic() - start < TIMEOUT_S + 1
    with pytest.raises(GroupAbortedError, match="rank 0 waited"):
        layers[1](groups[1])
    assert_new_group_works()


def test_a_late_rank_is_no_fault(groups):
    layers = shards()
    expected = finished(call_all(layers, groups), groups)
    made = []
    for layer, group in zip(layers, groups, strict=True):
        y, routed = layer(group)
        made.append((y, *routed))
        time.sleep(1.0)
    for one, other in zip(finished(made, groups), expected, strict=True):
        assert same_bits(one, other)


def test_abort_from_another_thread_frees_the_wait(groups):
    layers = shards()
    finished(call_all(layers, groups), groups)
    layers[0](groups[0])
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
    with pytest.raises(GroupAbortedError, match="the user pressed stop"):
        layers[0](groups[0])
    assert_new_group_works()


def test_a_wrong_call_of_one_rank_ends_the_others_wait(groups):
    layers = shards()
    finished(call_all(layers, groups), groups)
    layers[0](groups[0])
    start = time.monotonic()
    layers[1].w_down = layers[1].w_down[:, :, :-64].contiguous()
    with pytest.raises(ValueError, match=r"w_down|w_up"):
        layers[1](groups[1])
    synchronize()
    assert time.monotonic() - start < 0.5
    with pytest.raises(GroupAbortedError, match="rank 1"):
        layers[0](groups[0])
    assert_new_group_works()


@pytest.mark.parametrize("change", [{"layer_id": 7}, {"capacity_factor": 2.0}], ids=str)
def test_a_field_that_differs_is_named_on_every_rank(change, groups):
    layers = shards()
    expected = finished(call_all(layers, groups), groups)
    (field,) = change
    options = layers[1].options
    layers[1].options = options | change
    call_all(layers, groups)
    synchronize()
    for group in groups:
        with pytest.raises(RankMismatchError, match=f"{field} differs between ranks"):
            group.stats()
    layers[1].options = options
    for one, other in zip(finished(call_all(layers, groups), groups), expected, strict=True):
        assert same_bits(one, other)


def test_a_mismatch_that_a_call_raises_leaves_the_ranks_in_step(groups):
    layers = shards()
    expected = finished(call_all(layers, groups), groups)
    layers[1].options = {"layer_id": 3}
    call_all(layers, groups)
    synchronize()
    layers[1].options = {}
    for layer, group in zip(layers, groups, strict=True):
        with pytest.raises(RankMismatchError):
            layer(group)
    for one, other in zip(finished(call_all(layers, groups), groups), expected, strict=True):
        assert same_bits(one, other)


def test_undefined_logits_of_one_rank_are_its_own_matter(groups):
    layers = shards()
    expected = finished(call_all(layers, groups), groups)
    bad = 37
    layers[1].x[bad, 5] = float("nan")
    outputs = call_all(layers, groups)
    synchronize()
    groups[0].stats()
    with pytest.raises(RoutingError, match=f"router logits.*token {bad}"):
        groups[1].stats()
    assert same_tensors(outputs[0][0].cpu(), expected[0][0])
    y, others = outputs[1][0].cpu(), torch.arange(200) != bad
    assert y[bad].isnan().all() and same_tensors(y[others], expected[1][0][others])
    layers[1].x[bad, 5] = 0
    finished(call_all(layers, groups), groups)


# ---- reports and the ranks that they must not wait for -----------------------------------------


def spoil(layer, token=37):
    """Gives a token router logits that are not numbers."""
    layer.x[token, 5] = float("nan")
    synchronize()


def call_ahead(layer, group, calls=3):
    """Calls of one rank before any of the others; how often one raised RoutingError."""
    raised = 0
    for _ in range(calls):
        try:
            layer(group)
        except RoutingError:
            raised += 1
        time.sleep(0.1)  # the launch has reported by now, and waits for the other rank
    return raised


def assert_told_once(layers, groups):
    """One thread drives both ranks, the first one three calls ahead."""
    spoil(layers[0])
    start = time.monotonic()
    assert call_ahead(layers[0], groups[0]) == 0
    assert time.monotonic() - start < 20
    for _ in range(3):
        layers[1](groups[1])
    synchronize()
    with pytest.raises(RoutingError, match="token 37"):
        groups[0].stats()
    for group in groups:
        group.stats()


def test_a_report_waits_for_no_rank_that_has_still_to_be_called(groups):
    layers = shards()
    finished(call_all(layers, groups), groups)
    assert_told_once(layers, groups)


def test_scratch_grows_without_waiting_for_a_rank(groups):
    """Larger and larger calls of one rank ahead of the other's."""
    sizes = [(16, 5), (300, 200), (1500, 700), (4000, 3000)]
    layers = [shards(tokens=tokens) for tokens in sizes]
    made = [[], []]
    start = time.monotonic()
    for rank in range(RANKS):
        for pair in layers:
            y, routed = pair[rank](groups[rank])
            made[rank].append((y, *routed))
    assert time.monotonic() - start < 20
    finish_all(groups)
    for idx, pair in enumerate(layers):
        again = finished(call_all(pair, groups), groups)
        for rank in range(RANKS):
            assert same_bits([tensor.cpu() for tensor in made[rank][idx]], again[rank])


class OnStream:
    """A layer of one of the ranks that share a GPU, on a stream of its own."""

    def __init__(self, layer):
        self.layer, self.x, self.stream = layer, layer.x, torch.cuda.Stream(layer.x.device)

    def __call__(self, group):
        with torch.cuda.stream(self.stream):
            return self.layer(group)


def test_a_report_of_ranks_that_share_a_gpu():
    make_layer()()  # loads the kernel, which waits for the launches of the GPU
    made = flashmoe.local_group(RANKS, device="cuda", devices=[0, 0], max_tokens=1024)
    for group in made:
        group.set("max_sms", 32)
    layers = [OnStream(layer) for layer in shards(devices=(0, 0))]
    outputs = finished(call_all(layers, made), made)
    assert all(one[0].isfinite().all() for one in outputs)
    assert_told_once(layers, made)
    for group in made:
        group.close()


def test_an_abort_does_not_hide_what_the_launch_found(groups):
    layers = shards()
    finished(call_all(layers, groups), groups)
    spoil(layers[0])
    layers[0](groups[0])
    time.sleep(0.1)
    groups[1].abort("the user pressed stop")
    synchronize()
    with pytest.raises(GroupAbortedError, match=r"the user pressed stop.*token 37"):
        groups[0].stats()
    assert_new_group_works()


def test_a_wait_that_ran_out_is_not_hidden_by_a_token(groups):
    layers = shards()
    finished(call_all(layers, groups), groups)
    for group in groups:
        group.set("timeout_s", TIMEOUT_S)
    spoil(layers[0])
    layers[0](groups[0])
    synchronize()
    with pytest.raises(WaitTimeoutError, match=WAITED + ".*and before that.*token 37"):
        groups[0].stats()
    assert_new_group_works()


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01, 0.1])
def test_an_abort_while_the_memory_is_made_ends_the_call(delay):
    made = flashmoe.local_group(RANKS, device="cuda", max_tokens=65536)
    layers = shards(hidden=2048)
    timer = threading.Timer(delay, lambda: made[1].abort("the user pressed stop"))
    start = time.monotonic()
    timer.start()
    with pytest.raises(GroupAbortedError, match="the user pressed stop"):
        layers[0](made[0])
        timer.join()
        made[0].stats()
    assert time.monotonic() - start < 5
    timer.join()
    with pytest.raises(GroupAbortedError, match="the user pressed stop"):
        layers[1](made[1])
    for group in made:
        group.close()
    assert_new_group_works()


def test_a_size_beyond_the_limits_is_named_on_every_rank_before_memory_is_made():
    made = flashmoe.local_group(RANKS, device="cuda", max_tokens=2**21)
    for layer, group in zip(shards(), made, strict=True):
        with pytest.raises(UnsupportedError, match=r"tokens \* top_k of a rank is 2097152 \* 4"):
            layer(group)
        assert group.stats()["symmetric_bytes"] == 0
    for group in made:
        group.close()


def test_memory_that_is_not_there_fails_every_rank_by_name():
    made = flashmoe.local_group(RANKS, device="cuda")
    made[0].reserve(2**20, **TOO_MUCH)
    layers = shards()
    for _ in range(2):
        for layer, group in zip(layers, made, strict=True):
            with pytest.raises(OutOfMemoryError, match=r"device \d gives no \d+ bytes"):
                layer(group)
    for group in made:
        group.close()
    assert_new_group_works()


def test_several_ranks_are_explained(groups):
    from flashmoe import bench_cuda

    case = Case("ranks/explained", tokens=(300,), hidden=256, experts=16, top_k=4)
    before = bench_cuda.explain(case, "bf16", groups[0])
    for word in ("ranks   2, of up to 4096 tokens", "region  ", "8 here x 1 group of all sources"):
        assert word in before, before
    finished(call_all(shards(), groups), groups)
    stated = int(before.split("region  ")[1].split()[0])
    assert stated <= groups[0].stats()["symmetric_bytes"] < stated + (4 << 20)
    assert bench_cuda.explain(case, "bf16", groups[0]) == before


# ---- the wrap of the epoch ---------------------------------------------------------------------


def test_the_epoch_is_set_before_the_first_call(groups):
    finished(call_all(shards(), groups), groups)
    for group in groups:
        with pytest.raises(ValueError, match="epoch: can only be set before"):
            group.set("epoch", 7.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_thousand_calls_across_the_wrap():
    calls = 20_000
    sizes = [(1, 33), (33, 1), (0, 17), (64, 0), (0, 0), (65, 5), (3, 3), (20, 48)]
    layers = [shards(tokens=tokens, seed=seed) for seed, tokens in enumerate(sizes)]
    fresh = flashmoe.local_group(RANKS, device="cuda", max_tokens=128)
    expected = [finished(call_all(pair, fresh), fresh) for pair in layers]
    kept = [
        [[tensor.to(f"cuda:{rank}") for tensor in one] for rank, one in enumerate(pair)]
        for pair in expected
    ]
    made = flashmoe.local_group(RANKS, device="cuda", max_tokens=128)
    for group in made:
        group.set("epoch", float(WRAP - calls // 2))
    order = torch.randint(len(sizes), (calls,), generator=torch.Generator().manual_seed(3))
    differs = [torch.zeros(1, dtype=torch.int64, device=f"cuda:{rank}") for rank in range(RANKS)]
    for idx in order.tolist():
        for rank, outputs in enumerate(call_all(layers[idx], made)):
            for one, other in zip(outputs, kept[idx][rank], strict=True):
                differs[rank] += (one.view(torch.uint8) != other.view(torch.uint8)).any()
    finish_all(made)
    assert [int(one) for one in differs] == [0, 0]
    assert [group.stats()["epoch"] for group in made] == [calls // 2 + 2] * RANKS
    for group in [*fresh, *made]:
        group.close()


# ---- processes -------------------------------------------------------------------------------


def run_both(processes, **changes):
    return processes.values("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS, **changes)


def assert_same_arrays(one, other):
    for rank in range(RANKS):
        for a, b in zip(one[rank], other[rank], strict=True):
            assert a.tobytes() == b.tobytes(), f"rank {rank}"


def test_processes_give_the_bits_of_one_process(processes):
    processes.join()
    expected = in_one_process(PROCESS_CASE, PROCESS_TOKENS)
    assert_same_arrays(run_both(processes), expected)
    assert_same_arrays(run_both(processes, count=200), expected)


def test_processes_agree_on_the_largest_call(processes):
    """The first call makes the memory for all ranks; a reservation grows it."""
    processes.join()
    tokens = (10, 3000)
    processes.values("run", case=PROCESS_CASE, tokens=tokens)
    processes.values("run", case=PROCESS_CASE, tokens=tokens[::-1])
    before = processes.values("reserve", tokens=1)
    after = processes.values("reserve", tokens=[4000, 5000])
    assert before[0] == before[1] < after[0] == after[1]
    processes.values("run", case=PROCESS_CASE, tokens=(5000, 4999))


def test_processes_across_the_wrap_of_the_epoch(processes):
    processes.join(epoch=float(WRAP - 100))
    expected = in_one_process(PROCESS_CASE, PROCESS_TOKENS)
    for count in (50, 100, 50):
        assert_same_arrays(run_both(processes, count=count), expected)


def test_memory_that_one_process_needs_and_none_has(processes):
    processes.join()
    processes.values("reserve", tokens=[1, 2**20], **TOO_MUCH)
    for _ in range(2):  # the group goes on
        for answer in processes.all("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS):
            assert answer.error == "OutOfMemoryError", f"{answer.error}: {answer.text}"
            assert "rank 0: device" in answer.text and "gives no" in answer.text
            assert answer.seconds < 30
    assert_survivor_is_well(processes)


def test_a_late_process_is_no_fault(processes):
    processes.join()
    first = run_both(processes)
    assert_same_arrays(run_both(processes, delay=[0.0, 2.0]), first)


def failing_call(processes):
    """Lets rank 0 call alone."""
    processes[0].start("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS)


def assert_survivor_is_well(processes):
    processes[0].start("is_well")
    assert processes[0].value()
    processes.join()
    assert_same_arrays(run_both(processes), in_one_process(PROCESS_CASE, PROCESS_TOKENS))


def assert_timed_out(answer):
    assert answer.error == "WaitTimeoutError", f"{answer.error}: {answer.text}"
    assert TIMEOUT_S <= answer.seconds < TIMEOUT_S + 1
    for word in ("rank 0 waited", "phase", "rank 1", "epoch", "expected", "seen"):
        assert word in answer.text, answer.text


def test_a_killed_process_is_named(processes):
    processes.join(timeout_s=TIMEOUT_S)
    run_both(processes)
    failing_call(processes)
    time.sleep(0.2)
    processes[1].kill()
    assert_timed_out(processes[0].answer())
    assert_survivor_is_well(processes)


def test_a_stopped_process_is_named_and_learns_of_it(processes):
    processes.join(timeout_s=TIMEOUT_S)
    run_both(processes)
    processes[1].signal(signal.SIGSTOP)
    failing_call(processes)
    assert_timed_out(processes[0].answer())
    processes[1].signal(signal.SIGCONT)
    processes[1].start("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS)
    answer = processes[1].answer()
    assert answer.error == "GroupAbortedError" and "rank 0 waited" in answer.text
    assert_survivor_is_well(processes)


def test_a_mismatch_between_processes(processes):
    processes.join()
    first = run_both(processes)
    answers = processes.all("run", case=PROCESS_CASE, tokens=PROCESS_TOKENS, layer_id=[0, 5])
    for answer in answers:
        assert answer.error == "RankMismatchError", f"{answer.error}: {answer.text}"
        assert "layer_id differs between ranks" in answer.text
    assert_same_arrays(run_both(processes), first)


def test_a_first_call_that_one_process_refuses(processes):
    """While its peer waits on the host for the memory."""
    processes.join()
    answers = processes.all(
        "run", case=PROCESS_CASE, tokens=PROCESS_TOKENS, capacity_factor=[None, -1.0]
    )
    assert answers[1].error == "ValueError" and "capacity_factor" in answers[1].text
    assert answers[0].error == "GroupAbortedError" and "capacity_factor" in answers[0].text
    assert answers[0].seconds < 5
    assert_survivor_is_well(processes)


@pytest.mark.parametrize("n_processes", [1, 2], ids=["threads", "processes"])
def test_run_moe(n_processes):
    report = flashmoe.run_moe(
        n_processes, ranks=RANKS, device="cuda", scale=8, tokens=200, repeats=2, quiet=True
    )
    assert report.passed, report.reasons
    assert report.bitwise and report.ranks == RANKS


def test_the_link_between_the_gpus():
    from flashmoe import doctor

    found = doctor.links("gpu links", RANKS)
    assert found.status == "ok" and "GB/s" in found.found, found
