"""`flashmoe bench --device cuda --ranks W`: the layer of several ranks, a process and a GPU each.

In one run, in turn: the layer on W ranks, the layer of one GPU with the same rows and the rank's
own experts alone (`one-gpu`: what the ranks' tensor work takes), and the same layer in PyTorch. A
time is the slowest rank's (`rank_timing`). Beside them: the exchange by itself, as plain copies of
its bytes, and what of it the launch hides. Before anything is timed the layer is compared with an
fp64 layer over all ranks, and run again for its bits.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist

from . import bench, bench_cuda, doctor, local_group, models, rank_peers, rank_timing
from .bench import OURS
from .cases import Case
from .check import same_bits
from .group import Group, lookup, resolve
from .inputs import DTYPES
from .passes import RankCall, call_layer, call_options, reserve
from .rank_processes import on_ranks
from .rank_traffic import Traffic, overlap, traffic_of
from .run import PHASES

REFERENCE = "one-gpu"
REPEATS = 5  # for the bits
# Phases of a launch beside its tiles: from the plan until the last row of another rank has come and
# is in its place, and from the first sum that is sent home to the end.
BESIDE = ("push", "return")
PHASE_RUNS = 5
STUDY_WORLDS = (2, 4, 8)
STUDY_TOKENS = (1024, 2048, 4096, 8192, 16384)
STUDY_EXPERTS = (8, 16, 32, 64, 128)
SEED_TOKENS, SEED_EXPERTS = 8192, 64

# case -> ranks -> (floor, goal) of our time over the one GPU's; of DECODE in microseconds more than
# the one GPU's, where not everything has a goal.
DECODE = "qwen3-30b-t64"
TARGETS = {
    "qwen3-30b": {2: (1.12, 1.05), 4: (1.20, 1.10), 8: (1.40, 1.20)},
    DECODE: {2: (30.0, 15.0), 4: (35.0, None), 8: (45.0, None)},
    "seed": {2: (1.12, 1.06), 4: (1.15, 1.08), 8: (1.20, 1.10)},
    "mixtral": {2: (1.08, 1.04), 4: (1.10, 1.05), 8: (1.12, 1.06)},
    "deepseek-v3": {2: (1.10, 1.05), 4: (1.15, 1.08), 8: (1.25, 1.12)},
}


# ---- what is measured -------------------------------------------------------------------------


def rank_cases():
    """Name -> Case, with the tokens of a rank; the largest last."""
    of_one = bench_cuda.gpu_cases()
    deepseek = models.Model("deepseek-v3", 7168, 2048, 256, 8, routing=models.SIGMOID)
    cases = {name: of_one[name] for name in ("qwen3-30b", DECODE, "seed", "mixtral")}
    return cases | {"deepseek-v3": replace(deepseek.case(8192), name="deepseek-v3")}


def study_cases():
    """Name -> Case of the scaling study; the seed itself is one of them."""
    seed = rank_cases()["seed"]
    by_tokens = {f"seed-t{tokens}": {"tokens": (tokens,)} for tokens in STUDY_TOKENS}
    by_experts = {f"seed-e{experts}": {"experts": experts} for experts in STUDY_EXPERTS}
    sizes = by_tokens | by_experts
    for usual in (f"seed-t{SEED_TOKENS}", f"seed-e{SEED_EXPERTS}"):
        del sizes[usual]
    return {"seed": seed} | {name: replace(seed, name=name, **one) for name, one in sizes.items()}


def planned(pattern, ranks, study=None):
    """[(number of ranks, cases)]: what `pattern` (globs, separated by commas) names, of what the
    ranks can divide. The scaling study has its sizes at `ranks`, and the seed at the fewer ranks of
    weak scaling before."""
    cases = study_cases() if study else rank_cases()
    plan = [(ranks, chosen(cases, pattern, ranks))]
    if study:
        seed = {"seed": cases["seed"]}
        fewer = [world for world in STUDY_WORLDS if world < ranks]
        plan = [(world, chosen(seed, pattern, world)) for world in fewer] + plan
    return [(world, cases) for world, cases in plan if cases]


def chosen(cases, pattern, world):
    """Those of `cases` (name -> Case) that the pattern names and `world` ranks can divide."""
    patterns = pattern.split(",")
    named = [c for name, c in cases.items() if any(fnmatchcase(name, p) for p in patterns)]
    return [case for case in named if case.experts % world == 0]


def check_gpus(ranks):
    """Raises ValueError where there are not so many GPUs, or they cannot be used."""
    bench_cuda.check_device()
    count = torch.cuda.device_count()
    if not 2 <= ranks <= count:
        raise ValueError(f"ranks is {ranks}; accepted: 2 to {count}, the GPUs there are")


def one_gpu(case, world):
    """The layer of one GPU with the rows and the experts of one of `world` ranks. A rank with fewer
    experts than a token has gets its rows from more tokens."""
    local = case.experts // world
    top_k = min(case.top_k, local)
    tokens = case.tokens[0] * case.top_k // top_k
    return replace(case, tokens=(tokens,), experts=local, top_k=top_k)


# ---- the ranks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What the ranks measure; every process gets the same."""

    world: int
    cases: list[Case]
    dtype: str
    seconds: float
    device: str


@dataclass
class Seat:
    """What a rank's process works with."""

    rank: int
    world: int
    device: str
    group: Group
    alone: Group
    exchange: object  # a torch process group: NCCL's on GPUs
    timer: object

    def everyone(self, value):
        """The values of all ranks."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


def run_bench(plan, *, dtype="bf16", seconds=1.0, device="cuda"):
    """Yields a record (a dict) for every case of a plan. seconds: of each sustained measurement,
    two a case. device "cpu": the same on the CPU engine, to try it.

    Raises RuntimeError with what the first failing rank raised.
    """
    return run_plan(plan, bench_rank, dtype, seconds, device)


def run_plan(plan, function, dtype, seconds, device):
    """Yields what the generator `function(rank, spec)` makes of every entry of a plan."""
    for world, cases in plan:
        spec = Spec(world, cases, dtype, seconds, device)
        yield from on_ranks(world, function, spec, device=device)


def bench_rank(rank, spec):
    """A rank's part: yields the record of every case, on rank 0."""
    return each_case(rank, spec, bench_case)


def each_case(rank, spec, measure):
    """Yields measure(case, spec, seat, links) of every case; all ranks together."""
    seat = make_seat(rank, spec)
    links = measure_links(seat)
    try:
        for case in spec.cases:
            yield measure(case, spec, seat, links)
            if spec.device == "cuda":
                torch.cuda.empty_cache()
        dist.barrier()
    finally:
        seat.alone.close()
        seat.group.close()


def make_seat(rank, spec):
    on_gpu = spec.device == "cuda"
    exchange = dist.new_group(backend="nccl") if on_gpu else dist.group.WORLD
    timer = rank_timing.GpuTimer(exchange) if on_gpu else rank_timing.HostTimer()
    name, _ = resolve(dist.group.WORLD)
    [alone] = local_group(1)
    seat = Seat(rank, spec.world, spec.device, lookup(name), alone, exchange, timer)
    largest = replace(
        spec.cases[0],
        **{what: max(getattr(c, what) for c in spec.cases) for what in ("hidden", "top_k")},
        experts=max(case.experts for case in spec.cases),
    )
    reserve([seat.group], largest, max(case.tokens[0] for case in spec.cases))
    return seat


def measure_links(seat):
    """The links between neighbours and how many NVLinks a GPU has; rank 0 measures, others rest."""
    links = {"nvlinks": 0, "pairs": [], "absent": ""}
    if seat.device == "cuda" and seat.rank == 0:
        links["nvlinks"] = active_nvlinks()
        try:
            links["pairs"] = [doctor.measured_link(*pair) for pair in doctor.neighbours(seat.world)]
        except RuntimeError as error:
            links["absent"] = doctor.first_line(error)
    return seat.everyone(links)[0]


def active_nvlinks():
    """NVLinks of the first GPU that are up; 0 where the driver does not say."""
    import pynvml

    count = 0
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        # By its name: NVML counts GPUs that CUDA_VISIBLE_DEVICES hides.
        name = f"GPU-{torch.cuda.get_device_properties().uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        for idx in range(pynvml.NVML_NVLINK_MAX_LINKS):
            count += pynvml.nvmlDeviceGetNvLinkState(handle, idx)
    return count


# ---- one case ---------------------------------------------------------------------------------


@torch.no_grad()
def bench_case(case, spec, seat, links):
    """The record of one case; the same on all ranks."""
    call, own = make_calls(case, DTYPES[spec.dtype], seat)
    quality, traffic = measure_quality(case, call, seat)
    y, _ = call_layer(call)
    peers, absent = rank_peers.find(case, call, y, seat.exchange, seat.everyone)
    launches = {OURS: lambda: call_layer(call), REFERENCE: lambda: call_layer(own)}
    timed = time_launches(launches, peers, spec, seat)
    return {
        **make_record(case, spec, timed, quality, direction="forward", part="ranks"),
        **judged(TARGETS, case.name, spec.world, timed.by_graph.us),
        "eager_peers": bench.peers_of(timed.by_call.us, REFERENCE),
        "peers_absent": absent,
        **measure_beside(traffic, timed.by_graph.us, launches[OURS], seat),
        "tflops": round(bench_cuda.flops(case) / timed.by_graph.us[OURS] / 1e6, 1),
        "links": links,
    }


def make_calls(case, dtype, seat):
    """(the call on all ranks, the call of one GPU alone) of this rank: the same expert weights and
    tokens, each with a router for its number of experts."""
    local = one_gpu(case, seat.world)
    own = bench_cuda.make_call(local, dtype, seat.alone, seat.device, seed=100 + seat.rank)
    generator = torch.Generator(seat.device).manual_seed(7)  # of all ranks
    w_router = own.x.new_empty(case.experts, case.hidden)
    w_router.normal_(std=case.hidden**-0.5, generator=generator)
    x = own.x[: case.tokens[0]]
    call = RankCall(
        x, {"w_router": w_router}, own.weights, call_options(case, seat.group), grad_y=x
    )
    return call, own


def measure_quality(case, call, seat):
    """(error_ratio of y over all ranks, bits of repeated runs and the load; the `Traffic`)."""
    y, routed = call_layer(call)
    y, ids = y.clone(), routed.topk_ids.clone()
    bitwise = True
    for _ in range(REPEATS):
        again, routed = call_layer(call)
        bitwise &= same_bits(y, again) and same_bits(ids, routed.topk_ids)
    ratio = rank_peers.error_ratio(case, call, y, ids, seat.exchange, seat.everyone)
    traffic = traffic_of(seat.everyone(ids.cpu()), case.experts, row_bytes(case, call))
    quality = {
        "error_ratio": round(ratio, 4),
        "bitwise": all(seat.everyone(bitwise)),
        "load_most_over_mean": round(traffic.load_most_over_mean(), 4),
    }
    return quality, traffic


def row_bytes(case, call):
    """Bytes of a token's row."""
    return case.hidden * call.x.element_size()


@dataclass(frozen=True)
class Timed:
    """Ours and the reference: `rank_timing.Times` of replays of graphs in turn and of eager calls
    in turn (peers too), microseconds of replays after a pause; nodes of a launch of ours."""

    by_graph: rank_timing.Times
    by_call: rank_timing.Times
    short: dict[str, float]
    launches: int


def time_launches(launches, peers, spec, seat):
    """`Timed` of ours and the reference (launches), with peers that are called eagerly."""
    timer = seat.timer
    graphs = {name: timer.graphed(one) for name, one in launches.items()}
    return Timed(
        rank_timing.sustained(graphs, spec.seconds, timer, seat.everyone),
        rank_timing.sustained(launches | peers, spec.seconds, timer, seat.everyone),
        rank_timing.burst(graphs, timer, seat.everyone),
        timer.launches_of(launches[OURS], seat.group),
    )


def measure_beside(traffic, us, launch, seat):
    """The fields of a record about what travels, how much of it a launch of ours hides, and where
    the launch's time goes on each rank. us: of ours and the reference."""
    communication_us, absent = measure_communication(traffic, seat)
    hidden = None
    if communication_us is not None:
        hidden = round(overlap(us[OURS], us[REFERENCE], communication_us), 4)
    return {
        "communication_us": communication_us,
        "communication_absent": absent,
        "overlap": hidden,
        **sent_of(traffic),
        "phases_us": measure_timeline(launch, seat),
    }


def measure_communication(traffic, seat):
    """(microseconds of the exchange by itself, as plain copies; "" or why there are none)."""
    seat.timer.synchronize()
    dist.barrier()  # no GPU works on while rank 0 copies between them
    made = (None, "the CPU engine has no links")
    if seat.device == "cuda" and seat.rank == 0:
        try:
            made = (round(rank_peers.copy_us(traffic.link_bytes()), 1), "")
        except RuntimeError as error:
            made = (None, doctor.first_line(error))
    return seat.everyone(made)[0]


def measure_timeline(launch, seat):
    """Of each rank phase -> microseconds, by its kernel's own clock: the eager launch, of a few,
    with the median time. Raises what a launch has reported."""
    runs = []
    for _ in range(PHASE_RUNS):
        runs.append(bench_cuda.measure_phases(launch, seat.group, seat.timer.prepare))
    launches = list(zip(*seat.everyone(runs), strict=True))
    launches.sort(key=lambda ranks: max(map(launch_us, ranks)))
    return list(launches[len(launches) // 2])


def launch_us(phases):
    """How long a launch took, from its phases."""
    return sum(us for name, us in phases.items() if name not in BESIDE)


def make_record(case, spec, timed, quality, direction, part):
    """The fields that records of both directions have from `Timed` and the quality."""
    by_graph, by_call, short = timed.by_graph, timed.by_call, timed.short
    local = one_gpu(case, spec.world)
    return {
        **bench.measurement(
            case,
            by_graph.us,
            REFERENCE,
            direction=direction,
            dtype=spec.dtype,
            quality=quality,
            launches=timed.launches,
            gpu=torch.cuda.get_device_name() if spec.device == "cuda" else None,
            ranks=spec.world,
        ),
        "part": part,
        "one_gpu_tokens": local.tokens[0],
        "one_gpu_experts": local.experts,
        "one_gpu_top_k": local.top_k,
        "eager_us": round(by_call.us[OURS], 1),
        "eager_reference_us": round(by_call.us[REFERENCE], 1),
        "burst_us": round(short[OURS], 1),
        "burst_reference_us": round(short[REFERENCE], 1),
        "burst_over_one_gpu": round(short[OURS] / short[REFERENCE], 4),
        "sm_clock_mhz": by_graph.clocks,
        "power_w": [round(power, 1) for power in by_graph.powers],
        "driver": by_graph.driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def judged(targets, name, world, us):
    """Our time against the one GPU's (us: of both), beside the floor and the goal that `targets`
    has, if any: the figure is their quotient, for decode the microseconds between them."""
    floor, goal = targets.get(name, {}).get(world, (None, None))
    over, added = round(us[OURS] / us[REFERENCE], 4), round(us[OURS] - us[REFERENCE], 1)
    figure = added if name == DECODE else over
    met = "" if floor is None else "goal" if goal and figure <= goal else "floor"
    if met == "floor" and figure > floor:
        met = "no"
    return {
        "over_one_gpu": over,
        "added_us": added,
        "figure": figure,
        "figure_unit": "us more" if name == DECODE else REFERENCE,
        "floor": floor,
        "goal": goal,
        "met": met,
    }


def sent_of(traffic: Traffic):
    """The fields of a record about what travels, over all ranks."""
    return {
        "rows_sent": traffic.rows_sent(),
        "rows_sent_plain": traffic.rows_sent(plain=True),
        "bytes_sent": traffic.bytes_sent(),
        "bytes_sent_plain": traffic.bytes_sent(plain=True),
    }


# ---- what is shown and kept -------------------------------------------------------------------


def with_written(records, folder=None):
    """Records behind those that the results of their GPU have: other numbers of ranks are measured
    on other machines."""
    try:
        path = bench_cuda.path_of(records[0], folder)
    except ValueError:  # no checkout
        return records
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines] + records


def table(records):
    """The records as aligned text, a line each."""
    head = f"{head_of_times()}{'PyTorch us':>11}{'x':>6}{head_of_rest()}"
    beside = f"x: PyTorch ({rank_peers.TORCH}; eager) over ours"
    return "\n".join([head, *map(row, records), *footer(records, beside)])


def row(one):
    """A line of the table."""
    peer = one["eager_peers"].get(rank_peers.TORCH)
    times = None if peer is None else peer / one["us"]
    return f"{times_of(one)}{number(peer, '.0f'):>11}{number(times, '.1f'):>6}{rest_of(one)}"


def head_of_times():
    return (
        f"{'case':14}{'ranks':>6}{'us':>9}{'one-gpu':>9}{'figure':>8}{'floor':>7}{'goal':>6} met  "
        f"{'burst':>6}"
    )


def times_of(one):
    """What a line begins with: our times against the one GPU's."""
    return (
        f"{one['case']:14}{one['ranks']:6}{one['us']:9.1f}{one['reference_us']:9.1f}"
        f"{shown(one, 'figure'):>8}{shown(one, 'floor'):>7}{shown(one, 'goal'):>6} "
        f"{one['met'] or '-':5}{one['burst_over_one_gpu']:6.3f}"
    )


def head_of_rest():
    return (
        f"{'copies us':>10}{'overlap':>8}{'MB sent':>9}{'plain':>8}{'TFLOP/s':>8}{'error':>7} bits"
    )


def rest_of(one):
    """What a line ends with: the exchange, the rate, the quality."""
    return (
        f"{number(one['communication_us'], '.1f'):>10}{number(one['overlap'], '.2f'):>8}"
        f"{one['bytes_sent'] / 1e6:9.1f}{one['bytes_sent_plain'] / 1e6:8.1f}{one['tflops']:8.0f}"
        f"{one['error_ratio']:7.3f} {'same' if one['bitwise'] else 'DIFFER'}"
    )


def shown(one, what):
    """The figure, floor or goal of a record as text."""
    return number(one[what], ".3f" if one["figure_unit"] == REFERENCE else "+.1f")


def number(value, form):
    return "-" if value is None else format(value, form)


def footer(records, beside):
    """What the table was measured with, and what is missing. beside: what its columns of PyTorch
    are."""
    if not records:
        return []
    first = records[0]
    links = first["links"]
    rates = [f"{link['gb_per_s']:.0f}" for link in links["pairs"]]
    flags = [f"{link['flag_us']:.1f}" for link in links["pairs"]]
    kind = f"{links['nvlinks']} NVLinks a GPU, " if links["nvlinks"] else ""
    measured = f": {kind}neighbours {' '.join(rates)} GB/s, flags {' '.join(flags)} us"
    missing = {
        f"{name}: {reason}" for one in records for name, reason in one["peers_absent"].items()
    }
    missing |= {f"copies: {one['communication_absent']}" for one in records} - {"copies: "}
    missing |= {f"links: {links['absent']}"} - {"links: "}
    return [
        f"{first['gpu'] or 'CPU engine'}, {first['dtype']}{measured if rates else ''}. us: graph "
        f"replays in turn, the slowest rank; figure: us over one-gpu, for decode us more; {beside}",
        *sorted(missing),
    ]


def timeline(records):
    """Where the launches' time goes on each rank, as aligned text, in microseconds."""
    names = [n for n in PHASES if any(n in ph for one in records for ph in one["phases_us"])]
    lines = [f"{'case':14}{'rank':>6}{'us':>9}" + "".join(f"{name:>10}" for name in names)]
    for one in records:
        for rank, phases in enumerate(one["phases_us"]):
            parts = "".join(f"{phases.get(name, 0.0):10.1f}" for name in names)
            lines.append(f"{one['case']:14}{rank:6}{launch_us(phases):9.1f}{parts}")
    return "\n".join([*lines, "phases: when the first cluster of one eager launch went on"])
