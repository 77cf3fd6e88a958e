"""`flashmoe doctor`: what of this machine FlashMoE can use, and what to do about what it can not.

Every check tries the thing itself where it can: a layer on one rank, on threads, over shared
memory, through torch, on two ranks of mpirun, on a Hopper GPU; a collective of gloo; a program for
the compiler. What is only looked up says so. Nothing here needs more than the package's own
dependencies.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import permutations
from typing import Any

OK = "ok"
ABSENT = "absent"  # not there, and not needed by what is there
PROBLEM = "problem"

MIN_GXX = 12
MIN_NVCC = (12, 4)
SHOWN_RANKS, SHOWN_HIDDEN = 8, 4096  # an example
SMALL_SHM_BYTES = 1 << 30  # containers have 64 MiB unless told otherwise
TORCH = "for autograd and process groups: pip install 'flashmoe[torch]'"
HOPPER = (9, 0)  # the compute capability that the kernels are for
COMMAND_TIMEOUT_S = 60
GLOO_TIMEOUT_S = 20
# From cuda.h.
CUDA_ERROR_NO_DEVICE = 100
ATTRIBUTE_MAJOR, ATTRIBUTE_MINOR = 75, 76


@dataclass(frozen=True)
class Check:
    """One line of the report. found: what is there; advice: what to do, "" if nothing."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine() -> Iterator[Check]:
    """All checks, in the order of the report. A check that breaks is a problem of its own."""
    for name, examiner in EXAMINERS.items():
        try:
            yield from examiner(name)
        except Exception as error:
            yield Check(name, PROBLEM, f"{type(error).__name__}: {first_line(error)}", ADVICE)


ADVICE = (
    "where the text does not say what to do, report it with the output of flashmoe doctor --json"
)


def summary(checks: list[Check]) -> dict[str, Any]:
    """The report as plain data: what `--json` prints."""
    problems = [check.name for check in checks if check.status == PROBLEM]
    return {"passed": not problems, "problems": problems, "checks": [asdict(one) for one in checks]}


def lines(checks: list[Check]) -> Iterator[str]:
    """The report for people."""
    for check in checks:
        yield f"{check.status:8} {check.name:14} {check.found}"
        if check.advice:
            yield f"{'':23} -> {check.advice}"
    problems = [check.name for check in checks if check.status == PROBLEM]
    on_gpu = any(check.name == "gpu layer" and check.status == OK for check in checks)
    works = f"FlashMoE works here, on the CPU{' and the GPU' if on_gpu else ''}"
    yield ""
    yield f"to be mended: {', '.join(problems)}" if problems else works


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def attempt(*command: str, text: str = "", **environment: str) -> tuple[bool, str]:
    """Runs a program on an input: whether it went well, and what it said."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            input=text,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
            timeout=COMMAND_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, first_line(error)
    return done.returncode == 0, done.stdout.strip()


def output(*command: str) -> str | None:
    """What a program says; None if it is not there or fails."""
    well, said = attempt(*command)
    return said if well else None


# ---- the package ---------------------------------------------------------------------------------


def package(name: str) -> Iterator[Check]:
    from . import __version__

    place = os.path.dirname(os.path.abspath(__file__))
    yield Check(name, OK, f"flashmoe {__version__}, Python {platform.python_version()}, at {place}")


def engine(name: str) -> Iterator[Check]:
    """The compiled library, and a layer on it: y = 2 x, on one rank and on two."""
    from . import __version__, _core
    from .group import local_group

    try:
        found = f"{_core.version()}; {_core.build_info()}"
    except Exception as error:
        advice = "run make in a checkout, or pip install --force-reinstall flashmoe"
        yield Check(name, PROBLEM, first_line(error), advice)
        return
    if _core.version() != __version__:
        advice = f"the package is {__version__}: build the library again (make build)"
        yield Check(name, PROBLEM, found, advice)
        return
    doubled(None, 0, 1)
    groups = local_group(2)
    try:
        on_two_ranks(lambda rank: doubled(groups[rank], rank, 2))
    finally:
        for group in groups:
            group.close()
    yield Check(name, OK, f"{found}; one rank and two as threads are right")


def doubled(group: Any, rank: int, world: int) -> None:
    """A layer of two experts, times 1 and times 3, each token to both. Raises AssertionError."""
    import numpy as np

    from .functional import experts

    x = np.arange(1.0, 25.0, dtype=np.float32).reshape(3, 8) + 100 * rank
    scales = np.split(np.array([1, 3], np.float32), world)[rank]
    w_up = scales[:, None, None] * np.eye(8, dtype=np.float32)
    w_down = np.stack([np.eye(8, dtype=np.float32)] * len(scales))
    ids, weights = np.tile([0, 1], (3, 1)), np.full((3, 2), 0.5, np.float32)
    y = experts(x, ids, weights, w_up, w_down, activation="identity", group=group)
    if not np.array_equal(y, 2 * x):
        raise AssertionError(f"y is {y[0, 0]} where {2 * x[0, 0]} is right, on rank {rank}")


def on_two_ranks(function: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(function, range(2)))


def shared_memory(name: str) -> Iterator[Check]:
    """Where the ranks of several processes meet, tried with both ends in this process."""
    from . import _core
    from .group import Group

    place = "/dev/shm"
    if not os.path.isdir(place):
        yield Check(name, PROBLEM, f"{place} is not there", "mount a tmpfs on it")
        return
    disk = shutil.disk_usage(place)
    found = f"{place} has {mebibytes(disk.free)} MiB free of {mebibytes(disk.total)}"
    token = f"doctor-{secrets.token_hex(8)}"

    def run(rank: int) -> None:
        with Group(_core.engine().group_shm(token, rank, 2), f"{token}-{rank}") as group:
            doubled(group, rank, 2)

    try:
        on_two_ranks(run)
    except Exception as error:
        advice = f"make {place} writable and larger (containers: docker run --shm-size=8g)"
        yield Check(name, PROBLEM, f"{found}; {first_line(error)}", advice)
        return
    # A backward holds, on each rank for each rank, its rows of x, of grad_y and of grad_x.
    tokens = disk.free // (SHOWN_RANKS**2 * 3 * SHOWN_HIDDEN * 2)
    found += f"; {SHOWN_RANKS} ranks may have about {tokens} tokens each (H {SHOWN_HIDDEN}, bf16)"
    few = disk.total < SMALL_SHM_BYTES
    advice = "for more: docker run --shm-size=8g, or a larger tmpfs" if few else ""
    yield Check(name, OK, found, advice)


def mebibytes(count: int) -> int:
    return count >> 20


def launcher(name: str) -> Iterator[Check]:
    from .launch import detect

    try:
        found = detect()
    except (ValueError, NotImplementedError) as error:
        advice = "unset these variables, or start all ranks with one launcher"
        yield Check(name, PROBLEM, first_line(error), advice)
        return
    alone = "none: this process was started alone"
    text = f"{found.kind}: rank {found.rank} of {found.world}" if found else alone
    yield Check(name, OK, text)


# ---- what other packages bring -------------------------------------------------------------------


def torch(name: str) -> Iterator[Check]:
    """PyTorch, and a layer's gradients through it."""
    try:
        import torch
    except ModuleNotFoundError:
        yield Check(name, ABSENT, "not installed", TORCH)
        return
    from .functional import experts

    x = torch.ones(3, 8, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(8, dtype=torch.float64)[None]
    ids, weights = torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), 2.0).double()
    y = experts(x, ids, weights, eye, eye, activation="identity")
    (gradient,) = torch.autograd.grad(y.sum(), x)
    if not torch.equal(gradient, 2 * torch.ones_like(x)):
        raise AssertionError("the gradient of y = 2 x is not 2")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({cuda}); gradients are right"
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        yield Check(name, PROBLEM, f"{found}; no gloo", "install a torch built with gloo")
        return
    try:
        gloo()
    except Exception as error:
        advice = "gloo needs a host name that resolves: see /etc/hosts, or GLOO_SOCKET_IFNAME=lo"
        yield Check(name, PROBLEM, f"{found}; gloo fails: {first_line(error)}", advice)
        return
    yield Check(name, OK, f"{found}; gloo connects two ranks")


def gloo() -> None:
    """A sum over two ranks of gloo, in threads. Raises RuntimeError."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    store, timeout = dist.HashStore(), timedelta(seconds=GLOO_TIMEOUT_S)

    def run(rank: int) -> None:
        ones = torch.ones(1)
        dist.ProcessGroupGloo(store, rank, 2, timeout).allreduce([ones]).wait()
        if ones.item() != 2:
            raise AssertionError(f"gloo says that 1 + 1 is {ones.item()}")

    on_two_ranks(run)


def mpi(name: str) -> Iterator[Check]:
    said = output("mpirun", "--version")
    if said is None:
        advice = "to start ranks with mpirun: apt-get install openmpi-bin"
        yield Check(name, ABSENT, "no mpirun", advice)
    else:
        yield mpirun(name, said.splitlines()[0])
    # In a process of its own: a broken MPI ends the process that loads it.
    code = "from mpi4py import MPI; print(MPI.Get_library_version())"
    binding = output(sys.executable, "-c", code)
    if binding:
        version = binding.splitlines()[0].split(", package")[0]
        yield Check("mpi4py", OK, f"loads {version}")
    elif output(sys.executable, "-c", "import mpi4py") is not None:
        advice = "mpi4py finds no MPI library: apt-get install openmpi-bin"
        yield Check("mpi4py", ABSENT if said is None else PROBLEM, "finds no MPI", advice)
    else:
        advice = "for communicators as group=: pip install 'flashmoe[mpi]'"
        yield Check("mpi4py", ABSENT, "not installed", advice)


# Each rank; the group of both is the one that a user gets.
ON_A_RANK = """
import flashmoe
from flashmoe import doctor
with flashmoe.world_group() as group:
    assert group.world == 2, f"{group.world} ranks where 2 were started"
    doctor.doubled(group, group.rank, group.world)
"""


def mpirun(name: str, version: str) -> Check:
    """A layer on two ranks that mpirun starts."""
    from .launch import detect

    try:
        inside = detect() is not None
    except (ValueError, NotImplementedError):
        inside = True
    if inside:
        return Check(name, OK, f"{version}; not tried from inside of a launcher")
    environment = {
        "FLASHMOE_TIMEOUT_S": str(COMMAND_TIMEOUT_S // 2),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # Two ranks on a machine of one core: Open MPI 4, and 5.
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    # The ranks meet by the name of Open MPI's job; others' jobs have none.
    named = "Open MPI" in version
    environment["MASTER_ADDR"] = "" if named else "127.0.0.1"
    environment["MASTER_PORT"] = "" if named else str(free_port())
    well, said = attempt("mpirun", "-np", "2", sys.executable, "-c", ON_A_RANK, **environment)
    if not well:
        words = [line for line in said.splitlines() if line.strip(" -")] or ["it says nothing"]
        advice = "see whether mpirun -np 2 hostname works, then report the rest of what it says"
        return Check(name, PROBLEM, f"{version}; two ranks fail: {words[-1][:200]}", advice)
    root = named and os.geteuid() == 0
    advice = "as root, Open MPI asks for mpirun --allow-run-as-root" if root else ""
    return Check(name, OK, f"{version}; two ranks are right", advice)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# ---- the tools that build it ---------------------------------------------------------------------


NO_EIGEN = "finds no Eigen"
PROGRAM = f"""
#include <barrier>
#include <span>
#if !__has_include(<Eigen/Core>) && !__has_include(<eigen3/Eigen/Core>)
#error {NO_EIGEN}
#endif
"""


def compiler(name: str) -> Iterator[Check]:
    command = os.environ.get("CXX", "g++")
    version = output(command, "-dumpfullversion", "-dumpversion")
    advice = f"only to build from source: apt-get install g++ ({MIN_GXX} or newer)"
    if version is None:
        yield Check(name, ABSENT, f"no {command}", advice)
    elif int(version.split(".")[0]) < MIN_GXX and "clang" not in command:
        yield Check(name, ABSENT, f"{command} {version} is too old", advice)
    else:
        well, said = attempt(command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-", text=PROGRAM)
        if well:
            yield Check(name, OK, f"{command} {version}; reads C++20 and Eigen")
        elif NO_EIGEN in said:
            advice = "only to build from source: apt-get install libeigen3-dev"
            yield Check(name, ABSENT, f"{command} {version}; {NO_EIGEN}", advice)
        else:
            yield Check(name, ABSENT, f"{command} {version} does not read C++20", advice)


def cuda(name: str) -> Iterator[Check]:
    """The toolkit. Looked up: nothing is compiled with it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    command = os.path.join(home, "bin", "nvcc") if home else "nvcc"
    said = re.search(r"release (\d+)\.(\d+)", output(command, "--version") or "")
    advice = "only to build the CUDA part: install the CUDA toolkit {}.{} or newer"
    if said is None:
        yield Check(name, ABSENT, f"no {command}", advice.format(*MIN_NVCC))
    elif tuple(map(int, said.groups())) < MIN_NVCC:
        yield Check(name, ABSENT, f"nvcc {said[1]}.{said[2]} is too old", advice.format(*MIN_NVCC))
    else:
        yield Check(name, OK, f"nvcc {said[1]}.{said[2]}; not tried")


class DriverError(RuntimeError):
    """The CUDA driver answered with an error; `code` is its CUresult."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(f"{function} answers with error {code}")
        self.code = code


class Driver:
    """The few functions of the CUDA driver that are needed here. Raises OSError without it."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        self._library = ctypes.CDLL(library)
        self._call("cuInit", 0)

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            raise DriverError(function, code)

    def _number(self, function: str, *arguments: Any, kind: Any = ctypes.c_int) -> int:
        value = kind()
        self._call(function, ctypes.byref(value), *arguments)
        return value.value

    def version(self) -> tuple[int, int]:
        number = self._number("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def count(self) -> int:
        return self._number("cuDeviceGetCount")

    def device(self, idx: int) -> tuple[str, tuple[int, int], int]:
        """Name, compute capability and bytes of memory."""
        handle = self._number("cuDeviceGet", idx)
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, len(name), handle)
        major, minor = (
            self._number("cuDeviceGetAttribute", which, handle)
            for which in (ATTRIBUTE_MAJOR, ATTRIBUTE_MINOR)
        )
        memory = self._number("cuDeviceTotalMem_v2", handle, kind=ctypes.c_size_t)
        return name.value.decode(errors="replace"), (major, minor), memory

    def reaches(self, idx: int, peer: int) -> bool:
        """Whether one GPU can load and store the other's memory."""
        handles = (self._number("cuDeviceGet", idx), self._number("cuDeviceGet", peer))
        return bool(self._number("cuDeviceCanAccessPeer", *handles))


def gpus(name: str, library: str = "libcuda.so.1") -> Iterator[Check]:
    cpu = "the layer runs on the CPU"
    try:
        driver = Driver(library)
        count = driver.count()
    except OSError:
        yield Check(name, ABSENT, "no CUDA driver", f"{cpu}; for GPUs install the NVIDIA driver")
        return
    except DriverError as error:
        if error.code == CUDA_ERROR_NO_DEVICE:
            yield Check(name, ABSENT, "the CUDA driver sees no GPU", cpu)
        else:
            advice = "see nvidia-smi; after a driver update restart the machine or the container"
            yield Check(name, PROBLEM, first_line(error), advice)
        return
    major, minor = driver.version()
    for idx in range(count):
        model, capability, memory = driver.device(idx)
        found = f"{model}, compute capability {capability[0]}.{capability[1]}, "
        found += f"{mebibytes(memory) // 1024} GiB, driver for CUDA {major}.{minor}; not tried"
        advice = ""
        if capability != HOPPER:
            advice = f"the kernels are for Hopper (9.0): {cpu}"
        elif not built_with_cuda():
            advice = f"this build has no CUDA part: {cpu}; install where nvcc is"
        yield Check(f"gpu {idx}", ABSENT if advice else OK, found, advice)
    if count > 1:
        reach = peer_access("peer access", driver, count)
        yield reach
        if reach.status == OK and built_with_cuda():
            yield links("gpu links", count)


def built_with_cuda() -> bool:
    from . import _core

    return "built without CUDA" not in _core.build_info()


def gpu_layer(name: str) -> Iterator[Check]:
    """A small layer on the GPU beside the CPU engine's, and its time."""
    try:
        from . import gpu_layer as tried
    except ModuleNotFoundError:
        yield Check(name, ABSENT, "not tried: PyTorch is not installed", TORCH)
        return
    if reason := tried.missing():
        yield Check(name, ABSENT, f"not tried: {reason}", "the layer runs on the CPU")
        return
    try:
        yield Check(name, OK, tried.check())
    except Exception as error:
        advice = "run flashmoe check --device cuda, and report what it says"
        yield Check(name, PROBLEM, first_line(error), advice)


def peer_access(name: str, driver: Driver, count: int) -> Check:
    pairs = list(permutations(range(count), 2))
    apart = [f"{one} to {other}" for one, other in pairs if not driver.reaches(one, other)]
    if not apart:
        return Check(name, OK, f"between all {count} GPUs, as the driver says; not tried")
    advice = (
        "several ranks need NVLink or PCIe peer access: see nvidia-smi topo -m, and switch off "
    )
    advice += "PCIe ACS and the IOMMU where they block it"
    return Check(name, ABSENT, f"not from {', '.join(apart)}", advice)


def neighbours(count: int) -> list[tuple[int, int]]:
    """The pairs of GPUs whose links are measured: each and the next one."""
    return [(one, (one + 1) % count) for one in range(count)]


def measured_link(one: int, other: int) -> dict[str, float]:
    """The link from one GPU to another: GB/s of a kernel's stores, microseconds of a flag. Raises
    RuntimeError where there is none."""
    from . import _core

    speed, seconds = _core.engine().measure_link(one, other)
    rate, flag = round(speed / 1e9, 1), round(seconds * 1e6, 2)
    return {"from": one, "to": other, "gb_per_s": rate, "flag_us": flag}


def links(name: str, count: int) -> Check:
    """Every pair of neighbours, with the memory that ranks use."""
    found, failed = [], []
    for one, other in neighbours(count):
        try:
            link = measured_link(one, other)
        except RuntimeError as error:
            failed.append(f"{one} to {other}: {first_line(error)}")
            continue
        rate, flag = link["gb_per_s"], link["flag_us"]
        found.append(f"{one} to {other}: {rate:.0f} GB/s, a flag {flag:.1f} us")
    if not failed:
        return Check(name, OK, "; ".join(found))
    advice = "several ranks on CUDA need these links; one rank works without"
    return Check(name, ABSENT, "; ".join(failed + found), advice)


EXAMINERS: dict[str, Callable[[str], Iterator[Check]]] = {
    "package": package,
    "engine": engine,
    "shared memory": shared_memory,
    "launcher": launcher,
    "torch": torch,
    "mpi": mpi,
    "compiler": compiler,
    "cuda": cuda,
    "gpu": gpus,
    "gpu layer": gpu_layer,
}
