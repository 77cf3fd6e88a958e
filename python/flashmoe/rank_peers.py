"""What `flashmoe bench --ranks` holds the layer of several ranks against: the same layer in
PyTorch, the exchange by itself, and plain PyTorch in fp64 for the values; of several ranks, whose
tokens `Ranks` joins.
"""

from __future__ import annotations

import statistics

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import backward_peers, bench_peers, reference
from .gpu_timing import BURST_LAUNCHES
from .inputs import LAYOUTS

TORCH = "torch all-to-all, grouped_mm"


class AllToAll(torch.autograd.Function):
    """Rows to the ranks that they are for; their gradients come back the same way."""

    @staticmethod
    def forward(ctx, rows, out_splits, in_splits, exchange):
        ctx.way = (in_splits, out_splits, exchange)
        made = rows.new_empty(sum(out_splits), rows.shape[1])
        dist.all_to_all_single(made, rows.contiguous(), out_splits, in_splits, group=exchange)
        return made

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad, *ctx.way), None, None, None


def torch_layer(case, call, exchange):
    """The layer in PyTorch, as a model file writes expert parallelism: rows sorted by expert, an
    all-to-all there and one back, counts read on the host in between. exchange: the process group
    of the all-to-alls."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    x, w_router = call.x, call.routing["w_router"]
    world, local = dist.get_world_size(exchange), call.weights["w_up"].shape[0]
    local_experts = torch.arange(local, device=x.device).repeat(world)

    def exchanged(rows, out_splits, in_splits):
        return AllToAll.apply(rows, out_splits, in_splits, exchange)

    def layer():
        up, down = (bench_peers.as_matrices(call, name) for name in ("w_up", "w_down"))
        weights, ids = bench_peers.route(case, x, w_router)
        slots = ids.flatten().argsort(stable=True)
        sent = torch.bincount(ids.flatten(), minlength=case.experts)  # [W * E_loc]
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=exchange)
        of_ranks = torch.stack((sent, came)).view(2, world, local).sum(-1)
        in_splits, out_splits = of_ranks.tolist()
        rows = exchanged(x[slots // case.top_k], out_splits, in_splits)
        # They came source by source; the products want them expert by expert.
        experts = local_experts.repeat_interleave(came, output_size=len(rows))
        order = experts.argsort(stable=True)
        ends = came.view(world, local).sum(0).cumsum(0).to(torch.int32)
        hidden = reference.activate(grouped_mm(rows[order], up, offs=ends), case.activation_spec)
        out = torch.empty_like(rows).index_copy_(0, order, grouped_mm(hidden, down, offs=ends))
        out = exchanged(out, in_splits, out_splits)
        back = torch.empty_like(out).index_copy_(0, slots, out)
        return (back.view(*ids.shape, -1) * weights[..., None].to(x.dtype)).sum(1)

    return layer


def find(case, call, y, exchange, everyone):
    """(name -> function that gives y, name -> why it is not there): the same on all ranks.

    y [T, H]: what ours gives on this rank. everyone(value): the values of all ranks.
    """

    def judge(layer):
        return bench_peers.disagreement(layer(), y)

    return admitted(case, call, lambda: torch_layer(case, call, exchange), judge, everyone)


def find_trained(case, call, expected, exchange, everyone):
    """The same of layers that autograd differentiates, `backward_peers.Trained`. expected: name ->
    gradient of ours. call: of `backward_peers.differentiable`."""

    def make():
        layer = torch_layer(case, call, exchange)
        return backward_peers.Trained(layer, call.leaves(), call.grad_y)

    def judge(trained):
        return backward_peers.disagreement(trained.gradients(), expected)

    return admitted(case, call, make, judge, everyone)


def admitted(case, call, make, judge, everyone):
    """(name -> what make() gives, name -> why it is not there): where all ranks have no reason
    against it. judge(made): this rank's reason, "" for none."""
    reason = bench_peers.reason_against(bench_peers.GROUPED, case, call)
    made = None
    if not reason:
        try:
            made = make()
            reason = judge(made)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            reason = f"fails: {type(error).__name__}: {error}"
    reasons = [one for one in everyone(reason) if one]
    return ({}, {TORCH: reasons[0]}) if reasons else ({TORCH: made}, {})


# ---- the exchange by itself -------------------------------------------------------------------


def copy_us(link_bytes):
    """Microseconds of plain copies of link_bytes[from][to] bytes between the GPUs of this process,
    all at once: the median of a few, each the slowest GPU's. The other ranks rest meanwhile."""
    world = len(link_bytes)
    pairs = [(a, b) for a in range(world) for b in range(world) if link_bytes[a][b]]
    buffers = {pair: [pair_buffer(link_bytes, pair, end) for end in range(2)] for pair in pairs}
    streams = {pair: [torch.cuda.Stream(device) for device in pair] for pair in pairs}
    starters = [torch.cuda.Stream(device) for device in range(world)]
    runs = [copy_once(buffers, streams, starters) for _ in range(2 + BURST_LAUNCHES)]
    return statistics.median(runs[2:])


def pair_buffer(link_bytes, pair, end):
    a, b = pair
    return torch.zeros(link_bytes[a][b], dtype=torch.int8, device=f"cuda:{pair[end]}")


def copy_once(buffers, streams, starters):
    """Microseconds of one round of copies, of the slowest GPU."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in starters]
    for device, stream in enumerate(starters):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)  # about a millisecond, until all copies are queued
            events[device][0].record()
    for pair, (source, target) in buffers.items():
        leaving, arriving = streams[pair]
        leaving.wait_event(events[pair[0]][0])
        # A copy orders the current streams of both GPUs: here none that another copy uses.
        with torch.cuda.stream(arriving), torch.cuda.stream(leaving):
            target.copy_(source, non_blocking=True)
        starters[pair[0]].wait_stream(leaving)
    for device, stream in enumerate(starters):
        with torch.cuda.stream(stream):
            events[device][1].record()
    for device in range(len(starters)):
        torch.cuda.synchronize(device)
    return max(start.elapsed_time(end) for start, end in events) * 1e3


# ---- values -----------------------------------------------------------------------------------


class Ranks:
    """The tokens of several ranks, as many on each, as `backward_quality.OneRank` has one rank's.
    exchange: a torch process group of them."""

    def __init__(self, exchange):
        self.exchange = exchange
        self.rank, self.world = dist.get_rank(exchange), dist.get_world_size(exchange)

    def joined(self, own):
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own.contiguous(), group=self.exchange)
        return torch.cat(parts)

    def own_of_sum(self, parts):
        total = parts.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.exchange)
        return total.chunk(self.world)[self.rank]


def plain_layer(case, call, topk_ids, dtype, exchange):
    """y of plain PyTorch in a dtype for given ids [T, k], the same T on all ranks: each rank adds
    up what its experts make of all ranks' tokens, and these sums are added in fp32 or wider."""
    order, transposed, _ = LAYOUTS[case.layout]
    ranks = Ranks(exchange)
    local = case.experts // ranks.world
    x = call.x.to(dtype)
    logits = reference.router_logits(x, call.routing["w_router"].to(dtype))
    weights = reference.topk_weights(logits, topk_ids, case.routing)
    xs, ids, all_weights = (ranks.joined(one) for one in (x, topk_ids, weights))
    mine = torch.where(ids // local == ranks.rank, ids - ranks.rank * local, -1)
    part = reference.experts(
        xs,
        mine,
        all_weights,
        **{name: weight.to(dtype) for name, weight in call.weights.items()},
        activation=case.activation_spec,
        interleaved=order == "interleaved",
        transposed=transposed,
        weight_on_input=case.weight_on_input,
    )
    return ranks.own_of_sum(part.to(logits.dtype)).to(dtype)


def error_ratio(case, call, y, topk_ids, exchange, everyone):
    """The error of y over that of plain PyTorch in its dtype, both against fp64, over all ranks."""
    oracle = plain_layer(case, call, topk_ids, torch.float64, exchange)
    plain = plain_layer(case, call, topk_ids, y.dtype, exchange)
    squares = [float((one.double() - oracle).square().sum()) for one in (y, plain)]
    ours, yardstick = (sum(parts) for parts in zip(*everyone(squares), strict=True))
    return (ours / yardstick) ** 0.5
