"""The layer as a torch module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import group as groups
from .config import Activation, Routing, count, flag, resolve_activation, save_z_choice
from .functional import _DEFAULT_ROUTING, RoutingResult, moe
from .weight_grads import WeightGradQueue


class MoE(nn.Module):
    """Router and experts of one layer; each of W ranks holds its E_loc = E / W experts.

    Parameters, with G = 2 for a gated activation, else 1 (the last two dimensions of the expert
    weights are exchanged when ``transposed``):
        w_router [E, H], router_bias [E] (if ``router_bias``),
        w_up [E_loc, G*I, H], b_up [E_loc, G*I], w_down [E_loc, H, I], b_down [E_loc, H] (b_* if
        ``bias``).
    Buffer: selection_bias [E] float32 (float64 for a float64 layer), if ``selection_bias``.

    The weights start as those of nn.Linear: uniform within 1 / sqrt(fan_in). The router is the same
    on all ranks only if the caller makes it so (same seed, or a broadcast).

    With ``delay_wgrad`` a backward leaves the gradients of w_up and w_down to :meth:`backward_dw`,
    and the two parameters carry Megatron's mark for that, ``skip_backward_post_hook``.

    Raises TypeError or ValueError, naming the argument. See :func:`flashmoe.moe` for the options.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str | Activation = "swiglu",
        routing: Routing = _DEFAULT_ROUTING,
        bias: bool = False,
        router_bias: bool = False,
        selection_bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        weight_on_input: bool = False,
        capacity_factor: float | None = None,
        group: Any = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        save_z: bool | str = False,
        delay_wgrad: bool = False,
        layer_id: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size, intermediate_size, num_experts, top_k)
        for name, value in (
            ("bias", bias),
            ("router_bias", router_bias),
            ("selection_bias", selection_bias),
            ("transposed", transposed),
            ("delay_wgrad", delay_wgrad),
        ):
            flag(name, value)
        save_z_choice(save_z)
        _, world = groups.resolve(group)
        if num_experts % world != 0:
            raise ValueError(
                f"num_experts is {num_experts} on a group of {world} ranks; accepted: a multiple "
                f"of {world}"
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.activation = activation
        self.routing = routing
        self.interleaved = interleaved
        self.transposed = transposed
        self.weight_on_input = weight_on_input
        self.capacity_factor = capacity_factor
        self.group = group
        self.save_z = save_z
        self.layer_id = layer_id
        self._make_parameters(
            num_experts // world, bias, router_bias, selection_bias, dtype, device
        )
        self.reset_parameters()
        self.weight_grad_queue = WeightGradQueue() if delay_wgrad else None
        self._after_backward_dw: list[Callable[[], None]] = []
        if delay_wgrad:
            self.w_up.skip_backward_post_hook = self.w_down.skip_backward_post_hook = True

    def _make_parameters(
        self,
        num_local_experts: int,
        bias: bool,
        router_bias: bool,
        selection_bias: bool,
        dtype: torch.dtype | None,
        device: Any,
    ) -> None:
        width = self.intermediate_size * (2 if resolve_activation(self.activation).gated else 1)
        options = {"dtype": dtype, "device": device}

        def parameter(present: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, **options)) if present else None

        def weight(rows: int, columns: int) -> nn.Parameter:
            shape = (columns, rows) if self.transposed else (rows, columns)
            return nn.Parameter(torch.empty((num_local_experts, *shape), **options))

        self.w_router = parameter(True, self.num_experts, self.hidden_size)
        self.router_bias = parameter(router_bias, self.num_experts)
        self.w_up = weight(width, self.hidden_size)
        self.w_down = weight(self.hidden_size, self.intermediate_size)
        self.b_up = parameter(bias, num_local_experts, width)
        self.b_down = parameter(bias, num_local_experts, self.hidden_size)
        wide = torch.float64 if self.w_up.dtype == torch.float64 else torch.float32
        start = torch.zeros(self.num_experts, dtype=wide, device=device) if selection_bias else None
        self.register_buffer("selection_bias", start)

    def reset_parameters(self) -> None:
        """Draws all parameters again: uniform within 1 / sqrt(fan_in), selection_bias 0."""
        bounds = {
            "w_router": self.hidden_size,
            "router_bias": self.hidden_size,
            "w_up": self.hidden_size,
            "b_up": self.hidden_size,
            "w_down": self.intermediate_size,
            "b_down": self.intermediate_size,
        }
        with torch.no_grad():
            for name, fan_in in bounds.items():
                parameter = getattr(self, name)
                if parameter is not None:
                    bound = 1 / math.sqrt(fan_in)
                    parameter.uniform_(-bound, bound)
            if self.selection_bias is not None:
                self.selection_bias.zero_()

    def forward(
        self, x: torch.Tensor, return_routing: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, RoutingResult]:
        """y with shape and dtype of x [..., H]; with ``return_routing`` also a RoutingResult."""
        y, routing = moe(
            x,
            self.w_router,
            self.w_up,
            self.w_down,
            top_k=self.top_k,
            routing=self.routing,
            router_bias=self.router_bias,
            selection_bias=self.selection_bias,
            b_up=self.b_up,
            b_down=self.b_down,
            activation=self.activation,
            interleaved=self.interleaved,
            transposed=self.transposed,
            weight_on_input=self.weight_on_input,
            capacity_factor=self.capacity_factor,
            group=self.group,
            save_z=self.save_z,
            weight_grad_queue=self.weight_grad_queue,
            layer_id=self.layer_id,
        )
        return (y, routing) if return_routing else y

    def need_backward_dw(self) -> bool:
        """Whether the layer was made with ``delay_wgrad``."""
        return self.weight_grad_queue is not None

    def backward_dw(self) -> None:
        """Computes the gradients of w_up and w_down of the oldest backward that waits for them,
        then calls the hooks. See :meth:`flashmoe.WeightGradQueue.backward_dw`; nothing happens in a
        layer without ``delay_wgrad`` or with both weights frozen."""
        trained = self.w_up.requires_grad or self.w_down.requires_grad
        if self.weight_grad_queue is None or not trained:
            return
        self.weight_grad_queue.backward_dw()
        for hook in self._after_backward_dw:
            hook()

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        """Has ``hook()`` called after each :meth:`backward_dw`: where Megatron's data parallelism
        learns that the gradients are there."""
        self._after_backward_dw.append(hook)

    @torch.no_grad()
    def update_selection_bias(self, tokens_per_expert: torch.Tensor, rate: float = 1e-3) -> None:
        """Balances the experts without an auxiliary loss: raises the selection bias of each expert
        with fewer slots than the mean by ``rate``, lowers it where there are more
        (Wang et al. 2024, arXiv 2408.15664).

        Args:
            tokens_per_expert: [E] slots since the last update: the sum of
                ``RoutingResult.tokens_per_expert`` over microbatches and data-parallel ranks, the
                same on all ranks.

        Raises ValueError if the layer has no selection bias, or for another shape.
        """
        if self.selection_bias is None:
            raise ValueError("update_selection_bias: the layer was made without selection_bias")
        if tokens_per_expert.shape != self.selection_bias.shape:
            raise ValueError(
                f"tokens_per_expert has shape {tuple(tokens_per_expert.shape)}; accepted: "
                f"{tuple(self.selection_bias.shape)}"
            )
        counts = tokens_per_expert.to(self.selection_bias)
        self.selection_bias += rate * torch.sign(counts.mean() - counts)

    def extra_repr(self) -> str:
        """The sizes, and the options that are not at their default."""
        parts = [
            f"hidden_size={self.hidden_size}",
            f"intermediate_size={self.intermediate_size}",
            f"num_experts={self.num_experts}",
            f"top_k={self.top_k}",
            f"activation={self.activation!r}",
        ]
        if self.routing != _DEFAULT_ROUTING:
            parts.append(f"routing={self.routing}")
        if self.b_up is not None:
            parts.append("bias=True")
        for name in ("router_bias", "selection_bias"):
            if getattr(self, name) is not None:
                parts.append(f"{name}=True")
        for name in ("interleaved", "transposed", "weight_on_input", "save_z"):
            if value := getattr(self, name):
                parts.append(f"{name}={value!r}")
        if self.need_backward_dw():
            parts.append("delay_wgrad=True")
        if self.capacity_factor is not None:
            parts.append(f"capacity_factor={self.capacity_factor}")
        if self.group is not None:
            parts.append(f"group={self.group}")
        return ", ".join(parts)


def _check_sizes(hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> None:
    count("hidden_size", hidden_size)
    count("intermediate_size", intermediate_size)
    count("num_experts", num_experts)
    count("top_k", top_k)
    if top_k > num_experts:
        raise ValueError(f"top_k is {top_k}; accepted: 1 to num_experts = {num_experts}")
