"""What the tests of several ranks on GPUs share: layers cut over ranks, and ranks as processes that
a test may stop and kill."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from dataclasses import replace

import flashmoe
import rank_process
import torch
from flashmoe import _core, passes
from flashmoe.cases import Case
from flashmoe.config import Routing
from flashmoe.group import Group
from flashmoe.inputs import make_operands, on_device
from layer_common import make_layer, what_is_missing

TIMEOUT_S = 1.5  # of waits that a test lets run out
ENDS = ((0, 1), (127, 128), (129, 8191), (8191, 0), (0, 0), (1, 0), (500, 700))
MORE_CASES = [
    Case("ranks/tokens", tokens=ENDS, hidden=128, intermediate=192, experts=16, top_k=4),
    Case("ranks/tokens_ids", tokens=ENDS, ids="sentinels", hidden=192, experts=6, top_k=3),
    Case("ranks/one_rank", ids="one_rank", tokens=((1500, 900),), hidden=512, intermediate=128,
         experts=32, top_k=4),
    Case("ranks/one_expert", ids="one_expert", tokens=((700, 2000),), hidden=512, experts=8,
         top_k=1),
    Case("ranks/no_expert", ids="no_expert", tokens=((130, 1),), experts=8),
    Case("ranks/capacity", tokens=((1000, 600),), hidden=256, experts=32, top_k=6,
         capacity_factor=0.7, bias=True),
    Case("ranks/groups", tokens=((800, 333),), hidden=320, experts=32, top_k=6, bias=True,
         routing=Routing(score="sigmoid", num_groups=8, top_groups=4, scale=2.5),
         selection_bias=True, layout="interleaved_transposed", activation="gpt_oss"),
    Case("ranks/input_weight", tokens=((77, 300),), hidden=576, experts=10, top_k=3,
         weight_on_input=True, layout="separate"),
    Case("ranks/wide", tokens=((300, 500),), hidden=7168, intermediate=64, experts=8),
    Case("ranks/k32", tokens=((70, 90),), experts=64, top_k=32),
]  # fmt: skip

_context = multiprocessing.get_context("spawn")  # CUDA survives no fork
_tokens = (f"gpuranks{os.getpid()}-{number}" for number in itertools.count())


def missing_for_two() -> str | None:
    """Why two ranks cannot run here, each on a GPU of its own; None if they can."""
    if missing := what_is_missing():
        return missing
    if (count := torch.cuda.device_count()) < 2:
        return f"two GPUs: {count} is there"
    if not torch.cuda.can_device_access_peer(0, 1):
        return "two GPUs that reach each other"
    return None


def shards(world=2, tokens=(300, 200), experts=16, seed=0, devices=(0, 1), **options):
    """The `layer_common.Layer` of each rank on its GPU: one router, experts cut over the ranks."""
    whole = make_layer(tokens=1, experts=experts, seed=seed, **options)
    share = experts // world
    made = []
    for rank in range(world):
        mine = slice(rank * share, (rank + 1) * share)
        x = whole.with_x(tokens[rank], seed=1000 * seed + rank).x
        weights = {"w_up": whole.w_up[mine].clone(), "w_down": whole.w_down[mine].clone()}
        tensors = weights | {"x": x, "w_router": whole.w_router}
        device = f"cuda:{devices[rank]}"
        made.append(replace(whole, **{name: one.to(device) for name, one in tensors.items()}))
    synchronize()
    return made


def call_all(layers, groups):
    """The outputs of all ranks, called in turn by this thread."""
    made = []
    for layer, group in zip(layers, groups, strict=True):
        y, routed = layer(group)
        made.append((y, *routed))
    return made


def finished(outputs, groups):
    """Copies of outputs on the host, once all ranks are done; raises what a launch reported."""
    finish_all(groups)
    return [[tensor.cpu() for tensor in one] for one in outputs]


def finish_all(groups):
    synchronize()
    for group in groups:
        group.stats()


def synchronize():
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


# ---- ranks as processes --------------------------------------------------------------------------


class Rank:
    """What a rank process can be asked to do."""

    def __init__(self, index):
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.set_num_threads(1)
        self.group = None

    def join(self, token, rank, world, **options):
        """Makes this process a rank of a new group."""
        self.leave()
        handle = _core.engine().group_shm(token, rank, world)
        self.group = Group(handle, f"{token}:{rank}")
        for key, value in options.items():
            self.group.set(key, value)

    def leave(self):
        if self.group:
            self.group.close()
        self.group = None

    def run(self, case, tokens, count=1, delay=0.0, gradients=False, **changes):
        """`count` calls of a case, `delay` seconds late: arrays of the outputs of the last one, of
        its backward too with `gradients`. `changes` replace options of the call."""
        group = self.group
        operands = on_device(make_operands(case, tokens, "bf16"), self.device)
        call = passes.rank_call(case, operands, "bf16", group.rank, group.world, group)
        call.options |= changes
        torch.cuda.synchronize()
        time.sleep(delay)
        for _ in range(count):
            made = passes.run_rank(call, gradients)
        torch.cuda.synchronize()
        group.stats()
        return arrays(*made)

    def reserve(self, tokens, **sizes):
        self.group.reserve(tokens, **sizes)
        return self.group.stats()["symmetric_bytes"]

    def is_well(self):
        """A product and a layer of one rank, after whatever has happened."""
        a = torch.eye(256, device=self.device)
        y, _ = make_layer(tokens=100)()
        return bool((a @ a == a).all() and y.isfinite().all())


class Processes(rank_process.RankProcesses):
    """Two rank processes, each on its GPU; one that is gone is replaced."""

    def __init__(self):
        super().__init__(self._made(index) for index in range(2))

    @staticmethod
    def _made(index):
        return rank_process.RankProcess(_context, Rank, index)

    def join(self, **options):
        """Makes them the ranks of one new group."""
        for index, process in enumerate(self):
            if not process.process.is_alive():
                process.close()
                self[index] = self._made(index)
        super().join(next(_tokens), **options)


def arrays(outputs, routed):
    """The bytes of what `passes.run_rank` returns."""
    tensors = [*outputs.values(), *(routed or ())]
    return [tensor.detach().cpu().view(torch.uint8).numpy() for tensor in tensors]


def in_one_process(case, tokens, gradients=False):
    """What `Rank.run` gives on both ranks, by ranks as threads of this process."""
    groups = flashmoe.local_group(2, device="cuda", max_tokens=max(tokens))
    operands = make_operands(case, tokens, "bf16")
    calls = [
        passes.rank_call(case, on_device(operands, f"cuda:{rank}"), "bf16", rank, 2, group)
        for rank, group in enumerate(groups)
    ]
    results = passes.on_all_ranks(lambda rank: passes.run_rank(calls[rank], gradients), 2)
    finish_all(groups)
    made = [arrays(*result) for result in results]
    for group in groups:
        group.close()
    return made
