"""The layer on CUDA tensors: values of the case table and of more sizes, outputs and scratch
poisoned. Errors are against fp64, with plain PyTorch on the same GPU as the yardstick."""

import math
from dataclasses import replace

import flashmoe
import pytest
import torch
from flashmoe import check, ops
from flashmoe.cases import Case
from flashmoe.errors import RoutingError, UnsupportedError
from flashmoe.inputs import make_operands, on_device
from flashmoe.passes import engine_pass
from layer_common import MIXED, finish, make_layer, same_bits

TOKENS = (0, 1, 3, 8, 9, 63, 64, 65, 127, 128, 129, 1000, 8191)
POISON = -77
TABLE = [
    (case.key(dtype, ranks), mode, case, dtype)
    for mode, case, dtype, ranks in check.planned(device="cuda")
    if not check.missing_for(case, dtype, ranks, "cpu")
    if "rank_" not in case.defect and 1 in (case.ranks if case.refused else (1,))
]
SIZES = [
    Case("size/e1024_k32", experts=1024, top_k=32, hidden=64, intermediate=64, tokens=(65,)),
    Case("size/e1024_k1", experts=1024, top_k=1, hidden=128, intermediate=64, tokens=(300,)),
    Case("size/smallest", experts=1, top_k=1, hidden=64, intermediate=64, tokens=(1,)),
    Case("size/k32", experts=32, top_k=32, hidden=192, intermediate=64, tokens=(70,)),
    Case("size/gpt_oss", experts=4, hidden=2880, intermediate=2880, tokens=(130,),
         activation="gpt_oss", bias=True, router_bias=True, layout="interleaved_transposed"),
    Case("size/wide", experts=4, hidden=7168, intermediate=64, tokens=(40,)),
    Case("size/deep", experts=4, hidden=64, intermediate=4096, tokens=(200,)),
    Case("size/few_e1024_k32", experts=1024, top_k=32, hidden=64, intermediate=64, tokens=(8,)),
    Case("size/few_wide", experts=8, top_k=2, hidden=7168, intermediate=64, tokens=(5,)),
    Case("size/few_deep", experts=4, hidden=64, intermediate=4160, tokens=(8,)),
    Case("size/uneven", experts=6, top_k=3, hidden=832, intermediate=448, tokens=(333,)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Outputs hold NaN, integers -77, before the engine writes them."""
    allocate = ops._empty_outputs

    def poisoned(*args):
        outputs = allocate(*args)
        for tensor in outputs.values():
            if tensor is not None:
                tensor.fill_(math.nan if tensor.is_floating_point() else POISON)
        return outputs

    monkeypatch.setattr(ops, "_empty_outputs", poisoned)


def run_case(case, dtype, pool, mode="values"):
    record = check.Record(case.name, dtype, 1, mode, device="cuda")
    check.check_case(case, record, pool)
    assert record.status == "passed", record.reason


@pytest.mark.parametrize(
    ("mode", "case", "dtype"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_case_table(mode, case, dtype, pool):
    run_case(case, dtype, pool, mode)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(tokens, dtype, pool):
    case = Case("tokens", tokens=(tokens,), hidden=128, intermediate=192, experts=16, top_k=4)
    run_case(case, dtype, pool)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", SIZES + MIXED, ids=lambda case: case.name)
def test_sizes_and_mixtures(case, dtype, pool):
    run_case(replace(case, hidden=max(case.hidden, 64)), dtype, pool)


def test_scratch_of_nan_changes_nothing():
    """A launch whose tokens are all NaN leaves NaN in every row of the scratch."""
    case = Case("poison", ids="uniform", tokens=(200,), hidden=192, intermediate=128, top_k=3)
    operands = on_device(make_operands(case, (200,), "bf16"), "cuda")
    spoiled = replace(operands, x=[torch.full_like(operands.x[0], math.nan)])
    [group] = flashmoe.local_group(1)
    with group:
        clean = engine_pass(case, operands, "bf16", [group], False).outputs["y"][0]
        engine_pass(case, spoiled, "bf16", [group], False)
        after = engine_pass(case, operands, "bf16", [group], False).outputs["y"][0]
        finish(group)
    assert check.same_bits(clean, after)


@pytest.mark.parametrize("fused", [True, False], ids=["router", "ids"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_value_stays_in_its_token(value, fused):
    layer, bad = make_layer(), 37
    others = torch.arange(len(layer.x), device="cuda") != bad
    spoiled = layer.x.clone()
    spoiled[bad, 5] = value
    [group] = flashmoe.local_group(1)
    with group:
        y, routed = layer(group)

        def again(x):
            if fused:
                return layer(group, x)[0]
            chosen = (routed.topk_ids, routed.topk_weights)
            return flashmoe.experts(x, *chosen, layer.w_up, layer.w_down, group=group)

        clean, made = again(layer.x).clone(), again(spoiled)
        torch.cuda.synchronize()
        if fused:
            with pytest.raises(RoutingError, match=f"router logits.*token {bad}"):
                group.stats()
            assert torch.isnan(made[bad]).all()
        else:
            assert not torch.isfinite(made[bad]).all()
        assert same_bits([clean[others], made[others]], [y[others], y[others]])
        finish(group)


def same_alone(layer, last):
    """The last tokens of a layer have the same bits as a layer of those tokens alone."""
    [group] = flashmoe.local_group(1)
    with group:
        y, routed = layer(group)
        y_alone, alone = layer(group, layer.x[-last:])
        finish(group)
    together = (y, routed.topk_ids, routed.topk_weights)
    alone = (y_alone, alone.topk_ids, alone.topk_weights)
    assert same_bits([tensor[-last:] for tensor in together], alone)
    assert int(routed.tokens_per_expert.sum()) == len(layer.x) * layer.top_k


def test_more_tokens_than_131072():
    same_alone(make_layer(tokens=140_001, hidden=128, intermediate=64, experts=64, top_k=8), 300)


def test_more_elements_than_32_bits_count():
    tokens, hidden = 66_000, 32_768
    assert tokens * hidden > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 40 << 30:
        pytest.skip(f"needs 40 GiB of GPU memory: {free >> 30} GiB are free")
    same_alone(make_layer(tokens=tokens, hidden=hidden, intermediate=64, experts=4, top_k=1), 200)


def test_module_and_leading_dimensions():
    module = flashmoe.MoE(128, 64, 8, 2, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(3, 50, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y, routing = module(x, return_routing=True)
    assert y.shape == x.shape and y.device == x.device
    assert routing.topk_ids.device == x.device
    assert int(routing.tokens_per_expert.sum()) == 300
    assert torch.equal(y[1], module(x[1]).detach())


def test_operands_on_two_devices_are_named():
    layer = make_layer()
    layer.w_down = layer.w_down.cpu()
    with pytest.raises(TypeError, match="w_down is on cpu; accepted: cuda:0"):
        layer()


def test_sizes_that_are_not_multiples_of_64_are_named():
    with pytest.raises(UnsupportedError, match="hidden"):
        make_layer(hidden=136)()
    with pytest.raises(UnsupportedError, match="intermediate"):
        make_layer(intermediate=72)()


def test_gate_and_up_that_are_contiguous_in_other_dimensions_are_named():
    layer = make_layer()
    gate, up = layer.w_up.chunk(2, dim=1)
    layer.options["w_gate"] = gate.contiguous()
    layer.w_up = up.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(UnsupportedError, match="w_gate and w_up differ in which dimension"):
        layer()
    layer.w_up = up.contiguous()
    layer()
    finish(flashmoe.group.lookup("self"))
