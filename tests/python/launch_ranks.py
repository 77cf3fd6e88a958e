"""What the processes of the launcher tests run: `python launch_ranks.py world|communicator|torch`.

Rank r of two holds experts 2r and 2r + 1, which multiply by their number plus one; every token goes
to experts 0 and 2 with weight 1/2, so y = 2 x.
"""

import sys

import flashmoe
import numpy as np
from flashmoe import group as groups


def doubled(group, rank, factor=1.0):
    x = np.arange(1.0, 25.0).reshape(3, 8) + 100 * rank
    ids, weights = np.tile([0, 2], (3, 1)), np.full((3, 2), 0.5)
    w_up = np.stack([np.eye(8) * (2 * rank + local + 1) * factor for local in range(2)])
    w_down = np.stack([np.eye(8)] * 2)
    y = flashmoe.experts(x, ids, weights, w_up, w_down, activation="identity", group=group)
    np.testing.assert_array_equal(y, 2 * factor * x)


def world():
    group = flashmoe.world_group()
    assert group.world == 2 and flashmoe.world_group() is group
    doubled(group, group.rank)
    group.close()
    again = flashmoe.world_group()
    assert again is not group
    doubled(again, group.rank)
    return group.rank


def communicator():
    from mpi4py import MPI

    whole = MPI.COMM_WORLD
    doubled(whole, whole.rank)
    other = whole.Dup()
    name, world = groups.resolve(other)
    assert world == 2 and name != groups.resolve(whole)[0]
    doubled(other, whole.rank, factor=3.0)
    other.Free()  # takes its group along
    for use in (lambda: groups.lookup(name), lambda: groups.resolve(MPI.COMM_NULL)):
        try:
            use()
        except ValueError:
            continue
        raise AssertionError("a communicator that is not there was accepted")
    assert groups.resolve(MPI.COMM_SELF) == ("self", 1)
    return whole.rank


def torch():
    """The default process group is the rendezvous where there is one; it may come later, and meet
    at the same port."""
    import torch.distributed as dist

    before = flashmoe.world_group()
    assert before.name == "world"
    doubled(before, before.rank)
    dist.init_process_group("gloo")
    group = flashmoe.world_group()
    assert group.name.startswith("pg:")
    doubled(group, dist.get_rank())
    dist.destroy_process_group()
    return group.rank


if __name__ == "__main__":
    # One write, so that lines of two ranks do not mix.
    sys.stdout.write(f"rank {globals()[sys.argv[1]]()} done\n")
