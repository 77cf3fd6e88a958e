"""The Python package as its users meet it: types, stubs, and the time of its import."""

from __future__ import annotations

import sys

from .common import Finding, GateError, exists, run, select, tool

PACKAGE = "python/flashmoe/__init__.py"
IMPORT_SECONDS = 0.2
PROBE = """
import sys, time
start = time.perf_counter()
import flashmoe
seconds = time.perf_counter() - start
print(seconds, *sorted({"torch", "tvm_ffi", "numpy"} & set(sys.modules)))
"""


def types() -> Finding:
    """mypy over the package, whose public functions are all annotated."""
    if not exists(PACKAGE):
        raise GateError(f"{PACKAGE} is missing")
    result = run([tool("mypy"), "--no-error-summary"])
    problems = result.stdout.strip().splitlines() if result.returncode else []
    stubs = select(under=("python/",), suffixes=(".pyi",))
    for stub in stubs:
        module = stub.removeprefix("python/").removesuffix(".pyi").replace("/", ".")
        module = module.removesuffix(".__init__")
        result = run([sys.executable, "-m", "mypy.stubtest", "--concise", module])
        problems += result.stdout.strip().splitlines() if result.returncode else []
    return Finding(problems, f"{len(stubs)} stubs")


def import_time() -> Finding:
    """The best of five fresh interpreters, and without torch in any of them."""
    if not exists(PACKAGE):
        raise GateError(f"{PACKAGE} is missing")
    seconds, loaded = [], set()
    for _ in range(5):
        result = run([sys.executable, "-c", PROBE])
        if result.returncode:
            return Finding([f"import flashmoe: {result.stdout.strip()}"])
        first, *modules = result.stdout.split()
        seconds.append(float(first))
        loaded.update(modules)
    problems = []
    if min(seconds) >= IMPORT_SECONDS:
        problems.append(f"import flashmoe takes {min(seconds):.2f} s, {IMPORT_SECONDS} at most")
    if loaded & {"torch", "tvm_ffi"}:
        problems.append(f"import flashmoe imports {', '.join(sorted(loaded))}")
    return Finding(problems, f"{min(seconds):.3f} s")
