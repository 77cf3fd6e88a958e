"""The resources of every CUDA kernel in a library: registers, stack, local and shared memory.

    python scripts/cuda_resources.py LIBRARY [--output FILE] [--if-possible]

Prints a table, and writes it to FILE. Exit code 1 if a kernel has a stack frame or local memory:
both mean that its registers were misjudged. Needs cuobjdump (CUDA toolkit, or the package
nvidia-cuda-cuobjdump); with --if-possible its absence is said and is no failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HEADER = ("kernel", "registers", "stack", "local", "parameters")


class ToolMissingError(RuntimeError):
    """cuobjdump is nowhere to be found."""


@dataclass(frozen=True)
class Kernel:
    """Registers a thread at launch (roles move them later), and bytes."""

    name: str
    registers: int
    stack: int
    local: int
    parameters: int

    @property
    def cells(self):
        numbers = (self.registers, self.stack, self.local, self.parameters)
        return (self.name, *(str(number) for number in numbers))


def find_tool() -> str:
    """cuobjdump of the toolkit, or of a package in this Python. Raises ToolMissingError."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "bin" for home in [*homes, "/usr/local/cuda"] if home]
    folders += sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin"))
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    if tool := shutil.which("cuobjdump", path=path):
        return tool
    raise ToolMissingError("cuobjdump is missing: CUDA toolkit, or pip nvidia-cuda-cuobjdump")


def short_name(mangled: str) -> str:
    """Demangled, without namespaces and parameters."""
    if tool := shutil.which("c++filt"):
        command = [tool, mangled]
        mangled = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(flashmoe::[\w:]*\)", "", mangled).removeprefix("void ")
    return re.sub(r"\b\w+::", "", name.rsplit("(", 1)[0])


def read_kernels(library: Path) -> list[Kernel]:
    """All kernels of a library or object."""
    command = [find_tool(), "--dump-resource-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = []
    for function, usage in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text):
        fields = re.findall(r"([A-Z]+(?:\[\d\])?):(\d+)", usage)
        numbers = {key: int(value) for key, value in fields}
        parameters = numbers.get("CONSTANT[0]", 0)
        name = short_name(function)
        kernels.append(Kernel(name, numbers["REG"], numbers["STACK"], numbers["LOCAL"], parameters))
    return sorted(kernels, key=lambda kernel: kernel.name)


def table(kernels: list[Kernel]) -> str:
    rows = [HEADER, *(kernel.cells for kernel in kernels)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--output", type=Path, help="write the table to this file as well")
    parser.add_argument("--if-possible", action="store_true", help="pass without cuobjdump")
    options = parser.parse_args()
    try:
        kernels = read_kernels(options.library)
    except ToolMissingError as error:
        print(f"no resource table: {error}")
        return 0 if options.if_possible else 1
    text = table(kernels)
    print(text, end="")
    if options.output:
        options.output.write_text(text)
    faults = [kernel.name for kernel in kernels if kernel.stack or kernel.local]
    for name in faults:
        print(f"{name}: uses local memory")
    if not kernels:
        print(f"{options.library}: no kernels")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
