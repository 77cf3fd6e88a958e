"""`flashmoe bench`: the layer's time against plain PyTorch on the same cores, in the same run.

Ours, the reference (a loop over the experts) and peers (`torch.nn.functional.grouped_mm` where it
runs) are timed in turn, round by round, and medians are compared: a machine that slows down slows
all of them. All contenders run the whole layer, router included.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from . import compare, local_group, reference
from .cases import select
from .check import same_bits
from .inputs import DTYPES, make_operands, pack
from .passes import engine_pass, rank_call, reference_pass, run_rank

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "plain PyTorch, loop over experts"
PEER = "torch.grouped_mm"
OURS = "ours"
DIRECTIONS = (("forward", False), ("forward+backward", False), ("forward+backward", True))
WARM_UP_S = 1.0
MIN_ROUNDS = 5
# OpenMP threads of the contender before spin on for some milliseconds: nobody pays for another's.
PAUSE_S = 0.02
MAX_ROUNDS = 31


def run_bench(pattern="*", *, dtype=None, budget_s=8.0):
    """Yields a record (a dict, see docs) for every speed case x dtype x direction.

    budget_s: seconds of timed rounds for each record.
    """
    threads = torch.get_num_threads()
    [group] = local_group(1)
    group.set("num_threads", threads)
    try:
        for case, one_dtype, _ in select(pattern, "speed", dtype=dtype):
            yield from bench_case(case, one_dtype, group, threads, budget_s)
    finally:
        group.close()


def planned(pattern="*", dtype=None):
    """Number of records that `run_bench` yields."""
    return len(DIRECTIONS) * len(select(pattern, "speed", dtype=dtype))


def bench_case(case, dtype, group, threads, budget_s):
    """The records of one case."""
    tokens = case.steps(1)[0]
    operands = make_operands(case, tokens, dtype)
    expected = references(case, operands, dtype, group)
    for direction, save_z in DIRECTIONS:
        backward = direction != "forward"
        measured = replace(case, save_z=save_z)
        contenders = make_contenders(measured, operands, dtype, group, backward)
        times = interleaved(contenders, budget_s)
        medians = {name: statistics.median(runs) * 1e6 for name, runs in times.items()}
        launches = count_launches(contenders[OURS], group)
        quality = measure_quality(measured, operands, dtype, group, backward, expected)
        named = replace(case, name=case.name.removeprefix("speed/"), tokens=tokens)
        yield {
            **measurement(
                named,
                medians,
                REFERENCE,
                direction=direction,
                dtype=dtype,
                quality=quality,
                launches=launches,
            ),
            "cpu": cpu_name(),
            "threads": threads,
            "save_z": save_z,
            "rounds": len(times[OURS]),
            "torch": torch.__version__,
        }


def measurement(case, times, reference, *, direction, dtype, quality, launches, gpu=None, ranks=1):
    """The fields that every record begins with; times: name -> microseconds of all contenders."""
    us, reference_us = times[OURS], times[reference]
    return {
        "case": case.name,
        "direction": direction,
        "tokens": case.tokens[0],
        "hidden": case.hidden,
        "intermediate": case.intermediate,
        "experts": case.experts,
        "top_k": case.top_k,
        "dtype": dtype,
        "ranks": ranks,
        "device": "cuda" if gpu else "cpu",
        "gpu": gpu,
        "us": round(us, 1),
        "reference": reference,
        "reference_us": round(reference_us, 1),
        "ratio": round(reference_us / us, 4),
        **quality,
        "launches": launches,
        "peers": peers_of(times, reference),
        "source": source_hash(),
        "date": datetime.date.today().isoformat(),
    }


def peers_of(times, reference):
    """The times of neither ours nor the reference, as a record shows them."""
    return {name: round(us, 1) for name, us in times.items() if name not in (OURS, reference)}


def make_contenders(case, operands, dtype, group, backward):
    """Name -> function of no arguments that runs the layer once."""
    call = rank_call(case, operands, dtype, 0, 1, group)
    if backward:
        run_rank(call, True)  # makes the leaves require gradients
    layers = {REFERENCE: loop_experts, PEER: grouped_experts}
    contenders = {OURS: lambda: run_rank(call, backward)}
    for name, experts in layers.items():
        contender = plain_layer(case, operands, DTYPES[dtype], experts, backward)
        if name == REFERENCE or runs(contender):
            contenders[name] = contender
    return contenders


def runs(contender):
    """Whether this build of torch can run a contender at all."""
    try:
        contender()
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def plain_layer(case, operands, dtype, experts, backward):
    """The layer in PyTorch around `experts(x, ids, weights, w_up, w_down, activation)`."""
    packed = pack(operands, case.layout)
    leaves = [
        value.to(dtype).contiguous().requires_grad_(backward)
        for value in (operands.x[0], operands.w_router, packed["w_up"], packed["w_down"])
    ]
    grad_y = operands.grad_y[0].to(dtype)

    def layer():
        x, w_router, w_up, w_down = leaves
        with torch.set_grad_enabled(backward):
            logits = reference.router_logits(x, w_router)
            weights, ids = logits.softmax(-1).topk(case.top_k, dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
            y = experts(x, ids, weights, w_up, w_down, case.activation_spec)
            return torch.autograd.grad(y, leaves, grad_y) if backward else y

    return layer


def loop_experts(x, ids, weights, w_up, w_down, activation):
    """One expert after the other."""
    return reference.experts(x, ids, weights, w_up, w_down, activation=activation)


def grouped_experts(x, ids, weights, w_up, w_down, activation):
    """Rows sorted by expert and two grouped products."""
    slots = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=w_up.shape[0])
    ends = counts.cumsum(0).to(torch.int32)
    rows = x[slots // ids.shape[1]]
    a = reference.activate(F.grouped_mm(rows, w_up.transpose(1, 2), offs=ends), activation)
    out = F.grouped_mm(a, w_down.transpose(1, 2), offs=ends)
    out = out * weights.flatten()[slots, None].to(x.dtype)
    back = torch.empty_like(slots).scatter(0, slots, torch.arange(len(slots)))
    return out[back].view(*ids.shape, -1).sum(1)


def interleaved(contenders, budget_s):
    """Name -> seconds of each round; one run of every contender a round."""
    begin, warm_ups = time.perf_counter(), 0
    while warm_ups < 2 and time.perf_counter() - begin < WARM_UP_S:
        start = time.perf_counter()
        for contender in contenders.values():
            contender()
        round_s = time.perf_counter() - start
        warm_ups += 1
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_s / round_s)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - start)
    return times


def count_launches(ours, group):
    """Engine launches of one call."""
    before = group.stats()["epoch"]
    ours()
    return int(group.stats()["epoch"] - before)


def references(case, operands, dtype, group):
    """(ids of the layer's own choice, oracle, plain): forward and backward by `reference_pass`."""
    routed = engine_pass(case, operands, dtype, [group], False).routed
    ids = [one.topk_ids for one in routed]
    oracle = reference_pass(case, operands, ids, torch.float64, True, mirrored=True)
    return ids, oracle, reference_pass(case, operands, ids, DTYPES[dtype], True)


def measure_quality(case, operands, dtype, group, backward, expected):
    """error_ratio (the largest of all outputs) and bitwise (two runs) of what was timed."""
    first = engine_pass(case, operands, dtype, [group], backward).outputs
    second = engine_pass(case, operands, dtype, [group], backward).outputs
    ids, oracle, plain = expected
    tallies = {}
    made = {name: parts for name, parts in oracle.items() if name in first}
    compare.tally(tallies, case, ids, first, made, plain)
    bitwise = all(
        same_bits(part, second[name][idx])
        for name, parts in first.items()
        for idx, part in enumerate(parts)
    )
    ratio = max(one.ratio for one in tallies.values())
    return {"error_ratio": round(ratio, 4), "bitwise": bitwise}


def source_hash():
    """A hash of the sources that a result belongs to: src, include and python of the checkout, or
    the installed package."""
    package = Path(__file__).resolve().parent
    checkout = (ROOT / "include" / "flashmoe").is_dir()
    folders = [ROOT / name for name in ("src", "include", "python")] if checkout else [package]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not {"__pycache__", "lib"} & set(path.parts[len(ROOT.parts) :]):
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def cpu_name():
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE).group(1)
    except (OSError, AttributeError):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def results_path(machine=None, part="cpu", folder=None):
    """Where `--write` appends: one file a kind of machine. Raises ValueError outside a checkout."""
    if folder is None and not (ROOT / "include" / "flashmoe").is_dir():
        raise ValueError("--write needs a source checkout: results belong to benchmarks/results")
    slug = re.sub(r"[^a-z0-9]+", "-", (machine or cpu_name()).lower()).strip("-")
    return (folder or ROOT / "benchmarks" / "results") / f"{slug}-{part}.jsonl"


def write_records(records, path=None):
    """Appends records to the results of this machine, or to `path`; returns the path."""
    path = path or results_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    return path


def plot_records(records, path):
    """A PNG with one group of bars a record: ours, the reference and the peers, in milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys([OURS, REFERENCE, *(n for r in records for n in r["peers"])]))
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.7 * len(records)), layout="constrained")
    height = 0.8 / len(names)
    for idx, name in enumerate(names):
        values = [
            {OURS: r["us"], REFERENCE: r["reference_us"], **r["peers"]}.get(name, 0) / 1e3
            for r in records
        ]
        places = [place + idx * height for place in range(len(records))]
        axes.barh(places, values, height, label=name)
    labels = [
        f"{r['case']}\n{r['dtype']} {r['direction']}" + (" (Z saved)" if r["save_z"] else "")
        for r in records
    ]
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(records))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, median of interleaved runs")
    axes.set_title(f"{records[0]['cpu']}, {records[0]['threads']} threads", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
