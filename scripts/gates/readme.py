"""The commands of README.md that are marked `<!-- run -->` run, in order, from its folder."""

from __future__ import annotations

import re
import subprocess

from .common import ROOT, Finding, GateError, exists, line_of, read, run

BLOCK = re.compile(r"<!-- run -->\s*```(bash|python)\n(.*?)```", re.DOTALL)
TIMEOUT_S = 300


def check() -> Finding:
    if not exists("README.md"):
        raise GateError("README.md is missing")
    text = read("README.md")
    blocks = list(BLOCK.finditer(text))
    if not blocks:
        raise GateError("README.md: no block is marked <!-- run -->")
    problems = []
    for block in blocks:
        language, code = block.groups()
        shell = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else ["python", "-c"]
        where = f"README.md:{line_of(text, block.start())}"
        try:
            result = run([*shell, code], timeout=TIMEOUT_S, cwd=ROOT, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            problems.append(f"{where}: not done after {TIMEOUT_S} s")
            continue
        if result.returncode:
            tail = "\n    ".join(result.stdout.strip().splitlines()[-15:])
            problems.append(f"{where}: exit {result.returncode}\n    {tail}")
    return Finding(problems, f"{len(blocks)} blocks")
