"""Builds and tests everything: what `make test` and `make test-quick` run.

    python scripts/run_tests.py [--quick] [--verbose] [STEP ...]

Each step writes its output to build/logs/STEP.log; a step that fails shows the end of it. The last
line is `N passed, N failed`, over the cases of all steps; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LOGS = BUILD / "logs"
BIN = Path(sys.executable).parent
STEP_TIMEOUT_S = 40 * 60
TAIL_LINES = 60
TAIL_COLUMNS = 240
# Python files with bounds of time: nothing runs beside them. The others share the cores.
ALONE = ("test_faults_lifecycle.py", "test_faults_processes.py", "test_ranks_failure.py")
MOST_WORKERS = 8  # each imports PyTorch
# C++ cases with this in their name take long: not in a quick run, not under a sanitizer.
SLOW_CPP = "Slow"
FUZZ_SECONDS = 600
FUZZ_EXAMPLES = 13_000  # of each kind: about ten minutes on two busy cores
SANITIZER_OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


@dataclass
class Outcome:
    """Cases of one step. `failures` name what failed, `skips` what was skipped and why."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.passed += other.passed
        self.failures += other.failures
        self.skips += other.skips


class StepError(Exception):
    """A step broke before it could count its cases."""


@dataclass
class Context:
    """What a step may know: the options, and where its output goes."""

    name: str
    quick: bool
    verbose: bool

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"

    def run(self, command: Sequence[str | Path], **environment: str) -> int:
        """Runs a command at the root of the project, appends to the log, returns its exit code."""
        with self.log.open("a") as log:
            log.write("$ " + " ".join(map(str, command)) + "\n")
            log.flush()
            output = None if self.verbose else log
            try:
                result = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=STEP_TIMEOUT_S,
                )
            except subprocess.TimeoutExpired as error:
                raise StepError(f"not done after {STEP_TIMEOUT_S} s: {command[0]}") from error
        return result.returncode

    def must_run(self, command: Sequence[str | Path], **environment: str) -> None:
        status = self.run(command, **environment)
        if status:
            raise StepError(f"exit {status}: {' '.join(map(str, command))}")


def skip_reason(case: ElementTree.Element, skipped: ElementTree.Element) -> str:
    """Why a case was skipped. CTest keeps what GoogleTest said in the output of the case."""
    output = case.findtext("system-out", "")
    said = re.search(r"Skipped\n(.+)", output)
    return said.group(1) if said else skipped.get("message", "no reason given")


def read_junit(path: Path, status: int) -> Outcome:
    """Cases of a JUnit file, as pytest and CTest write it; `status` is the exit code beside it."""
    if not path.exists():
        raise StepError(f"exit {status}, and no cases were recorded")
    outcome = Outcome()
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("name", "?")
        if (scope := case.get("classname", name)) != name:
            name = f"{scope}::{name}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failures.append(name)
        elif skipped is not None:
            outcome.skips.append(f"{name}: {skip_reason(case, skipped)}")
        elif case.get("status", "run") != "run":  # CTest: disabled or not run
            outcome.failures.append(f"{name}: {case.get('status')}")
        else:
            outcome.passed += 1
    if outcome.passed + len(outcome.failures) == 0:
        raise StepError("no case ran")
    if status and not outcome.failures:
        raise StepError(f"exit {status}, although no case failed")
    return outcome


def build(context: Context, preset: str = "release") -> Outcome:
    if not (BUILD / preset / "build.ninja").exists():
        context.must_run(["cmake", "--preset", preset])
    context.must_run(["cmake", "--build", "--preset", preset])
    return Outcome()


def gates(context: Context) -> Outcome:
    report = LOGS / "gates.txt"
    command = [sys.executable, ROOT / "scripts" / "gates" / "run.py", "--report", report]
    report.unlink(missing_ok=True)
    status = context.run([*command, *(["--quick"] if context.quick else [])])
    if not report.exists():
        raise StepError(f"exit {status}, and no gate was recorded")
    results = [line.split() for line in report.read_text().splitlines()]
    return Outcome(
        passed=sum(word == "ok" for word, _ in results),
        failures=[name for word, name in results if word != "ok"],
    )


def ctest(context: Context, preset: str, prefix: Sequence[str] = (), **environment: str) -> Outcome:
    report = LOGS / f"{context.name}.xml"
    report.unlink(missing_ok=True)
    command = [*prefix, "ctest", "--test-dir", f"build/{preset}", "--output-on-failure"]
    command += ["--output-junit", str(report), "-j", str(os.cpu_count())]
    if context.quick or preset != "release":
        command += ["--exclude-regex", SLOW_CPP]
    return read_junit(report, context.run(command, **environment))


def cpp_tests(context: Context) -> Outcome:
    return ctest(context, "release")


def pytest(context: Context, part: str, *arguments: str | Path, **environment: str) -> Outcome:
    report = LOGS / f"{context.name}-{part}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    command += ["-m", "not slow"] * context.quick
    return read_junit(report, context.run(command, **environment))


def python_tests(context: Context) -> Outcome:
    folder = ROOT / "tests" / "python"
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    shared = ["-n", str(workers), "--dist", "worksteal", "--durations=15"]
    shared += [f"--ignore={folder / name}" for name in ALONE]
    outcome = pytest(context, "shared", *shared, OMP_NUM_THREADS="1")
    alone = [folder / name for name in ALONE]
    outcome.add(pytest(context, "alone", "--durations=10", *alone))
    return outcome


def emulated_tests(context: Context) -> Outcome:
    """The case table on the CUDA kernels, which the CPU runs; in a process of its own, because its
    library stands for the other one."""
    folder = ROOT / "tests" / "emulator"
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    shared = ["-n", str(workers), "--dist", "worksteal", "--durations=15"]
    return pytest(context, "cases", *shared, folder, OMP_NUM_THREADS="1")


def sanitizer(preset: str) -> Callable[[Context], Outcome]:
    def step(context: Context) -> Outcome:
        build(context, preset)
        # ThreadSanitizer needs its part of the address space free: no randomised layout, where
        # the system lets us say so.
        fixed_layout = ["setarch", "-R"]
        allowed = context.run([*fixed_layout, "true"]) == 0
        return ctest(context, preset, fixed_layout if allowed else (), **SANITIZER_OPTIONS)

    return step


def fuzz(context: Context) -> Outcome:
    """The fuzzers for ten minutes each; `make test` gives them seconds (docs/reliability.md)."""
    build(context, "asan")
    program = BUILD / "asan" / "tests" / "fuzz" / "fuzz_c_api"
    command = [program, "--seconds", str(FUZZ_SECONDS), "--seed", str(time.time_ns())]
    outcome = Outcome()
    if context.run(command, **SANITIZER_OPTIONS):
        outcome.failures.append("fuzz_c_api")
    else:
        outcome.passed += 1
    examples = {"FLASHMOE_TEST_EXAMPLES": str(FUZZ_EXAMPLES)}
    config = ["--timeout=1800", "tests/python/test_faults_config.py"]
    outcome.add(pytest(context, "config", *config, **examples))
    return outcome


@dataclass(frozen=True)
class Step:
    name: str
    run: Callable[[Context], Outcome]
    quick: bool = True  # part of a quick run
    needed: bool = False  # the later steps mean nothing without it
    by_name: bool = False  # runs only when it is named


STEPS = [
    Step("build", build, needed=True),
    Step("gates", gates),
    Step("cpp", cpp_tests),
    Step("python", python_tests),
    Step("emulated", emulated_tests, quick=False),
    Step("tsan", sanitizer("tsan"), quick=False),
    Step("asan", sanitizer("asan"), quick=False),
    Step("fuzz", fuzz, quick=False, by_name=True),
]


def run_step(step: Step, context: Context) -> Outcome:
    """Runs one step and prints its line, with the end of its log if it failed."""
    context.log.unlink(missing_ok=True)
    if sys.stdout.isatty():
        print(f"{step.name:8} ...", end="\n" if context.verbose else "\r", flush=True)
    start = time.perf_counter()
    try:
        outcome = step.run(context)
    except StepError as error:
        outcome = Outcome(failures=[f"{step.name}: {error}"])
    seconds = time.perf_counter() - start
    counts = f"{outcome.passed:6} passed {len(outcome.failures):4} failed"
    counts += f" {len(outcome.skips):4} skipped"
    word = "FAIL" if outcome.failures else "ok"
    print(f"{step.name:8} {word:5} {seconds:7.1f} s {counts}", flush=True)
    if outcome.failures:
        for name in outcome.failures[:TAIL_LINES]:
            print(f"    failed: {name}")
        tail = context.log.read_text(errors="replace").splitlines() if context.log.exists() else []
        print(f"    the end of {context.log.relative_to(ROOT)}:")
        print("\n".join(f"    | {line[:TAIL_COLUMNS]}" for line in tail[-TAIL_LINES:]))
    for skip in outcome.skips:
        print(f"    skipped: {skip}")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds and tests everything.")
    names = [step.name for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="without what is slow")
    parser.add_argument("--verbose", action="store_true", help="show the output of the steps")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(names):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    LOGS.mkdir(parents=True, exist_ok=True)

    passed = failed = 0
    start = time.perf_counter()
    for step in STEPS:
        asked = step.name in options.steps if options.steps else not step.by_name
        if not asked or (options.quick and not step.quick):
            continue
        outcome = run_step(step, Context(step.name, options.quick, options.verbose))
        passed += outcome.passed
        failed += len(outcome.failures)
        if step.needed and outcome.failures:
            break
    print(f"{time.perf_counter() - start:.0f} s in all")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
