"""Ranks as processes that tests may stop, kill and question: what the fault tests share.

A `RankProcess` is forked from a server that has imported torch and flashmoe once, so that a test of
three ranks starts in a tenth of a second. It runs one method of `Rank` at a time and answers with
what it returned or raised.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import flashmoe
import numpy as np
import rank_process
import torch
from flashmoe import _core, passes
from flashmoe.group import Group
from flashmoe.inputs import make_operands
from ranks_common import SMALL, narrow, open_groups, run_step

SHARED_MEMORY = Path("/dev/shm")
CASE = SMALL
PHASES = ("route", "plan", "push", "up", "down", "weight", "return", "combine")  # fm_phase

_context = multiprocessing.get_context("forkserver")
# With what the first call would import, two seconds a process.
_context.set_forkserver_preload(["torch._dynamo", "tvm_ffi", "flashmoe.passes", "flashmoe.ops"])
OURS = f"faults{os.getpid()}-"  # how the tokens of this run start
_tokens = (f"{OURS}{number}" for number in itertools.count())


def new_token():
    return next(_tokens)


def segments(token=None):
    """Names in shared memory of a token, or of any of this run."""
    start = f"flashmoe-{token}-" if token else f"flashmoe-{OURS}"
    return {path.name for path in SHARED_MEMORY.glob(f"{start}*")}


def expected_outputs(world):
    """Outputs and gradients of each rank of a correct step, as arrays."""
    with open_groups(world) as groups:
        operands = make_operands(CASE, CASE.steps(world)[0], "fp32", 0)
        calls = [
            passes.rank_call(CASE, operands, "fp32", r, world, groups[r]) for r in range(world)
        ]
        results = passes.on_all_ranks(lambda r: passes.run_rank(calls[r], gradients=True), world)
        run_step(CASE, groups)
    return [arrays(outputs) for outputs, _ in results]


def arrays(outputs):
    return {name: value.numpy() for name, value in outputs.items()}


class Rank:
    """What a rank process can be asked to do."""

    def __init__(self):
        self.group = None
        torch.set_num_threads(1)

    def join(self, token, rank, world, creation_s=20.0, **options):
        """Makes this process a rank of a new group; options as of `Group.set`."""
        self.leave()
        os.environ["FLASHMOE_TIMEOUT_S"] = str(creation_s)
        handle = _core.engine().group_shm(token, rank, world)
        self.group = Group(handle, f"{token}:{rank}")
        for key, value in {"num_threads": 1, **options}.items():
            self.group.set(key, value)

    def leave(self):
        if self.group:
            self.group.close()
        self.group = None

    def call(self, dtype="fp32"):
        operands = make_operands(CASE, CASE.steps(self.group.world)[0], dtype, 0)
        return passes.rank_call(
            CASE, operands, dtype, self.group.rank, self.group.world, self.group
        )

    def step(self, stop_in=None, direction="forward", again=False):
        """One forward and backward, with `again` two. `stop_in`: the phase at whose first task the
        process is to stop."""

        def arm():
            self.group.set("stop_in_phase", PHASES.index(stop_in) + 1)

        if stop_in and direction == "forward":
            arm()
        armed_later = arm if stop_in and direction == "backward" else None
        outputs, _ = passes.run_rank(self.call(), gradients=True, after_forward=armed_later)
        return self.step() if again else arrays(outputs)

    def steps(self, count, expected):
        """`count` steps, every one of them compared with `expected`, bit by bit."""
        call = self.call()
        for step in range(count):
            outputs, _ = passes.run_rank(call, gradients=True)
            for name, value in arrays(outputs).items():
                if value.tobytes() != expected[name].tobytes():
                    raise AssertionError(f"{name} of step {step} differs")
        return count

    def misuse(self, kind):
        """A step that is not the one of the other ranks."""
        return MISUSES[kind](self)

    def late(self, seconds, expected):
        time.sleep(seconds)
        return self.steps(1, expected)

    def abort_in(self, seconds):
        """Waits in a call that another thread aborts: time of the abort and of its end, text."""
        when = []

        def abort():
            when.append(time.monotonic())
            self.group.abort("the user pressed stop")

        timer = threading.Timer(seconds, abort)
        timer.start()
        try:
            self.step()
        except flashmoe.errors.GroupAbortedError as error:
            return when[0], time.monotonic(), str(error)
        finally:
            timer.join()
        raise AssertionError("the call was not aborted")

    def leave_by(self, way):
        """Ends the process in one of the ways that a program ends."""
        if way == "exit":
            sys.exit(0)
        if way == "hard exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGTERM if way == "SIGTERM" else signal.SIGABRT)

    def group_cycles(self, token, rank, world, count, expected):
        """Makes a group, runs a step and closes it, `count` times; resources before and after."""
        for cycle in range(count):
            self.join(f"{token}-{cycle}", rank, world)
            if cycle % 10 == 0:
                self.steps(1, expected)
            self.leave()
            if cycle == min(count // 10, 50):
                before = resources()
        return before, resources()

    def thread_cycles(self, count):
        """As `group_cycles` with four ranks that are threads of this process."""

        def settled():
            time.sleep(0.5)  # a thread that Python has joined may still be about to end
            return resources()

        for cycle in range(count):
            groups = flashmoe.local_group(4)
            if cycle % 10 == 0:
                results = passes.on_all_ranks(lambda r, groups=groups: soak(groups[r], 3, 1), 4)
                assert all(isinstance(result, tuple) for result in results), results
            for group in groups:
                group.close()
            if cycle == 100:
                before = settled()
        return before, settled()

    def two_groups(self, tokens, rank, world, count, expected):
        """Two groups over the same processes, each used by a thread of its own, at once."""
        ends = []
        for token in tokens:
            ends.append(Rank())
            ends[-1].join(token, rank, world)
        results = passes.on_all_ranks(lambda end: ends[end].steps(count, expected), len(ends))
        for end in ends:
            end.leave()
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def two_threads(self):
        """Two threads call the same group at once: what each of them raised or gave."""
        calls = [self.call(), self.call()]
        results = passes.on_all_ranks(lambda idx: passes.run_rank(calls[idx], gradients=False), 2)
        return [
            (type(result).__name__, str(result)) if isinstance(result, Exception) else None
            for result in results
        ]

    def soak(self, launches, seed):
        return soak(self.group, launches, seed)


def raises(rank):
    raise RuntimeError(f"the loader of rank {rank.group.rank} failed")


def other_direction(rank):
    """A second forward where the others are in their backward."""
    passes.run_rank(rank.call(), gradients=False)
    return passes.run_rank(rank.call(), gradients=False)


def with_cut(rank, cut):
    call = rank.call()
    cut(call)
    return passes.run_rank(call, gradients=True)


def fewer_experts_a_token(call):
    call.options["top_k"] = CASE.top_k - 1


def other_layer(call):
    call.options["layer_id"] = 7


MISUSES = {
    "raises": raises,
    "direction": other_direction,
    "shape": lambda rank: with_cut(rank, narrow),
    "top_k": lambda rank: with_cut(rank, fewer_experts_a_token),
    "layer": lambda rank: with_cut(rank, other_layer),
    "dtype": lambda rank: passes.run_rank(rank.call("fp64"), gradients=True),
}


def resources():
    """Open files, mappings of shared memory, threads and resident MiB of this process."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        mapped = sum("/dev/shm/flashmoe" in line for line in maps)
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "segments": mapped,
        "threads": len(os.listdir("/proc/self/task")),
        "resident": resident,
    }


# ---- many launches ----------------------------------------------------------------------------

WRAP = 2**32
SOAK_EXPERTS, SOAK_HIDDEN, SOAK_INTERMEDIATE, SOAK_TOP_K, SOAK_TOKENS = 8, 8, 4, 2, 6
SOAK_BATCH = 100  # launches whose operands and results NumPy makes at once


def soak_weights():
    """Small whole numbers: every product and sum is exact, so that results are compared exactly."""
    generator = np.random.default_rng(1)
    w_up = generator.integers(-3, 4, (SOAK_EXPERTS, SOAK_INTERMEDIATE, SOAK_HIDDEN))
    w_down = generator.integers(-3, 4, (SOAK_EXPERTS, SOAK_HIDDEN, SOAK_INTERMEDIATE))
    return w_up.astype(np.float32), w_down.astype(np.float32)


def soak_operands(generator, whole):
    """x, ids, weights and the right y of a batch of launches, tokens first cut by their number."""
    batch = (SOAK_BATCH, SOAK_TOKENS)
    x = generator.integers(-4, 5, (*batch, SOAK_HIDDEN)).astype(np.float32)
    ids = generator.integers(-1, SOAK_EXPERTS, (*batch, SOAK_TOP_K))
    weights = generator.integers(-2, 3, (*batch, SOAK_TOP_K)).astype(np.float32)
    rows = np.einsum("btkij,btj->btki", whole[ids], x)
    right = (np.where(ids < 0, 0, weights)[..., None] * rows).sum(2)
    tokens = generator.integers(0, SOAK_TOKENS + 1, SOAK_BATCH)
    for launch, count in enumerate(tokens):
        yield tuple(array[launch, :count] for array in (x, ids, weights, right))


def soak(group, launches, seed):
    """Forwards with a new number of tokens, new tokens and a new routing each time; every result is
    compared with NumPy's. Returns the last epoch and the resources at a tenth and at the end."""
    w_up, w_down = soak_weights()
    share = SOAK_EXPERTS // group.world
    mine = slice(group.rank * share, (group.rank + 1) * share)
    local = [torch.from_numpy(w[mine].copy()) for w in (w_up, w_down)]
    whole = (w_down @ w_up).astype(np.float64)
    generator = np.random.default_rng([seed, group.rank])
    batches = itertools.chain.from_iterable(
        soak_operands(generator, whole) for _ in itertools.count()
    )
    before = None
    for launch, (x, ids, weights, right) in enumerate(itertools.islice(batches, launches)):
        tensors = [torch.from_numpy(array) for array in (x, ids, weights)]
        y = flashmoe.experts(
            *tensors, *local, activation="identity", num_experts=SOAK_EXPERTS, group=group
        )
        if not np.array_equal(y.numpy(), right):
            raise AssertionError(f"launch {launch} of rank {group.rank} is wrong")
        if launch == launches // 10:
            before = resources()
    return group.stats()["epoch"], before, resources()


# ---- the processes ----------------------------------------------------------------------------


class RankProcess(rank_process.RankProcess):
    def __init__(self, log):
        super().__init__(_context, Rank, log=log)


class Ranks(rank_process.RankProcesses):
    """The rank processes of a test, in the order of their ranks."""

    def join(self, **options):
        """Makes them the ranks of one new group."""
        super().join(new_token(), **options)

    def assert_all_right(self, count):
        """`count` steps on every rank with the right bits."""
        for answer in self.all("steps", count=count, expected=expected_outputs(len(self))):
            assert answer.value == count, f"{answer.error}: {answer.text}"

    def assert_recovers(self, calls=100):
        """They form a new group and make correct calls, a forward and a backward in turn."""
        self.join()
        self.assert_all_right(calls // 2)
        for process in self:
            process.start("leave")
            process.value()

    def printed(self):
        return "".join(process.log.read_text() for process in self)


@contextmanager
def rank_processes(count, directory, **options):
    """`count` processes, joined to one group; killed in the end. Nothing may be left of them."""
    ranks = Ranks(RankProcess(directory / f"rank{rank}.log") for rank in range(count))
    try:
        ranks.join(**options)
        yield ranks
    finally:
        ranks.close()
    assert not segments()
