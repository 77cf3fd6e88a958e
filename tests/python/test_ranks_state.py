"""State that outlives a launch: the epoch and its wrap, several layers on one group, backwards in
any order."""

from dataclasses import replace

import pytest
import torch
from flashmoe import passes
from flashmoe.inputs import make_operands
from ranks_common import SMALL, assert_same_bits, open_groups, run_processes, run_step

WRAP = 2**32


@pytest.mark.parametrize("start", [WRAP - 1, WRAP - 2, WRAP - 5, WRAP // 2 - 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_epoch_wraps(num_ranks, start):
    with open_groups(num_ranks) as groups:
        first = run_step(SMALL, groups)
    with open_groups(num_ranks, epoch=start, jitter_us=20.0) as groups:
        epochs = []
        for _ in range(4):  # two launches each
            assert_same_bits(first, run_step(SMALL, groups))
            epochs.append({group.stats()["epoch"] for group in groups})
    assert all(len(of_ranks) == 1 for of_ranks in epochs)
    assert 0 not in set.union(*epochs)
    if start >= WRAP - 5:
        assert max(epochs[-1]) < 16, "the epoch did not wrap"


def test_epoch_is_set_before_the_first_launch_only():
    with open_groups(2) as groups:
        run_step(SMALL, groups)
        with pytest.raises(ValueError, match="epoch"):
            groups[0].set("epoch", 7)


class Flight:
    """A forward of one rank whose backward is still to come."""

    def __init__(self, case, rank, groups, seed):
        world = len(groups)
        self.operands = make_operands(case, case.steps(world)[0], "fp32", seed)
        self.call = passes.rank_call(case, self.operands, "fp32", rank, world, groups[rank])
        for leaf in self.call.leaves().values():
            leaf.requires_grad_(True)
        self.y, self.routed = passes.call_layer(self.call)

    def backward(self):
        """Outputs by name, as `passes.run_rank` has them."""
        leaves = self.call.leaves()
        ends = [self.y, self.routed.topk_weights, self.routed.logits]
        arriving = [self.call.grad_y, self.call.grad_weights, self.call.grad_logits]
        grads = torch.autograd.grad(ends, list(leaves.values()), arriving)
        outputs = {
            "y": self.y.detach(),
            "topk_weights": self.routed.topk_weights.detach(),
            "logits": self.routed.logits.detach(),
        }
        return outputs | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


NARROW = replace(SMALL, hidden=16, intermediate=8, experts=6, top_k=2)
WIDE = replace(SMALL, hidden=136, intermediate=40, experts=12, top_k=5)

# Forwards in order (case, seed), then the order of their backwards.
ORDERS = {
    "last_first": ([(NARROW, 0), (WIDE, 1)], (1, 0)),
    "first_first": ([(NARROW, 0), (WIDE, 1)], (0, 1)),
    "older_forward": ([(WIDE, 0), (WIDE, 1), (NARROW, 2)], (0, 2, 1)),
    "same_layer": ([(SMALL, 0), (SMALL, 1)], (0, 1)),
}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("forwards", "order"), ORDERS.values(), ids=ORDERS.keys())
def test_forwards_in_flight(num_ranks, forwards, order):
    """Layers of different sizes on one group: as if each had a group of its own."""
    alone = []
    for case, seed in forwards:
        with open_groups(num_ranks) as groups:
            alone.append(run_step(case, groups, seed=seed))

    def on_rank(rank):
        flights = [Flight(case, rank, groups, seed) for case, seed in forwards]
        return {idx: flights[idx].backward() for idx in order}

    with open_groups(num_ranks, jitter_us=20.0) as groups:
        by_rank = passes.on_all_ranks(on_rank, num_ranks)
    for result in by_rank:
        if isinstance(result, Exception):
            raise result
    for idx, (case, _) in enumerate(forwards):
        outputs = passes.gather(case, [flights[idx] for flights in by_rank], []).outputs
        assert_same_bits(alone[idx], outputs)


def test_many_launches_back_to_back():
    """Nothing is left behind that a later launch could read: 600 launches, sizes changing."""
    small = replace(NARROW, bias=False, aux_gradients=False)
    tokens = [(1, 9), (70, 0), (0, 0), (3, 65)]
    with open_groups(2) as groups:
        first = [run_step(small, groups, tokens=one) for one in tokens]
        for step in range(300):
            kind = step % len(tokens)
            assert_same_bits(first[kind], run_step(small, groups, tokens=tokens[kind]))


@pytest.mark.slow
def test_processes_grow_their_memory(tmp_path):
    """A wide layer on processes, whose shared memory starts small: the bits of threads."""
    (ours,) = run_processes(2, tmp_path, WIDE)
    with open_groups(2) as groups:
        assert_same_bits(run_step(WIDE, groups), ours)
