"""Graphs of two ranks, captured at once and apart, and torch.compile with a group of two."""

import os
import random
import time
from dataclasses import dataclass
from functools import cache

import flashmoe
import pytest
import torch
from cuda_products import count_graph_nodes
from flashmoe.rank_processes import on_ranks
from gpu_ranks import call_all, finish_all, finished, shards, synchronize
from layer_common import same_bits
from rank_differences import Differences
from test_ranks import capture

RANKS = 2
REPLAYS = 50
EXPERTS = 16


@pytest.fixture
def eager():
    """Other groups, whose calls are not captured."""
    made = flashmoe.local_group(RANKS, device="cuda", max_tokens=4096)
    yield made
    for group in made:
        group.close()


def capture_at_once(layers, groups):
    """[(graph, outputs)] of all ranks: every capture is open when the first rank is called."""
    graphs = [torch.cuda.CUDAGraph(keep_graph=True) for _ in layers]
    streams = [torch.cuda.Stream(layer.x.device) for layer in layers]
    outputs = []
    synchronize()
    for graph, stream in zip(graphs, streams, strict=True):
        with torch.cuda.stream(stream):
            # Other modes forbid this thread what the next capture begins with.
            graph.capture_begin(capture_error_mode="relaxed")
    for layer, group, stream in zip(layers, groups, streams, strict=True):
        with torch.cuda.stream(stream):
            y, routed = layer(group)
        outputs.append((y, *routed))
    for graph, stream in zip(graphs, streams, strict=True):
        with torch.cuda.stream(stream):
            graph.capture_end()
    return list(zip(graphs, outputs, strict=True))


def instantiate(captured):
    """Each graph is one kernel; afterwards it may be replayed."""
    for graph, _ in captured:
        assert count_graph_nodes(graph) == ["kernel"]
        graph.instantiate()


def replay(captured):
    """The outputs of all ranks, poisoned before."""
    for _, outputs in captured:
        for tensor in outputs:
            tensor.fill_(-1)
    for graph, _ in captured:
        graph.replay()
    return [outputs for _, outputs in captured]


def draw_inputs(layers, generators, shift):
    """New tokens; the experts of the router moved on by `shift`."""
    for layer, generator in zip(layers, generators, strict=True):
        layer.x.normal_(generator=generator)
        layer.w_router.copy_(layer.w_router.roll(shift, dims=0))


def assert_replays_follow(captured, layers, groups, eager, replays=REPLAYS):
    """Replays give the bits of eager calls on another group, with new inputs each time."""
    generators = [torch.Generator(f"cuda:{rank}").manual_seed(rank) for rank in range(RANKS)]
    found = Differences()
    for step in range(replays):
        draw_inputs(layers, generators, shift=step % 3)
        made = replay(captured)
        found.add(made, call_all(layers, eager))
    finish_all([*groups, *eager])
    assert found.total() == [0, 0]


# ---- captures --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(300, 200), (0, 65), (2000, 1)], ids=str)
def test_captures_of_all_ranks_at_once(tokens, groups, eager):
    layers = shards(tokens=tokens, capacity_factor=0.9)
    for one in (groups, eager):
        finished(call_all(layers, one), one)
    captured = capture_at_once(layers, groups)
    instantiate(captured)
    assert_replays_follow(captured, layers, groups, eager)


def test_captures_at_different_times(groups, eager):
    """Between them the group has other launches, and one rank's graph is made anew."""
    layers, others = shards(), shards(tokens=(17, 900), seed=3)
    for one in (groups, eager):
        finished(call_all(layers, one), one)
        finished(call_all(others, one), one)
    first = capture(layers[0], groups[0])
    for _ in range(3):
        call_all(others, groups)
    synchronize()
    second = capture(layers[1], groups[1])
    instantiate([first, second])
    assert_replays_follow([first, second], layers, groups, eager, replays=10)
    call_all(others, groups)
    synchronize()
    again = capture(layers[0], groups[0])
    instantiate([again])
    assert_replays_follow([again, second], layers, groups, eager, replays=10)
    expected = finished(call_all(others, eager), eager)
    made = finished(call_all(others, groups), groups)
    assert all(same_bits(*pair) for pair in zip(made, expected, strict=True))


def test_one_rank_replays_and_the_other_calls(groups, eager):
    layers = shards()
    for one in (groups, eager):
        finished(call_all(layers, one), one)
    captured = capture(layers[0], groups[0])
    instantiate([captured])
    generators = [torch.Generator(f"cuda:{rank}").manual_seed(rank) for rank in range(RANKS)]
    found = Differences()
    for _ in range(REPLAYS):
        draw_inputs(layers, generators, shift=0)
        [made] = replay([captured])
        y, routed = layers[1](groups[1])
        found.add([made, (y, *routed)], call_all(layers, eager))
    finish_all([*groups, *eager])
    assert found.total() == [0, 0]


@dataclass
class Padded:
    """A layer whose routing is given. Tokens from `count` on are no tokens: their ids are -1."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    w_up: torch.Tensor
    w_down: torch.Tensor

    def __call__(self, group, count=None):
        """(y, []) of one call, of the first `count` tokens alone where it is given."""
        routing = (self.x[:count], self.ids[:count], self.weights[:count])
        y = flashmoe.experts(*routing, self.w_up, self.w_down, num_experts=EXPERTS, group=group)
        return y, []

    def draw(self, generator, count):
        """New tokens, ids and weights, `count` of each."""
        self.x.normal_(generator=generator)
        self.weights.uniform_(generator=generator)
        self.ids.random_(0, EXPERTS, generator=generator)
        self.ids[count:] = -1


def padded_layers(sizes):
    made = []
    for layer in shards(tokens=sizes, experts=EXPERTS):
        shape, device = (len(layer.x), layer.top_k), layer.x.device
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        weights = torch.zeros(shape, dtype=torch.float32, device=device)
        made.append(Padded(layer.x, ids, weights, layer.w_up, layer.w_down))
    return made


def test_replays_with_other_numbers_of_tokens(groups, eager):
    """Within the captured size, by tokens without experts; beside calls of just the tokens."""
    sizes = (700, 1100)
    layers = padded_layers(sizes)
    generators = [torch.Generator(f"cuda:{rank}").manual_seed(rank) for rank in range(RANKS)]
    for rank, layer in enumerate(layers):
        layer.draw(generators[rank], sizes[rank])
    for one in (groups, eager):
        finished(call_all(layers, one), one)
    captured = capture_at_once(layers, groups)
    instantiate(captured)
    counts = random.Random(5)
    found = Differences()
    for _ in range(REPLAYS):
        tokens = [counts.choice((0, 1, 127, 128, 129, size)) for size in sizes]
        for rank, layer in enumerate(layers):
            layer.draw(generators[rank], tokens[rank])
        made = [outputs[0] for outputs in replay(captured)]
        alone = [
            layer(group, count)[0]
            for layer, group, count in zip(layers, eager, tokens, strict=True)
        ]
        expected = []
        for y, own, count in zip(made, alone, tokens, strict=True):
            whole = torch.zeros_like(y)
            whole[:count] = own
            expected.append([whole])
        found.add([[y] for y in made], expected)
    finish_all([*groups, *eager])
    assert found.total() == [0, 0]


def test_graphs_of_several_layers_share_a_workspace(groups, eager):
    """In any order that is the same on all ranks, beside eager calls of that group and another."""
    for one in (groups, eager):
        one[0].reserve(4096, hidden=1024, top_k=8, num_experts=64)
    layers = [
        shards(),
        shards(experts=64, top_k=8, hidden=1024, tokens=(100, 900), seed=1),
        shards(experts=4, top_k=1, hidden=64, tokens=(17, 0), seed=2),
    ]
    expected = [finished(call_all(pair, groups), groups) for pair in layers]
    finished(call_all(layers[1], eager), eager)
    graphs = {("graph", idx): capture_at_once(pair, groups) for idx, pair in enumerate(layers)}
    graphs["graph of another group", 1] = capture_at_once(layers[1], eager)
    for captured in graphs.values():
        instantiate(captured)
    kept = [
        [[tensor.to(f"cuda:{rank}") for tensor in one] for rank, one in enumerate(pair)]
        for pair in expected
    ]
    order, found = random.Random(9), Differences()
    for _ in range(80):
        kind, idx = order.choice([*graphs, ("call", 0), ("call", 2)])
        made = call_all(layers[idx], groups) if kind == "call" else replay(graphs[kind, idx])
        found.add(made, kept[idx])
    finish_all([*groups, *eager])
    assert found.total() == [0, 0]


# ---- processes -------------------------------------------------------------------------------


def work_of_a_process(rank):
    """Yields what was found in one of two processes: captures, replays and compiled calls."""
    import torch.distributed as dist

    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no workers beside the two processes
    other = dist.new_group(backend="gloo")
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, [graphs_of_a_process(rank, other), compiled_calls(rank)])
    yield everyone


def graphs_of_a_process(rank, other):
    """(kinds of the graph's nodes, replays that were not the eager call's bits). Both processes
    capture when they come to it, and sleep as they like between replays."""
    import torch.distributed as dist

    layer = shards()[rank]
    for group in (dist.group.WORLD, other):
        layer(group)
    captured = capture(layer, dist.group.WORLD)
    captured[0].instantiate()
    pause, different = random.Random(rank), 0
    for _ in range(REPLAYS):
        layer.x.normal_()
        layer.w_router.copy_(layer.w_router.roll(1, dims=0))
        time.sleep(pause.choice((0.0, 0.0, 0.002)))
        [made] = replay([captured])
        y, routed = layer(other)
        torch.cuda.synchronize()
        different += not same_bits(made, (y, *routed))
    return count_graph_nodes(captured[0]), different


def compiled_calls(rank):
    """Numbers of tokens whose compiled call gave other bits than the eager one."""
    import torch.distributed as dist

    layer, group = shards(tokens=(256, 256))[rank], dist.group.WORLD

    def block(x):
        weights = (layer.w_router, layer.w_up, layer.w_down)
        y, routed = flashmoe.moe(x * 2, *weights, top_k=4, group=group)
        return x + y, routed.topk_ids

    compiled = torch.compile(block, fullgraph=True)
    different = []
    for tokens in (256, 256, 64, 300):
        x = layer.with_x(tokens, seed=tokens + rank).x
        torch._dynamo.mark_dynamic(x, 0)
        expected = [tensor.clone() for tensor in block(x)]
        made = compiled(x)
        torch.cuda.synchronize()
        if not same_bits(made, expected):
            different.append(tokens)
    return different


@cache
def of_processes():
    """What both processes found; a fixture of the module would start them before a skip."""
    [found] = on_ranks(RANKS, work_of_a_process, device="cuda")
    return found


def test_processes_capture_and_replay():
    assert [graphs for graphs, _ in of_processes()] == [(["kernel"], 0)] * RANKS


def test_compile_of_a_group_of_two():
    assert [compiled for _, compiled in of_processes()] == [[]] * RANKS
