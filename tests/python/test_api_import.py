"""What importing flashmoe costs, and what it offers."""

import subprocess
import sys

import flashmoe
import pytest
from flashmoe import _core

# The bar is 0.2 s; a loaded machine gets the best of three.
IMPORT_SECONDS = 0.2


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_quick_and_loads_nothing_heavy():
    code = """
import sys, time
start = time.perf_counter()
import flashmoe
print(time.perf_counter() - start)
print([name for name in ("torch", "numpy", "tvm_ffi") if name in sys.modules])
"""
    outputs = [run_python(code).split("\n") for _ in range(3)]
    assert all(loaded == "[]" for _, loaded, *_ in outputs)
    assert min(float(seconds) for seconds, *_ in outputs) < IMPORT_SECONDS


def test_numpy_only_use_does_not_import_our_torch_modules():
    code = """
import sys
import numpy as np
import flashmoe
x = np.ones((3, 8), np.float32)
w_up, w_down = np.ones((2, 8, 8), np.float32), np.ones((2, 8, 4), np.float32)
ids, weights = np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32)
print(flashmoe.experts(x, ids, weights, w_up, w_down).shape)
print("flashmoe.ops" in sys.modules)
"""
    assert run_python(code).split("\n")[:2] == ["(3, 8)", "False"]


def test_lazy_attributes():
    assert flashmoe.MoE.__name__ == "MoE"
    assert {"MoE", "run_moe", "experts", "moe"} <= set(dir(flashmoe))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = flashmoe.no_such_name


def test_version_is_that_of_the_engine():
    assert flashmoe.__version__ == _core.version()
    assert "cpu" in _core.build_info()


def test_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(_core, "LIBRARY", tmp_path / "libflashmoe_ffi.so")
    monkeypatch.setattr(_core, "_module", None)
    with pytest.raises(flashmoe.errors.FlashMoEError, match=r"libflashmoe_ffi\.so.*build it"):
        _core.engine()


@pytest.mark.slow
def test_torch_before_and_after_flashmoe_under_compile():
    """The first call of all may be a compiled one: nothing was imported for it in eager mode."""
    code = """
import flashmoe
import torch
def f(x, w_router, w_up, w_down):
    routing = flashmoe.Routing(score="sigmoid")
    return flashmoe.moe(x, w_router, w_up, w_down, top_k=2, routing=routing)[0].sum()
shapes = ((5, 8), (4, 8), (4, 12, 8), (4, 8, 6))
args = [torch.randn(shape, requires_grad=True) for shape in shapes]
torch.compile(f, fullgraph=True, backend="aot_eager")(*args).backward()
print([tuple(arg.grad.shape) == shape for arg, shape in zip(args, shapes)])
"""
    assert run_python(code).split("\n")[0] == "[True, True, True, True]"
