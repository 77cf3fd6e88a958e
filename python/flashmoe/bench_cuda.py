"""`flashmoe bench --device cuda`: the whole layer on a GPU against cuBLAS's bare products.

The reference is torch.bmm of the up and the down product with balanced experts and nothing else:
no router, no gather, no activation, no sum. Ours and the peers run the whole layer, router
included, with random routing (softmax of random logits). Everything is timed in turn
(`gpu_timing`), with a cold L2 cache: ours and the reference alone as replays of CUDA graphs, which
the ratio is of; both beside the peers, likewise; and all of them eagerly. Before it is timed, ours
is compared with an fp64 layer and run twice.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from . import bench, bench_peers, local_group, models, ops, reference
from .bench import OURS
from .cases import Case
from .check import same_bits
from .gpu_timing import burst, microseconds, sustained, timed
from .inputs import DTYPES, LAYOUTS
from .passes import RankCall, call_layer, call_options, operator_call
from .run import PHASES

REFERENCE = "torch.bmm"
DECODE_TOKENS = (1, 8, 64, 256)
CAPTURE = "thread_local"  # other threads, as NCCL's, go on asking CUDA about their events


def gpu_cases():
    """Name -> Case: the layers whose speed is followed."""
    found = models.find
    deepseek = models.Model("deepseek-v3-ep8", 7168, 2048, 32, 8, routing=models.SIGMOID)
    seed = models.Model("seed", 2048, 2048, 64, 2)
    qwen3, mixtral = found("qwen3-30b-a3b"), found("mixtral-8x7b")
    cases = {
        "qwen3-30b": qwen3.case(8192),
        "mixtral": mixtral.case(8192),
        "scout": found("llama4-scout").case(8192),
        "olmoe": found("olmoe").case(8192),
        "deepseek-v3-ep8": deepseek.case(8192),
        "seed": seed.case(8192),
        "gpt-oss-20b": found("gpt-oss-20b").case(8192),
        "qwen3-30b-t32768": qwen3.case(32768),
    }
    for name, model in (("qwen3-30b", qwen3), ("mixtral", mixtral)):
        cases |= {f"{name}-t{tokens}": model.case(tokens) for tokens in DECODE_TOKENS}
    return {name: replace(case, name=name) for name, case in cases.items()}


def planned(pattern="*"):
    """The cases that `pattern` names: globs, separated by commas."""
    from fnmatch import fnmatchcase

    patterns = pattern.split(",")
    return [
        case for name, case in gpu_cases().items() if any(fnmatchcase(name, p) for p in patterns)
    ]


def check_device():
    """Raises ValueError where the layer cannot run on a GPU, naming what is missing."""
    from ._core import build_info

    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device")
    if "(sm_90" not in build_info():
        raise ValueError(f"device is cuda, but there is no Hopper GPU to use: {build_info()}")


def run_bench(pattern="*", *, dtype="bf16", seconds=1.0):
    """Yields a record (a dict) for every case. seconds: of each sustained measurement, two a case.

    Raises ValueError without a GPU that the layer can use.
    """
    return each_case(planned(pattern), bench_case, dtype, seconds)


def each_case(cases, measure, dtype, seconds):
    """Yields measure(case, dtype, group, seconds, ceilings) of every case, on one group."""
    check_device()
    ceilings = measure_ceilings()
    [group] = local_group(1)
    try:
        for case in cases:
            yield measure(case, dtype, group, seconds, ceilings)
            torch.cuda.empty_cache()
    finally:
        group.close()


@torch.no_grad()
def bench_case(case, dtype, group, seconds, ceilings):
    """The record of one case."""
    call = make_call(case, DTYPES[dtype], group)
    quality = measure_quality(case, call)
    peers, absent = bench_peers.find(case, call, call_layer(call)[0])
    eager = {OURS: lambda: call_layer(call), REFERENCE: bare_products(case, call), **peers}
    graphs = {
        name: graphed(one) for name, one in eager.items() if name not in bench_peers.EAGER_ONLY
    }
    graphs = {name: one for name, one in graphs.items() if one is not None}
    cold = make_flush()
    pair = {name: graphs[name] for name in (OURS, REFERENCE)}
    times, clock, power, driver = sustained(pair, seconds, cold)
    beside = sustained(graphs, seconds, cold)[0] if len(graphs) > len(pair) else times
    by_call, *_ = sustained(eager, seconds, cold)
    short = burst(graphs, cold)
    phases = measure_phases(eager[OURS], group, cold)
    experts_hit = quality["experts_hit"]
    floor = floor_us(case, experts_hit, ceilings)
    us = times[OURS]
    return {
        **bench.measurement(
            case,
            times,
            REFERENCE,
            direction="forward",
            dtype=dtype,
            quality=quality,
            launches=launches_of(eager[OURS]),
            gpu=torch.cuda.get_device_name(),
        ),
        "part": "layer",
        "layout": case.layout,
        "peers": bench.peers_of(beside, REFERENCE),
        "beside_peers": {
            "us": round(beside[OURS], 1),
            "reference_us": round(beside[REFERENCE], 1),
            "ratio": round(beside[REFERENCE] / beside[OURS], 4),
        },
        "eager_us": round(by_call[OURS], 1),
        "eager_reference_us": round(by_call[REFERENCE], 1),
        "eager_ratio": round(by_call[REFERENCE] / by_call[OURS], 4),
        "eager_peers": bench.peers_of(by_call, REFERENCE),
        "peer_versions": bench_peers.versions(peers),
        "peers_absent": absent,
        "burst_us": round(short[OURS], 1),
        "burst_reference_us": round(short[REFERENCE], 1),
        "burst_ratio": round(short[REFERENCE] / short[OURS], 4),
        "burst_peers": bench.peers_of(short, REFERENCE),
        "phases_us": phases,
        "floor_us": round(floor, 1),
        "over_floor": round(us / floor, 4),
        "tflops": round(flops(case) / us / 1e6, 1),
        "gbytes": round(least_bytes(case, experts_hit) / 1e9, 4),
        **ceilings,
        "sm_clock_mhz": clock,
        "power_w": round(power, 1),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


# ---- operands ---------------------------------------------------------------------------------


def make_call(case: Case, dtype, group, device="cuda", seed=7):
    """The operands of a case on rank 0 of a group, drawn on the device: random tokens and router,
    so random logits."""
    generator = torch.Generator(device).manual_seed(seed)
    order, transposed, _ = LAYOUTS[case.layout]
    tokens, hidden, inner = case.tokens[0], case.hidden, case.intermediate
    share = case.experts // group.world

    def normal(*shape, scale=1.0, wide=False):
        values = torch.empty(shape, device=device, dtype=torch.float32 if wide else dtype)
        return values.normal_(std=scale, generator=generator)

    def weight(rows, columns):
        shape = (columns, rows) if transposed else (rows, columns)
        return normal(share, *shape, scale=columns**-0.5)

    width = inner * (2 if case.activation_spec.gated and order != "separate" else 1)
    weights = {"w_up": weight(width, hidden), "w_down": weight(hidden, inner)}
    if order == "separate":
        weights["w_gate"] = weight(inner, hidden)
    if case.bias:
        weights["b_up"] = normal(share, width, scale=0.5)
        weights["b_down"] = normal(share, hidden, scale=0.5)
    routing = {"w_router": normal(case.experts, hidden, scale=hidden**-0.5)}
    if case.router_bias:
        routing["router_bias"] = normal(case.experts, scale=0.5)
    if case.selection_bias:
        routing["selection_bias"] = normal(case.experts, scale=0.1, wide=True)
    x = normal(tokens, hidden)
    return RankCall(x, routing, weights, call_options(case, group), grad_y=x)


def explain(case, dtype, group, device="cuda"):
    """How the layer of a case runs on one rank of a group, as text."""
    tensors, config = operator_call(case, make_call(case, DTYPES[dtype], group, device))
    return ops.explain(tensors, config.encode(), group.name)


# ---- contenders -------------------------------------------------------------------------------


def bare_products(case, call):
    """The up and the down product with the same number of rows for every expert."""
    rows = math.ceil(case.tokens[0] * case.top_k / case.experts)
    up, down = (bench_peers.as_matrices(call, name) for name in ("w_up", "w_down"))
    x = call.x.new_empty(case.experts, rows, case.hidden).normal_()
    a = call.x.new_empty(case.experts, rows, case.intermediate).normal_()

    def products():
        return torch.bmm(x, up), torch.bmm(a, down)

    return products


def graphed(contender):
    """The contender as the replay of a CUDA graph; None if it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        contender()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode=CAPTURE):
            kept = contender()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay(made=kept):  # the outputs live as long as the graph
        graph.replay()
        return made

    return replay


def launches_of(contender):
    """Nodes of the graph that a call becomes."""
    from cuda.bindings import runtime

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, capture_error_mode=CAPTURE):
        contender()
    _, _, count = runtime.cudaGraphGetNodes(runtime.cudaGraph_t(graph.raw_cuda_graph()), 0)
    return count


def make_flush():
    """A function that leaves nothing of the operands in the L2 cache."""
    size = torch.cuda.get_device_properties().L2_cache_size
    memory = torch.empty(2 * size, dtype=torch.int8, device="cuda")
    return memory.zero_


# ---- quality and ceilings ---------------------------------------------------------------------


def measure_quality(case, call):
    """error_ratio of y (plain PyTorch is 1, both against fp64), bits of two runs, the load."""
    y, routed = call_layer(call)
    y, ids = y.clone(), routed.topk_ids.clone()
    again, _ = call_layer(call)
    oracle = reference_layer(case, call, ids, torch.float64)
    plain = reference_layer(case, call, ids, call.x.dtype)
    norms = [torch.linalg.vector_norm(one.double() - oracle) for one in (y, plain)]
    counts = torch.bincount(ids.flatten(), minlength=case.experts)
    return {
        "error_ratio": round(float(norms[0] / norms[1]), 4),
        "bitwise": same_bits(y, again),
        "load_most_over_mean": round(float(counts.max() / counts.double().mean()), 3),
        "experts_hit": int((counts > 0).sum()),
    }


def reference_layer(case, call, topk_ids, dtype):
    """y of plain PyTorch in a dtype, for given ids."""
    order, transposed, _ = LAYOUTS[case.layout]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {name: tensor.to(dtype) for name, tensor in call.weights.items()}
    routing = {name: tensor.to(dtype) for name, tensor in call.routing.items()}
    if "selection_bias" in routing:
        routing["selection_bias"] = call.routing["selection_bias"].to(wide)
    y, _ = reference.moe(
        call.x.to(dtype),
        **routing,
        **tensors,
        top_k=case.top_k,
        routing=case.routing,
        topk_ids=topk_ids,
        activation=case.activation_spec,
        interleaved=order == "interleaved",
        transposed=transposed,
        weight_on_input=case.weight_on_input,
    )
    return y


def measure_phases(launch, group, cold):
    """Phase -> microseconds of one eager launch with a cold cache, by the kernel's own clock.

    Of the launch's first cluster: when it went on. Raises what a launch has reported.
    """
    cold()
    launch()
    seconds = group.stats()["phase_seconds"]
    return {name: round(one * 1e6, 1) for name, one in zip(PHASES, seconds, strict=True) if one}


def measure_ceilings():
    """What the card does at best: a large bf16 product, and reading memory."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product, *_ = sustained({"product": lambda: a @ b}, 0.6)
    large = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    readers = (lambda: large.sum(), lambda: large.amax())
    for reader in readers:
        reader()
    read_us = min(min(microseconds([timed(reader) for _ in range(5)])) for reader in readers)
    return {
        "peak_tflops": round(2 * 8192**3 / product["product"] / 1e6, 1),
        "read_gb_per_s": round(large.nbytes / read_us / 1e3, 1),
    }


def flops(case):
    """Floating-point operations of the expert products."""
    products = 3 if case.activation_spec.gated else 2
    return 2 * products * case.tokens[0] * case.top_k * case.hidden * case.intermediate


def least_bytes(case, experts_hit):
    """Bytes that a layer moves at least: weights of the experts that are hit, x, y and router."""
    products = 3 if case.activation_spec.gated else 2
    weights = products * experts_hit * case.hidden * case.intermediate
    return 2 * (weights + 2 * case.tokens[0] * case.hidden + case.experts * case.hidden)


def floor_us(case, experts_hit, ceilings):
    """The larger of operations over the measured rate and bytes over the measured bandwidth."""
    by_rate = flops(case) / ceilings["peak_tflops"] / 1e6
    by_bytes = least_bytes(case, experts_hit) / ceilings["read_gb_per_s"] / 1e3
    return max(by_rate, by_bytes)


# ---- what is shown and kept -------------------------------------------------------------------


def path_of(record, folder=None):
    """Where records of this GPU and part are kept. Raises ValueError outside a checkout."""
    gpu = record["gpu"].lower().removeprefix("nvidia ")
    return bench.results_path(gpu, record["part"], folder)


def write_records(records, folder=None):
    """Appends records of one part to the results of their GPU; returns the path."""
    return bench.write_records(records, path_of(records[0], folder))


def table(records):
    """The records as aligned text, a line each; peers as the time of the bare products over theirs,
    with an e where only eager calls could be timed."""
    peers = [name for name in bench_peers.MAKERS if any(share_of(one, name) for one in records)]
    lines = [
        f"{'case':17}{'us':>9}{'bmm us':>9}{'ratio':>7}{'burst':>7}{'eager':>7}{'x floor':>8}"
        f"{'TFLOP/s':>8}{'MHz':>6}{'error':>7} bits  " + "".join(f"{name:>17}" for name in peers)
    ]
    for one in records:
        lines.append(
            f"{one['case']:17}{one['us']:9.1f}{one['reference_us']:9.1f}{one['ratio']:7.3f}"
            f"{one['burst_ratio']:7.3f}{one['eager_ratio']:7.3f}{one['over_floor']:8.2f}"
            f"{one['tflops']:8.0f}{one['sm_clock_mhz']:6.0f}{one['error_ratio']:7.3f} "
            f"{'same  ' if one['bitwise'] else 'DIFFER'}"
            + "".join(f"{share_of(one, name) or '-':>17}" for name in peers)
        )
    return "\n".join([*lines, *footer(records)])


def timeline(records):
    """Where each launch's time goes, as aligned text: microseconds and percent of each phase."""
    names = [name for name in PHASES if any(name in one["phases_us"] for one in records)]
    lines = [f"{'case':17}{'us':>9}" + "".join(f"{name:>16}" for name in names)]
    for one in records:
        phases = one["phases_us"]
        total = sum(phases.values()) or 1.0
        shown = [phases.get(name, 0.0) for name in names]
        parts = "".join(f"{us:10.1f}{us / total:5.0%} " for us in shown)
        lines.append(f"{one['case']:17}{total:9.1f}{parts}")
    return "\n".join([*lines, "phases: when the first cluster of one eager launch went on"])


def share_of(record, peer):
    """The time of the bare products over a peer's, as text; "" where it was not timed."""
    if peer in record["peers"]:
        return f"{record['beside_peers']['reference_us'] / record['peers'][peer]:.3f}"
    if peer in record["eager_peers"]:
        return f"{record['eager_reference_us'] / record['eager_peers'][peer]:.3f} e"
    return ""


def footer(records):
    """What the table was measured with, and which peers are missing."""
    if not records:
        return []
    first = records[0]
    versions = {name: text for one in records for name, text in one["peer_versions"].items()}
    missing = dict.fromkeys(
        f"{name}: {reason}"
        for one in records
        for name, reason in one["peers_absent"].items()
        if reason.startswith(bench_peers.NOT_INSTALLED)
    )
    return [
        f"{first['gpu']}, {first['dtype']}: bf16 product {first['peak_tflops']:.0f} TFLOP/s, "
        f"reading {first['read_gb_per_s']:.0f} GB/s. us, ratio: graph replays in turn",
        *(f"{name} {text}" for name, text in versions.items()),
        *missing,
    ]
