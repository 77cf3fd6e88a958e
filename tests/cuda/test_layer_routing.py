"""Routing on the GPU beside the CPU engine's, on the same operands: ids, counts, drops."""

import flashmoe
import pytest
import torch
from flashmoe import compare
from flashmoe.cases import Case
from flashmoe.config import Routing
from flashmoe.inputs import DTYPES, make_operands, on_device
from flashmoe.passes import engine_pass
from layer_common import may_differ

ROUTINGS = {
    "softmax": Routing(),
    "topk_softmax": Routing(score="topk_softmax"),
    "sigmoid": Routing(score="sigmoid"),
    "sigmoid_groups": Routing(score="sigmoid", num_groups=8, top_groups=4, scale=2.5),
    "sqrt_softplus": Routing(score="sqrt_softplus"),
}


def both(case, operands, dtype):
    """RoutingResult of the CPU engine and of the GPU, both on the host."""
    [group] = flashmoe.local_group(1)
    with group:
        on_cpu = engine_pass(case, operands, dtype, [group], False).routed[0]
        on_gpu = engine_pass(case, on_device(operands, "cuda"), dtype, [group], False).routed[0]
    return on_cpu, type(on_gpu)(*(tensor.cpu() for tensor in on_gpu))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("score", ROUTINGS)
def test_ids_are_those_of_the_cpu(score, dtype, record_property):
    case = Case(
        "routing", tokens=(2000,), hidden=512, intermediate=64, experts=64, top_k=6,
        routing=ROUTINGS[score], capacity_factor=0.9,
    )  # fmt: skip
    operands = make_operands(case, (2000,), dtype)
    on_cpu, on_gpu = both(case, operands, dtype)
    differs = (on_cpu.topk_ids != on_gpu.topk_ids).any(-1)
    allowed = may_differ(case, operands, dtype)
    record_property("tokens that differ", int(differs.sum()))
    record_property("tokens that may", int(allowed.sum()))
    assert not (differs & ~allowed).any(), differs.nonzero().flatten().tolist()
    assert allowed.sum() < len(allowed) / 4, "the bound says nothing"
    assert torch.equal(on_cpu.topk_ids[~differs], on_gpu.topk_ids[~differs])
    if not differs.any():
        assert torch.equal(on_cpu.tokens_per_expert, on_gpu.tokens_per_expert)
        assert torch.equal(on_cpu.dropped, on_gpu.dropped)
    assert compare.count_problem(case, on_gpu) == ""
    flips, problem = compare.id_problem(case, operands, [on_gpu.topk_ids], DTYPES[dtype])
    assert problem is None
    record_property("tokens rounded otherwise than in fp64", flips)


@pytest.mark.parametrize("case", [
    Case("equal", ids="router_equal", top_k=3, tokens=(130,), experts=16),
    Case("tied", ids="router_tied", top_k=4, tokens=(130,), experts=16),
    Case("tied_groups", ids="router_tied", top_k=4, tokens=(130,), experts=16,
         routing=Routing(score="sigmoid", num_groups=4, top_groups=2)),
], ids=lambda case: case.name)  # fmt: skip
def test_equal_logits_give_the_same_ids(case):
    on_cpu, on_gpu = both(case, make_operands(case, (130,), "bf16"), "bf16")
    assert torch.equal(on_cpu.topk_ids, on_gpu.topk_ids)
    assert torch.equal(on_cpu.tokens_per_expert, on_gpu.tokens_per_expert)
