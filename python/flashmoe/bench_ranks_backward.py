"""`flashmoe bench --device cuda --direction backward --ranks W`: the backward of several ranks.

As `bench_ranks` has the forward: in one run, in turn, our backward on W ranks and that of one GPU
with the same rows and the rank's own experts alone (`one-gpu`), each in one launch from what a
forward with Z kept has saved; a time is the slowest rank's. Beside them: forward and backward under
autograd, with the same layer in PyTorch; the exchange by itself; the error of every gradient over
all ranks, against fp64, and its bits.
"""

from __future__ import annotations

import torch

from . import (
    backward_peers,
    backward_quality,
    bench_backward,
    bench_cuda,
    bench_ranks,
    compare,
    rank_peers,
    rank_timing,
)
from .bench import OURS
from .bench_ranks import REFERENCE, REPEATS
from .check import same_bits
from .inputs import DTYPES
from .rank_traffic import traffic_of

# case -> ranks -> (floor, goal) of our time over the one GPU's
TARGETS = {name: {2: (1.12, 1.06)} for name in ("qwen3-30b", "seed", "mixtral", "deepseek-v3")}


def planned(pattern, ranks):
    """As `bench_ranks.planned`, of the cases whose backward is followed."""
    cases = {name: case for name, case in bench_ranks.rank_cases().items() if name in TARGETS}
    chosen = bench_ranks.chosen(cases, pattern, ranks)
    return [(ranks, chosen)] if chosen else []


def run_bench(plan, *, dtype="bf16", seconds=1.0, device="cuda"):
    """Yields a record (a dict) for every case of a plan. seconds: of each sustained measurement,
    three a case. device "cpu": the same on the CPU engine, to try it; it keeps no Z over ranks.

    Raises RuntimeError with what the first failing rank raised.
    """
    return bench_ranks.run_plan(plan, bench_rank, dtype, seconds, device)


def bench_rank(rank, spec):
    """A rank's part: yields the record of every case, on rank 0."""
    return bench_ranks.each_case(rank, spec, bench_case)


@torch.no_grad()
def bench_case(case, spec, seat, links):
    """The record of one case; the same on all ranks."""
    call, own = make_calls(case, DTYPES[spec.dtype], seat)
    ours = bench_backward.make_backward(case, call, seat.group)
    quality, traffic = measure_quality(case, call, ours, seat)
    torch.cuda.empty_cache()  # what fp64 took: the engine allocates beside torch
    expected = bench_backward.as_leaves(call, ours.gradients)
    peers, absent = rank_peers.find_trained(case, call, expected, seat.exchange, seat.everyone)
    alone = bench_backward.make_backward(bench_ranks.one_gpu(case, spec.world), own, seat.alone)
    launches = {OURS: ours.launch, REFERENCE: alone.launch}
    timed = bench_ranks.time_launches(launches, {}, spec, seat)
    beside = bench_ranks.measure_beside(traffic, timed.by_graph.us, ours.launch, seat)
    z_kept = "z" in ours.saved
    del ours, alone, expected, launches  # gigabytes of gradients
    return {
        **bench_ranks.make_record(
            case, spec, timed, quality, direction="backward", part="ranks-backward"
        ),
        **bench_ranks.judged(TARGETS, case.name, spec.world, timed.by_graph.us),
        "z_kept": z_kept,
        "step_eager_us": measure_steps(call, own, peers, spec, seat),
        "peers_absent": absent,
        **beside,
        "tflops": round(2 * bench_cuda.flops(case) / timed.by_graph.us[OURS] / 1e6, 1),
        "links": links,
    }


def make_calls(case, dtype, seat):
    """As `bench_ranks.make_calls`, with leaves that require gradients, and Z kept where the engine
    can: that of the CPU cannot over ranks."""
    call, own = (
        bench_backward.trained_call(one, seed=200 + seat.rank)
        for one in bench_ranks.make_calls(case, dtype, seat)
    )
    return bench_backward.keeping_z(call, call.x.is_cuda), bench_backward.keeping_z(own, True)


def measure_quality(case, call, ours, seat):
    """(error ratios of every gradient over all ranks, with the reason where something is wrong
    beyond a ratio; bits of repeated runs and the load; the `Traffic`)."""
    made, bitwise = ours.run(), True
    for _ in range(REPEATS):
        again = ours.run()
        bitwise &= all(same_bits(one, again[name]) for name, one in made.items())
    del again
    ids, ranks = ours.saved["topk_ids"], rank_peers.Ranks(seat.exchange)
    plain = backward_quality.plain_gradients(case, call, ids, ranks)
    made = {OURS: bench_backward.as_leaves(call, made)}
    own = backward_quality.tallies(case, call, ids, made, plain, ranks)[OURS]
    of_ranks = seat.everyone(own)
    tallies = {name: compare.pooled([one[name] for one in of_ranks]) for name in own}
    ratios = backward_quality.ratios_of(tallies)
    row_bytes = bench_ranks.row_bytes(case, call)
    traffic = traffic_of(seat.everyone(ids.cpu()), case.experts, row_bytes, backward=True)
    quality = {
        "error_ratio": max(ratios.values()),
        "error_ratios": ratios,
        "error_failures": backward_quality.failures_of(tallies),
        "bitwise": all(seat.everyone(bitwise)),
        "load_most_over_mean": round(traffic.load_most_over_mean(), 4),
    }
    return quality, traffic


def measure_steps(call, own, peers, spec, seat):
    """Name -> microseconds of an eager forward and backward under autograd, of the slowest rank:
    ours, the one GPU's, and of `peers`."""
    trained = {OURS: backward_peers.ours(call), REFERENCE: backward_peers.ours(own)} | peers
    steps = {name: one.step for name, one in trained.items()}
    times = rank_timing.sustained(steps, spec.seconds, seat.timer, seat.everyone)
    return {name: round(us, 1) for name, us in times.us.items()}


# ---- what is shown ----------------------------------------------------------------------------


def table(records):
    """The records as aligned text, a line each, and what is wrong with a gradient."""
    wrong = [
        f"{one['case']}: {name}: {reason}"
        for one in records
        for name, reason in one["error_failures"].items()
    ]
    beside = (
        f"step: forward + backward under autograd, eager; x: PyTorch's ({rank_peers.TORCH}) over it"
    )
    return "\n".join([head(), *map(row, records), *wrong, *bench_ranks.footer(records, beside)])


def head():
    return f"{bench_ranks.head_of_times()}{'step us':>9}{'x':>6}{bench_ranks.head_of_rest()}"


def row(one):
    """A line of the table."""
    steps = one["step_eager_us"]
    peer = steps.get(rank_peers.TORCH)
    times = None if peer is None else peer / steps[OURS]
    return (
        f"{bench_ranks.times_of(one)}{steps[OURS]:9.0f}{bench_ranks.number(times, '.1f'):>6}"
        f"{bench_ranks.rest_of(one)}"
    )


def timeline(records):
    """Where the launches' time goes on each rank, as aligned text; up is the gradients of
    activations, down those of inputs."""
    return bench_ranks.timeline(records)
