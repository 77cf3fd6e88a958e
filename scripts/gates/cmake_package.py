"""The installed CMake package serves C and C++ programs: configure, build and run the examples."""

from __future__ import annotations

import shutil

from .common import BUILD, Finding, run, tool


def check() -> Finding:
    cmake, work = tool("cmake"), BUILD / "package"
    prefix, build = work / "install", work / "build"
    shutil.rmtree(work, ignore_errors=True)
    configure = [cmake, "-S", "examples", "-B", str(build), "-G", "Ninja"]
    steps = [
        [cmake, "--install", str(BUILD), "--prefix", str(prefix), "--component", "library"],
        [*configure, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release"],
        [cmake, "--build", str(build)],
        [tool("ctest"), "--test-dir", str(build), "--output-on-failure", "--no-tests=error"],
    ]
    for step in steps:
        result = run(step)
        if result.returncode:
            return Finding([f"{' '.join(step)}: {result.stdout.strip()[-3000:]}"])
    passed = [line for line in result.stdout.splitlines() if "tests passed" in line]
    return Finding([], passed[0] if passed else "")
