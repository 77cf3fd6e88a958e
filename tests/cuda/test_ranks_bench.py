"""`flashmoe bench --ranks` on two GPUs, of a layer that takes no time, in both directions."""

from flashmoe import bench_ranks, bench_ranks_backward, rank_peers
from flashmoe.bench import OURS
from flashmoe.cases import Case

CASE = Case("small", tokens=(512,), hidden=1024, intermediate=512, experts=16, top_k=4)


def test_a_record_of_two_ranks():
    [record] = bench_ranks.run_bench([(2, [CASE])], seconds=0.05)
    assert record["ranks"] == 2 and record["launches"] == 1 and record["bitwise"]
    assert record["error_ratio"] < 1.25
    assert record["us"] > 0 and record["reference_us"] > 0 and record["burst_us"] > 0
    assert record["peers_absent"] == {} and record["eager_peers"][rank_peers.TORCH] > 0
    assert record["communication_absent"] == "" and record["communication_us"] > 0
    assert len(record["links"]["pairs"]) == 2 and not record["links"]["absent"]
    assert min(record["sm_clock_mhz"]) > 0 and record["driver"]
    for phases in record["phases_us"]:
        assert {"route", "plan", "up", "down", "combine"} <= set(phases)


def test_a_record_of_the_backward_of_two_ranks():
    [record] = bench_ranks_backward.run_bench([(2, [CASE])], seconds=0.05)
    assert record["ranks"] == 2 and record["launches"] == 1 and record["bitwise"]
    assert record["z_kept"] is True
    assert record["error_ratio"] < 1.25 and record["error_failures"] == {}
    assert record["us"] > 0 and record["reference_us"] > 0 and record["burst_us"] > 0
    assert record["peers_absent"] == {}
    assert set(record["step_eager_us"]) == {OURS, bench_ranks.REFERENCE, rank_peers.TORCH}
    assert record["communication_absent"] == "" and record["communication_us"] > 0
    for phases in record["phases_us"]:
        # In a layer this small the first cluster may have no tile of a product: its phase is 0.
        assert {"plan", "push"} <= set(phases)
