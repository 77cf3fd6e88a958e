"""A GPU that is not there: what `flashmoe bench --ranks` and `--direction backward` ask of torch,
NVML, the CUDA runtime and the links on one, answered from the CPU, so that every line of them runs.
Times are the host's; memory is 1000 bytes more at each question."""

from __future__ import annotations

import importlib
import sys
import time
import types
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from flashmoe import bench_ranks, doctor
from flashmoe.rank_processes import on_ranks
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Tensors that are made for a GPU are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        assert event.at


class Graph:
    """Whose replays take half a millisecond and do nothing."""

    def __init__(self, keep_graph=False):
        self.keep_graph = keep_graph

    def replay(self):
        time.sleep(0.0005)

    def raw_cuda_graph(self):
        assert self.keep_graph
        return 1


class Memory:
    """The count of bytes in use, 1000 more at each question."""

    def __init__(self):
        self.asked = 0

    def allocated(self):
        self.asked += 1
        return 1000 * self.asked


@contextmanager
def capture(graph, capture_error_mode):
    assert capture_error_mode == "thread_local"
    yield


def nvml():
    """pynvml, of a GPU with 18 links."""
    module = types.ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.NVML_NVLINK_MAX_LINKS = 24

    def link_state(handle, idx):
        if idx >= 18:
            raise module.NVMLError
        return 1

    module.nvmlInit = lambda: None
    module.nvmlSystemGetDriverVersion = lambda: "580.1"
    module.nvmlDeviceGetHandleByIndex = lambda idx: idx
    module.nvmlDeviceGetHandleByUUID = lambda name: name
    module.nvmlDeviceGetNvLinkState = link_state
    return module


def runtime():
    """cuda.bindings, whose graphs have one node."""
    module = types.ModuleType("cuda.bindings.runtime")
    module.cudaGraph_t = int
    module.cudaGraphGetNodes = lambda graph, count: (0, [], 1)
    return module


def link(one, other):
    """What `doctor.measured_link` says of a pair."""
    return {"from": one, "to": other, "gb_per_s": 400.0, "flag_us": 1.5}


def install():
    """In a process of its own, for good."""
    memory = Memory()
    fakes = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": memory.allocated,
        "max_memory_allocated": memory.allocated,
        "reset_peak_memory_stats": lambda: None,
        "current_device": lambda: 0,
        "get_device_name": lambda: "NVIDIA H200",
        "get_device_properties": lambda: types.SimpleNamespace(L2_cache_size=1 << 16, uuid="1"),
        "power_draw": lambda device: 500_000,
        "clock_rate": lambda device: 1500,
        "_sleep": lambda cycles: None,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch.Generator = Generator
    doctor.measured_link = link
    dist.new_group = lambda backend: dist.group.WORLD
    bindings = types.ModuleType("cuda.bindings")
    bindings.runtime = runtime()
    for module in (nvml(), types.ModuleType("cuda"), bindings, bindings.runtime):
        sys.modules[module.__name__] = module
    OnCpu().__enter__()


def rank_records(module, case):
    """What a module of the benchmark of several ranks records of two cases, `case` and one of which
    each rank has fewer experts than k, on two ranks of a GPU that is not there."""
    few = replace(case, name="seed", experts=2, top_k=2)
    spec = bench_ranks.Spec(2, [case, few], "bf16", 0.05, "cuda")
    return list(on_ranks(2, bench_rank, module.__name__, spec))


def bench_rank(rank, module, spec):
    """`bench_rank` of a module, by its name."""
    install()
    yield from importlib.import_module(module).bench_rank(rank, spec)
