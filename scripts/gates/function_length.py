"""No function over 120 lines; how many are over 60, the habit of the house, is shown."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from .common import CPP, Finding, code_only, line_of, read, select

LIMIT = 120
HABIT = 60

Function = tuple[str, int, int]  # name, first line, number of lines


def python_functions(text: str) -> Iterator[Function]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def closing_brace(code: str, opening: int) -> int:
    """Offset of the brace that closes the one at `opening`, or the end of the text."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(code, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    return len(code)


def is_initialiser(head: str) -> bool:
    """Whether a brace after `head` starts a value: `= {`, `x{`, or a member in `T() : a{`."""
    if "(" not in head or re.search(r"[=,(]\s*$", head):
        return True
    in_member_list = re.search(r"\)[^;{}()]*[^:]:[^:]", head)
    return in_member_list is not None and re.search(r"[\w>]\s*$", head) is not None


def cpp_functions(text: str) -> Iterator[Function]:
    """Functions at namespace or class scope; a lambda counts with the function around it."""
    code = code_only(text)
    start = position = 0  # start: where the current declaration begins
    while match := re.compile(r"[{};]|\b(?:public|private|protected)\s*:").search(code, position):
        position = match.end()
        if match.group() != "{":
            start = position
            continue
        head = code[start : match.start()]
        is_scope = re.search(r"\b(namespace|class|struct|union|extern)\b", head)
        if is_scope and not re.search(r"\)\s*(const|noexcept|override|final|\s)*(->.*)?$", head):
            start = position  # look inside
        elif is_initialiser(head):
            position = closing_brace(code, match.start()) + 1
        else:
            end = closing_brace(code, match.start())
            if name := re.search(r"([~\w:]+|operator\s*\S+)\s*\(", head):
                first = line_of(code, start + len(head) - len(head.lstrip()))
                yield name.group(1), first, line_of(code, end) - first + 1
            start = position = end + 1


def check() -> Finding:
    problems, num_functions, num_over_habit, longest = [], 0, 0, 0
    for name in select(suffixes=(*CPP, ".py")):
        functions = python_functions if name.endswith(".py") else cpp_functions
        for function, line, length in functions(read(name)):
            num_functions += 1
            num_over_habit += length > HABIT
            longest = max(longest, length)
            if length > LIMIT:
                problems.append(f"{name}:{line}: {function} has {length} lines, {LIMIT} at most")
    note = f"{num_functions} functions, {num_over_habit} over {HABIT} lines, longest {longest}"
    return Finding(problems, note)
