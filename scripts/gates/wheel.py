"""`pip install .` gives a package that works without PyTorch, away from the source tree, and one
wheel serves the other versions of Python that this machine has."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .common import BUILD, Finding, run

# One expert, relu, unit matrices: y = x; and two ranks, as threads and over shared memory.
PROBE = """
import sys
import numpy as np
import flashmoe
x = np.arange(8, dtype=np.float32).reshape(2, 4)
unit = np.eye(4, dtype=np.float32)[None]
ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
y = flashmoe.experts(x, ids, weights, unit, unit, activation="relu")
np.testing.assert_array_equal(y, x)
from flashmoe import cli
code = cli.main(["doctor"])
assert "torch" not in sys.modules
print(flashmoe.__version__, "at", flashmoe.__file__.split("/env-")[1])
sys.exit(code)
"""
OLDEST = (3, 10)
QUERY = "import sys, venv, ensurepip; print(*sys.version_info[:2])"


def version_of(python: str | Path) -> tuple[int, int] | None:
    """Version of an interpreter that can make environments; None if it is none."""
    result = run([str(python), "-c", QUERY])
    words = result.stdout.split()
    return (int(words[0]), int(words[1])) if result.returncode == 0 else None


def interpreters() -> dict[tuple[int, int], str]:
    """One interpreter of each version here: on the PATH, and where pyenv and uv keep theirs."""
    home = Path.home()
    kept = Path(os.environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    folders = [*kept.glob("*/bin"), *(home / ".local/share/uv/python").glob("*/bin")]
    names = [f"python3.{minor}" for minor in range(OLDEST[1], OLDEST[1] + 12)]
    candidates = [path for name in names if (path := shutil.which(name))]
    candidates += [str(folder / name) for folder in folders for name in names]
    found = {sys.version_info[:2]: sys.executable}
    for candidate in candidates:
        if os.path.exists(candidate) and (version := version_of(candidate)):
            found.setdefault(version, candidate)
    return found


def serves(python: str, wheel: Path, name: str) -> str:
    """Installs the wheel into a new environment and tries it; "" or what went wrong."""
    folder = wheel.parent / f"env-{name}"
    inside = str(folder / "bin" / "python")
    steps = [
        [python, "-m", "venv", str(folder)],
        [inside, "-m", "pip", "-q", "--disable-pip-version-check", "install", str(wheel)],
        [inside, "-c", PROBE],
    ]
    for step in steps:
        result = run(step, cwd=wheel.parent)
        if result.returncode:
            return f"Python {name}: {' '.join(step[:6])}: {result.stdout.strip()[-2000:]}"
    return ""


def check() -> Finding:
    work = BUILD / "wheel"
    shutil.rmtree(work, ignore_errors=True)
    here = sys.version_info[:2]
    found = interpreters()
    others = sorted(set(found) - {here})
    # The wheel is built as `pip install .` builds it, by the oldest other Python with build tools
    # of its own; the CUDA part is compiled by the build itself.
    builder = str(work / "build" / "bin" / "python")
    options = ["--no-deps", "--config-settings", "cmake.define.FLASHMOE_CUDA=OFF", "-w", str(work)]
    steps = [
        [found[others[0]] if others else sys.executable, "-m", "venv", str(work / "build")],
        [builder, "-m", "pip", "-q", "--disable-pip-version-check", "wheel", *options, "."],
    ]
    for step in steps:
        result = run(step)
        if result.returncode:
            return Finding([f"{' '.join(step)}: {result.stdout.strip()[-2000:]}"])
    (wheel,) = work.glob("flashmoe-*.whl")
    tried = sorted({*others[:1], *others[-1:]} or {here})
    problems = []
    for version in tried:
        name = ".".join(map(str, version))
        if problem := serves(found[version], wheel, name):
            problems.append(problem)
    versions = ", ".join(".".join(map(str, version)) for version in tried)
    note = f"{wheel.name}, {wheel.stat().st_size >> 10} KiB, on Python {versions}"
    return Finding(problems, note if others else f"{note}: no other Python here")
