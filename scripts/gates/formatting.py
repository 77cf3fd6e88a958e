"""clang-format and ruff: one layout for all sources, and ruff's lint rules."""

from __future__ import annotations

from .common import CPP, Finding, run, select, tool


def cpp_files() -> list[str]:
    return select(suffixes=CPP)


def clang_format() -> Finding:
    names = cpp_files()
    result = run([tool("clang-format"), "--dry-run", "--Werror", *names])
    wrong = sorted({line.split(":")[0] for line in result.stdout.splitlines() if "error:" in line})
    problems = [f"{name}: not formatted (make format)" for name in wrong]
    if result.returncode and not problems:
        problems = [result.stdout.strip()]
    return Finding(problems, f"{len(names)} files")


def fix_clang_format() -> None:
    run([tool("clang-format"), "-i", *cpp_files()], check=True)


def ruff() -> Finding:
    problems = []
    for command in (
        ["check", "--output-format=concise"],
        ["format", "--check", "--output-format=concise"],
    ):
        result = run([tool("ruff"), *command, "-q", "."])
        if result.returncode:
            problems += result.stdout.strip().splitlines()
    return Finding(problems)


def fix_ruff() -> None:
    run([tool("ruff"), "check", "-q", "--fix", "."])
    run([tool("ruff"), "format", "-q", "."], check=True)
