"""Rules about the text of the sources: what may not appear, and where."""

from __future__ import annotations

import re

from .common import CPP, Finding, code_only, files, line_of, read, select

LIBRARY = ("src/", "include/")


def scan(names: list[str], pattern: str, message: str, *, in_code: bool) -> Finding:
    """A problem for each match of `pattern` in the files, or in their code without comments."""
    problems = []
    expression = re.compile(pattern, re.MULTILINE)
    for name in names:
        text = code_only(read(name)) if in_code else read(name)
        for match in expression.finditer(text):
            problems.append(f"{name}:{line_of(text, match.start())}: {message}")
    return Finding(problems, f"{len(names)} files")


def inline_assembly() -> Finding:
    names = [f for f in select(suffixes=CPP) if not f.startswith("src/cuda/ptx/")]
    pattern = r"\b(?:asm|__asm|__asm__)\b\s*(?:volatile|__volatile__)?\s*\("
    return scan(names, pattern, "inline assembly belongs under src/cuda/ptx/", in_code=True)


def open_ends() -> Finding:
    # Letters in brackets, so that this file passes.
    pattern = r"\b(?:TO[D]O|FIX[M]E|X[X]X|HA[C]K)\b"
    suffixes = (*CPP, ".py", ".pyi", ".md", ".cmake", ".toml", ".sh", "CMakeLists.txt", "Makefile")
    message = "an open end: do it, or file an issue"
    return scan(select(suffixes=suffixes), pattern, message, in_code=False)


def environment_in_one_place() -> Finding:
    names = [f for f in select(under=LIBRARY, suffixes=CPP) if not f.startswith("src/base/env.")]
    message = "the environment is read in src/base/env alone"
    return scan(names, r"\b(?:secure_)?getenv\s*\(", message, in_code=True)


def machine_paths() -> Finding:
    """No path of one machine in what people read or run."""
    suffixes = (".md", ".toml", ".sh", ".json", ".jsonl", ".cmake", ".txt", ".yml", "Makefile")
    names = [f for f in select(suffixes=suffixes) if not f.startswith("tests/")]
    names += [f for f in files() if f.startswith(".ci/")]
    roots = "|".join(("work", "tmp", "root", "home"))
    return scan(names, rf"(?:^|[\s\"'=(:])/(?:{roots})/", "a path of one machine", in_code=False)


def line_width() -> Finding:
    """clang-format and ruff leave long comments alone; nobody else does."""
    names = select(suffixes=(*CPP, ".py", ".cmake", "CMakeLists.txt", "Makefile"))
    return scan(names, r"^.{101,}$", "over 100 columns", in_code=False)


def one_version() -> Finding:
    """The Python package and the changelog name the version of CMakeLists.txt."""
    found = re.search(r"project\(flashmoe VERSION ([\d.]+)", read("CMakeLists.txt"))
    version = found.group(1) if found else "?"
    places = {"CHANGELOG.md": f"## [{version}]"}
    places["python/flashmoe/__init__.py"] = f'__version__ = "{version}"'
    missing = {name: text for name, text in places.items() if text not in read(name)}
    problems = [f"{name}: {text} is missing" for name, text in missing.items()]
    return Finding(problems, version)
