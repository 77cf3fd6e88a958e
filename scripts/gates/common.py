"""What the gates share: the files of the project, tools, and the form of a gate."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "release"
CPP = (".h", ".hpp", ".cpp", ".cu", ".cuh")


class GateError(Exception):
    """The gate could not do its work: a tool or an input is missing. Counts as a failure."""


@dataclass
class Finding:
    """What a gate says: `problems` fail it, `note` is shown beside its name."""

    problems: list[str]
    note: str = ""


@dataclass(frozen=True)
class Gate:
    name: str
    check: Callable[[], Finding]
    slow: bool = False  # left out of a quick run
    fix: Callable[[], None] | None = None


@cache
def files() -> tuple[str, ...]:
    """All files of the project that git knows or would add, relative to its root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(sorted(name for name in set(listing.stdout.split("\n")) if exists(name)))


def exists(name: str) -> bool:
    return bool(name) and (ROOT / name).is_file()


def select(*, under: Iterable[str] = ("",), suffixes: Iterable[str]) -> list[str]:
    """Files whose path starts with one of `under` and ends with one of `suffixes`."""
    return [f for f in files() if f.startswith(tuple(under)) and f.endswith(tuple(suffixes))]


@cache
def read(name: str) -> str:
    path = ROOT / name
    if not path.exists():
        raise GateError(f"{name} is missing")
    return path.read_text(errors="replace")


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise GateError(f"{name} is missing: make setup")
    return path


def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """Runs a command at the root of the project; stdout and stderr come back as one text."""
    settings = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, **{**settings, **options})


def run_all(commands: dict[str, list[str]]) -> dict[str, subprocess.CompletedProcess[str]]:
    """Runs named commands, one per core at a time."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(commands, pool.map(run, commands.values()), strict=True))


@cache
def compile_commands() -> list[dict]:
    """How the build compiles each source, with its command split into words."""
    path = BUILD / "compile_commands.json"
    if not path.exists():
        raise GateError("build/release/compile_commands.json is missing: make build")
    entries = json.loads(path.read_text())
    for entry in entries:
        entry["words"] = entry["command"].split()
        entry["name"] = os.path.relpath(entry["file"], ROOT)
    return entries


def code_only(text: str) -> str:
    """C++ text with comments, strings and preprocessor lines blanked; line breaks stay."""
    pattern = re.compile(
        r"//[^\n]*|/\*.*?\*/"  # comments
        r'|R"\w*\(.*?\)\w*"|"(?:\\.|[^"\\\n])*"'  # strings
        r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'"  # characters, but not digit separators
        r"|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*",  # preprocessor lines
        re.DOTALL | re.MULTILINE,
    )
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1
