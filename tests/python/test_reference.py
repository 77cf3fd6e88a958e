"""The reference against a layer written token by token, and against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flashmoe import reference  # noqa: E402
from flashmoe.cases import CASES, Case  # noqa: E402
from flashmoe.config import Routing  # noqa: E402
from flashmoe.inputs import LAYOUTS, make_operands, pack, unpack  # noqa: E402

GATES = {
    "silu": lambda v, alpha: v / (1 + math.exp(-alpha * v)),
    "gelu": lambda v, alpha: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v, alpha: (
        0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    ),
    "relu": lambda v, alpha: max(v, 0.0),
    "relu2": lambda v, alpha: max(v, 0.0) ** 2,
    "identity": lambda v, alpha: v,
}
SCORES = {
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "sqrt_softplus": lambda v: math.sqrt(math.log1p(math.exp(v))),
    "topk_softmax": lambda v: v,
}


def softmax(values):
    exponentials = [math.exp(value - max(values)) for value in values]
    return [one / sum(exponentials) for one in exponentials]


def naive_route(logits, case, selection_bias):
    """(ids, weights) of one token, by the definition."""
    routing, bias = case.routing, selection_bias
    scored = routing.score == "softmax"
    scores = softmax(logits) if scored else [SCORES[routing.score](value) for value in logits]
    selection = [s + (0 if bias is None else bias[e]) for e, s in enumerate(scores)]
    size = case.experts // routing.num_groups
    groups = [selection[g * size : (g + 1) * size] for g in range(routing.num_groups)]
    strength = [sum(sorted(group)[::-1][: routing.group_top]) for group in groups]
    by_strength = sorted(range(routing.num_groups), key=lambda g: (-strength[g], g))
    eligible = by_strength[: routing.top_groups] if routing.num_groups > 1 else [0]
    candidates = [e for e in range(case.experts) if e // size in eligible]
    ids = sorted(candidates, key=lambda e: (-selection[e], e))[: case.top_k]
    weights = [scores[e] for e in ids]
    if routing.score == "topk_softmax":
        weights = softmax(weights)
    if routing.renormalize:
        weights = [weight / (sum(weights) + 1e-20) for weight in weights]
    return ids, [weight * routing.scale for weight in weights]


def naive_expert(operands, case, expert, x):
    """Output row of one expert for one input row (lists of floats)."""
    activation = case.activation_spec
    limit = activation.limit or math.inf
    gate, up = operands.w_gate, operands.w_up
    inner = []
    for i in range(case.intermediate):
        raised = float(up[expert, i] @ x) + (float(operands.b_up[expert, i]) if case.bias else 0)
        driver = raised
        if activation.gated:
            driver = float(gate[expert, i] @ x)
            driver += float(operands.b_gate[expert, i]) if case.bias else 0
        value = GATES[activation.kind](min(driver, limit), activation.alpha)
        if activation.gated:
            value *= min(max(raised, -limit), limit) + activation.up_offset
        inner.append(value)
    out = operands.w_down[expert] @ np.array(inner)
    return out + operands.b_down[expert] if case.bias else out


def naive_layer(operands, case):
    """(y [T, H], ids, weights, dropped) of rank 0, one token and one slot after the other."""
    x = operands.x[0]
    y = np.zeros_like(x)
    used, dropped, all_ids, all_weights = {}, 0, [], []
    slots = x.shape[0] * case.top_k
    room = math.ceil(case.capacity_factor * slots / case.experts) if case.capacity_factor else slots
    for t, row in enumerate(x):
        if case.fused_router:
            logits = operands.w_router @ row
            if operands.router_bias is not None:
                logits = logits + operands.router_bias
            ids, weights = naive_route(list(map(float, logits)), case, operands.selection_bias)
        else:
            ids = operands.topk_ids[0][t].tolist()
            weights = operands.topk_weights[0][t].tolist()
        for expert, weight in zip(ids, weights, strict=True):
            if not 0 <= expert < case.experts:
                continue
            used[expert] = used.get(expert, 0) + 1
            if used[expert] > room:
                dropped += 1
            elif case.weight_on_input:
                y[t] += naive_expert(operands, case, expert, weight * row)
            else:
                y[t] += weight * naive_expert(operands, case, expert, row)
        all_ids.append(ids)
        all_weights.append(weights)
    return y, all_ids, all_weights, dropped


def as_numpy(operands):
    """The operands with NumPy arrays."""
    turned = {}
    for name, value in vars(operands).items():
        if isinstance(value, list):
            turned[name] = [one.numpy() for one in value]
        else:
            turned[name] = None if value is None else value.numpy()
    return type(operands)(**turned)


def small(case):
    """The case at sizes that Python loops take."""
    changes = {"hidden": 6, "intermediate": 5, "tokens": (9,), "rows": ()}
    if case.ids == "rows" or case.experts > 24:
        changes |= {"ids": "uniform", "experts": 8, "top_k": min(case.top_k, 8)}
    return Case(**{**{f: getattr(case, f) for f in Case.__dataclass_fields__}, **changes})


COMPARED = [case for case in CASES if "gradients" in case.modes and case.ids != "one_rank"]


def call_reference(case, operands, **replaced):
    """(y, ReferenceResult or None) of rank 0 with weights laid out as the case says."""
    order, transposed, _ = LAYOUTS[case.layout]
    options = {
        "activation": case.activation,
        "interleaved": order == "interleaved",
        "transposed": transposed,
        "weight_on_input": case.weight_on_input,
        "capacity_factor": case.capacity_factor,
        **pack(operands, case.layout),
    }
    x = operands.x[0]
    if not case.fused_router:
        ids, weights = operands.topk_ids[0], operands.topk_weights[0]
        return reference.experts(x, ids, weights, **options), None
    return reference.moe(
        x,
        operands.w_router,
        top_k=case.top_k,
        routing=case.routing,
        router_bias=operands.router_bias,
        selection_bias=operands.selection_bias,
        **options,
        **replaced,
    )


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_reference_is_the_layer_written_token_by_token(case):
    case = small(case)
    operands = make_operands(case, (9,), "fp64", seed=3)
    y, ids, weights, dropped = naive_layer(as_numpy(operands), case)
    ours, routed = call_reference(case, operands)
    # two sums of H and I terms, k of them added: each off by at most its length times eps
    terms = case.hidden + case.intermediate + case.top_k
    bound = 4 * terms * np.finfo(np.float64).eps * max(1.0, float(np.abs(y).max()))
    assert np.abs(ours.numpy() - y).max() <= bound
    if routed is not None:
        assert routed.topk_ids.tolist() == ids
        assert np.abs(routed.topk_weights.numpy() - np.array(weights)).max() <= bound
        counts = np.bincount(np.array(ids).ravel(), minlength=case.experts)
        assert routed.tokens_per_expert.tolist() == counts.tolist()
        assert int(routed.dropped) == dropped


# one case for each way through the code; relu and clamps are differentiable almost everywhere
GRADCHECKED = [
    case
    for case in COMPARED
    if case.name.split("/")[0] in ("router", "activation", "layout", "input_weight", "capacity")
    or case.name in ("ids/sentinels", "ids/duplicates", "bias/gated", "bias/plain")
]


@pytest.mark.parametrize("case", GRADCHECKED, ids=lambda case: case.name)
def test_gradients_of_the_reference_are_its_derivatives(case):
    case = small(case)
    operands = make_operands(case, (5,), "fp64", seed=4)
    names = ["w_up", "w_down", "w_gate", "b_gate", "b_up", "b_down", "w_router", "router_bias"]
    names = [name for name in names if getattr(operands, name) is not None]
    fixed = {}
    if case.fused_router:  # near ties must not flip under a finite difference
        fixed["topk_ids"] = call_reference(case, operands)[1].topk_ids

    def layer(x, *values):
        changed = dict(zip(names, values, strict=False))
        if not case.fused_router:
            changed["topk_weights"] = [values[-1]]
        now = type(operands)(**{**vars(operands), "x": [x], **changed})
        y, routed = call_reference(case, now, **fixed)
        return (y, routed.topk_weights, routed.logits) if routed is not None else y

    leaves = [operands.x[0], *(getattr(operands, name) for name in names)]
    if not case.fused_router:
        leaves.append(operands.topk_weights[0])
    leaves = [leaf.requires_grad_() for leaf in leaves]
    # fast_mode: random projections of the Jacobian; tests of the engine look at every element
    assert torch.autograd.gradcheck(layer, leaves, fast_mode=True)


PACKED = [(layout, "swiglu") for layout in LAYOUTS]
PACKED += [(layout, "relu2") for layout in LAYOUTS if LAYOUTS[layout][0] == "concatenated"]


@pytest.mark.parametrize(("layout", "activation"), PACKED)
def test_unpack_undoes_pack(layout, activation):
    case = Case("layout", layout=layout, activation=activation, bias=True, hidden=5, intermediate=3)
    operands = make_operands(case, (2,), "fp64")
    natural = unpack(pack(operands, layout), layout, case.activation_spec.gated)
    for name, value in natural.items():
        assert torch.equal(value, getattr(operands, name)), name
    gated = {"w_gate", "b_gate"} if activation == "swiglu" else set()
    assert natural.keys() == {"w_up", "w_down", "b_up", "b_down"} | gated


def test_of_equal_scores_the_lowest_ids_win():
    selection = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]])
    assert reference.choose(selection, 4).tolist() == [[1, 2, 4, 3]]
    grouped = Routing(score="topk_softmax", num_groups=2, top_groups=1, group_top=2)
    tied = torch.tensor([[5.0, 1.0, 1.0, 5.0]])
    assert reference.selection_scores(tied, grouped).tolist() == [[5, 1, -math.inf, -math.inf]]


def test_capacity_keeps_the_first_slots_of_each_expert():
    ids = torch.tensor([[0, 1], [0, -1], [1, 0], [0, 2]])
    kept = reference.kept_slots(ids, 3, 0.75)  # ceil(0.75 * 8 / 3) = 2
    assert kept.tolist() == [[True, True], [True, False], [True, False], [False, True]]
