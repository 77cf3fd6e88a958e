"""Ranks as processes of this machine, started by the process that wants their results."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from multiprocessing.connection import wait

ITEM, FAILURE, END = "item", "failure", "end"


def on_ranks(world, function, *arguments, device="cpu"):
    """Yields what the generator `function(rank, *arguments)` yields on rank 0 of `world` processes.

    They share a gloo process group, torch's default one; with device "cuda" rank r has GPU r as its
    current device. `function` is a module's own, arguments and items can be pickled. Every rank's
    generator runs to its end.

    Raises RuntimeError with the first failing rank's error, once all processes are gone.
    """
    context = multiprocessing.get_context("spawn")  # CUDA survives no fork
    with tempfile.TemporaryDirectory(prefix="flashmoe-ranks-") as folder:
        ranks = {}
        try:
            for rank in range(world):
                here, there = context.Pipe(duplex=False)
                task = (rank, world, folder, there, device, function, arguments)
                process = context.Process(target=rank_main, args=task, daemon=True)
                process.start()
                there.close()  # so that its end is seen here
                ranks[here] = (rank, process)
            yield from listen({here: rank for here, (rank, _) in ranks.items()})
            for _, process in ranks.values():
                process.join()
        finally:
            for here, (_, process) in ranks.items():
                process.kill()
                process.join()
                here.close()


def listen(connections):
    """Yields rank 0's items until all ranks have ended. connections: connection -> rank."""
    open_ones = dict(connections)
    while open_ones:
        for here in wait(list(open_ones)):
            rank = open_ones[here]
            try:
                kind, value = here.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank}: its process ended") from None
            if kind == FAILURE:
                raise RuntimeError(f"rank {rank}: {value}")
            if kind == END:
                del open_ones[here]
            elif rank == 0:
                yield value


def rank_main(rank, world, folder, there, device, function, arguments):
    """The life of a rank's process."""
    import torch
    import torch.distributed as dist

    try:
        if device == "cuda":
            torch.cuda.set_device(rank)
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // world))
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        for item in function(rank, *arguments):
            if rank == 0:
                there.send((ITEM, item))
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        there.send((FAILURE, f"{type(error).__name__}: {error}"))
    else:
        there.send((END, None))
