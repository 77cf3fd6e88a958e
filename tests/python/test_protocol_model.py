"""The flag protocol as a model (tests/model/protocol.pml), searched exhaustively with spin: it has
no error, and every rule that is left out makes one."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

MODEL = Path(__file__).parent.parent / "model" / "protocol.pml"

# Rule that is broken -> what the search finds.
LOST_OR_TORN = "assertion violated"
DEADLOCK = "invalid end state"
MUTATIONS = {
    "DROP_CREDIT": LOST_OR_TORN,
    "LATE_CREDIT": LOST_OR_TORN,
    "CREDIT_BEFORE_READING": LOST_OR_TORN,
    "ONE_BANK": LOST_OR_TORN,
    "STALE_FLAG": LOST_OR_TORN,
    "METADATA_FLAG_FIRST": LOST_OR_TORN,
    "PUSH_FLAG_FIRST": LOST_OR_TORN,
    "RETURN_FLAG_FIRST": LOST_OR_TORN,
    "READ_WITHOUT_WAITING": LOST_OR_TORN,
    "COMBINE_WITHOUT_WAITING": LOST_OR_TORN,
    "PUSH_BEFORE_METADATA": LOST_OR_TORN,
    "NO_CREDIT_FROM_REFUSERS": DEADLOCK,
    "SILENT_REFUSAL": DEADLOCK,
}

# Ranks and launches. Two ranks may refuse anything; of three, to be quick, only the first.
SIZES = {
    "2 ranks": ("N=2", "L=6"),
    "3 ranks": ("N=3", "L=4", "REFUSERS=1"),
}


@pytest.fixture(scope="module", autouse=True)
def tools():
    for tool in ("spin", "gcc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt-get install {tool}")


def search(directory, *macros):
    """The report of an exhaustive search of the model under these macros."""
    defines = [f"-D{macro}" for macro in macros]
    for command in (
        ["spin", "-a", *defines, MODEL],
        ["gcc", "-O0", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
    report = subprocess.run(
        ["./pan", "-m100000"], cwd=directory, capture_output=True, text=True, timeout=120
    )
    assert "Search not completed" not in report.stdout or "errors: 1" in report.stdout
    return report.stdout


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_protocol_has_no_error(tmp_path, size):
    """No deadlock, no lost row, no row read before it was written or after it was overwritten."""
    report = search(tmp_path, *size)
    assert "errors: 0" in report, report
    assert "max search depth too small" not in report
    unreached = re.search(r"unreached in proctype Rank\n\t\((\d+) of", report)
    assert unreached and unreached.group(1) == "0", "a part of the model is never reached"
    print(re.search(r"\d+ states, stored", report.replace("\t", " ")).group())


@pytest.mark.slow
@pytest.mark.parametrize("rule", MUTATIONS)
def test_broken_rule_is_found(tmp_path, rule):
    report = search(tmp_path, "N=2", "L=5", rule)
    assert "errors: 1" in report, f"nobody notices {rule}"
    assert MUTATIONS[rule] in report, report


def test_launches_in_flight(tmp_path):
    """The search does see two ranks a launch apart: what the banks and the credit are for."""
    assert LOST_OR_TORN in search(tmp_path, "N=2", "TWO_IN_FLIGHT")


def test_every_mutation_of_the_model_is_tested():
    tested = {"N", "L", "REFUSERS", "TWO_IN_FLIGHT", *MUTATIONS}
    named = set(re.findall(r"#(?:ifdef|ifndef|elif defined\()\s*(\w+)", MODEL.read_text()))
    assert named == tested
