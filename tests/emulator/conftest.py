"""Tests of the CUDA kernels on the emulator: `python -m pytest tests/emulator`, in a process of its
own. The layer's calls on tensors in host memory run the emulated kernels (ffi/on_device.cpp)."""

import os
from pathlib import Path

import pytest
from flashmoe import _core, check
from flashmoe.passes import on_all_ranks

MOST_TOKENS = 1200  # of a rank: more take minutes
ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build" / "release" / "tests" / "emulator" / "ffi" / "libflashmoe_emulated_ffi.so"

os.environ.setdefault("FLASHMOE_EMULATED_GPUS", "4")
os.environ.setdefault("FLASHMOE_EMULATED_SEED", "1")
_core.LIBRARY = Path(os.environ.get("FLASHMOE_EMULATED_LIBRARY", BUILT))


@pytest.fixture(scope="session", autouse=True)
def library():
    assert _core.LIBRARY.exists(), f"{_core.LIBRARY} is missing: make build, with CUDA's headers"


class Pool(check.GroupPool):
    """Groups with room for every case of the table: ranks cannot grow theirs in the middle."""

    def get(self, ranks):
        is_new = ranks not in self.groups
        groups = super().get(ranks)
        if is_new and ranks > 1:
            room = {"hidden": 1088, "top_k": 10, "num_experts": 512}
            on_all_ranks(lambda rank: groups[rank].reserve(MOST_TOKENS, **room), ranks)
        return groups


@pytest.fixture(scope="session")
def pool():
    """Groups for all cases: what one leaves behind in scratch, the next one finds."""
    pool = Pool()
    yield pool
    pool.close()
