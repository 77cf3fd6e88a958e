"""Helpers of the Python tests: small layers, a plain PyTorch layer, ranks as threads."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

# A protocol error must fail a test in seconds.
os.environ.setdefault("FLASHMOE_TIMEOUT_S", "30")

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional

# Ours may be this much further from fp64 than plain PyTorch of the same dtype.
RATIO_BAR = 1.25


@dataclass
class Layer:
    """Operands of one small layer with a gated SiLU and options of :func:`flashmoe.moe`."""

    x: torch.Tensor
    w_router: torch.Tensor
    w_up: torch.Tensor
    w_down: torch.Tensor
    b_up: torch.Tensor | None = None
    b_down: torch.Tensor | None = None
    router_bias: torch.Tensor | None = None
    top_k: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    TENSORS = ("x", "w_router", "w_up", "w_down", "b_up", "b_down", "router_bias")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The operands that are present, by name."""
        named = {name: getattr(self, name) for name in self.TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, dtype: torch.dtype) -> Layer:
        """A copy with fresh leaves of another dtype."""
        leaves = {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **leaves)

    def grads(self) -> dict[str, torch.Tensor]:
        """The gradients that have arrived, by operand."""
        named = {name: tensor.grad for name, tensor in self.tensors().items()}
        return {name: grad for name, grad in named.items() if grad is not None}

    def keywords(self) -> dict[str, Any]:
        """Arguments of flashmoe.moe."""
        return {**self.tensors(), "top_k": self.top_k, **self.options}


def make_layer(
    tokens: int = 24,
    hidden: int = 32,
    intermediate: int = 24,
    experts: int = 6,
    top_k: int = 2,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """A layer with random operands that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    layer = Layer(
        x=draw(tokens, hidden),
        w_router=draw(experts, hidden, scale=hidden**-0.5),
        w_up=draw(experts, 2 * intermediate, hidden, scale=hidden**-0.5),
        w_down=draw(experts, hidden, intermediate, scale=intermediate**-0.5),
        top_k=top_k,
    )
    if bias:
        layer.b_up = draw(experts, 2 * intermediate, scale=0.5)
        layer.b_down = draw(experts, hidden, scale=0.5)
        layer.router_bias = draw(experts, scale=0.5)
    return layer


def plain_experts(layer: Layer, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The experts, one after the other; ids outside [0, E) have no expert."""
    y = torch.zeros_like(layer.x)
    for expert_idx in range(layer.w_up.shape[0]):
        token_idx, slot_idx = (topk_ids == expert_idx).nonzero(as_tuple=True)
        z = layer.x[token_idx] @ layer.w_up[expert_idx].T
        z = z if layer.b_up is None else z + layer.b_up[expert_idx]
        gate, up = z.chunk(2, dim=-1)
        rows = (F.silu(gate) * up) @ layer.w_down[expert_idx].T
        rows = rows if layer.b_down is None else rows + layer.b_down[expert_idx]
        weight = topk_weights[token_idx, slot_idx].to(rows.dtype)
        y = y.index_add(0, token_idx, rows * weight[:, None])
    return y


def plain_moe(
    layer: Layer, topk_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, weights and logits; ids [T, k] pin a choice that rounding could turn."""
    wide = torch.float64 if layer.x.dtype == torch.float64 else torch.float32
    bias = None if layer.router_bias is None else layer.router_bias.to(wide)
    logits = F.linear(layer.x.to(wide), layer.w_router.to(wide), bias)
    scores = logits.softmax(-1)
    if topk_ids is None:
        topk_ids = scores.topk(layer.top_k, dim=-1).indices
    weights = scores.gather(-1, topk_ids)
    weights = weights / weights.sum(-1, keepdim=True)
    return plain_experts(layer, topk_ids, weights), weights, logits


def assert_as_exact_as_plain(
    name: str, ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor
) -> None:
    """The error of ours against fp64 is at most RATIO_BAR times that of plain PyTorch.

    Plain is credited with at least half a unit in the last place: what rounding the result costs.
    The ratio of two norms made of n roundings has a standard deviation near 1/sqrt(n): three are
    allowed for.
    """
    assert ours.shape == exact.shape, f"{name}: {tuple(ours.shape)} != {tuple(exact.shape)}"
    half_ulp = exact.norm() * torch.finfo(ours.dtype).eps / 2
    error = (ours.double() - exact).norm()
    noise = 1 + 3 / max(ours.numel(), 1) ** 0.5
    bar = RATIO_BAR * noise * max((plain.double() - exact).norm(), half_ulp)
    assert error <= bar, f"{name}: error {error:.3g}, accepted {bar:.3g}"


class Ranks:
    """Runs one function on every rank of a local group, each rank in its own thread."""

    def __init__(self, groups: list[Any]) -> None:
        self.groups = groups

    def run(self, function: Any) -> list[Any]:
        """What ``function(rank, group)`` returned on each rank, or the exception it raised."""
        results: list[Any] = [None] * len(self.groups)

        def on_rank(rank: int) -> None:
            try:
                results[rank] = function(rank, self.groups[rank])
            except Exception as error:
                results[rank] = error

        threads = [
            threading.Thread(target=on_rank, args=(rank,)) for rank in range(len(self.groups))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
            assert not thread.is_alive(), "a rank hangs"
        return results

    def values(self, function: Any) -> list[Any]:
        """As ``run``; the first exception is raised."""
        results = self.run(function)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


@pytest.fixture
def ranks():
    """``ranks(n)``: n ranks as threads; their group is closed after the test."""
    import flashmoe

    opened = []

    def start(num_ranks: int) -> Ranks:
        groups = flashmoe.local_group(num_ranks)
        opened.extend(groups)
        return Ranks(groups)

    yield start
    for group in opened:
        group.close()
