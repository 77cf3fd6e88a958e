"""The case table on the engine, and that the judge finds what it must find."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from flashmoe import cases, check, compare, models, passes, reference  # noqa: E402
from flashmoe.inputs import make_operands  # noqa: E402

# The quick part: one or two cases a group, on the smallest number of ranks that takes each path.
QUICK = (
    "router/sigmoid_groups:fp64:w2",
    "router/topk_softmax:fp32:w1",
    "router/equal_logits:bf16:w2",
    "router/e_is_512:bf16:w4",
    "ids/sentinels:*:w2",
    "ids/duplicates:fp32:w1",
    "ids/one_rank:bf16:w2",
    "rows/edges:*",
    "activation/gpt_oss:*",
    "activation/relu2:bf16:w1",
    "layout/interleaved_transposed:*:w2",
    "layout/strided:bf16:w1",
    "input_weight/k3_bias:fp64:w2",
    "saved_z/gated:*",
    "capacity/half:*:w3",
    "tokens/1:fp32:w2",
    "tokens/alternating_with_none:*",
    "size/smallest:*",
    "ranks/many:bf16:w8",
)


@pytest.mark.parametrize("mode", ["values", "gradients"])
@pytest.mark.parametrize("pattern", QUICK)
def test_chosen_cases(pattern, mode):
    assert_all_pass(check.run_checks(pattern, gradients=mode == "gradients"))


def test_wrong_calls_are_refused():
    assert_all_pass(check.run_checks("refused/*"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["values", "gradients"])
def test_whole_table(mode):
    records = list(check.run_checks(gradients=mode == "gradients"))
    assert_all_pass(records)
    ratios = {}
    for record in records:
        for name, one in record.outputs.items():
            ratios.setdefault((name, record.dtype), []).append(one["ratio"])
    # a case alone may be unlucky, which its bar allows for; half of the cases may not
    for key, found in ratios.items():
        assert statistics.median(found) <= compare.RATIO_BAR, key


def assert_all_pass(records):
    records = list(records)
    assert records, "no case was run"
    failed = [f"{r.case} {r.dtype} w{r.ranks}: {r.reason}" for r in records if r.status != "passed"]
    assert not failed, "\n".join(failed)


# ---- the table itself ---------------------------------------------------------------------------


def test_names_are_unique_and_grouped():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert all(name.count("/") == 1 for name in names)


def test_every_axis_of_the_layer_has_a_case():
    compared = [case for case in cases.CASES if "gradients" in case.modes]
    specs = [case.activation_spec for case in compared]
    assert (
        {spec.kind for spec in specs if spec.gated}
        == {spec.kind for spec in specs}
        == {spec.kind for spec in specs if not spec.gated}
    )
    assert {case.routing.score for case in compared} == {
        "softmax", "topk_softmax", "sigmoid", "sqrt_softplus",
    }  # fmt: skip
    assert {ranks for case in compared for ranks in case.ranks} == {1, 2, 3, 4, 8}
    assert {dtype for case in compared for dtype in case.dtypes} == set(cases.ALL_DTYPES)
    for flag in ("bias", "router_bias", "selection_bias", "aux_gradients", "weight_on_input"):
        assert {getattr(case, flag) for case in compared} == {True, False}, flag


@pytest.mark.parametrize("limit", [cases.LIMIT, cases.TIGHT_LIMIT])
def test_rounding_takes_no_value_across_a_limit(limit):
    fp16, bf16 = (torch.tensor(limit).to(dtype) for dtype in (torch.float16, torch.bfloat16))
    half_step = torch.finfo(torch.float16).eps / 4  # of numbers from 1/2 to 1
    values = limit + half_step * torch.linspace(-2, 2, 1001, dtype=torch.float64)
    values = values[values != limit]  # which is halfway
    assert ((values.half().double() > limit) == (values > limit)).all()
    assert abs(float(fp16) - limit) == half_step and float(bf16) < limit


def test_tokens_and_experts_of_a_case_are_all_different():
    case = cases.Case("unique", tokens=((40, 13),), bias=True)
    operands = make_operands(case, (40, 13), "bf16")
    tokens = torch.cat(operands.x)
    assert len(tokens.unique(dim=0)) == len(tokens)
    for weight in (operands.w_up, operands.w_gate, operands.w_down):
        assert len(weight.flatten(1).unique(dim=0)) == case.experts


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_per_expert_are_what_the_case_says(ranks):
    case = next(case for case in cases.CASES if case.name == "rows/edges")
    [tokens] = case.steps(ranks)
    ids = torch.cat(make_operands(case, tokens, "fp32").topk_ids)
    assert torch.bincount(ids.flatten(), minlength=case.experts).tolist() == list(case.rows)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_models_scale_to_sizes_that_go_together(name, ranks):
    full = models.MODELS[name]
    for scale in (1, 2, 8, 64):
        model = models.scaled(full, scale, ranks)
        assert model.experts % ranks == 0
        assert model.experts % model.routing.num_groups == 0
        assert model.hidden % 64 == 0
        assert model.intermediate % 64 == 0
        assert model.top_k <= model.experts * model.routing.top_groups // model.routing.num_groups
    if full.experts % ranks == 0:
        assert models.scaled(full, 1, ranks) == full


# ---- the judge ----------------------------------------------------------------------------------


class FakePool:
    """In place of check.GroupPool: one rank, no engine."""

    def get(self, ranks):
        assert ranks == 1
        return [None]

    def tuned(self, ranks, **values):
        return self.get(ranks)

    def drop(self, ranks):
        pass


def plain_call(call):
    """In place of passes.call_layer: plain PyTorch in the dtype of the call."""
    unused = ("num_experts", "group", "save_z")
    options = {name: value for name, value in call.options.items() if name not in unused}
    if "topk_ids" in call.routing:
        return reference.experts(call.x, **call.routing, **call.weights, **options), None
    return reference.moe(call.x, **call.routing, **call.weights, **options)


JUDGED = cases.Case("judged", tokens=(150,), bias=True, dtypes=("bf16",))


def judged(monkeypatch, case=JUDGED, dtype="bf16", gradients=True, spoil=None, spoil_second=None):
    """The record of `case` on a stand-in engine: plain PyTorch whose outputs `spoil` changes."""
    runs = []

    def spoiled_gather(*arguments):
        result = gather(*arguments)
        runs.append(result)
        for change in (spoil, spoil_second if len(runs) % 2 == 0 else None):
            if change:
                change(result)
        return result

    gather = passes.gather
    monkeypatch.setattr(passes, "gather", spoiled_gather)
    monkeypatch.setattr(passes, "call_layer", plain_call)
    record = check.Record(case.name, dtype, 1, "gradients" if gradients else "values")
    check.check_case(case, record, FakePool())
    return record


def test_the_judge_accepts_plain_pytorch(monkeypatch):
    record = judged(monkeypatch)
    assert record.status == "passed", record.reason
    assert record.error_ratio == pytest.approx(1)
    assert record.bitwise


def swap_tokens(result):
    y = result.outputs["y"][0]
    y[[3, 4]] = y[[4, 3]]


def swap_experts(result):
    grad = result.outputs["grad_w_down"][0]
    grad[[1, 2]] = grad[[2, 1]]


def blur(name):
    """Adds one more rounding error of the size of the output's own."""

    def change(result):
        value = result.outputs[name][0]
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        value += (noise * value.float().abs().mean() * 2**-7).to(value.dtype)

    return change


def break_one(name, *index):
    def change(result):
        result.outputs[name][0][index] *= 2

    return change


def not_finite(result):
    result.outputs["grad_x"][0][7, 7] = float("nan")


def wrong_choice(result):
    ids = result.routed[0].topk_ids
    unused = next(e for e in range(JUDGED.experts) if e not in ids[11].tolist())
    ids[11, 1] = unused


def wrong_order(result):
    ids = result.routed[0].topk_ids
    ids[11] = ids[11].flip(0)


def wrong_count(result):
    result.routed[0].tokens_per_expert[2] += 1


def wrong_drops(result):
    result.routed[0].dropped[0] += 1


def forget_gradient(result):
    del result.outputs["grad_b_down"]


@pytest.mark.parametrize(
    ("spoil", "mentions"),
    [
        (swap_tokens, "y: error ratio"),
        (swap_experts, "grad_w_down: error ratio"),
        (blur("y"), "y: error ratio"),
        (blur("grad_w_up"), "grad_w_up: error ratio"),
        (break_one("grad_w_gate", 5, 3, 2), "expert 5, intermediate 3, hidden 2"),
        (break_one("grad_w_router", 6, 1), "expert 6, hidden 1"),
        (not_finite, "grad_x: not finite"),
        (wrong_choice, "topk_ids of token 11 on rank 0"),
        (wrong_order, "topk_ids of token 11 on rank 0"),
        (wrong_count, "tokens_per_expert"),
        (wrong_drops, "dropped 1, expected 0"),
        (forget_gradient, "grad_b_down: missing"),
    ],
)
def test_the_judge_finds(monkeypatch, spoil, mentions):
    record = judged(monkeypatch, spoil=spoil)
    assert record.status == "failed"
    assert mentions in record.reason


def test_the_judge_finds_a_trace_where_there_must_be_nothing(monkeypatch):
    def spoil(result):
        result.outputs["y"][0][4, 0] = 1e-30

    case = replace(JUDGED, ids="sentinels")
    assert judged(monkeypatch, case).status == "passed"
    record = judged(monkeypatch, case, spoil=spoil)
    assert record.reason == "y: token 4 must be exactly 0 and is not"


def test_the_judge_finds_bits_that_change(monkeypatch):
    def negate_zero(result):
        result.outputs["y"][0][4, 0] = -0.0

    case = replace(JUDGED, ids="sentinels")
    record = judged(monkeypatch, case, spoil_second=negate_zero)
    assert record.bitwise is False
    assert "differs between two runs" in record.reason


def test_the_judge_allows_a_choice_within_rounding_and_no_other(monkeypatch):
    case = replace(JUDGED, tokens=(1,), experts=4, top_k=1)
    operands = make_operands(case, (1,), "fp32")
    x = operands.x[0]
    nearly = operands.w_router.clone()
    nearly[2:] = 0
    nearly[0] = x[0] / x[0].norm()
    for step, accepted in ((1e-9, True), (1e-4, False)):
        nearly[1] = nearly[0] * (1 - step)
        routed = replace(operands, w_router=nearly)
        flips, problem = compare.id_problem(case, routed, [torch.tensor([[1]])], torch.float32)
        assert (problem is None) == accepted
        assert flips == (1 if accepted else 0)


def test_the_judge_wants_the_lowest_ids_of_bit_equal_logits():
    case = replace(JUDGED, ids="router_equal", tokens=(1,))
    operands = make_operands(case, (1,), "fp32")
    assert compare.id_problem(case, operands, [torch.tensor([[0, 1]])], torch.float32)[1] is None
    problem = compare.id_problem(case, operands, [torch.tensor([[0, 2]])], torch.float32)[1]
    assert problem == "topk_ids of token 0 on rank 0 are [0, 2], the reference chooses [0, 1]"
