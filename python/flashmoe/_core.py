"""The compiled engine: loaded by the first call, its errors registered as flashmoe classes."""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

from . import errors
from .config import DTYPES, LayerConfig

LIBRARY = Path(__file__).parent / "lib" / "libflashmoe_ffi.so"

# Functions that wait for other ranks, or for a GPU.
WAITING = (
    *("forward", "backward", "group_shm", "group_refuse", "group_destroy", "group_reserve"),
    *("group_abort", "group_stats", "measure_link"),
)

_lock = threading.Lock()
_module: Any = None


def engine() -> Any:
    """The TVM-FFI module with the functions of src/bindings/ffi.cpp.

    Raises FlashMoEError if the library has not been built.
    """
    global _module
    if _module is None:
        with _lock:
            if _module is None:
                _module = _load()
    return _module


def _load() -> Any:
    if not LIBRARY.exists():
        raise errors.FlashMoEError(
            f"{LIBRARY} does not exist: build it with `make`, or install the flashmoe wheel"
        )
    import tvm_ffi

    for name in errors.__all__:
        tvm_ffi.register_error(f"flashmoe.{name}", getattr(errors, name))
    module = tvm_ffi.load_module(str(LIBRARY))
    # Ranks that are threads of this process wait for each other inside these calls.
    for name in WAITING:
        getattr(module, name).release_gil = True
    return module


@cache
def _layer(config: str, dtype: str, hidden: int, intermediate: int, num_experts: int) -> int:
    numbers = LayerConfig.decode(config).numbers()
    numbers["dtype"] = DTYPES.index(dtype)
    numbers["hidden"] = hidden
    numbers["intermediate"] = intermediate
    numbers["num_experts"] = num_experts
    return engine().layer_create(numbers)


def layer(config: str, world: int, x: Any, w_up: Any, w_down: Any) -> int:
    """Handle of the layer that these operands belong to (x [T, H], w_down [E_loc, H, I]).

    Raises TypeError if x has a dtype that no layer has.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise TypeError(f"x has dtype {dtype}; accepted: {', '.join(DTYPES)}")
    num_experts = LayerConfig.decode(config).num_experts or w_up.shape[0] * world
    return _layer(config, dtype, x.shape[1], w_down.shape[2], num_experts)


def stream_of(x: Any) -> int:
    """The ``cudaStream_t`` of torch's current stream on the device of ``x``; 0 on the CPU."""
    if x.device.type != "cuda":
        return 0
    import torch

    return torch.cuda.current_stream(x.device).cuda_stream


def _forget_lock() -> None:
    """In a forked child: another thread of the parent may have held it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_lock)


def version() -> str:
    """Version of the compiled engine."""
    return engine().version()


def build_info() -> str:
    """What this build can do, in one line."""
    return engine().build_info()


def from_numpy(array: Any) -> Any:
    """A NumPy array as a tensor of the engine, without a copy where NumPy can say "read-only"."""
    import tvm_ffi

    try:
        capsule = array.__dlpack__(max_version=(1, 0))
    except TypeError:  # NumPy before 2.1
        capsule = (array if array.flags.writeable else array.copy()).__dlpack__()
    return tvm_ffi.from_dlpack(capsule)
