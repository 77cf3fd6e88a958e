"""The installed CMake package serves a C program: configure, build and run tests/consumer."""

from __future__ import annotations

import shutil

from .common import BUILD, Finding, run, tool

CONSUMER = "tests/consumer"


def check() -> Finding:
    cmake = tool("cmake")
    prefix, build = BUILD / "package" / "install", BUILD / "package" / "build"
    shutil.rmtree(BUILD / "package", ignore_errors=True)
    steps = [
        [cmake, "--install", str(BUILD), "--prefix", str(prefix), "--component", "library"],
        [cmake, "-S", CONSUMER, "-B", str(build), "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}"],
        [cmake, "--build", str(build)],
        [str(build / "consumer")],
    ]
    for step in steps:
        result = run(step)
        if result.returncode:
            return Finding([f"{' '.join(step)}: {result.stdout.strip()}"])
    return Finding([], result.stdout.strip())
