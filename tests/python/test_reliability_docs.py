"""docs/reliability.md: every fault has a test, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()

# A word or two of each fault that must have a row.
FAULTS = [
    "killed before dispatch",
    "killed between dispatch and combine",
    "killed in the backward",
    "stopped inside the deadline",
    "stopped past the deadline",
    "raises and skips the call",
    "another layer, direction, shape or dtype",
    "another build",
    "abort from another thread",
    "new group in the same process",
    "shared memory after any exit",
    "100,000 launches",
    "1000 groups",
    "random delays",
    "late by 10 s",
    "overlapping groups",
    "two threads",
    "C ABI",
    "configuration file",
    "rule of the protocol",
]


def rows():
    """(fault, names of tests, what was seen) of the table."""
    table = PAGE.split("## Faults")[1].split("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith("| ") and not line.startswith("| fault")
    ]
    return [(fault, re.findall(r"`([^`]+)`", tests), seen) for fault, tests, seen in cells]


def exists(name):
    if "::" in name:
        file, test = name.split("::")
        path = ROOT / "tests" / "python" / f"{file}.py"
        body = ast.parse(path.read_text()).body if path.exists() else []
        return any(isinstance(item, ast.FunctionDef) and item.name == test for item in body)
    if name.startswith("fuzz."):
        return f"add_test(NAME {name} " in (ROOT / "tests/fuzz/CMakeLists.txt").read_text()
    file, suite, test = name.split(".")
    path = ROOT / "tests" / "cpp" / f"{file}.cpp"
    return path.exists() and bool(re.search(rf"TEST(_F|_P)?\({suite}, {test}\)", path.read_text()))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_has_a_row_with_tests(fault):
    found = [row for row in rows() if fault in row[0]]
    assert found, f"no row about '{fault}'"
    for _, tests, seen in found:
        assert tests and seen


def test_named_tests_exist():
    missing = [name for _, tests, _ in rows() for name in tests if not exists(name)]
    assert not missing
    assert not exists("test_faults_processes::test_nothing")


def test_every_fault_test_is_named():
    """A new test of faults comes with a word about what it saw."""
    named = {name for _, tests, _ in rows() for name in tests}
    unnamed = []
    for path in sorted((ROOT / "tests" / "python").glob("test_faults_*.py")):
        for item in ast.parse(path.read_text()).body:
            if isinstance(item, ast.FunctionDef) and item.name.startswith("test_"):
                unnamed.append(f"{path.stem}::{item.name}")
    helpers = {
        "test_faults_lifecycle::test_soak_finds_a_wrong_row",
        "test_faults_config::test_good_file_is_read",
        "test_faults_config::test_nesting_is_refused",
        "test_faults_config::test_any_values_of_known_keys",
    }
    assert set(unnamed) - named == helpers
