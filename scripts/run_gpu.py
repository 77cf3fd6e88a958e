"""Runs the GPU tests and the GPU benchmark; prints a short table last.

    python scripts/run_gpu.py --out results
    python3 scripts/run_gpu.py --out results --pack build/gpu

The second form runs what scripts/pack_gpu.py has built on another machine; the first one what make
has built here with nvcc.

Steps, in this order (--steps a,b,..): `values` (the case table and more sizes), `behaviour`
(repeats, graphs, streams, failures), `products` (the grouped product alone), `backward` (every
gradient of the case table and more sizes), `training` (autograd's ways through the layer, graphs of
whole steps, a hundred of them), `programs` (the gradient check, the example and transformers'
training on the GPU; not by default), `sanitize` (compute-sanitizer's four tools on small cases;
not by default), `bench` (records, a table and a roofline PNG), `backward_bench` (records of the
backward, tables and a PNG of ratios). On a machine of several GPUs, and not by default: `ranks`
(values, state and faults of two ranks), `ranks_backward` (the same of their backward), `ranks_more`
(graphs, torch.compile, other work beside them), `ranks_bench` (the benchmark of --ranks ranks:
records, tables, PNGs of ratios, a timeline and the scaling study), `ranks_backward_bench` (that of
their backward: records, tables, PNGs of ratios and a timeline).
--quick takes a part of each. The logs, the records and the PNGs go to --out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
# A test that hangs is named (-v), its stacks are printed, and it ends, all before its step does.
PYTEST = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider",
          "-o", "faulthandler_timeout=45", "--timeout", "60")  # fmt: skip
PROGRAMS = ("--timeout", "240", "--durations", "5", "-m", "slow")
GRACE_S = 15  # for a step over its limit to say what it has found
SANITIZE_CASE = "tokens/[13]*"  # 1, 3 and 113: the kernel of few tokens, and the other
VALUES = ("layer_values", "layer_routing", "layer_placement")
RANKS_MORE = ("ranks_graph", "ranks_load", "ranks_bench")
QUICK_VALUES = "test_tokens or mixtures or scratch or module or routing or equal_logits or way"
QUICK_BEHAVIOUR = "100_runs or one_kernel_node or replays or wait_that or streams_in_turn"
DEFAULT_STEPS = ("values", "behaviour", "products", "backward", "training", "bench",
                 "backward_bench")  # fmt: skip
# Of a measurement of ranks_bench and ranks_backward_bench, which stay within their limits with it.
RANK_SECONDS = 0.4
BACKWARD_SECONDS = 0.5  # of a measurement of backward_bench, likewise
QUICK_BACKWARD = "test_tokens or mixtures or graph or main_grad or order"
QUICK_BACKWARD_CASES = "qwen3-30b,mixtral,seed"
QUICK_CASES = "qwen3-30b,mixtral,olmoe,gpt-oss-20b,qwen3-30b-t1,qwen3-30b-t64"


@dataclass
class Step:
    """A command of a step: how long it may take, and what it is called in the table."""

    name: str
    command: list[str]
    limit_s: int


def test_files(*stems: str) -> list[str]:
    return [f"tests/cuda/test_{stem}.py" for stem in stems]


def workers() -> list[str]:
    """Options that spread tests over processes, where pytest-xdist is installed."""
    try:
        import xdist  # noqa: F401
    except ImportError:
        return []
    return ["-n", "4"]


def planned(arguments: argparse.Namespace) -> list[Step]:
    """The commands of the steps that were asked for."""
    quick, out = arguments.quick, arguments.out
    keep_values = ["-k", QUICK_VALUES] if quick else []
    keep_behaviour = ["-k", QUICK_BEHAVIOUR] if quick else []
    keep_backward = ["-k", QUICK_BACKWARD] if quick else []
    behaviour = test_files("layer_repeat", "layer_graph", "layer_streams", "layer_doctor")
    bench = [sys.executable, __file__, "--only-bench", "--out", str(out)]
    bench += ["--cases", arguments.cases or (QUICK_CASES if quick else "*")]
    bench += ["--seconds", str(arguments.seconds or (0.4 if quick else 1.0))]
    backward_bench = [sys.executable, __file__, "--only-backward-bench", "--out", str(out)]
    backward_bench += ["--cases", arguments.cases or (QUICK_BACKWARD_CASES if quick else "*")]
    backward_bench += ["--seconds", str(arguments.seconds or BACKWARD_SECONDS)]
    ranks_bench = [sys.executable, __file__, "--only-ranks-bench", "--out", str(out)]
    ranks_bench += ["--ranks", str(arguments.ranks), "--cases", arguments.cases or "*"]
    ranks_bench += ["--seconds", str(arguments.seconds or RANK_SECONDS)] + ["--quick"] * quick
    ranks_backward = [sys.executable, __file__, "--only-ranks-backward-bench", "--out", str(out)]
    ranks_backward += ["--ranks", str(arguments.ranks)]
    ranks_backward += ["--cases", arguments.cases or (QUICK_BACKWARD_CASES if quick else "*")]
    ranks_backward += ["--seconds", str(arguments.seconds or RANK_SECONDS)]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
    checked = [sys.executable, "-m", "flashmoe", "check", "--device", "cuda"]
    checked += ["--case", SANITIZE_CASE, "--dtype", "bf16"]
    steps = {
        "values": [
            Step(
                "values",
                [*PYTEST, *workers(), *test_files(*VALUES), *keep_values],
                300,
            )
        ],
        "behaviour": [Step("behaviour", [*PYTEST, *behaviour, *keep_behaviour], 240)],
        "products": [Step("products", [*PYTEST, *workers(), *test_files("grouped_product")], 240)],
        "backward": [
            Step(
                "backward",
                [*PYTEST, *workers(), *test_files("backward"), *keep_backward],
                120,
            )
        ],
        "training": [
            Step(
                "training",
                [*PYTEST, "-m", "not slow", *test_files("training")],
                120,
            )
        ],
        "programs": [
            Step(
                "programs",
                [*PYTEST, *PROGRAMS, *test_files("training")],
                300,
            )
        ],
        "ranks": [Step("ranks", [*PYTEST, "--durations", "10", *test_files("ranks")], 240)],
        "ranks_backward": [
            Step(
                "ranks_backward",
                [*PYTEST, "--timeout", "90", "--durations", "10", *test_files("ranks_backward")],
                240,
            )
        ],
        "ranks_more": [
            Step(
                "ranks_more",
                [*PYTEST, "--durations", "10", *test_files(*RANKS_MORE)],
                180,
            )
        ],
        "sanitize": [
            Step(tool, [*sanitizer, "--tool", tool, *checked], 240)
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        ],
        "bench": [Step("bench", bench, 300)],
        "backward_bench": [Step("backward_bench", backward_bench, 120)],
        "ranks_bench": [Step("ranks_bench", ranks_bench, 150 if arguments.ranks < 4 else 240)],
        "ranks_backward_bench": [Step("ranks_backward_bench", ranks_backward, 240)],
    }
    unknown = set(arguments.steps) - set(steps)
    if unknown:
        raise SystemExit(f"steps {', '.join(sorted(unknown))}: known are {', '.join(steps)}")
    return [step for name in steps if name in arguments.steps for step in steps[name]]


def install(pack: Path) -> None:
    """Puts the packed library where the checkout's package looks for its own."""
    folder = ROOT / "python" / "flashmoe" / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(pack / "lib" / "libflashmoe_ffi.so", folder)


def environment(pack: Path | None) -> dict[str, str]:
    """The environment of the steps."""
    paths = [str(ROOT / "python")]
    # No wait here is that long: one that runs out leaves its step the time for the rest.
    changes = {"PYTHONUNBUFFERED": "1", "FLASHMOE_TIMEOUT_S": "20"}
    if pack is not None:
        paths.append(str((pack / "site").resolve()))
        changes["FLASHMOE_CUDA_BENCH"] = str((pack / "lib/libflashmoe_cuda_bench.so").resolve())
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {**os.environ, **changes, "PYTHONPATH": os.pathsep.join(paths)}


def run(step: Step, out: Path, env: dict[str, str]) -> tuple[bool, str, float]:
    """(passed, last line, seconds) of a step; its output goes to a log and its end is shown."""
    start = time.monotonic()
    log = out / f"{step.name}.log"
    with log.open("w", encoding="utf-8") as file:
        code = run_bounded(step, env, file)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    shown = lines if "bench" in step.name else [line for line in lines if is_finding(line)]
    print(f"\n== {step.name}", *shown[-25:], sep="\n", flush=True)
    last = "over its time limit" if code == 124 else next(iter(reversed(lines)), "")
    return code == 0, last, time.monotonic() - start


def run_bounded(step: Step, env: dict[str, str], file: IO[str]) -> int:
    """Exit code of a step, 124 over its limit: it is interrupted first, upon which pytest prints
    its failures. The processes that it has started end with it: ranks of a step that hangs would
    keep the GPUs from the next one."""
    # A shell's background jobs ignore interrupts, and what they start would too.
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=env,
        stdout=file,
        stderr=file,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        return process.wait(step.limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return 124
    finally:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_finding(line: str) -> bool:
    """Whether a line of a log says what failed."""
    return line.startswith(("FAILED", "ERROR", "E  ", "=====", "failed")) or "Error" in line


def bench(arguments: argparse.Namespace) -> None:
    """The benchmark by itself: records as they come, then the table and the PNG."""
    from flashmoe import bench_cuda, plots

    records = []
    for record in bench_cuda.run_bench(arguments.cases or "*", seconds=arguments.seconds or 1.0):
        records.append(record)
        bench_cuda.write_records([record], arguments.out)
        print(bench_cuda.table([record]).splitlines()[1], flush=True)
    if not records:
        raise SystemExit(f"no case matches '{arguments.cases}'")
    plots.plot_roofline(records, arguments.out / "roofline.png")
    print("\n" + bench_cuda.table(records))
    print("\n" + bench_cuda.timeline(records))


def backward_bench(arguments: argparse.Namespace) -> None:
    """The benchmark of the backward by itself: records as they come, then tables and the PNG."""
    from flashmoe import bench_backward, plots

    print(bench_backward.head(), flush=True)
    made = bench_backward.run_bench(arguments.cases or "*", seconds=arguments.seconds)
    records = collected(arguments, bench_backward, made, "of the backward")
    plots.plot_backward(records, arguments.out / "backward.png")


def ranks_bench(arguments: argparse.Namespace) -> None:
    """The benchmark of several ranks by itself: records as they come, then tables and PNGs."""
    from flashmoe import bench_ranks, plots

    out, records = arguments.out, ranks_records(arguments, bench_ranks, ranks_plan(arguments))
    judged = [one for one in records if one["floor"] is not None] or records
    plots.plot_ranks(judged, out / "ranks.png")
    plots.plot_timeline(records[0], out / "ranks_timeline.png")
    if not arguments.quick:
        plots.plot_scaling(records, out / "ranks_scaling.png")


def ranks_backward_bench(arguments: argparse.Namespace) -> None:
    """The benchmark of the backward of several ranks by itself, likewise."""
    from flashmoe import bench_ranks_backward, plots

    plan = bench_ranks_backward.planned(arguments.cases or "*", arguments.ranks)
    records = ranks_records(arguments, bench_ranks_backward, plan)
    plots.plot_ranks(records, arguments.out / "ranks_backward.png")
    plots.plot_timeline(records[0], arguments.out / "ranks_backward_timeline.png")


def ranks_records(
    arguments: argparse.Namespace, module: Any, plan: list[tuple[int, list[Any]]]
) -> list[dict[str, Any]]:
    """What a module of the benchmark of several ranks measures of a plan."""
    from flashmoe import bench_ranks

    bench_ranks.check_gpus(arguments.ranks)
    made = module.run_bench(plan, seconds=arguments.seconds)
    return collected(arguments, module, made, f"of {arguments.ranks} ranks")


def collected(
    arguments: argparse.Namespace, module: Any, made: Iterable[dict[str, Any]], what: str
) -> list[dict[str, Any]]:
    """The records that a module of the benchmark makes: written and shown as they come, then as
    tables. what: the cases are."""
    from flashmoe import bench_cuda

    records = []
    for record in made:
        records.append(record)
        bench_cuda.write_records([record], arguments.out)
        print(module.row(record), flush=True)
    if not records:
        raise SystemExit(f"no case {what} matches '{arguments.cases}'")
    print(f"\n{module.table(records)}\n\n{module.timeline(records)}", flush=True)
    return records


def ranks_plan(arguments: argparse.Namespace) -> list[tuple[int, list[Any]]]:
    """The cases and, without --quick, the scaling study: one start of processes for each number of
    ranks, the number that was asked for first."""
    from flashmoe import bench_ranks

    plan = bench_ranks.planned(arguments.cases or "*", arguments.ranks)
    if not arguments.quick:
        plan += reversed(bench_ranks.planned("*", arguments.ranks, "scaling"))
    merged: dict[int, dict[str, Any]] = {}
    for world, cases in plan:
        merged.setdefault(world, {}).update({case.name: case for case in cases})
    return [(world, list(cases.values())) for world, cases in merged.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and records")
    parser.add_argument("--pack", type=Path, help="folder made by scripts/pack_gpu.py")
    parser.add_argument("--quick", action="store_true", help="about five minutes")
    parser.add_argument(
        "--steps",
        type=lambda text: text.split(","),
        default=DEFAULT_STEPS,
    )
    parser.add_argument("--cases", help="of the benchmark: names or globs, comma-separated")
    parser.add_argument(
        "--seconds", type=float, help="of a sustained measurement, two to four a case"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=2,
        help="of ranks_bench and ranks_backward_bench (default: 2)",
    )
    alone = {
        "only_bench": bench,
        "only_backward_bench": backward_bench,
        "only_ranks_bench": ranks_bench,
        "only_ranks_backward_bench": ranks_backward_bench,
    }
    for option in alone:
        flag = f"--{option.replace('_', '-')}"
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for option, by_itself in alone.items():
        if getattr(arguments, option):
            by_itself(arguments)
            return 0
    if arguments.pack:
        install(arguments.pack)
    env = environment(arguments.pack)
    rows = [(step, *run(step, arguments.out, env)) for step in planned(arguments)]
    print()
    for step, passed, last, seconds in rows:
        print(f"{'passed' if passed else 'FAILED'} {step.name:10} {seconds:6.1f} s  {last}")
    return 0 if all(passed for _, passed, *_ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
