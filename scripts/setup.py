"""Makes this machine ready to build and test: system packages, and the virtual environment .venv.

Needs Python 3.10 and nothing else. As root it installs the system packages that are missing;
otherwise it prints the one line that does, and exits with 1. What was done is remembered in
.venv/flashmoe.stamp, so that a second run only looks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "flashmoe.stamp"
MIN_PYTHON = (3, 10)
MIN_GXX = 12

# System package -> what the C++ compiler must be able to include.
HEADERS = {
    "libdnnl-dev": ["oneapi/dnnl/dnnl.hpp"],
    "libeigen3-dev": ["Eigen/Core", "eigen3/Eigen/Core"],
    "libgtest-dev": ["gtest/gtest.h"],
}

# System package -> the program that it brings. A test says so where one is missing.
OPTIONAL_PROGRAMS = {"openmpi-bin": "mpirun", "spin": "spin"}

APT_INSTALL = ["apt-get", "install", "-y", "-q", "--no-install-recommends"]

COMMAND = """\
#!{python}
import sys

from flashmoe.cli import main

sys.exit(main())
"""


class SetupError(Exception):
    """Something that the user has to do; the text says what."""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def missing_packages() -> list[str]:
    """Names of the system packages that this machine lacks."""
    if shutil.which(compiler()) is None:
        return ["g++", *HEADERS]
    # One preprocessor run answers for all headers.
    lines = []
    for package, headers in HEADERS.items():
        condition = " || ".join(f"__has_include(<{header}>)" for header in headers)
        lines.append(f"#if !({condition})\nmissing {package}\n#endif")
    command = [compiler(), "-E", "-P", "-x", "c++", "-"]
    result = subprocess.run(
        command, input="\n".join(lines), capture_output=True, text=True, check=True
    )
    missing = re.findall(r"^missing (\S+)$", result.stdout, re.MULTILINE)
    ensurepip = Path(sysconfig.get_path("stdlib")) / "ensurepip" / "_bundled"
    if not VENV.exists() and not ensurepip.exists():
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-venv")
    return missing


def apt(command: list[str], needed: bool) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, check=needed, env=environment, stdout=subprocess.DEVNULL)


def install_system_packages() -> None:
    missing = missing_packages()
    optional = [name for name, tool in OPTIONAL_PROGRAMS.items() if shutil.which(tool) is None]
    may_install = shutil.which("apt-get") is not None and os.geteuid() == 0
    if missing and shutil.which("apt-get") is None:
        raise SetupError("missing, by their Debian names: " + " ".join(missing))
    if missing and not may_install:
        command = " ".join([*APT_INSTALL, *missing, *optional])
        raise SetupError(f"run this, then try again:\nsudo apt-get update && sudo {command}")
    if may_install and (missing or optional):
        print("setup: system packages", *missing, *optional, flush=True)
        apt(["apt-get", "update", "-q"], needed=bool(missing))
        if missing:
            apt([*APT_INSTALL, *missing], needed=True)
        for name in optional:  # one by one: not every system has all of them
            apt([*APT_INSTALL, name], needed=False)
    optional = [name for name in optional if shutil.which(OPTIONAL_PROGRAMS[name]) is None]
    if optional:
        print("setup: not installed, their tests are skipped:", *optional, flush=True)
    version = subprocess.run([compiler(), "-dumpversion"], capture_output=True, text=True)
    if int(version.stdout.split(".")[0]) < MIN_GXX:
        raise SetupError(
            f"{compiler()} is version {version.stdout.strip()}; {MIN_GXX} or newer is needed. "
            f"For example: apt-get install g++-{MIN_GXX}, then CXX=g++-{MIN_GXX} make run"
        )


def stamp() -> str:
    """What the environment depends on: this script, the requirements, the place, the Python."""
    digest = hashlib.sha256()
    for path in (Path(__file__), ROOT / "pyproject.toml"):
        digest.update(path.read_bytes())
    digest.update(f"{ROOT} {sys.version_info[:2]}".encode())
    return digest.hexdigest()


def requirements() -> list[str]:
    """Everything of pyproject.toml: what the package needs, and all of its extras."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10: pip brings the same reader
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [name for group in groups for name in group if not name.startswith("flashmoe[")]


def make_environment(wanted: str) -> None:
    """Creates .venv if it is missing and brings it up to date."""
    python = VENV / "bin" / "python"
    marker = VENV / "flashmoe.root"
    if not marker.exists() or marker.read_text() != str(ROOT):
        # An environment holds its own path: one that was copied or half made is made anew.
        print("setup: virtual environment .venv", flush=True)
        base = getattr(sys, "_base_executable", sys.executable)
        subprocess.run([base, "-m", "venv", "--clear", VENV], check=True)
        marker.write_text(str(ROOT))
    print("setup: Python packages (minutes and 6 GB the first time, for PyTorch)", flush=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    subprocess.run([*pip, "pip>=25"], check=True)
    subprocess.run([python, __file__, "--install-requirements"], check=True)
    # The package is used from the source tree: a path file, and the command beside it.
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True)
    Path(site.stdout.strip(), "flashmoe_checkout.pth").write_text(f"{ROOT / 'python'}\n")
    script = VENV / "bin" / "flashmoe"
    script.write_text(COMMAND.format(python=python))
    script.chmod(0o755)
    STAMP.write_text(wanted)


def main() -> int:
    if sys.argv[1:] == ["--install-requirements"]:  # by the Python of .venv, which has pip
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        return subprocess.run([*command, *requirements()], check=False).returncode
    try:
        if sys.version_info < MIN_PYTHON:
            raise SetupError(f"Python {sys.version.split()[0]}: 3.10 or newer is needed")
        install_system_packages()
        wanted = stamp()
        if not STAMP.exists() or STAMP.read_text() != wanted:
            make_environment(wanted)
    except (SetupError, subprocess.CalledProcessError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
