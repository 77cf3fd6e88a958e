"""Every header compiles alone; the C ABI as C too."""

from __future__ import annotations

import shlex

from .common import Finding, compile_commands, run_all, select, tool

FOLDERS = ("include/", "src/base/", "src/plan/", "src/cpu/", "src/fabric/", "src/engine/")


def include_flags() -> list[str]:
    """Folders and definitions that the build gives to the sources of the core."""
    words = next(e["words"] for e in compile_commands() if e["name"].startswith("src/base/"))
    flags = []
    for position, word in enumerate(words):
        if word == "-isystem":
            flags += words[position : position + 2]
        elif word.startswith(("-I", "-D", "-m", "-f")):
            flags.append(word)
    return shlex.split(" ".join(flags))


def check() -> Finding:
    compiler, flags = tool("g++"), include_flags()
    headers = select(under=FOLDERS, suffixes=(".h",))
    strict = ["-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    commands = {}
    for header in headers:
        # Included, not compiled itself: a header on its own may use #pragma once.
        common = [*strict, *flags, "-include", header]
        commands[header] = [compiler, "-std=c++20", *common, "-x", "c++", "/dev/null"]
        if header.endswith("c_api.h"):
            as_c = ["gcc", "-std=c11", *strict, "-Iinclude", "-include", header]
            commands[f"{header} as C"] = [*as_c, "-x", "c", "/dev/null"]
    problems = []
    for name, result in run_all(commands).items():
        if result.returncode:
            lines = [line for line in result.stdout.splitlines() if "error:" in line]
            problems.append(f"{name}: {(lines or [result.stdout.strip()])[0]}")
    return Finding(problems, f"{len(headers)} headers")
