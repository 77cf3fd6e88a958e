"""GPU tests: `python -m pytest tests/cuda`. Each skip names what is missing."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


class Failures:
    """Prints what failed as it comes: a run that hangs later and is killed has told it."""

    def __init__(self, reporter):
        self.reporter = reporter

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            told = f"{crash.path}:{crash.lineno}: {crash.message}" if crash else report.longreprtext
            self.reporter.ensure_newline()
            self.reporter.write_line(f"failed {report.nodeid}: {told}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    reporter = config.pluginmanager.getplugin("terminalreporter")
    if reporter:  # a worker of pytest-xdist has none
        config.pluginmanager.register(Failures(reporter))


@pytest.fixture(autouse=True)
def needs_gpu(request):
    name = request.module.__name__
    if name.startswith(("test_layer", "test_training", "test_backward")):
        from layer_common import what_is_missing
    elif name.startswith("test_ranks"):
        from gpu_ranks import missing_for_two as what_is_missing
    else:
        from cuda_products import what_is_missing

    if missing := what_is_missing():
        pytest.skip(f"needs {missing}")


@pytest.fixture(scope="module")
def pool():
    """Groups for all cases of a file: what one leaves behind in scratch, the next one finds."""
    from flashmoe import check

    pool = check.GroupPool()
    yield pool
    pool.close()


@pytest.fixture
def poisoned_gradients(monkeypatch):
    """Gradients hold NaN before the engine writes them."""
    from flashmoe import ops

    allocate = ops.empty_gradients

    def poisoned(*args):
        gradients = allocate(*args)
        for tensor in gradients.values():
            tensor.fill_(math.nan)
        return gradients

    monkeypatch.setattr(ops, "empty_gradients", poisoned)


@pytest.fixture
def groups():
    """The groups of two ranks of this process, a GPU each."""
    import flashmoe

    made = flashmoe.local_group(2, device="cuda", max_tokens=4096)
    yield made
    for group in made:
        group.close()
