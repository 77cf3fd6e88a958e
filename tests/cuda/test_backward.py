"""The backward on CUDA tensors: every gradient of the case table and of more sizes against fp64,
with plain PyTorch on the same GPU as the yardstick; gradients poisoned before they are written."""

import math
from dataclasses import replace

import flashmoe
import pytest
import torch
from cuda_products import count_graph_nodes
from flashmoe import check, ops
from flashmoe.cases import Case
from layer_common import MIXED, finish, make_layer, same_bits

TABLE = [
    (case.key(dtype, ranks), case, dtype)
    for _, case, dtype, ranks in check.planned(gradients=True, device="cuda")
    if not check.missing_for(case, dtype, ranks, "cpu")
    if case.probe == "compare" and not case.refused
]
TOKENS = (0, 1, 17, 64, 129, 1000, 4097)
SIZES = [
    Case("size/e1024_k32", experts=1024, top_k=32, hidden=64, intermediate=64, tokens=(65,)),
    Case("size/smallest", experts=1, top_k=1, hidden=64, intermediate=64, tokens=(1,)),
    Case("size/gpt_oss", experts=4, hidden=2880, intermediate=2880, tokens=(130,),
         activation="gpt_oss", bias=True, router_bias=True, layout="interleaved_transposed"),
    Case("size/wide", experts=4, hidden=7168, intermediate=64, tokens=(40,)),
    Case("size/deep", experts=4, hidden=64, intermediate=4096, tokens=(200,)),
    Case("size/uneven", experts=6, top_k=3, hidden=832, intermediate=448, tokens=(333,)),
    # Half of the last weight pair's tiles do not exist.
    *(Case(f"size/half_pair_{layout}", experts=3, top_k=2, hidden=128, intermediate=192,
           tokens=(200,), save_z=True, layout=layout, bias=True)
      for layout in ("concatenated", "separate", "interleaved", "interleaved_transposed")),
]  # fmt: skip
pytestmark = pytest.mark.usefixtures("poisoned_gradients")


def run_case(case, dtype, pool):
    record = check.Record(case.name, dtype, 1, "gradients", device="cuda")
    check.check_case(case, record, pool)
    assert record.status == "passed", record.reason


@pytest.mark.parametrize(("case", "dtype"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_case_table(case, dtype, pool):
    run_case(case, dtype, pool)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(tokens, dtype, pool):
    case = Case("tokens", tokens=(tokens,), hidden=128, intermediate=192, experts=16, top_k=4)
    run_case(case, dtype, pool)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", SIZES + MIXED, ids=lambda case: case.name)
def test_sizes_and_mixtures(case, dtype, pool):
    run_case(replace(case, hidden=max(case.hidden, 64)), dtype, pool)


def leaves_of(layer):
    return [layer.x, layer.w_router, layer.w_up, layer.w_down]


def gradients(layer, group, seed=1):
    """Gradients of all leaves for an arriving gradient drawn from a seed."""
    for leaf in leaves_of(layer):
        leaf.requires_grad_()
    y, _ = layer(group)
    generator = torch.Generator("cuda").manual_seed(seed)
    arriving = torch.randn(*y.shape, device="cuda", generator=generator).to(y.dtype)
    return torch.autograd.grad(y, leaves_of(layer), arriving)


@pytest.fixture
def group():
    [one] = flashmoe.local_group(1)
    with one:
        yield one


def test_hundred_runs_give_the_same_bits(group):
    layer = make_layer(tokens=777, capacity_factor=0.9)
    expected = gradients(layer, group)
    for run in range(100):
        group.set("max_sms", (0, 2, 26, 100)[run % 4])
        assert same_bits(gradients(layer, group), expected)
    finish(group)


def test_backwards_in_any_order(group):
    one, two = make_layer(tokens=500), make_layer(tokens=300, seed=5)
    expected = [gradients(layer, group) for layer in (one, two)]
    for order in ((0, 1), (1, 0)):
        ends = [layer(group)[0] for layer in (one, two)]
        made = [None, None]
        for which in order:
            generator = torch.Generator("cuda").manual_seed(1)
            y = ends[which]
            arriving = torch.randn(*y.shape, device="cuda", generator=generator).to(y.dtype)
            made[which] = torch.autograd.grad(y, leaves_of((one, two)[which]), arriving)
        assert all(same_bits(*pair) for pair in zip(made, expected, strict=True))
    finish(group)


def test_a_backward_is_one_kernel_and_replays_to_the_same_bits(group):
    layer = make_layer(tokens=300)
    expected = gradients(layer, group)
    _, routed = layer(group)
    tensors = {"x": layer.x, "w_router": layer.w_router, "w_up": layer.w_up, "w_down": layer.w_down}
    generator = torch.Generator("cuda").manual_seed(1)
    saved = {name: tensor.detach() for name, tensor in tensors.items()} | {
        "topk_ids": routed.topk_ids,
        "topk_weights": routed.topk_weights.detach(),
        "logits": routed.logits.detach(),
        "grad_y": torch.randn(*layer.x.shape, device="cuda", generator=generator).to(layer.x.dtype),
    }
    made = {name: torch.full_like(saved[name], math.nan) for name in tensors}
    config = flashmoe.config.LayerConfig(top_k=4).encode()
    handle = flashmoe.group.resolve(group)[0]
    ops.launch_backward(saved, made, config, handle)
    assert same_bits(list(made.values()), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        ops.launch_backward(saved, made, config, handle)
    assert count_graph_nodes(graph) == ["kernel"]
    graph.instantiate()
    for tensor in made.values():
        tensor.fill_(math.nan)
    graph.replay()
    assert same_bits(list(made.values()), expected)
    finish(group)


@pytest.mark.parametrize("overwrite", [False, True])
def test_main_grad(overwrite, group):
    layer = make_layer(tokens=300)
    plain = gradients(layer, group)
    for weight in (layer.w_up, layer.w_down):
        weight.main_grad = torch.full(weight.shape, 3.0, device="cuda")
        weight.overwrite_main_grad = overwrite
    y, _ = layer(group)
    generator = torch.Generator("cuda").manual_seed(1)
    y.backward(torch.randn(*y.shape, device="cuda", generator=generator).to(y.dtype))
    for weight, expected in zip((layer.w_up, layer.w_down), plain[2:], strict=True):
        sums = weight.main_grad - (0.0 if overwrite else 3.0)
        error = (sums.double() - expected.double()).norm() / expected.double().norm()
        assert error < 2**-8
    finish(group)
