"""GPU tests: `python -m pytest tests/cuda`. Each skip names what is missing."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture(autouse=True)
def needs_gpu():
    import cuda_products

    if missing := cuda_products.what_is_missing():
        pytest.skip(f"needs {missing}")
