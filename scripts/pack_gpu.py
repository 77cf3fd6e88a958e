"""Builds flashmoe with CUDA and packs what a GPU machine without internet needs to run it.

    python scripts/pack_gpu.py            builds here (nvcc is needed, a GPU is not) into build/gpu
    python3 scripts/run_gpu.py --pack build/gpu --out results     there, in a copy of the checkout

The folder holds lib/ (the library of the Python package, and the building blocks that
tests/cuda/test_grouped_product.py loads) and site/ (apache-tvm-ffi and pytest-timeout for the
Python of that machine, which has to have torch and pytest itself). The products of the CPU engine
are Eigen's in this build, so that oneDNN and OpenMP need not travel.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("libflashmoe_ffi.so", "src/cuda/libflashmoe_cuda_bench.so")
TARGETS = ("flashmoe_ffi", "flashmoe_cuda_bench")
PACKAGES = ("apache-tvm-ffi", "pytest-timeout")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "SKBUILD": "ON",  # the library stays in the build folder, for any processor
    "FLASHMOE_CUDA": "ON",
    "FLASHMOE_GEMM": "eigen",
    "FLASHMOE_TESTS": "ON",
    "FLASHMOE_WERROR": "ON",
}


def build(folder: Path, jobs: int) -> None:
    """Configures and builds the libraries in `folder`."""
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    options.append(f"-DPython_EXECUTABLE={sys.executable}")
    subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options], check=True
    )
    subprocess.run(
        ["cmake", "--build", str(folder), "-j", str(jobs), "--target", *TARGETS], check=True
    )


def pack_libraries(built: Path, folder: Path) -> None:
    """Copies the libraries, without their symbol tables."""
    folder.mkdir(parents=True, exist_ok=True)
    for library in LIBRARIES:
        path = shutil.copy2(built / library, folder)
        subprocess.run(["strip", path], check=True)


def pack_package(name: str, folder: Path, python: str, wheels: Path) -> None:
    """Unpacks the wheel of a package, of the version that is installed here, for `python`."""
    version = importlib.metadata.version(name)
    stem = name.replace("-", "_")
    if (folder / f"{stem}-{version}.dist-info").exists():
        return
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary=:all:", "--python-version", python, "--implementation", "cp"),
            *platforms,
            *("--dest", str(wheels), f"{name}=={version}"),
        ],
        check=True,
    )
    tag = "cp" + python.replace(".", "")
    found = [path for path in wheels.glob(f"{stem}-{version}-*.whl") if is_for(path.name, tag)]
    with zipfile.ZipFile(found[0]) as archive:
        archive.extractall(folder)


def is_for(wheel: str, tag: str) -> bool:
    """Whether a wheel runs on the Python of `tag`."""
    return f"-{tag}-" in wheel or "-none-any" in wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "gpu", help="the packed folder")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu-build")
    parser.add_argument("--python", default="3.12", help="of the GPU machine (default: 3.12)")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    build(arguments.build, arguments.jobs)
    pack_libraries(arguments.build, arguments.to / "lib")
    for name in PACKAGES:
        pack_package(name, arguments.to / "site", arguments.python, arguments.build / "wheels")
    packed = sum(path.stat().st_size for path in arguments.to.rglob("*") if path.is_file())
    print(f"{arguments.to}: {packed / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
