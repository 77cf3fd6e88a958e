"""The gates of the house: one line each, exit code 1 if one fails.

python scripts/gates/run.py [NAME ...] [--quick] [--fix format]
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gates import (
    clang_tidy,
    cmake_package,
    formatting,
    function_length,
    headers,
    library_symbols,
    python_api,
    readme,
    text_rules,
    wheel,
)
from gates.common import Finding, Gate, GateError

GATES = [
    Gate("clang-format", formatting.clang_format, fix=formatting.fix_clang_format),
    Gate("ruff", formatting.ruff, fix=formatting.fix_ruff),
    Gate("line-width", text_rules.line_width),
    Gate("function-length", function_length.check),
    Gate("inline-assembly", text_rules.inline_assembly),
    Gate("open-ends", text_rules.open_ends),
    Gate("library-is-quiet", library_symbols.check),
    Gate("environment", text_rules.environment_in_one_place),
    Gate("machine-paths", text_rules.machine_paths),
    Gate("version", text_rules.one_version),
    Gate("headers", headers.check, slow=True),
    Gate("cmake-package", cmake_package.check),
    Gate("python-types", python_api.types),
    Gate("import-time", python_api.import_time),
    Gate("clang-tidy", clang_tidy.check, slow=True),
    Gate("wheel", wheel.check, slow=True),
    Gate("readme-commands", readme.check, slow=True),
]
MAX_SHOWN = 40
AT_ONCE = 2  # most of a gate's time one core works, or the network


def checked(gate: Gate) -> tuple[Finding, float]:
    """What a gate found, and the seconds it took."""
    start = time.perf_counter()
    try:
        finding = gate.check()
    except GateError as error:
        finding = Finding([str(error)])
    return finding, time.perf_counter() - start


def report(gate: Gate, finding: Finding, seconds: float) -> bool:
    """Prints the line of a gate; True if it passed."""
    word = "FAIL" if finding.problems else "ok"
    print(f"{word:4}  {gate.name:18} {seconds:6.1f} s  {finding.note}", flush=True)
    for problem in finding.problems[:MAX_SHOWN]:
        print(f"      {problem}")
    if len(finding.problems) > MAX_SHOWN:
        print(f"      and {len(finding.problems) - MAX_SHOWN} more")
    return not finding.problems


def main() -> int:
    parser = argparse.ArgumentParser(description="The gates of the house.")
    known = [gate.name for gate in GATES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--quick", action="store_true", help="without the slow ones")
    parser.add_argument("--fix", choices=["format"], help="rewrite the sources, check nothing")
    parser.add_argument("--report", type=Path, help="also write one line a gate to this file")
    options = parser.parse_args()
    if unknown := set(options.names) - set(known):
        parser.error(f"no such gate: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if options.fix:
        for gate in GATES:
            if gate.fix:
                gate.fix()
        return 0
    names = options.names or [g.name for g in GATES if not (options.quick and g.slow)]
    chosen = [gate for gate in GATES if gate.name in names]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = zip(chosen, pool.map(checked, chosen), strict=True)
        results = {gate.name: report(gate, *outcome) for gate, outcome in found}
    if options.report:
        lines = [f"{'ok' if passed else 'FAIL'} {name}\n" for name, passed in results.items()]
        options.report.write_text("".join(lines))
    num_passed = sum(results.values())
    print(f"gates: {num_passed} passed, {len(results) - num_passed} failed")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
