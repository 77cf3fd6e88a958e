"""flashmoe doctor: it finds what is here, and says by name what is wrong or missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flashmoe import _core, cli, doctor, functional
from flashmoe import group as groups

# Two GPUs that do not reach each other; ERROR is what cuInit answers, COUNT how many there are.
STUB_DRIVER = r"""
#include <string.h>
#include <stddef.h>
int cuInit(unsigned flags) { return ERROR; }
int cuDriverGetVersion(int* version) { *version = 13010; return 0; }
int cuDeviceGetCount(int* count) { *count = COUNT; return 0; }
int cuDeviceGet(int* device, int idx) { *device = idx + 40; return 0; }
int cuDeviceGetName(char* name, int length, int device) {
  strncpy(name, device == 40 ? "H200" : "A100", length);
  return 0;
}
int cuDeviceGetAttribute(int* value, int which, int device) {
  *value = which == 75 ? (device == 40 ? 9 : 8) : 0;
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = 141ul << 30; return 0; }
int cuDeviceCanAccessPeer(int* can, int device, int peer) { *can = device < peer; return 0; }
"""


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def examined(name):
    """The checks of one examiner, as `examine` gives them."""
    return list(doctor.EXAMINERS[name](name))


def one(name):
    (check,) = examined(name)
    return check


def test_this_machine_is_well(capsys, no_launcher):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["passed"] is True and report["problems"] == []
    found = {check["name"]: check for check in report["checks"]}
    assert {"package", "engine", "shared memory", "launcher", "torch", "mpi"} <= found.keys()
    for name in ("engine", "shared memory"):
        assert found[name]["status"] == "ok"
    assert _core.version() in found["engine"]["found"]
    if shutil.which("mpirun"):
        assert found["mpi"]["status"] == "ok" and "two ranks are right" in found["mpi"]["found"]
    assert all(check["advice"] for check in report["checks"] if check["status"] != "ok")


def test_people_get_lines_and_advice(capsys, no_launcher, monkeypatch, tmp_path):
    monkeypatch.setattr(_core, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(_core, "_module", None)
    monkeypatch.setattr(
        doctor, "EXAMINERS", {name: doctor.EXAMINERS[name] for name in ("package", "engine")}
    )
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("ok       package")
    assert shown[1].startswith("problem  engine") and "none.so does not exist" in shown[1]
    assert shown[2].strip().startswith("-> run make")
    assert shown[-1] == "to be mended: engine"


def test_a_library_of_another_version(monkeypatch):
    monkeypatch.setattr(_core, "version", lambda: "0.0.7")
    check = one("engine")
    assert check.status == "problem" and "build the library again" in check.advice


def test_a_wrong_result_is_a_problem(monkeypatch):
    monkeypatch.setattr(functional, "experts", lambda x, *rest, **options: 3 * x)
    monkeypatch.setattr(doctor, "EXAMINERS", {"engine": doctor.engine})
    (check,) = doctor.examine()
    assert check.status == "problem" and "y is 3.0 where 2.0 is right" in check.found


def test_shared_memory_that_is_full(monkeypatch):
    def full(token, rank, world):
        raise MemoryError("no room for 5 bytes; enlarge /dev/shm")

    class Engine:
        group_shm = staticmethod(full)

    monkeypatch.setattr(_core, "engine", Engine)
    check = one("shared memory")
    assert check.status == "problem" and "no room for 5 bytes" in check.found
    assert "--shm-size" in check.advice


def test_shared_memory_leaves_nothing_behind():
    before = set(groups._groups)
    assert one("shared memory").status == "ok"
    assert set(groups._groups) == before


def test_shared_memory_of_a_container(monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20)
    )
    check = one("shared memory")
    assert check.status == "ok" and "--shm-size" in check.advice
    assert "may have about 42 tokens" in check.found


def test_launchers(monkeypatch, no_launcher):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check = one("launcher")
    assert check.status == "problem" and "WORLD_SIZE is not set" in check.found
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert one("launcher").found == "environment: rank 1 of 2"


def test_torch_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    check = one("torch")
    assert check.status == "absent" and "flashmoe[torch]" in check.advice


def test_torch_is_tried():
    pytest.importorskip("torch")
    check = one("torch")
    assert check.status == "ok" and "gradients are right; gloo connects two" in check.found


def test_gloo_is_tried(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.distributed.ProcessGroupGloo, "allreduce", broken_allreduce)
    check = one("torch")
    assert check.status == "problem" and "gloo fails: host not known" in check.found
    assert "/etc/hosts" in check.advice


def broken_allreduce(*unused):
    raise RuntimeError("host not known\nfrom gloo/transport")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A PATH of programs that say what they are told to."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def make(name, said, status=0, unless="no option", said_then=""):
        """``unless``: an option under which it fails and says something else."""
        path = tmp_path / name
        fails = f"case \"$*\" in *'{unless}'*) echo '{said_then}'; exit 1;; esac"
        path.write_text(f"#!/bin/sh\n{fails}\necho '{said}'\nexit {status}\n")
        path.chmod(0o755)

    return make


def test_tools_that_are_missing_are_advice(tools):
    assert {one("compiler").found, one("cuda").found} == {"no g++", "no nvcc"}
    assert one("compiler").status == one("cuda").status == "absent"
    assert "apt-get install g++" in one("compiler").advice
    assert examined("mpi")[0].found == "no mpirun"


def test_tools_that_are_too_old(tools, monkeypatch):
    tools("g++", "11.4.0")
    tools("nvcc", "Cuda compilation tools, release 12.3, V12.3.1")
    assert one("compiler").found == "g++ 11.4.0 is too old"
    assert one("cuda").found == "nvcc 12.3 is too old" and "12.4" in one("cuda").advice
    tools("g++", "12.1.0")
    tools("nvcc", "Cuda compilation tools, release 12.10, V12.10.1")
    assert one("compiler").status == one("cuda").status == "ok"
    assert one("cuda").found == "nvcc 12.10; not tried"
    tools("clang++", "14.0")
    monkeypatch.setenv("CXX", "clang++")
    assert one("compiler").found == "clang++ 14.0; reads C++20 and Eigen"
    tools("nvcc", "broken", status=1)
    assert one("cuda").status == "absent"


@pytest.mark.parametrize(
    ("said", "found"),
    [("error: finds no Eigen", "g++ 12.1.0; finds no Eigen"), ("oops", "does not read C++20")],
)
def test_a_compiler_that_cannot_build(tools, said, found):
    tools("g++", "12.1.0", unless="-fsyntax-only", said_then=said)
    check = one("compiler")
    assert check.status == "absent" and found in check.found and "apt-get" in check.advice


def test_the_compiler_is_tried(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor, "PROGRAM", "int main() { return nothing; }")
    assert "does not read C++20" in one("compiler").found


def test_mpirun_that_starts_nothing(tools, no_launcher, monkeypatch):
    tools("mpirun", "mpirun (Open MPI) 4.1.4", unless="-np", said_then="not enough slots")
    check = examined("mpi")[0]
    assert check.status == "problem" and "mpirun -np 2 hostname" in check.advice
    assert check.found == "mpirun (Open MPI) 4.1.4; two ranks fail: not enough slots"
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "not tried from inside of a launcher" in examined("mpi")[0].found


@pytest.mark.slow
def test_ranks_of_mpirun_that_are_wrong(no_launcher, monkeypatch):
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    monkeypatch.setattr(doctor, "ON_A_RANK", doctor.ON_A_RANK.replace("== 2", "== 3"))
    check = examined("mpi")[0]
    assert check.status == "problem" and "two ranks fail" in check.found


def test_mpi4py_without_mpi(tools, no_launcher, monkeypatch):
    said = {"mpirun": "mpirun (Open MPI) 4.1.4\n\nReport bugs", "import mpi4py": ""}
    monkeypatch.setattr(
        doctor, "output", lambda *command: said.get(command[-1], said.get(command[0]))
    )
    monkeypatch.setattr(doctor, "attempt", lambda *command, **environment: (True, ""))
    mpirun, binding = examined("mpi")
    assert mpirun.found == "mpirun (Open MPI) 4.1.4; two ranks are right"
    assert binding.status == "problem" and "openmpi-bin" in binding.advice
    said["mpirun"] = None
    assert examined("mpi")[1].status == "absent"
    del said["import mpi4py"]
    assert "flashmoe[mpi]" in examined("mpi")[1].advice


@pytest.fixture
def driver(tmp_path):
    """A libcuda of our own."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")

    def build(error=0, count=2):
        source, library = tmp_path / "stub.c", tmp_path / f"stub-{error}-{count}.so"
        source.write_text(STUB_DRIVER)
        options = ["-shared", "-fPIC", f"-DERROR={error}", f"-DCOUNT={count}"]
        subprocess.run([compiler, *options, source, "-o", library], check=True)
        return list(doctor.gpus("gpu", str(library)))

    return build


def test_gpus_and_their_peers(driver, monkeypatch):
    monkeypatch.setattr(_core, "build_info", lambda: "cpu: x | cuda: none: built without CUDA")
    assert "no CUDA part" in driver()[0].advice
    monkeypatch.setattr(_core, "build_info", lambda: "cpu: x | cuda: H200 (sm_90, 132 SMs)")
    first, second, peers = driver()
    assert first.status == "ok"
    assert first.found == "H200, compute capability 9.0, 141 GiB, driver for CUDA 13.1; not tried"
    assert second.status == "absent" and "Hopper" in second.advice
    assert peers.status == "absent" and peers.found == "not from 1 to 0"
    assert "nvidia-smi topo" in peers.advice


def test_drivers_without_gpus(driver):
    assert [check.found for check in driver(error=100)] == ["the CUDA driver sees no GPU"]
    (check,) = driver(error=803)
    assert check.status == "problem" and "cuInit answers with error 803" in check.found
    (check,) = doctor.gpus("gpu", "libno-such-driver.so")
    assert check.status == "absent" and check.found == "no CUDA driver"


def test_doubled_is_a_test():
    """What the engine check computes is wrong where a layer is."""
    doctor.doubled(None, 0, 1)
    with pytest.raises(AssertionError):
        right = functional.experts
        try:
            functional.experts = lambda *rest, **options: np.nextafter(right(*rest, **options), 0)
            doctor.doubled(None, 0, 1)
        finally:
            functional.experts = right


# ---- a layer on the GPU ----------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A "GPU" that is the CPU, of which nothing is missing."""
    pytest.importorskip("torch", reason="needs PyTorch")
    from flashmoe import gpu_layer

    compare = gpu_layer.compare
    monkeypatch.setattr(gpu_layer, "missing", lambda: "")
    monkeypatch.setattr(gpu_layer, "compare", lambda device: compare("cpu"))
    monkeypatch.setattr(gpu_layer, "time_us", lambda: 21.4)
    monkeypatch.setattr(gpu_layer.torch.cuda, "get_device_name", lambda: "H200")
    return gpu_layer


def test_a_layer_on_the_gpu_is_compared_and_timed(gpu):
    check = one("gpu layer")
    assert check.status == doctor.OK
    assert "H200: a layer (T 256" in check.found and "takes 21 us" in check.found
    assert list(doctor.lines([check]))[-1] == "FlashMoE works here, on the CPU and the GPU"


@pytest.mark.parametrize("result", [(0.5, 0.0), (1.0, 0.1), (1.0, float("nan"))], ids=str)
def test_a_wrong_layer_on_the_gpu_is_a_problem(result, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "compare", lambda device: result)
    check = one("gpu layer")
    assert check.status == doctor.PROBLEM and "is not the CPU's" in check.found
    assert "check --device cuda" in check.advice


def test_the_comparison_sees_a_wrong_layer(gpu, monkeypatch):
    right = gpu.moe

    def wrong(x, w_router, w_up, w_down, **options):
        if options.get("group") is None:
            return right(x, w_router, w_up, w_down, **options)
        return right(x, w_router, w_up.roll(1, dims=0), w_down, **options)

    monkeypatch.setattr(gpu, "moe", wrong)
    assert one("gpu layer").status == doctor.PROBLEM


def test_why_no_layer_on_the_gpu_was_tried(monkeypatch):
    from flashmoe import gpu_layer

    monkeypatch.setattr(gpu_layer, "build_info", lambda: "cpu: Eigen | cuda: 13.0 (sm_90a)")
    monkeypatch.setattr(gpu_layer.torch.cuda, "is_available", lambda: False)
    assert one("gpu layer").found == "not tried: PyTorch sees no CUDA device"
    monkeypatch.setattr(gpu_layer.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_layer.torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(gpu_layer.torch.cuda, "get_device_name", lambda: "A100")
    assert "A100 has compute capability (8, 0)" in one("gpu layer").found
    monkeypatch.setattr(gpu_layer, "build_info", lambda: "cpu: Eigen | cuda: built without CUDA")
    assert one("gpu layer").found == "not tried: this build has no CUDA part"
