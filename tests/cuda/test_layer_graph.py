"""The layer in CUDA graphs and under torch.compile."""

import flashmoe
import pytest
import torch
from cuda_products import count_graph_nodes
from flashmoe import ops
from flashmoe.config import LayerConfig
from flashmoe.errors import UnsupportedError, WaitTimeoutError
from layer_common import finish, make_layer, same_bits

REPLAYS = 1000


def captured(call, **options):
    """(graph, what the call returned) of a capture on torch's capture stream."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(**options)
    with torch.cuda.graph(graph):
        made = call()
    return graph, made


@pytest.fixture
def group():
    [one] = flashmoe.local_group(1)
    with one:
        yield one


@pytest.mark.parametrize("tokens", [0, 1, 300, 8192])
def test_one_kernel_node(tokens, group):
    layer = make_layer(tokens=tokens)
    layer(group)
    graph, _ = captured(lambda: layer(group), keep_graph=True)
    assert count_graph_nodes(graph) == ["kernel"]


@pytest.mark.parametrize("tokens", [7, 500])
def test_replays_follow_inputs_and_routing(tokens, group):
    layer = make_layer(tokens=tokens, capacity_factor=0.9)
    layer(group)
    graph, (y, routed) = captured(lambda: layer(group))
    generator = torch.Generator("cuda").manual_seed(4)
    differs = torch.zeros(1, dtype=torch.int64, device="cuda")
    for replay in range(REPLAYS):
        layer.x.normal_(generator=generator)
        if replay % 7 == 0:
            layer.w_router.copy_(layer.w_router.roll(1, dims=0))
        for tensor in (y, *routed):
            tensor.fill_(-1)
        graph.replay()
        y_again, routed_again = layer()  # the group "self": other scratch, not captured
        for one, other in zip((y, *routed), (y_again, *routed_again), strict=True):
            differs += (one.view(torch.uint8) != other.view(torch.uint8)).any()
    finish(group)
    assert int(differs) == 0


def test_a_graph_survives_growth_of_the_scratch(group):
    layer, large = make_layer(tokens=100), make_layer(tokens=6000)
    expected = layer.outputs(group)
    graph, (y, routed) = captured(lambda: layer(group))
    large(group)
    y.fill_(-1)
    graph.replay()
    finish(group)
    assert same_bits([y, *routed], expected)


def test_growth_inside_a_capture_says_what_to_do(group):
    layer = make_layer()
    with pytest.raises(ValueError, match="run the layer once at this size before capturing"):
        captured(lambda: layer(group))
    torch.cuda.synchronize()
    layer(group)
    finish(group)


def test_a_replay_that_fails_is_raised_by_stats_and_the_next_one_works(group):
    layer = make_layer(tokens=2000, experts=64, hidden=1024)
    expected = layer.outputs(group)
    group.set("timeout_s", 1e-9)
    failing, _ = captured(lambda: layer(group))
    group.set("timeout_s", 30)
    graph, (y, routed) = captured(lambda: layer(group))
    failing.replay()
    torch.cuda.synchronize()
    with pytest.raises(WaitTimeoutError, match="a wait ran out of time"):
        group.stats()
    graph.replay()
    finish(group)
    assert same_bits([y, *routed], expected)


def test_a_call_beside_a_replay_is_turned_away_and_named(group):
    """Both leave multiprocessors free, and nobody has ordered them."""
    layer = make_layer(tokens=8192, hidden=1024, intermediate=512)
    group.set("max_sms", 16)
    expected = layer.outputs(group)
    graph, (y, routed) = captured(lambda: layer(group))
    side = torch.cuda.Stream()
    y.fill_(-1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        graph.replay()  # takes about a millisecond
    layer(group)
    with pytest.raises(UnsupportedError, match="another launch of this group was running"):
        group.stats()
    torch.cuda.synchronize()
    assert same_bits([y, *routed], expected)
    for _ in range(3):
        assert same_bits(layer.outputs(group), expected)
        graph.replay()
        torch.cuda.synchronize()
    finish(group)
    assert same_bits([y, *routed], expected)


def test_launches_on_all_multiprocessors_do_not_run_side_by_side(group):
    """There is no room for a second one: what its owner has not ordered, the GPU has."""
    layers = [make_layer(tokens=3000, hidden=512, seed=seed) for seed in range(2)]
    group.set("timeout_s", 2)
    expected = [layer.outputs(group) for layer in layers]
    made = [captured(lambda layer=layer: layer(group)) for layer in layers]
    streams = [torch.cuda.Stream() for _ in made]
    for _ in range(100):
        for _, (y, _) in made:
            y.fill_(-1)
        torch.cuda.synchronize()
        for (graph, _), stream in zip(made, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                graph.replay()
        finish(group)
        for (_, (y, routed)), right in zip(made, expected, strict=True):
            assert same_bits([y, *routed], right)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    layer = make_layer(tokens=256)

    def block(x):
        y, routed = flashmoe.moe(x * 2, layer.w_router, layer.w_up, layer.w_down, top_k=4)
        return x + y, routed.topk_ids

    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for seed in range(5):
        x = layer.with_x(256, seed=seed).x
        expected = block(x)
        torch.compiler.cudagraph_mark_step_begin()
        assert same_bits([tensor.clone() for tensor in compiled(x)], expected)


def test_compile_of_another_number_of_tokens():
    layer = make_layer()
    compiled = torch.compile(lambda x: layer(x=x)[0], fullgraph=True)
    for tokens in (64, 65, 500):
        x = layer.with_x(tokens, seed=tokens).x
        torch._dynamo.mark_dynamic(x, 0)
        assert same_bits([compiled(x)], [layer(x=x)[0]])


@pytest.mark.parametrize("fused", [True, False], ids=["router", "ids"])
def test_opcheck(fused):
    layer = make_layer(tokens=40)
    inputs = dict.fromkeys(ops.OPERANDS)
    inputs |= {"x": layer.x, "w_up": layer.w_up, "w_down": layer.w_down}
    if fused:
        inputs["w_router"] = layer.w_router
    else:
        inputs["topk_ids"] = torch.randint(16, (40, 4), device="cuda")
        inputs["topk_weights"] = torch.rand(40, 4, device="cuda")
    config = LayerConfig(top_k=4).encode()
    torch.library.opcheck(ops.forward, (*inputs.values(), config, "self", False))
