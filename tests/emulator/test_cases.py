"""The case table on the emulated CUDA kernels: outputs, gradients, and the same bits when other
multiprocessors, and fewer, run the same launch."""

import pytest
from conftest import MOST_TOKENS
from flashmoe import check

RANKS = (1, 2)
ROWS = [
    (mode, case, dtype, ranks)
    for gradients in (False, True)
    for ranks in RANKS
    for mode, case, dtype, _ in check.planned(gradients=gradients, ranks=ranks, device="cuda")
    if not check.missing_for(case, dtype, ranks, "cpu")
    if not case.refused or (ranks == 1 and "rank_" not in case.defect)
    if max(max(tokens) for tokens in case.steps(ranks)) <= MOST_TOKENS
]


@pytest.mark.parametrize(
    ("mode", "case", "dtype", "ranks"),
    ROWS,
    ids=[f"{case.key(dtype, ranks)}:{mode}" for mode, case, dtype, ranks in ROWS],
)
def test_case(mode, case, dtype, ranks, pool):
    record = check.Record(case.name, dtype, ranks, mode)
    check.check_case(case, record, pool)
    assert record.status == "passed", record.reason
