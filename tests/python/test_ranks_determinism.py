"""The same bits from run to run: any delay in any phase, any number of threads, threads or
processes."""

import pytest
from ranks_common import SMALL, assert_same_bits, configure, open_groups, run_processes, run_step

JITTERS_US = (30.0, 300.0, 0.0, 30.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_threads_under_jitter(num_ranks, dtype):
    with open_groups(num_ranks) as groups:
        first = run_step(SMALL, groups, dtype)
        for jitter_us in JITTERS_US:
            configure(groups, jitter_us=jitter_us)
            assert_same_bits(first, run_step(SMALL, groups, dtype))


def test_one_slow_rank():
    with open_groups(3) as groups:
        first = run_step(SMALL, groups)
        for slow in range(3):
            for rank, group in enumerate(groups):
                group.set("jitter_us", 2000.0 if rank == slow else 0.0)
            assert_same_bits(first, run_step(SMALL, groups))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_number_of_threads(num_ranks):
    with open_groups(num_ranks, num_threads=1) as groups:
        first = run_step(SMALL, groups)
        for threads in (2, 3):
            configure(groups, num_threads=threads, jitter_us=20.0)
            assert groups[0].stats()["num_threads"] != threads
            assert_same_bits(first, run_step(SMALL, groups))
            assert groups[0].stats()["num_threads"] == threads


def test_number_of_threads_differs_between_ranks():
    with open_groups(2, num_threads=1) as groups:
        first = run_step(SMALL, groups)
        groups[1].set("num_threads", 3)
        assert_same_bits(first, run_step(SMALL, groups))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_processes_under_jitter(num_ranks, tmp_path):
    """Processes agree with themselves under jitter, and with threads."""
    first, *others = run_processes(num_ranks, tmp_path, SMALL, jitters=(0.0, *JITTERS_US))
    for other in others:
        assert_same_bits(first, other)
    with open_groups(num_ranks) as groups:
        assert_same_bits(first, run_step(SMALL, groups))


@pytest.mark.slow
def test_a_hundred_runs():
    with open_groups(3, jitter_us=10.0) as groups:
        first = run_step(SMALL, groups)
        for _ in range(100):
            assert_same_bits(first, run_step(SMALL, groups))
