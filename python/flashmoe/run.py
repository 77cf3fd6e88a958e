"""`flashmoe run` and `flashmoe.run_moe`: one layer of a named model or of a configuration file over
several ranks, forward and backward, measured and checked against the reference."""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from . import models
from .cases import ALL_DTYPES, Case

DEFAULT_MODEL = "qwen3-30b-a3b"
PHASES = ("route", "plan", "push", "up", "down", "weight", "return", "combine")  # fm_phase
TRAFFIC = ("rows_sent", "rows_sent_plain", "bytes_sent", "bytes_sent_plain")


@dataclass(frozen=True)
class Spec:
    """What a run does; every process of it gets the same."""

    model: str
    case: Case
    dtype: str
    ranks: int
    scale: int  # 0: explicit sizes
    remark: str = ""
    gradients: bool = True  # forward and backward
    step: dict | None = None  # of a configuration file
    launch: str = "threads"  # threads, processes, or the kind of a Launch
    device: str = "cpu"  # or cuda: a GPU a rank, forward only
    seed: int = 0
    repeats: int = 3


@dataclass
class RankResult:
    """What one rank hands to the report."""

    outputs: dict  # name -> tensor, local experts only
    routed: object  # RoutingResult
    forward: list  # fm_stats of each repeat
    backward: list  # empty without gradients
    bitwise: bool  # all repeats gave the same bits


@dataclass
class Report:
    """The outcome of a run: what `--json` prints."""

    model: str
    scale: int
    remark: str
    sizes: dict
    dtype: str
    ranks: int
    launch: str
    engine: str
    tokens_per_expert: list[int]
    dropped: int
    traffic: dict  # forward, backward -> TRAFFIC fields, summed over ranks
    times: dict  # forward, backward -> seconds, flops and per phase thread_seconds and flops
    errors: dict  # output -> error, yardstick, ratio, bar
    error_ratio: float
    bitwise: bool
    flips: int
    passed: bool
    reasons: list[str] = field(default_factory=list)
    step: dict | None = None  # with a configuration file: PublishedConfig.step
    device: str = "cpu"

    def as_dict(self):
        """The report as plain data."""
        return asdict(self)


def run_moe(
    n_processes=1,
    *,
    model=None,
    config=None,
    ranks=None,
    tokens=None,
    dtype=None,
    scale=None,
    hidden=None,
    intermediate=None,
    experts=None,
    top_k=None,
    seed=0,
    repeats=3,
    quiet=False,
    device="cpu",
):
    """Builds inputs for one layer, runs it forward and backward over several ranks, checks every
    output and gradient against the reference, prints a report and returns it.

    model: a name of `flashmoe run --list`, by default qwen3-30b-a3b, in bf16 with 256 tokens a
    rank; or config: the path of a file of the published form (see `config_file`), which says
    dtype and tokens too, and whether there is a backward. `tokens` and `dtype` count where given.

    n_processes: above 1, that many processes over shared memory, one rank each; else `ranks`
    (default 1) ranks as threads of this process. Under torchrun, mpirun or srun the processes that
    they started are the ranks. scale: divides the model's sizes; None chooses one for this machine,
    but takes a file at its word. hidden, intermediate, experts, top_k: explicit sizes. quiet: print
    nothing. device: "cpu", or "cuda": a GPU a rank, the forward alone.

    Raises ValueError for sizes that do not go together, for a file that is not right, and for a
    number of ranks that is not the launcher's. The report is None on the launcher's other ranks
    than 0.
    """
    from .launch import detect

    launched = detect()
    launch, ranks = launch_kind(launched, n_processes, ranks)
    explicit = {"hidden": hidden, "intermediate": intermediate, "experts": experts, "top_k": top_k}
    if config is None:
        spec = model_spec(model or DEFAULT_MODEL, ranks, tokens, dtype, scale, explicit)
    elif model is None:
        spec = config_spec(config, ranks, tokens, dtype, scale, explicit)
    else:
        raise ValueError(f"model is {model} with a config file; accepted: one of the two")
    spec = replace(spec, launch=launch, seed=seed, repeats=repeats, device=device)
    if device == "cuda":
        spec = replace(spec, case=spec.case.on_cuda(), gradients=False)
        check_gpus(spec)
    run = {"threads": run_threads, "processes": run_processes}.get(launch, run_launched)
    with progress(quiet or (launched is not None and launched.rank > 0)) as advance:
        report = run(spec, advance)
    if report is not None and not quiet:
        from .report import print_run

        print_run(report)
    return report


def launch_kind(launched, n_processes, ranks):
    """How the ranks are started, and their number. Raises ValueError where more or fewer are asked
    for than the launcher has started."""
    asked = n_processes if n_processes > 1 else ranks
    if launched is None:
        return ("processes" if n_processes > 1 else "threads"), asked or 1
    if asked not in (None, launched.world):
        raise ValueError(
            f"ranks is {asked}; accepted: {launched.world}, the processes that {launched.kind} "
            "started"
        )
    return launched.kind, launched.world


def model_spec(name, ranks, tokens, dtype, scale, explicit):
    """The `Spec` of a named model. Raises ValueError where sizes do not go together."""
    tokens = 256 if tokens is None else tokens
    model = models.find(name)
    check_options(ranks, tokens, dtype)
    sizes = {what: value for what, value in explicit.items() if value is not None}
    if scale is None:
        scale = (
            1 if {"hidden", "intermediate"} <= sizes.keys() else fitting_scale(model, ranks, tokens)
        )
    model = replace(models.scaled(model, scale, ranks), **sizes)
    check_sizes(model, ranks)
    return Spec(name, model.case(tokens), dtype or "bf16", ranks, scale, model.remark)


def config_spec(path, ranks, tokens, dtype, scale, explicit):
    """The `Spec` of a configuration file. Raises ValueError, also where the check of the result
    would not fit into this machine's memory."""
    from . import config_file

    config = config_file.load(path)
    tokens = config.tokens if tokens is None else tokens
    check_options(ranks, tokens, dtype)
    model = models.Model(
        Path(path).name,
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        config.expert_top_k,
        activation=config.activation,
        bias=True,
    )
    sizes = {what: value for what, value in explicit.items() if value is not None}
    whole = replace(model, **sizes)
    model = replace(models.scaled(model, scale, ranks) if scale else model, **sizes)
    check_sizes(model, ranks)
    check_memory(model, whole, ranks, tokens)
    factor = config.factor(tokens, model.experts, model.top_k)
    step = config.step()
    capacity = config.capacity(tokens, model.experts, model.top_k)
    remark = (
        f"a step over the file's global batch: {step['micro_batches']} micro-batches x "
        f"{step['moe_layers']} MoE layers, {step['launches']} such launches a rank; capacity "
        f"{'unlimited' if capacity is None else f'{capacity} slots of a rank for an expert'}"
    )
    return Spec(
        model.name,
        model.case(tokens, capacity_factor=factor),
        dtype or config.dtype,
        ranks,
        scale or 1,
        remark,
        gradients=bool(config.is_training),
        step=step,
    )


def check_options(ranks, tokens, dtype):
    """Raises ValueError for options out of range."""
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; accepted: 1 or more")
    if tokens < 0:
        raise ValueError(f"tokens is {tokens}; accepted: 0 or more")
    if dtype not in (None, *ALL_DTYPES):
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(ALL_DTYPES)}")


def check_gpus(spec):
    """Raises ValueError where the ranks cannot run on GPUs, each on its own."""
    import torch

    from .cases import CUDA_DTYPES

    if spec.dtype not in CUDA_DTYPES:
        raise ValueError(f"dtype is {spec.dtype}; accepted on cuda: {', '.join(CUDA_DTYPES)}")
    count = torch.cuda.device_count()
    if spec.ranks > count:
        raise ValueError(f"ranks is {spec.ranks}; accepted on cuda: to {count}, the GPUs there are")


def check_memory(model, whole, ranks, tokens):
    """Raises ValueError where the operands, gradients and activations of the fp64 reference are
    more than this machine's memory, with the scale of `whole` that fits."""
    memory = memory_bytes()

    def needed(one):
        rows = tokens * ranks
        return 8 * (5 * one.parameters + 6 * rows * (one.top_k * one.intermediate + one.hidden))

    if needed(model) <= memory:
        return
    scale = 2
    while scale < 64 and needed(models.scaled(whole, scale, ranks)) > memory / 2:
        scale *= 2
    raise ValueError(
        f"sizes: the check against fp64 needs about {needed(model) / 2**30:.0f} GiB, this machine "
        f"has {memory / 2**30:.0f}; accepted: fewer tokens, or scale {scale}"
    )


def check_sizes(model, ranks):
    """Raises ValueError where the sizes of a model do not go together."""
    for what in ("hidden", "intermediate", "experts", "top_k"):
        if getattr(model, what) < 1:
            raise ValueError(f"{what} is {getattr(model, what)}; accepted: 1 or more")
    if model.experts % ranks:
        raise ValueError(f"experts is {model.experts}; accepted: a multiple of {ranks} ranks")
    if model.experts % model.routing.num_groups:
        groups = model.routing.num_groups
        raise ValueError(f"experts is {model.experts}; accepted: a multiple of {groups} groups")
    if model.top_k > model.experts:
        raise ValueError(f"top_k is {model.top_k}; accepted: at most {model.experts} experts")


def fitting_scale(model, ranks, tokens):
    """`models.fitting_scale` for this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return models.fitting_scale(model, ranks, tokens, cores or 1, memory_bytes())


def memory_bytes():
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def progress(quiet):
    """A progress bar on stderr; yields a function that names the next stage."""
    if quiet:
        yield lambda stage: None
        return
    from .report import stage_bar

    with stage_bar(len(STAGES)) as advance:
        yield advance


STAGES = ("inputs", "layer", "fp64 reference", "plain PyTorch")


def run_threads(spec, advance):
    """Ranks as threads of this process."""
    from . import local_group
    from .inputs import make_operands
    from .passes import on_all_ranks

    advance(STAGES[0])
    operands = make_operands(spec.case, spec.case.steps(spec.ranks)[0], spec.dtype, spec.seed)
    groups = local_group(spec.ranks, device=spec.device, max_tokens=spec.case.tokens[0])
    advance(STAGES[1])
    try:
        results = on_all_ranks(
            lambda rank: run_one_rank(spec, operands, rank, groups[rank], groups[rank].stats),
            spec.ranks,
        )
    finally:
        for group in groups:
            group.close()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return judge(spec, operands, results, advance)


def run_one_rank(spec, operands, rank, group, stats):
    """Forward and, where wanted, backward of one rank, `repeats` times after a warm-up."""
    from .check import same_bits
    from .passes import rank_call, run_rank

    if spec.device == "cuda":
        return run_one_gpu(spec, operands, rank, group, stats)
    forward, backward = [], []
    first, bitwise = None, True
    for _ in range(spec.repeats + 1):
        call = rank_call(spec.case, operands, spec.dtype, rank, spec.ranks, group)
        outputs, routed = run_rank(call, spec.gradients, lambda: forward.append(stats()))
        if first is None:
            first = outputs
        bitwise &= all(same_bits(value, first[name]) for name, value in outputs.items())
        if spec.gradients:
            backward.append(stats())
    routed = type(routed)(*(part.detach() for part in routed))
    return RankResult(first, routed, forward[1:], backward[1:], bitwise)


def run_one_gpu(spec, operands, rank, group, stats):
    """`run_one_rank` on the GPU of this rank."""
    import torch

    from .check import same_bits
    from .inputs import on_device
    from .passes import moved, rank_call, run_rank

    device = torch.device("cuda", rank)
    operands = on_device(operands, device)
    call = rank_call(spec.case, operands, spec.dtype, rank, spec.ranks, group)
    forward, first, bitwise = [], None, True
    for _ in range(spec.repeats + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        outputs, routed = run_rank(call, False)
        torch.cuda.synchronize(device)
        forward.append(stats() | {"seconds": time.perf_counter() - start})
        outputs, routed = moved(outputs, routed, "cpu")
        if first is None:
            first = outputs
        bitwise &= all(same_bits(value, first[name]) for name, value in outputs.items())
    return RankResult(first, routed, forward[1:], [], bitwise)


def run_processes(spec, advance):
    """One process a rank on this machine, over shared memory; the report is made here."""
    import torch
    import torch.multiprocessing as multiprocessing

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    advance(STAGES[0])
    with tempfile.TemporaryDirectory(prefix="flashmoe-run-") as folder:
        advance(STAGES[1])
        try:
            multiprocessing.spawn(process_main, (spec, folder), nprocs=spec.ranks)
        except (
            multiprocessing.ProcessRaisedException,
            multiprocessing.ProcessExitedException,
        ) as error:  # its text ends with that of the rank
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        results = [
            torch.load(Path(folder) / f"rank{rank}.pt", weights_only=False)
            for rank in range(spec.ranks)
        ]
    return judge(spec, operands_of(spec), results, advance)


def process_main(rank, spec, folder):
    """A process that `run_processes` starts."""
    import torch
    import torch.distributed as dist

    take_gpu(spec, rank)
    torch.set_num_threads(max(1, torch.get_num_threads() // spec.ranks))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=spec.ranks)
    try:
        result = run_in_process_group(spec, rank)
        torch.save(result, Path(folder) / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def take_gpu(spec, rank):
    """Makes the GPU of this rank the current one; ranks of a group share a machine."""
    if spec.device == "cuda":
        import torch

        torch.cuda.set_device(rank)


def run_in_process_group(spec, rank):
    """One rank's part over the default torch process group."""
    import torch.distributed as dist

    from .group import lookup, resolve

    process_group = dist.group.WORLD
    name, _ = resolve(process_group)
    return run_one_rank(spec, operands_of(spec), rank, process_group, lambda: lookup(name).stats())


def run_launched(spec, advance):
    """The processes that a launcher started; rank 0 makes the report."""
    import torch.distributed as dist

    from .launch import torch_process_group

    with torch_process_group():
        rank = dist.get_rank()
        take_gpu(spec, rank)
        advance(STAGES[1])
        result = run_in_process_group(spec, rank)
        results = [None] * spec.ranks if rank == 0 else None
        dist.gather_object(result, results)
        report = judge(spec, operands_of(spec), results, advance) if rank == 0 else None
        dist.barrier()
        return report


def operands_of(spec):
    """The seeded operands of a run."""
    from .inputs import make_operands

    return make_operands(spec.case, spec.case.steps(spec.ranks)[0], spec.dtype, spec.seed)


def judge(spec, operands, results, advance):
    """The `Report` from what all ranks returned."""
    import torch

    from . import _core, compare
    from .inputs import DTYPES
    from .passes import gather, reference_pass

    case, dtype = spec.case, DTYPES[spec.dtype]
    engine = gather(case, [one.outputs for one in results], [one.routed for one in results])
    ids = [routed.topk_ids for routed in engine.routed]
    advance(STAGES[2])
    oracle = reference_pass(case, operands, ids, torch.float64, spec.gradients, mirrored=True)
    advance(STAGES[3])
    plain = reference_pass(case, operands, ids, dtype, spec.gradients)
    tallies = {}
    compare.tally(tallies, case, ids, engine.outputs, oracle, plain)
    flips, problem = compare.id_problem(case, operands, ids, dtype)
    reasons = [problem] if problem else []
    reasons += [f"{name}: {one.reason}" for name, one in tallies.items() if not one.passed]
    bitwise = all(one.bitwise for one in results)
    if not bitwise:
        reasons.append("two runs on the same inputs differ")
    ran = {"forward": [one.forward for one in results]}
    if spec.gradients:
        ran["backward"] = [one.backward for one in results]
    return Report(
        model=spec.model,
        scale=spec.scale,
        remark=spec.remark,
        sizes=sizes_of(case, spec.ranks),
        dtype=spec.dtype,
        ranks=spec.ranks,
        launch=spec.launch,
        engine=_core.build_info(),
        device=spec.device,
        tokens_per_expert=sum(one.tokens_per_expert for one in engine.routed).tolist(),
        dropped=sum(int(one.dropped) for one in engine.routed),
        traffic={name: traffic_of([ran[-1] for ran in one]) for name, one in ran.items()},
        times={name: times_of(one) for name, one in ran.items()},
        errors={name: one.record() for name, one in tallies.items()},
        error_ratio=max(one.ratio for one in tallies.values()),
        bitwise=bitwise,
        flips=flips,
        passed=not reasons,
        reasons=reasons,
        step=spec.step,
    )


def sizes_of(case, ranks):
    """The sizes that a report shows."""
    return {
        "tokens_per_rank": case.tokens[0],
        "hidden": case.hidden,
        "intermediate": case.intermediate,
        "experts": case.experts,
        "experts_per_rank": case.experts // ranks,
        "top_k": case.top_k,
    }


def traffic_of(stats):
    """Rows and bytes sent by all ranks in one launch."""
    return {name: sum(int(one[name]) for one in stats) for name in TRAFFIC}


def times_of(repeats):
    """Times of one direction. `repeats[rank][repeat]` are fm_stats; the repeat of median wall time
    (of the slowest rank) is shown."""
    walls = [max(one["seconds"] for one in launch) for launch in zip(*repeats, strict=True)]
    median = walls.index(statistics.median_low(walls))
    launch = [one[median] for one in repeats]
    phases = {}
    for idx, name in enumerate(PHASES):
        seconds = sum(one["phase_seconds"][idx] for one in launch)
        if seconds > 0:
            flops = sum(one["phase_flops"][idx] for one in launch)
            phases[name] = {"thread_seconds": seconds, "flops": flops}
    return {
        "seconds": walls[median],
        "flops": sum(phase["flops"] for phase in phases.values()),
        "threads": sum(int(one["num_threads"]) for one in launch),
        "phases": phases,
    }
