"""Times of several ranks that run the same contenders: round by round, the slowest rank's.

Ranks begin a contender together: in front of it stand a flush of the L2 cache and an all-reduce of
one number, whose end is the same moment on all ranks to within microseconds. Contenders take turns
in random order without a pause (sustained), or have their turns after pauses (burst), as
`gpu_timing` has it for one GPU. The number of rounds is agreed: a rank alone in a round would wait.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from . import bench, bench_cuda, gpu_timing

WARM_UP_ROUNDS = 4
LEAST_ROUNDS = 5
QUEUED_ROUNDS = 4  # the queue of a GPU stays short, and never empty


class GpuTimer:
    """Times on this process's GPU, by events. exchange: a process group over NCCL."""

    burst_pause_s = gpu_timing.BURST_PAUSE_S

    def __init__(self, exchange):
        self.exchange = exchange
        self.flush = bench_cuda.make_flush()
        self.number = torch.zeros(1, device="cuda")
        self.prepare()  # NCCL connects at its first use
        self.synchronize()

    def prepare(self):
        """The ranks meet, with a cold cache."""
        self.flush()
        dist.all_reduce(self.number, group=self.exchange)

    def timed(self, contender):
        """One run, as `microseconds` takes it."""
        return gpu_timing.timed(contender, self.prepare)

    def settle(self, run):
        """Waits for the end of a run."""
        run[1].synchronize()

    def microseconds(self, runs):
        return gpu_timing.microseconds(runs)

    def synchronize(self):
        torch.cuda.synchronize()

    def graphed(self, contender):
        """The contender as the replay of a CUDA graph. Raises RuntimeError where it cannot be."""
        graph = bench_cuda.graphed(contender)
        if graph is None:
            raise RuntimeError("a call cannot be captured in a CUDA graph")
        return graph

    def launches_of(self, contender, group):
        """Nodes of the graph that a call becomes."""
        return bench_cuda.launches_of(contender)

    def clocks(self):
        return gpu_timing.ClockReader()


class HostTimer:
    """The same on the CPU engine, to try everything where there is no GPU."""

    burst_pause_s = 0.0

    def prepare(self):
        dist.barrier()

    def timed(self, contender):
        self.prepare()
        start = time.perf_counter()
        contender()
        return start, time.perf_counter()

    def settle(self, run):
        pass

    def microseconds(self, runs):
        return [(end - start) * 1e6 for start, end in runs]

    def synchronize(self):
        pass

    def graphed(self, contender):
        return contender

    def launches_of(self, contender, group):
        return bench.count_launches(contender, group)

    def clocks(self):
        return NoClocks()


class NoClocks:
    """In place of a `gpu_timing.ClockReader`."""

    driver = ""

    def start(self):
        pass

    def stop(self):
        return 0.0, 0.0


@dataclass
class Times:
    """us: name -> median over rounds of the slowest rank. Clock (MHz) and power (W) of each rank
    beside them, where they were read."""

    us: dict[str, float]
    clocks: list[float] = field(default_factory=list)
    powers: list[float] = field(default_factory=list)
    driver: str = ""


def sustained(contenders, seconds, timer, everyone):
    """`Times` of the contenders in turn for about `seconds`, of which the first third is warm-up.
    everyone(value): the values of all ranks."""
    start = time.perf_counter()
    run_rounds(contenders, WARM_UP_ROUNDS, timer)
    timer.synchronize()
    round_s = max(everyone(time.perf_counter() - start)) / WARM_UP_ROUNDS
    clocks = timer.clocks()
    clocks.start()
    runs = run_rounds(contenders, max(LEAST_ROUNDS, int(seconds / round_s)), timer)
    timer.synchronize()
    read = everyone(clocks.stop())
    late = {name: ones[len(ones) // 3 :] for name, ones in runs.items()}
    medians = {name: slowest(timer.microseconds(ones), everyone) for name, ones in late.items()}
    return Times(medians, *map(list, zip(*read, strict=True)), clocks.driver)


def run_rounds(contenders, number, timer):
    """Name -> the run of each round. The order of a round is random, and the same on all ranks."""
    order = random.Random(0)
    runs = {name: [] for name in contenders}
    for idx in range(number):
        for name in order.sample(list(contenders), len(contenders)):
            runs[name].append(timer.timed(contenders[name]))
        if idx >= QUEUED_ROUNDS:
            for ones in runs.values():
                timer.settle(ones[idx - QUEUED_ROUNDS])
    return runs


def burst(contenders, timer, everyone):
    """Name -> median of the slowest rank over a few launches after a pause."""
    runs = {name: [] for name in contenders}
    for _ in range(gpu_timing.BURST_ROUNDS):
        for name, contender in contenders.items():
            timer.synchronize()
            time.sleep(timer.burst_pause_s)
            for _ in range(2):
                timer.timed(contender)
            runs[name] += [timer.timed(contender) for _ in range(gpu_timing.BURST_LAUNCHES)]
    return {name: slowest(timer.microseconds(ones), everyone) for name, ones in runs.items()}


def slowest(times, everyone):
    """The median over rounds of the largest of all ranks' times."""
    return statistics.median(map(max, zip(*everyone(times), strict=True)))
