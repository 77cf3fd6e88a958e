"""Times on a GPU: contenders in turn, by events, with the clock that the card ran at beside them.

- sustained: contenders in turn (A B A B ...) without a pause, medians. The card is then at its
  power limit and lowers its clock, for all of them alike.
- burst: medians of a few launches after a pause, contender by contender.
"""

from __future__ import annotations

import statistics
import threading
import time

import torch

BURST_LAUNCHES = 9
BURST_PAUSE_S = 0.15
BURST_ROUNDS = 2


class ClockReader(threading.Thread):
    """Reads the SM clock (MHz) and the power (W) while it runs."""

    def __init__(self):
        super().__init__(daemon=True)
        import pynvml

        pynvml.nvmlInit()
        self.device = torch.cuda.current_device()  # a new thread's own would be 0
        self.driver = pynvml.nvmlSystemGetDriverVersion()
        self.samples = []
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(0.01):
            # torch knows which of the machine's devices CUDA_VISIBLE_DEVICES makes this one
            power = torch.cuda.power_draw(self.device) / 1e3
            self.samples.append((torch.cuda.clock_rate(self.device), power))

    def stop(self):
        """(median clock in MHz, median power in W) of the second half of the samples."""
        self.over.set()
        self.join()
        late = self.samples[len(self.samples) // 2 :] or [(0, 0.0)]
        return tuple(statistics.median(values) for values in zip(*late, strict=True))


def timed(contender, prepare=None):
    """The events around one run of `contender`; `prepare` runs before the first."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if prepare is not None:
        prepare()
    start.record()
    contender()
    end.record()
    return start, end


def microseconds(pairs):
    """The times between pairs of events."""
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def burst(contenders, prepare=None):
    """Name -> median after a pause, over rounds in which every contender has its turn."""
    times = {name: [] for name in contenders}
    for _ in range(BURST_ROUNDS):
        for name, contender in contenders.items():
            torch.cuda.synchronize()
            time.sleep(BURST_PAUSE_S)
            contender()
            contender()
            times[name] += microseconds([timed(contender, prepare) for _ in range(BURST_LAUNCHES)])
    return {name: statistics.median(values) for name, values in times.items()}


def sustained(contenders, seconds, prepare=None):
    """(name -> median, clock, power, driver) with the contenders in turn and no pause; the first
    third is warm-up."""
    clocks = ClockReader()
    clocks.start()
    rounds = []
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        rounds.append({name: timed(one, prepare) for name, one in contenders.items()})
        if len(rounds) % 4 == 0:  # the queue stays short, and never empty
            for _, end in rounds[-3].values():
                end.synchronize()
    torch.cuda.synchronize()
    clock, power = clocks.stop()
    late = rounds[len(rounds) // 3 :]
    medians = {
        name: statistics.median(microseconds([pairs[name] for pairs in late]))
        for name in contenders
    }
    return medians, clock, power, clocks.driver
