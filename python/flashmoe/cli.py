"""The command `flashmoe`: run, check, bench, doctor. Errors of the user: one line, exit code 2."""

from __future__ import annotations

import argparse
import sys


def main(argv=None):
    """Runs the command line; returns the exit code: 0 good, 1 a check failed, 2 a wrong call."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        print("flashmoe: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"flashmoe: {first_line(error)}", file=sys.stderr)
        return 2


def first_line(error):
    """The error in one line; a missing package with how to get it."""
    if isinstance(error, ModuleNotFoundError):
        extra = {"torch": "torch", "rich": "cli", "matplotlib": "plot"}.get(error.name)
        if extra:
            return f"{error.name} is not installed: pip install 'flashmoe[{extra}]'"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parser():
    """The argument parser."""
    top = argparse.ArgumentParser(
        prog="flashmoe", description="A mixture-of-experts layer, forward and backward, over ranks."
    )
    commands = top.add_subparsers(
        title="commands", required=True, metavar="run | check | bench | doctor"
    )
    add_run(commands)
    add_check(commands)
    add_bench(commands)
    add_doctor(commands)
    return top


def add_run(commands):
    about = "run one layer of a named model over several ranks, and check it"
    run = commands.add_parser("run", help=about, description=about)
    run.set_defaults(command=command_run)
    what = run.add_mutually_exclusive_group()
    what.add_argument(
        "--model",
        metavar="NAME",
        help="qwen3-30b-a3b (default), mixtral-8x7b, deepseek-v3, gpt-oss-20b, ... (--list)",
    )
    what.add_argument(
        "--config", metavar="FILE", help="sizes from a published flashmoe_config.json"
    )
    run.add_argument("--list", action="store_true", help="list the models and stop")
    run.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help="default: 2, on cuda the GPUs there are, or what torchrun, mpirun or srun started",
    )
    run.add_argument(
        "--processes",
        action="store_true",
        help="a process a rank over shared memory, instead of a thread a rank",
    )
    run.add_argument(
        "--tokens",
        type=natural,
        metavar="T",
        help="tokens of each rank (default: 256, or what the file says)",
    )
    run.add_argument(
        "--dtype",
        choices=("fp64", "fp32", "bf16", "fp16"),
        help="default: bf16, or what the file says",
    )
    run.add_argument(
        "--scale",
        type=positive,
        metavar="S",
        help="divide the sizes by S (default: for a model, whatever takes seconds here)",
    )
    for size in ("hidden", "intermediate", "experts", "top-k"):
        run.add_argument(
            f"--{size}",
            type=positive,
            metavar="N",
            help=f"explicit {size} size" if size != "top-k" else "experts per token",
        )
    run.add_argument("--seed", type=natural, default=0)
    run.add_argument(
        "--repeat",
        type=positive,
        default=3,
        metavar="N",
        help="timed repeats, of which the median is shown (default: 3)",
    )
    add_common(run)


def add_check(commands):
    about = "check the case table against the reference"
    check = commands.add_parser("check", help=about, description=about)
    check.set_defaults(command=command_check)
    check.add_argument("--gradients", action="store_true", help="forward and backward")
    check.add_argument(
        "--case",
        default="*",
        metavar="PATTERN",
        help="cases by name or name:dtype:wRANKS, e.g. 'router/*' or '*:bf16:w2'",
    )
    check.add_argument("--ranks", type=positive, metavar="N", help="instead of the cases' own")
    check.add_argument(
        "--dtype", choices=("fp64", "fp32", "bf16", "fp16"), help="instead of the cases' own"
    )
    add_common(check)


def add_bench(commands):
    about = "time the layer against plain PyTorch"
    bench = commands.add_parser("bench", help=about, description=about)
    bench.set_defaults(command=command_bench)
    bench.add_argument("--case", default="*", metavar="PATTERN", help="cases by name")
    bench.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 and bf16; on cuda, bf16"
    )
    bench.add_argument(
        "--direction",
        default="forward",
        choices=("forward", "backward"),
        help="on cuda: the backward of one GPU or, with --ranks, of W of them, with its gradients' "
        "error and forward + backward beside other layers; of one GPU also the memory it needs "
        "(default: forward; on cpu both are timed)",
    )
    bench.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="timed seconds for each line (default: 8; on cuda, 1 a measurement)",
    )
    bench.add_argument(
        "--explain", action="store_true", help="say how the cases would run, and time nothing"
    )
    bench.add_argument(
        "--ranks",
        type=positive,
        metavar="W",
        help="on cuda: the layer of W ranks, a process and a GPU each, against that of one GPU; "
        "with --explain: how one of them would run",
    )
    bench.add_argument(
        "--study",
        choices=("scaling",),
        help="with --ranks: over ranks, tokens and experts, instead of the cases",
    )
    bench.add_argument(
        "--timeline",
        nargs="?",
        const=True,
        metavar="FILE",
        help="on cuda: also where each launch's time goes; with --ranks FILE is a PNG of it",
    )
    bench.add_argument("--write", action="store_true", help="append to benchmarks/results")
    bench.add_argument("--plot", metavar="FILE", help="write a PNG")
    add_common(bench)


def add_doctor(commands):
    about = "say what works on this machine, and what to do about what does not"
    doctor = commands.add_parser("doctor", help=about, description=about)
    doctor.set_defaults(command=command_doctor)
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_common(command):
    """Options of every command."""
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command.add_argument("--json", action="store_true", help="JSON on stdout, one object a line")


def positive(text):
    """An int of at least 1."""
    return at_least(1, text)


def natural(text):
    """An int of at least 0."""
    return at_least(0, text)


def at_least(lowest, text):
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {lowest}")
    return value


def command_run(arguments):
    """`flashmoe run`."""
    from . import launch, report
    from .models import MODELS
    from .run import run_moe

    if arguments.list:
        report.print_models(MODELS.values(), arguments.json)
        return 0
    ranks = arguments.ranks
    if ranks is None and launch.detect() is None:
        ranks = default_ranks(arguments.device)
    outcome = run_moe(
        ranks if arguments.processes and ranks else 1,
        ranks=ranks,
        model=arguments.model,
        config=arguments.config,
        tokens=arguments.tokens,
        dtype=arguments.dtype,
        scale=arguments.scale,
        hidden=arguments.hidden,
        intermediate=arguments.intermediate,
        experts=arguments.experts,
        top_k=arguments.top_k,
        seed=arguments.seed,
        repeats=arguments.repeat,
        quiet=arguments.json,
        device=arguments.device,
    )
    if outcome is None:  # rank 0 of the launcher's reports
        return 0
    if arguments.json:
        report.print_json(outcome.as_dict())
    return 0 if outcome.passed else 1


def default_ranks(device):
    """Two; on CUDA as many as there are GPUs."""
    if device == "cpu":
        return 2
    import torch

    return max(torch.cuda.device_count(), 1)


def command_check(arguments):
    """`flashmoe check`."""
    from . import report
    from .check import planned, run_checks

    chosen = planned(
        arguments.case, arguments.gradients, arguments.ranks, arguments.dtype, arguments.device
    )
    if not chosen:
        raise ValueError(f"no case matches {arguments.case!r}")
    require_engine(arguments.device)
    records = []
    with progress(arguments.json, len(chosen), "cases") as advance:
        for record in run_checks(
            arguments.case,
            gradients=arguments.gradients,
            ranks=arguments.ranks,
            dtype=arguments.dtype,
            device=arguments.device,
        ):
            records.append(record)
            advance(f"{record.case} {record.dtype}")
            if arguments.json:
                report.print_json(vars(record))
    summary = report.check_summary(records)
    if arguments.json:
        report.print_json(summary)
    else:
        report.print_checks(records)
    return 1 if summary["failed"] else 0


def command_bench(arguments):
    """`flashmoe bench`."""
    from . import bench, report

    if arguments.direction == "backward":
        for option in ("explain", "study"):
            if getattr(arguments, option):
                raise ValueError(f"--direction is backward; accepted without --{option}")
        if arguments.device == "cpu":
            raise ValueError("--direction is backward with device cpu; accepted: --device cuda")
    if arguments.study and (arguments.explain or arguments.ranks is None):
        raise ValueError("--study is given; accepted: with --ranks, and without --explain")
    if arguments.explain:
        return explain_bench(arguments)
    if arguments.device == "cuda":
        one = arguments.ranks is None
        return command_bench_cuda(arguments) if one else command_bench_ranks(arguments)
    for option in ("timeline", "ranks"):
        if getattr(arguments, option):
            raise ValueError(f"--{option} is given with device cpu; accepted: --device cuda")
    count = bench.planned(arguments.case, arguments.dtype)
    if not count:
        raise ValueError(f"no speed case matches {arguments.case!r}")
    require_engine(arguments.device)
    if arguments.write:
        bench.results_path()
    records = []
    with progress(arguments.json, count, "records") as advance:
        for record in bench.run_bench(
            arguments.case,
            dtype=arguments.dtype,
            budget_s=arguments.seconds or 8.0,
        ):
            records.append(record)
            advance(f"{record['case']} {record['dtype']}")
            if arguments.json:
                report.print_json(record)
    if not arguments.json:
        report.print_bench(records)
    if arguments.write:
        print(f"appended to {bench.write_records(records)}", file=sys.stderr)
    if arguments.plot:
        bench.plot_records(records, arguments.plot)
    return 0


def command_bench_cuda(arguments):
    """`flashmoe bench --device cuda`."""
    from . import bench_backward, bench_cuda, plots

    is_backward = arguments.direction == "backward"
    bench = bench_backward if is_backward else bench_cuda
    bench_cuda.check_device()
    chosen = bench.planned(arguments.case)
    if not chosen:
        raise ValueError(f"no GPU case of the {arguments.direction} matches {arguments.case!r}")
    if arguments.timeline not in (None, True):
        raise ValueError(f"--timeline is {arguments.timeline!r}; accepted: a file with --ranks")
    options = {"dtype": arguments.dtype or "bf16", "seconds": arguments.seconds or 1.0}
    made = bench.run_bench(arguments.case, **options)
    records = collected(arguments, made, len(chosen))
    show_gpu_bench(arguments, bench, records)
    if arguments.plot:
        draw = plots.plot_backward if is_backward else plots.plot_roofline
        draw(records, arguments.plot)
    return 0


def command_bench_ranks(arguments):
    """`flashmoe bench --device cuda --ranks W`."""
    from . import bench_ranks, bench_ranks_backward, plots

    bench_ranks.check_gpus(arguments.ranks)
    if arguments.direction == "backward":
        bench, what = bench_ranks_backward, "the backward of several ranks"
        plan = bench.planned(arguments.case, arguments.ranks)
    else:
        bench, what = bench_ranks, "several ranks"
        plan = bench.planned(arguments.case, arguments.ranks, arguments.study)
    if not plan:
        raise ValueError(f"no case of {what} matches {arguments.case!r}")
    options = {"dtype": arguments.dtype or "bf16", "seconds": arguments.seconds or 1.0}
    made = bench.run_bench(plan, **options)
    records = collected(arguments, made, sum(len(cases) for _, cases in plan))
    show_gpu_bench(arguments, bench, records)
    if arguments.timeline not in (None, True):
        plots.plot_timeline(records[0], arguments.timeline)
    if arguments.plot and arguments.study:
        plots.plot_scaling(bench_ranks.with_written(records), arguments.plot)
    elif arguments.plot:
        plots.plot_ranks(records, arguments.plot)
    return 0


def collected(arguments, made, count):
    """The records of a GPU bench as they come, with a progress bar; with --json, shown one by one,
    and with --write kept."""
    from . import bench_cuda, report

    records, path = [], None
    with progress(arguments.json, count, "cases") as advance:
        for record in made:
            records.append(record)
            advance(f"{record['case']}, {record['ranks']} ranks")
            if arguments.json:
                report.print_json(record)
            if arguments.write:
                path = bench_cuda.write_records([record])
    if path:
        print(f"appended to {path}", file=sys.stderr)
    return records


def show_gpu_bench(arguments, bench, records):
    """The table of a GPU bench, and where the time goes."""
    if arguments.json:
        return
    print(bench.table(records))
    if arguments.timeline:
        print(f"\n{bench.timeline(records)}")


def explain_bench(arguments):
    """`flashmoe bench --explain`."""
    from . import bench_cuda, bench_ranks, local_group
    from .cases import select

    if arguments.device == "cuda":
        bench_cuda.check_device()
        if arguments.ranks:
            plan = bench_ranks.planned(arguments.case, arguments.ranks)
            cases = [case for _, of_ranks in plan for case in of_ranks]
        else:
            cases = bench_cuda.planned(arguments.case)
        chosen = [(case, arguments.dtype or "bf16") for case in cases]
    else:
        chosen = [row[:2] for row in select(arguments.case, "speed", dtype=arguments.dtype)]
    ranks = arguments.ranks or 1
    groups = local_group(ranks)
    try:
        for case, dtype in chosen:
            print(f"{case.name} {dtype}")
            if case.experts % ranks:
                text = f"{case.experts} experts cannot be divided among {ranks} ranks"
            else:
                text = bench_cuda.explain(case, dtype, groups[0], arguments.device)
            print("  " + text.replace("\n", "\n  "))
    finally:
        for group in groups:
            group.close()
    return 0


def command_doctor(arguments):
    """`flashmoe doctor`."""
    import json

    from . import doctor

    checks = list(doctor.examine())
    summary = doctor.summary(checks)
    text = json.dumps(summary) if arguments.json else "\n".join(doctor.lines(checks))
    print(text)
    return 0 if summary["passed"] else 1


def require_engine(device):
    """Raises FlashMoEError where the CPU engine is wanted and not built."""
    if device == "cpu":
        from . import _core

        _core.engine()


def progress(quiet, total, unit):
    """A progress bar, or nothing."""
    from contextlib import nullcontext

    from .report import progress_bar

    return nullcontext(lambda text: None) if quiet else progress_bar(total, unit)
