"""Two ranks on two GPUs that have other work: rows from other GPUs are this launch's, whatever the
caches hold, and bits stay whoever is late."""

import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from gpu_ranks import call_all, finish_all, finished, shards, synchronize
from rank_differences import Differences

RANKS = 2
ROUNDS = 200
INPUTS = 5
FREE_SMS = 32  # for what runs beside


class SideWork:
    """Work on a stream of its own: it writes and reads twice what the L2 cache holds."""

    def __init__(self, rank):
        device = f"cuda:{rank}"
        size = 2 * torch.cuda.get_device_properties(rank).L2_cache_size
        self.stream = torch.cuda.Stream(device)
        self.buffers = [torch.zeros(size // 2, dtype=torch.int16, device=device) for _ in range(2)]
        torch.cuda.synchronize(rank)
        self.add()  # its kernels are loaded before a launch waits for a peer
        torch.cuda.synchronize(rank)

    def add(self):
        """About a tenth of a millisecond more of it."""
        one, other = self.buffers
        with torch.cuda.stream(self.stream):
            one.add_(1)
            other.copy_(one)


def row_checksums(y):
    """[T] int64: a sum over a row's bits, in which every column has another weight."""
    columns = torch.arange(1, y.shape[1] + 1, device=y.device)
    return (y.view(torch.int16).long() * columns).sum(-1)


def leave_sms_free(groups):
    for rank, group in enumerate(groups):
        count = torch.cuda.get_device_properties(rank).multi_processor_count
        group.set("max_sms", count - FREE_SMS)


def other_inputs(layers, seed):
    """The layers of all ranks with other tokens."""
    made = []
    for rank, layer in enumerate(layers):
        generator = torch.Generator(layer.x.device).manual_seed(100 * seed + rank)
        x = torch.empty_like(layer.x).normal_(generator=generator)
        made.append(replace(layer, x=x))
    return made


@pytest.mark.parametrize("tokens", [(1500, 1100), (64, 64)], ids=["many", "few"])
def test_rows_under_work_that_thrashes_the_l2(tokens, groups):
    """Inputs take turns: a row that a cache kept from a launch before has another checksum."""
    layers = [
        other_inputs(shards(tokens=tokens, experts=32, hidden=1024, top_k=6), idx)
        for idx in range(INPUTS)
    ]
    leave_sms_free(groups)
    quiet = [finished(call_all(pair, groups), groups) for pair in layers]
    expected = [
        [row_checksums(one[0].to(f"cuda:{rank}")) for rank, one in enumerate(outputs)]
        for outputs in quiet
    ]
    assert all(
        len(torch.stack(sums).unique(dim=0)) == INPUTS for sums in zip(*expected, strict=True)
    )
    sides = [SideWork(rank) for rank in range(RANKS)]
    wrong = [torch.zeros(1, dtype=torch.int64, device=f"cuda:{rank}") for rank in range(RANKS)]
    for step in range(ROUNDS):
        for side in sides:
            side.add()
        made = call_all(layers[step % INPUTS], groups)
        for rank, outputs in enumerate(made):
            wrong[rank] += (row_checksums(outputs[0]) != expected[step % INPUTS][rank]).sum()
        if step % 10 == 9:
            synchronize()  # neither stream runs away from the other
    finish_all(groups)
    assert [int(one) for one in wrong] == [0, 0]


def test_100_runs_under_jitter(groups):
    """Ranks that come when they like, one of them with other work and fewer multiprocessors."""
    layers = shards(tokens=(1500, 700), experts=32, hidden=512)
    quiet = finished(call_all(layers, groups), groups)
    kept = [[tensor.to(f"cuda:{rank}") for tensor in one] for rank, one in enumerate(quiet)]
    count = torch.cuda.get_device_properties(1).multi_processor_count
    groups[1].set("max_sms", count - FREE_SMS)
    side, found, failures = SideWork(1), Differences(), []
    found.add(kept, kept)
    synchronize()  # what compares is loaded, too

    def work(rank):
        jitter = random.Random(rank)
        try:
            for _ in range(100):
                time.sleep(jitter.choice((0.0, 0.0002, 0.001, 0.004)))
                for _ in range(rank * jitter.randrange(4)):
                    side.add()
                y, routed = layers[rank](groups[rank])
                found.add_rank(rank, (y, *routed), kept[rank])
        except Exception as error:  # raised by the test, beside the other rank's
            failures.append((rank, error))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    finish_all(groups)
    assert found.total() == [0, 0]


def test_a_rank_that_is_seconds_late_under_work(groups):
    """Its peers' launches wait with other kernels beside them."""
    layers = shards(tokens=(900, 1300))
    leave_sms_free(groups)
    quiet = finished(call_all(layers, groups), groups)
    sides = [SideWork(rank) for rank in range(RANKS)]
    for late in range(RANKS):
        made = [None] * RANKS
        for rank in (1 - late, late):
            y, routed = layers[rank](groups[rank])
            made[rank] = (y, *routed)
            for _ in range(20):
                sides[1 - late].add()
            time.sleep(1.0)
        for one, other in zip(finished(made, groups), quiet, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
