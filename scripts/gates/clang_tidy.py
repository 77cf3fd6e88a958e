"""clang-tidy over src/**/*.cpp with the checks of .clang-tidy. A source is checked again only
when it, a header, the checks or the way it is compiled have changed."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

from .common import BUILD, ROOT, Finding, compile_commands, read, run, run_all, select, tool


def extra_arguments(cache: Path) -> list[str]:
    """clang reads a build made for g++: g++ judges the warnings, and <omp.h> is its own."""
    arguments = ["--extra-arg=-Wno-error"]
    omp = Path(run(["g++", "-print-file-name=include/omp.h"]).stdout.strip())
    if omp.is_absolute() and omp.exists():
        # The other headers of that folder are g++'s builtins: link this one alone.
        link = cache / "include" / "omp.h"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(omp)
        arguments.append(f"--extra-arg=-isystem{link.parent}")
    return arguments


def check() -> Finding:
    program = tool("clang-tidy")
    cache = BUILD / "clang-tidy"
    cache.mkdir(parents=True, exist_ok=True)
    context = hashlib.sha256(read(".clang-tidy").encode())
    for header in select(under=("src/", "include/"), suffixes=(".h",)):
        context.update(read(header).encode())
    commands, stamps = {}, {}
    entries = [e for e in compile_commands() if re.fullmatch(r"src/.*\.cpp", e["name"])]
    for entry in entries:
        name = entry["name"]
        digest = context.copy()
        digest.update((shlex.join(entry["words"]) + read(name)).encode())
        stamp = cache / (name.replace("/", "-") + ".ok")
        if stamp.exists() and stamp.read_text() == digest.hexdigest():
            continue
        stamps[name] = (stamp, digest.hexdigest())
        extra = extra_arguments(cache)
        commands[name] = [program, "-quiet", "-p", str(BUILD), *extra, str(ROOT / name)]
    problems = []
    for name, result in run_all(commands).items():
        if result.returncode == 0:
            stamp, digest_text = stamps[name]
            stamp.write_text(digest_text)
            continue
        found = [
            line.replace(f"{ROOT}/", "")
            for line in result.stdout.splitlines()
            if re.search(r": (error|warning): ", line)
        ]
        problems += found or [f"{name}: {result.stdout.strip()}"]
    note = f"{len(entries)} files, {len(commands)} changed"
    return Finding(sorted(set(problems)), note)
