"""Ids, token counts, drops and the row of every slot on the GPU beside the CPU engine's, over the
case table and over the ways in which the plan is made; scratch and outputs poisoned."""

import cuda_products
import flashmoe
import pytest
import torch
from cuda_layer import Forward
from flashmoe import check, ops
from flashmoe.cases import Case
from flashmoe.config import Routing
from flashmoe.inputs import make_operands, on_device
from flashmoe.passes import operator_call, rank_call
from layer_common import may_differ

TABLE = [
    (case, dtype)
    for mode, case, dtype, ranks in check.planned(device="cuda")
    if mode == "values" and case.probe == "compare" and not case.save_z
    if not check.missing_for(case, dtype, ranks, "cpu")
]
SMALL = {"hidden": 64, "intermediate": 64}
# few slots | few tiles | scanned histograms; the table of experts in shared or in global memory
WAYS = [
    Case("way/few_slots", ids="sentinels", tokens=(300,), experts=24, top_k=3, **SMALL),
    Case("way/few_tiles", ids="duplicates", tokens=(1000,), experts=16, top_k=6,
         capacity_factor=0.7, **SMALL),
    Case("way/last_of_few", ids="uniform", tokens=(1024,), experts=9, top_k=2, **SMALL),
    Case("way/scanned", ids="sentinels", tokens=(1025,), experts=40, top_k=4,
         capacity_factor=0.8, weight_on_input=True, **SMALL),
    Case("way/long_scan", tokens=(5000,), experts=64, top_k=6, capacity_factor=1.1, **SMALL),
    Case("way/far_few", tokens=(700,), experts=300, top_k=8, capacity_factor=0.9, **SMALL),
    Case("way/far_scanned", ids="uniform", tokens=(2100,), experts=1024, top_k=8, **SMALL),
    Case("way/groups", tokens=(1500,), experts=64, top_k=6, selection_bias=True,
         routing=Routing(score="sigmoid", num_groups=8, top_groups=4, scale=2.5), **SMALL),
]  # fmt: skip
CASES = TABLE + [(case, dtype) for case in WAYS for dtype in ("bf16", "fp16")]


@pytest.fixture(autouse=True)
def needs_library():
    if cuda_products.find_library() is None:
        pytest.skip(f"needs {cuda_products.LIBRARY} (make build with nvcc)")


def on_cpu(case, operands, dtype, group):
    """Outputs of the CPU engine by name."""
    tensors, config = operator_call(case, rank_call(case, operands, dtype, 0, 1, group))
    inputs = [tensors.get(name) for name in ops.OPERANDS]
    outputs = ops.forward(*inputs, config.encode(), group.name, False)
    return dict(zip(ops.OUTPUTS, outputs, strict=True))


def check_ids(case, operands, dtype, expected, made, record_property):
    """Ids are the CPU's but where rounding decides; counts and drops are those of the ids."""
    differs = (expected["topk_ids"] != made["topk_ids"]).any(-1)
    allowed = may_differ(case, operands, dtype)
    record_property("tokens that differ", int(differs.sum()))
    record_property("tokens that may", int(allowed.sum()))
    assert not (differs & ~allowed).any(), differs.nonzero().flatten().tolist()
    if case.exact_ids:
        assert not differs.any(), differs.nonzero().flatten().tolist()
    else:
        assert allowed.sum() <= len(allowed) / 4, "the bound says nothing"
    return differs


def check_rows(case, forward, topk_ids):
    """Every slot has the row that the CPU engine's plan gives it, and that row says so."""
    plan = forward.expected_plan(topk_ids.to(torch.int32))
    slots = topk_ids.numel()
    slot_row = forward.region("slot row")[:slots].view_as(topk_ids)
    differs = (slot_row != plan.slot_row).nonzero()
    assert not len(differs), (
        f"token {differs[0, 0]}, slot {differs[0, 1]}: row {slot_row[tuple(differs[0])]}, on the "
        f"CPU {plan.slot_row[tuple(differs[0])]}; {len(differs)} slots differ"
    )
    placed = (plan.slot_row >= 0).nonzero()
    rows = plan.slot_row[plan.slot_row >= 0].long()
    assert len(rows.unique()) == len(rows) and (not len(rows) or rows.max() < plan.rows)
    assert torch.equal(forward.region("row token")[rows].long(), placed[:, 0])
    if case.weight_on_input:
        weights = forward.region("weights", torch.float32)[:slots].view_as(topk_ids)
        of_rows = forward.region("row weight", torch.float32)[rows]
        assert torch.equal(of_rows, weights[placed[:, 0], placed[:, 1]])


def has_rows(case, tokens):
    """Whether the launch sorts rows by expert, which few tokens do not need (launch/decode.h)."""
    return tokens > 8 or case.weight_on_input or "transposed" in case.layout


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=[c.key(dtype, 1) for c, dtype in CASES])
def test_placement_is_the_cpu_engines(case, dtype, record_property):
    [group] = flashmoe.local_group(1)
    for step, tokens in enumerate(case.steps(1)):
        operands = make_operands(case, tokens, dtype, seed=step)
        with torch.no_grad():
            expected = on_cpu(case, operands, dtype, group)
        forward = Forward(case, on_device(operands, "cuda"), dtype)
        forward()
        forward.check_waits()
        made = {name: tensor.cpu() for name, tensor in forward.outputs.items()}
        topk_ids, differs = forward.tensors.get("topk_ids"), None
        if case.fused_router:
            topk_ids = made["topk_ids"]
            differs = check_ids(case, operands, dtype, expected, made, record_property)
        if differs is None or not differs.any():
            assert torch.equal(made["tokens_per_expert"], expected["tokens_per_expert"])
            assert torch.equal(made["dropped"], expected["dropped"])
        if has_rows(case, tokens[0]):
            check_rows(case, forward, topk_ids.cpu())
    group.close()


@pytest.mark.parametrize("column_pairs", [1, 2, 3, 5, 100])
def test_column_blocks_of_any_width_give_the_same_bits(column_pairs):
    case = Case("columns", tokens=(700,), hidden=2304, intermediate=128, experts=16, top_k=4)
    operands = on_device(make_operands(case, (700,), "bf16"), "cuda")
    chosen, forced = (Forward(case, operands, "bf16") for _ in range(2))
    chosen()
    forced(column_pairs=column_pairs)
    for forward in (chosen, forced):
        forward.check_waits()
    assert torch.isfinite(forced.outputs["y"]).all()
    for name, tensor in chosen.outputs.items():
        assert torch.equal(tensor, forced.outputs[name]), name


def test_scratch_that_another_launch_has_is_left_alone():
    case = Case("held", tokens=(300,), hidden=128, intermediate=128, experts=16, top_k=4)
    operands = on_device(make_operands(case, (300,), "bf16"), "cuda")
    clean, forward = (Forward(case, operands, "bf16") for _ in range(2))
    clean()
    clean.check_waits()
    before = {name: tensor.clone() for name, tensor in forward.outputs.items()}
    forward.holder.fill_(4)  # the id of another launch
    scratch = forward.scratch.clone()
    forward(max_sms=8)
    with pytest.raises(cuda_products.ProductError, match="another launch of this group"):
        forward.check_waits()
    assert int(forward.holder) == 5  # marked: one was turned away
    forward.holder.fill_(4)
    assert torch.equal(forward.scratch, scratch)
    for name, tensor in forward.outputs.items():
        assert torch.equal(tensor.nan_to_num(nan=7.0), before[name].nan_to_num(nan=7.0)), name
    forward.reports.zero_()
    forward.holder.zero_()
    for max_sms in (8, 0):
        forward(max_sms=max_sms)
        forward.check_waits()
        assert int(forward.holder) == 0
        for name, tensor in clean.outputs.items():
            assert torch.equal(tensor, forward.outputs[name]), name
