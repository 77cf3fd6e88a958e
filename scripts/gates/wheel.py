"""`pip install .` gives a package that works without PyTorch, away from the source tree."""

from __future__ import annotations

import shutil
import sys

from .common import BUILD, Finding, run

# One expert, relu, unit matrices: y = x.
PROBE = """
import sys
import numpy as np
import flashmoe
x = np.arange(8, dtype=np.float32).reshape(2, 4)
unit = np.eye(4, dtype=np.float32)[None]
ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
y = flashmoe.experts(x, ids, weights, unit, unit, activation="relu")
np.testing.assert_array_equal(y, x)
assert "torch" not in sys.modules
print(flashmoe.__version__, "at", flashmoe.__file__.split("/env/")[1])
"""


def check() -> Finding:
    work = BUILD / "wheel"
    shutil.rmtree(work, ignore_errors=True)
    python = work / "env" / "bin" / "python"
    # The build tools are those of .venv; the kernels are compiled by the build itself.
    options = ["--no-build-isolation", "--no-deps", "-C", "cmake.define.FLASHMOE_CUDA=OFF"]
    steps = [
        [sys.executable, "-m", "pip", "-q", "wheel", *options, "-w", str(work), "."],
        [sys.executable, "-m", "venv", str(work / "env")],
    ]
    for step in steps:
        result = run(step)
        if result.returncode:
            return Finding([f"{' '.join(step)}: {result.stdout.strip()[-2000:]}"])
    (wheel,) = work.glob("flashmoe-*.whl")
    installed = run([str(python), "-m", "pip", "-q", "install", str(wheel)])
    if installed.returncode:
        return Finding([f"{wheel.name} does not install: {installed.stdout.strip()[-2000:]}"])
    result = run([str(python), "-c", PROBE], cwd=work)
    problems = [result.stdout.strip()] if result.returncode else []
    return Finding(problems, f"{wheel.name}, {wheel.stat().st_size >> 10} KiB")
