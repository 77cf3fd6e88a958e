"""What the tests of several ranks share: cases, runs on threads and on processes, bits."""

from __future__ import annotations

from contextlib import contextmanager

import flashmoe
import torch
from flashmoe import passes
from flashmoe.cases import Case
from flashmoe.check import same_bits
from flashmoe.inputs import make_operands

# Divides over 1, 2, 3, 4, 6 and 8 ranks.
SMALL = Case(
    "ranks/test",
    tokens=((37, 5, 70, 1, 64, 65, 2, 33),),
    hidden=40,
    intermediate=24,
    experts=24,
    top_k=4,
    bias=True,
    router_bias=True,
    aux_gradients=True,
)


@contextmanager
def open_groups(num_ranks, **options):
    """Groups of ranks as threads with options of `Group.set`; closed in the end."""
    groups = flashmoe.local_group(num_ranks)
    try:
        configure(groups, **options)
        yield groups
    finally:
        for group in groups:
            group.close()


def configure(groups, **options):
    for group in groups:
        for key, value in options.items():
            group.set(key, value)


def run_step(case, groups, dtype="fp32", tokens=None, seed=0):
    """Outputs and gradients of one forward and backward on all ranks: name -> list of tensors."""
    tokens = tokens or case.steps(len(groups))[0]
    operands = make_operands(case, tokens, dtype, seed)
    return passes.engine_pass(case, operands, dtype, groups, gradients=True).outputs


def narrow(call):
    """Takes eight off the hidden size of every operand of a rank's call."""
    call.x = call.x[:, :-8].contiguous()
    call.grad_y = call.grad_y[:, :-8].contiguous()
    call.routing["w_router"] = call.routing["w_router"][:, :-8].contiguous()
    call.weights["w_up"] = call.weights["w_up"][..., :-8].contiguous()
    call.weights["w_down"] = call.weights["w_down"][:, :-8].contiguous()
    call.weights["b_down"] = call.weights["b_down"][:, :-8].contiguous()


def run_process(rank, world, directory, case, dtype, jitters):
    """One of several processes: a step for each jitter, the outputs saved in `directory`."""
    import torch.distributed as dist
    from flashmoe import group as flashmoe_groups

    store = dist.FileStore(f"{directory}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    process_group = dist.group.WORLD
    name, _ = flashmoe_groups.resolve(process_group)
    operands = make_operands(case, case.steps(world)[0], dtype, 0)
    results = []
    for jitter_us in jitters:
        flashmoe_groups.lookup(name).set("jitter_us", jitter_us)
        call = passes.rank_call(case, operands, dtype, rank, world, process_group)
        results.append(passes.run_rank(call, gradients=True)[0])
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


def run_processes(world, directory, case, dtype="fp32", jitters=(0.0,)):
    """As `run_step` on processes that meet in a gloo process group: one result a jitter."""
    torch.multiprocessing.spawn(
        run_process, (world, str(directory), case, dtype, jitters), nprocs=world
    )
    by_rank = [torch.load(f"{directory}/rank{rank}.pt") for rank in range(world)]
    return [
        passes.gather(case, list(outputs), []).outputs for outputs in zip(*by_rank, strict=True)
    ]


def assert_same_bits(first, second):
    """Two runs gave the same outputs, bit by bit."""
    assert first.keys() == second.keys()
    for name, parts in first.items():
        for entry, (one, other) in enumerate(zip(parts, second[name], strict=True)):
            assert same_bits(one, other), f"{name} of entry {entry} differs"
