"""Seeded operands for checks, runs and benchmarks.

Every value is drawn in fp64 and rounded once to the dtype in which the layer will read it, so that
the oracle (fp64) sees the layer's very numbers. Tokens and experts are all different: a row that
goes to the wrong place cannot pass. Weights are held as separate gate, up and down matrices
("natural" form); `pack` lays them out as a checkpoint would, differentiably, `unpack` undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# layout name -> (gate/up order, transposed for the API, memory form of the tensors)
LAYOUTS = {
    "concatenated": ("concatenated", False, "contiguous"),
    "interleaved": ("interleaved", False, "contiguous"),
    "separate": ("separate", False, "contiguous"),
    "transposed": ("concatenated", True, "contiguous"),
    "interleaved_transposed": ("interleaved", True, "contiguous"),
    "separate_transposed": ("separate", True, "contiguous"),
    "strided": ("concatenated", False, "strided"),
    "transposed_view": ("concatenated", False, "transposed"),
}


@dataclass(frozen=True)
class Operands:
    """What one layer call over W ranks reads, in fp64. Lists have one entry a rank; weights hold
    all E experts. Absent operands are None."""

    x: list[torch.Tensor]  # [T, H]
    grad_y: list[torch.Tensor]  # [T, H]
    w_up: torch.Tensor  # [E, I, H]
    w_down: torch.Tensor  # [E, H, I]
    w_gate: torch.Tensor | None = None  # [E, I, H]
    b_gate: torch.Tensor | None = None  # [E, I]
    b_up: torch.Tensor | None = None  # [E, I]
    b_down: torch.Tensor | None = None  # [E, H]
    w_router: torch.Tensor | None = None  # [E, H]
    router_bias: torch.Tensor | None = None  # [E]
    selection_bias: torch.Tensor | None = None  # [E]
    topk_ids: list[torch.Tensor] | None = None  # [T, k] int64
    topk_weights: list[torch.Tensor] | None = None  # [T, k]
    grad_weights: list[torch.Tensor] | None = None  # [T, k], arrives at the returned weights
    grad_logits: list[torch.Tensor] | None = None  # [T, E], arrives at the returned logits


def make_operands(case, tokens, dtype, seed=0):
    """Operands of one step of `case` (a `cases.Case`) with `tokens[rank]` tokens on each rank."""
    generator = torch.Generator().manual_seed(seed)
    draw = Draw(generator, DTYPES[dtype])
    hidden, inner, num_experts = case.hidden, case.intermediate, case.experts
    gated = case.activation_spec.gated
    operands = Operands(
        x=[draw.normal(num_tokens, hidden) for num_tokens in tokens],
        grad_y=[draw.normal(num_tokens, hidden) for num_tokens in tokens],
        w_up=draw.normal(num_experts, inner, hidden, scale=hidden**-0.5),
        w_down=draw.normal(num_experts, hidden, inner, scale=inner**-0.5),
        w_gate=draw.normal(num_experts, inner, hidden, scale=hidden**-0.5) if gated else None,
    )
    if case.bias:
        operands = replace(
            operands,
            b_up=draw.normal(num_experts, inner, scale=0.5),
            b_down=draw.normal(num_experts, hidden, scale=0.5),
            b_gate=draw.normal(num_experts, inner, scale=0.5) if gated else None,
        )
    if case.fused_router:
        return add_router(operands, case, draw)
    return add_external_routing(operands, case, draw)


def on_device(operands, device):
    """The same operands on a torch device."""

    def moved(value):
        if isinstance(value, list):
            return [one.to(device) for one in value]
        return value if value is None else value.to(device)

    return Operands(**{name: moved(value) for name, value in vars(operands).items()})


class Draw:
    """Normal and uniform numbers from one generator, rounded to the layer's dtype, kept in fp64."""

    def __init__(self, generator, dtype):
        self.generator = generator
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape, scale=1.0, wide=False):
        """N(0, scale^2), rounded to the layer's dtype (`wide`: to the router's fp32 or fp64)."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.wide if wide else self.dtype).double()

    def uniform(self, *shape, low=0.0, high=1.0, wide=True):
        """U(low, high), rounded to fp32 or fp64 (without `wide`: to the layer's dtype)."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (values * (high - low) + low).to(self.wide if wide else self.dtype).double()

    def integers(self, high, *shape):
        """Integers of [0, high)."""
        return torch.randint(high, shape, generator=self.generator)

    def permutation(self, size):
        """A permutation of range(size)."""
        return torch.randperm(size, generator=self.generator)


def add_router(operands, case, draw):
    """Router operands for a case whose ids are made by the layer."""
    num_experts, hidden = case.experts, case.hidden
    if case.ids == "router_equal":
        w_router = torch.zeros(num_experts, hidden, dtype=torch.float64)
    elif case.ids == "router_tied":
        # one-hot rows: experts e and e + 3 have bit-equal logits x[e % 3], however they are summed
        w_router = torch.eye(hidden, dtype=torch.float64)[torch.arange(num_experts) % 3]
    else:
        scale, wide = 1.5 * hidden**-0.5, case.wide_router
        w_router = draw.normal(num_experts, hidden, scale=scale, wide=wide)
    bias = None
    if case.router_bias:
        bias = draw.normal(num_experts, scale=0.5, wide=case.wide_router)
    if case.ids == "router_favour_one":
        bias = torch.zeros(num_experts, dtype=torch.float64)
        bias[-1] = 40.0
    aux = {}
    if case.aux_gradients:
        tokens = [x.shape[0] for x in operands.x]
        aux["grad_weights"] = [draw.normal(t, case.top_k, wide=True) for t in tokens]
        aux["grad_logits"] = [draw.normal(t, num_experts, scale=0.1, wide=True) for t in tokens]
    selection = draw.normal(num_experts, scale=0.3, wide=True) if case.selection_bias else None
    return replace(operands, w_router=w_router, router_bias=bias, selection_bias=selection, **aux)


def add_external_routing(operands, case, draw):
    """Ids and weights for a case whose routing comes from outside."""
    tokens = [x.shape[0] for x in operands.x]
    ids = external_ids(case, tokens, draw)
    wide = not case.narrow_slots
    weights = [draw.uniform(t, case.top_k, low=0.05, wide=wide) for t in tokens]
    return replace(operands, topk_ids=ids, topk_weights=weights)


def external_ids(case, tokens, draw):
    """Ids [T, k] of every rank, by the generator that `case.ids` names."""
    num_experts, top_k, ranks = case.experts, case.top_k, len(tokens)
    if case.ids == "rows":
        return ids_with_rows(case.rows, tokens, draw)
    if case.ids == "one_rank":
        last = num_experts - num_experts // ranks  # all on the experts of the last rank
        return [distinct_ids(t, top_k, num_experts - last, draw) + last for t in tokens]
    if case.ids == "one_expert":
        return [torch.full((t, top_k), num_experts - 1) for t in tokens]
    if case.ids == "no_expert":
        return [torch.full((t, top_k), -1) for t in tokens]
    ids = [distinct_ids(t, top_k, num_experts, draw) for t in tokens]
    if case.ids == "sentinels":
        return [with_sentinels(one, num_experts, draw) for one in ids]
    if case.ids == "duplicates":
        return [
            one[:, :1].expand(-1, top_k).contiguous()
            if top_k < 3
            else torch.cat([one[:, :-1], one[:, :1]], dim=1)
            for one in ids
        ]
    if case.ids == "uniform":
        return ids
    raise ValueError(f"unknown ids generator {case.ids!r}")


def distinct_ids(num_tokens, top_k, num_experts, draw):
    """[num_tokens, top_k] uniform ids, distinct in a token where there are enough experts."""
    if top_k > num_experts:
        return draw.integers(num_experts, num_tokens, top_k)
    return draw.uniform(num_tokens, num_experts).argsort(dim=1)[:, :top_k].contiguous()


def ids_with_rows(rows, tokens, draw):
    """[T, 1] ids such that expert e gets exactly rows[e] rows over all ranks together."""
    slots = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    slots = slots[draw.permutation(len(slots))]
    return [part[:, None].contiguous() for part in slots.split(list(tokens))]


def with_sentinels(ids, num_experts, draw):
    """A third of the slots become -1, E or E + 7; every fifth token has no expert at all."""
    sentinels = torch.tensor([-1, num_experts, num_experts + 7])[draw.integers(3, *ids.shape)]
    ids = torch.where(draw.integers(3, *ids.shape) == 0, sentinels, ids)
    return torch.where(torch.arange(len(ids))[:, None] % 5 == 4, sentinels, ids)


def pack(operands, layout):
    """Weights and biases of all experts as `layout` has them: a dict of w_up, w_down, and where
    present w_gate, b_up, b_down. Differentiable."""
    order, transposed, _ = LAYOUTS[layout]
    gate, up = operands.w_gate, operands.w_up
    packed = {"w_down": operands.w_down}
    if gate is not None and order == "separate":
        packed |= {"w_gate": gate, "w_up": up}
    else:
        packed["w_up"] = merge(gate, up, order)
    if transposed:
        packed = {name: weight.transpose(1, 2) for name, weight in packed.items()}
    if operands.b_up is not None:
        packed["b_up"] = merge(operands.b_gate, operands.b_up, order)
        packed["b_down"] = operands.b_down
    return packed


def merge(gate, up, order):
    """Gate and up rows in one tensor along dimension 1."""
    if gate is None:
        return up
    if order == "interleaved":
        return torch.stack([gate, up], dim=2).flatten(1, 2)
    return torch.cat([gate, up], dim=1)


def unpack(packed, layout, gated):
    """The natural form (w_gate, w_up, w_down, b_gate, b_up, b_down) of packed tensors. `packed` may
    lack any of them."""
    order, transposed, _ = LAYOUTS[layout]
    turned = {
        name: value.transpose(1, 2) if transposed and name.startswith("w_") else value
        for name, value in packed.items()
    }
    natural = dict(turned)
    for up, gate in (("w_up", "w_gate"), ("b_up", "b_gate")):
        whole = up == "w_up" and order == "separate"
        if up in turned and gated and not whole:
            natural[gate], natural[up] = split(turned[up], order)
    return natural


def split(merged, order):
    """Undoes `merge`."""
    if order == "interleaved":
        return merged[:, 0::2], merged[:, 1::2]
    return merged.chunk(2, dim=1)


def in_memory_form(weight, layout):
    """A copy of `weight` [E_loc, rows, columns] with the strides that `layout` asks for."""
    form = LAYOUTS[layout][2]
    if form == "transposed":
        return weight.transpose(1, 2).contiguous().transpose(1, 2)
    if form == "strided":
        wide = weight.new_full((*weight.shape[:-1], weight.shape[-1] + 8), float("nan"))
        wide[..., : weight.shape[-1]] = weight
        return wide[..., : weight.shape[-1]]
    return weight.contiguous()
