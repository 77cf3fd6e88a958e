"""What ranks do to each other when one is wrong, late, silent or dead: a named error on every rank,
in bounded time, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from flashmoe import errors, passes
from flashmoe.inputs import make_operands
from ranks_common import SMALL, assert_same_bits, configure, narrow, open_groups, run_step

CASE = SMALL


def calls_of(groups, dtype="fp32"):
    world = len(groups)
    operands = make_operands(CASE, CASE.steps(world)[0], dtype)
    return [passes.rank_call(CASE, operands, dtype, r, world, groups[r]) for r in range(world)]


def answers(groups, spoil):
    """What each rank's forward and backward gave, or raised, after spoil(rank, call)."""
    calls = calls_of(groups)

    def on_rank(rank):
        spoil(rank, calls[rank])
        return passes.run_rank(calls[rank], gradients=True)

    return passes.on_all_ranks(on_rank, len(groups))


def raises(rank, call):
    if rank == 1:
        raise RuntimeError("the loader of rank 1 failed")


def wrong_activation(rank, call):
    if rank == 1:
        call.options["activation"] = "swish"


def wrong_bias(rank, call):
    if rank == 1:
        call.weights["b_up"] = torch.zeros(3, 3)


def nan_logits(rank, call):
    if rank == 1:
        call.x[0] = float("nan")


BAD_CALLS = {
    "python": (wrong_activation, ValueError, "swish"),
    "engine": (wrong_bias, ValueError, "b_up"),
    "router": (nan_logits, errors.RoutingError, "logits"),
}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("spoil", "error", "word"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_one_rank_with_a_bad_argument(num_ranks, spoil, error, word):
    with open_groups(num_ranks) as groups:
        first = run_step(CASE, groups)
        for _ in range(3):
            for rank, answer in enumerate(answers(groups, spoil)):
                assert isinstance(answer, error if rank == 1 else errors.RankMismatchError), answer
                assert word in str(answer)
                assert rank == 1 or "rank 1" in str(answer)
            assert_same_bits(first, run_step(CASE, groups))


def other_hidden(rank, call):
    if rank == 1:
        narrow(call)


def other_dtype(rank, call):
    if rank == 1:
        call.x, call.grad_y = call.x.bfloat16(), call.grad_y.bfloat16()
        call.weights = {name: value.bfloat16() for name, value in call.weights.items()}


def other_top_k(rank, call):
    if rank == 1:
        call.options["top_k"] = 3


def other_experts(rank, call):
    if rank == 1:
        call.options["num_experts"] = None
        call.weights = {name: value[:-1].contiguous() for name, value in call.weights.items()}
        call.routing = {
            name: value[: call.weights["w_up"].shape[0] * call.options["group"].world].contiguous()
            for name, value in call.routing.items()
        }


def other_capacity(rank, call):
    if rank == 1:
        call.options["capacity_factor"] = 1.0


DISAGREEMENTS = {
    "hidden": (other_hidden, "hidden size", ("40", "32")),
    "dtype": (other_dtype, "dtype", ()),
    "top_k": (other_top_k, "top_k", ("3", "4")),
    "num_experts": (other_experts, "num_experts", ("24",)),
    "capacity": (other_capacity, "capacity_factor", ("0", "1")),
}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("spoil", "field", "values"), DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys()
)
def test_ranks_that_disagree(num_ranks, spoil, field, values):
    with open_groups(num_ranks) as groups:
        first = run_step(CASE, groups)
        for answer in answers(groups, spoil):
            assert isinstance(answer, errors.RankMismatchError), answer
            assert field in str(answer) and "rank 1" in str(answer)
            assert all(value in str(answer) for value in values)
        assert_same_bits(first, run_step(CASE, groups))


def test_forward_meets_backward():
    with open_groups(2) as groups:
        first = run_step(CASE, groups)
        calls = calls_of(groups)

        def mixed(rank):
            y, _ = passes.call_layer(calls[rank])
            if rank == 0:
                return passes.call_layer(calls[rank])
            return torch.autograd.grad(y, calls[rank].x, calls[rank].grad_y)

        for call in calls:
            call.x.requires_grad_(True)
        for answer in passes.on_all_ranks(mixed, 2):
            assert isinstance(answer, errors.RankMismatchError), answer
            assert "operation" in str(answer)
        assert_same_bits(first, run_step(CASE, groups))


def silent(groups, missing, function):
    """What function(rank) gave on every rank but the missing one, and the seconds it took."""
    start = time.perf_counter()
    given = passes.on_all_ranks(
        lambda rank: None if rank == missing else function(rank), len(groups)
    )
    return given, time.perf_counter() - start


TIMEOUT_S = 0.4
SLACK_S = 5.0  # of a busy machine


@pytest.mark.parametrize("steps_before", [0, 1], ids=["first_call", "later_call"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_rank_that_skips_the_call(num_ranks, steps_before):
    """The waits end at their bound and say who waited where for whom, and for what."""
    with open_groups(num_ranks) as groups:
        calls = calls_of(groups)
        for _ in range(steps_before):
            run_step(CASE, groups)
        configure(groups, timeout_s=TIMEOUT_S)
        given, seconds = silent(groups, 1, lambda rank: passes.call_layer(calls[rank]))
        assert TIMEOUT_S <= seconds < TIMEOUT_S + SLACK_S
        timeouts = [answer for answer in given if isinstance(answer, errors.WaitTimeoutError)]
        aborts = [answer for answer in given if isinstance(answer, errors.GroupAbortedError)]
        assert timeouts and len(timeouts) + len(aborts) == num_ranks - 1, given
        for answer in (*timeouts, *aborts):
            text = str(answer)
            for word in ("waited 0.4 s", "phase", "rank 1", "epoch", "expected", "seen"):
                assert word in text, text
        later, _ = silent(groups, None, lambda rank: passes.call_layer(calls[rank]))
        for answer in later:  # the group is over, and says so
            assert isinstance(answer, errors.FlashMoEError), answer
    with open_groups(num_ranks) as groups:  # a new one works
        run_step(CASE, groups)


def test_rank_that_is_late_but_in_time():
    with open_groups(2, timeout_s=20) as groups:
        first = run_step(CASE, groups)
        late = answers(groups, lambda rank, call: time.sleep(0.5 * rank))
        assert_same_bits(first, passes.gather(CASE, [outputs for outputs, _ in late], []).outputs)


def test_no_bound():
    """timeout_s 0 waits as long as it takes: here until the group is aborted."""
    with open_groups(2, timeout_s=0) as groups:
        calls = calls_of(groups)
        timer = threading.Timer(1.0, groups[1].abort, ("enough",))
        start = time.perf_counter()
        timer.start()
        (waiting, _), _ = silent(groups, 1, lambda rank: passes.call_layer(calls[rank]))
        seconds = time.perf_counter() - start
        timer.join()
    assert isinstance(waiting, errors.GroupAbortedError) and "enough" in str(waiting)
    assert seconds >= 1.0


@pytest.mark.parametrize("aborted", [0, 1], ids=["own", "of_a_peer"])
def test_abort_ends_waits_within_a_tenth_of_a_second(aborted):
    """From any thread, through any rank's end of the group; the best of three on a busy machine."""
    fastest = 60.0
    for _ in range(3):
        with open_groups(2) as groups:
            run_step(CASE, groups)
            calls = calls_of(groups)
            ended = []

            def wait(call=calls[0], ended=ended):
                try:
                    passes.call_layer(call)
                except errors.GroupAbortedError as error:
                    ended.append((time.perf_counter(), str(error)))

            thread = threading.Thread(target=wait)
            thread.start()
            time.sleep(0.3)
            start = time.perf_counter()
            groups[aborted].abort("the user pressed stop")
            thread.join()
        (when, text), *_ = ended
        assert "the user pressed stop" in text and f"rank {aborted}" in text
        fastest = min(fastest, when - start)
    assert fastest < 0.1


def test_hundred_calls_after_an_abort():
    """In the same process, on a new group, as if nothing had been."""
    with open_groups(2) as groups:
        first = run_step(CASE, groups)
        groups[0].abort("no more")
        for answer in answers(groups, lambda rank, call: None):
            assert isinstance(answer, errors.GroupAbortedError), answer
    with open_groups(2) as groups:
        for _ in range(50):  # of a forward and a backward each
            assert_same_bits(first, run_step(CASE, groups))


def test_exception_outside_the_layer_does_not_hang_the_peers():
    with open_groups(2, timeout_s=TIMEOUT_S) as groups:
        waiting, failed = answers(groups, raises)
    assert isinstance(failed, RuntimeError) and "loader" in str(failed)
    assert isinstance(waiting, errors.WaitTimeoutError), waiting


def test_refuse_spares_the_peers_the_wait():
    """A caller that catches its own error tells the peers, and the group goes on."""
    with open_groups(2) as groups:
        first = run_step(CASE, groups)
        calls = calls_of(groups)

        def on_rank(rank):
            if rank == 1:
                return groups[1].refuse("the loader of rank 1 failed")
            return passes.call_layer(calls[rank])

        told, _ = passes.on_all_ranks(on_rank, 2)
        assert isinstance(told, errors.RankMismatchError) and "loader" in str(told)
        configure(groups, timeout_s=30)
        assert_same_bits(first, run_step(CASE, groups))


SHARED_MEMORY = Path("/dev/shm")

PROCESS = """
    import sys
    import torch
    import torch.distributed as dist
    import flashmoe

    torch.set_num_threads(1)
    rank, steps = int(sys.argv[1]), int(sys.argv[3])
    dist.init_process_group(
        "gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2
    )
    layer = flashmoe.MoE(64, 32, 4, 2, group=dist.group.WORLD)
    x = torch.randn(200, 64)
    for step in range(steps):
        layer(x[: 1 + step % 200]).sum().backward()
        if step == 2:
            print("ready", flush=True)
    print("done", flush=True)
"""


def start_processes(store, steps):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(rank), store, str(steps)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "FLASHMOE_TIMEOUT_S": "2"},
        )
        for rank in range(2)
    ]


def segments():
    return {path.name for path in SHARED_MEMORY.glob("flashmoe-*")}


def assert_nothing_left(before):
    """No new segment stays; those of groups that others are making vanish by themselves."""
    deadline = time.monotonic() + 20
    while segments() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not segments() - before


@pytest.mark.slow
def test_nothing_is_left_in_shared_memory(tmp_path):
    before = segments()
    for process in start_processes(tmp_path / "store", 6):
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert output.split() == ["ready", "done"]
    assert_nothing_left(before)


@pytest.mark.slow
def test_nothing_is_left_when_all_ranks_are_killed(tmp_path):
    before = segments()
    processes = start_processes(tmp_path / "store", 10**9)
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert_nothing_left(before)


@pytest.mark.slow
def test_killed_peer_ends_the_wait_of_the_other(tmp_path):
    """The survivor gets an error that names the dead rank, within its bound."""
    survivor, victim = start_processes(tmp_path / "store", 10**9)
    try:
        for process in (survivor, victim):
            assert process.stdout.readline() == "ready\n"
        victim.send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, error = survivor.communicate(timeout=60)
        assert time.monotonic() - start < 2 + 3 * SLACK_S
    finally:
        for process in (survivor, victim):
            process.kill()
            process.communicate()
    assert survivor.returncode == 1
    assert "WaitTimeoutError" in error and "rank 1 is gone" in error, error[-2000:]
