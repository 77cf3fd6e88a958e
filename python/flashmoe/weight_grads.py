"""Weight gradients that do not go through autograd, by the protocols of Megatron's training loop.

``main_grad``: a parameter's gradient is added up in a tensor of its own, in fp32.
``backward_dw()``: a backward computes the gradients of the activations only; those of the expert
weights are computed later, oldest backward first, when a pipeline has time for them.

An operator sees tensors only, so the parameter objects travel on the autograd node. Eager mode
only: under torch.compile such a layer is a graph break.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from . import group as groups
from . import ops
from .errors import FlashMoEError
from .functional import has_main_grad

# fm_backward_flags
_ACCUMULATE = {"w_gate": 1, "w_up": 2, "w_down": 4}


class WeightOwner:
    """An expert weight's parameter: where its gradient goes, and what autograd is given for it.

    With ``main_grad`` (or ``get_main_grad()``) the gradient is added to that, or replaces it when
    ``overwrite_main_grad`` is set. If the parameter has ``grad_added_to_main_grad``, it is set to
    True and a dummy gradient is returned (zeros when ``zero_out_wgrad`` is set, else memory of any
    content); otherwise no gradient is returned. Without, the gradient is added to ``grad``.
    """

    def __init__(self, name: str, parameter: torch.Tensor, transposed: bool) -> None:
        self.name = name
        self.parameter = parameter
        self.transposed = transposed

    @property
    def overwrites(self) -> bool:
        """Whether the gradient replaces ``main_grad`` instead of being added to it."""
        return bool(getattr(self.parameter, "overwrite_main_grad", False))

    def main_grad(self, weight: torch.Tensor) -> torch.Tensor:
        """The accumulator in the layout of ``weight``. Raises TypeError or ValueError."""
        getter = getattr(self.parameter, "get_main_grad", None)
        into = self.parameter.main_grad if getter is None else getter()
        if not isinstance(into, torch.Tensor):
            raise TypeError(f"{self.name}.main_grad is a {type(into).__name__}; accepted: a tensor")
        into = into.to_local() if hasattr(into, "to_local") else into
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if into.dtype != wide:
            raise TypeError(f"{self.name}.main_grad has dtype {into.dtype}; accepted: {wide}")
        into = self._turned(into) if into.dim() == 3 else into
        if into.shape != weight.shape:
            raise ValueError(
                f"{self.name}.main_grad has shape {tuple(into.shape)}; accepted: "
                f"{tuple(weight.shape)}, the shape of {self.name}"
            )
        return into

    def finish(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Marks the parameter; returns the gradient that autograd is given for it."""
        if not hasattr(self.parameter, "grad_added_to_main_grad"):
            return None
        self.parameter.grad_added_to_main_grad = True
        zero = getattr(self.parameter, "zero_out_wgrad", False)
        return torch.zeros_like(weight) if zero else torch.empty_like(weight)

    def finish_later(self, gradient: torch.Tensor | None) -> None:
        """After the backward: what autograd would have done with the gradient, or the dummy."""
        weight = self.parameter
        if gradient is None:
            dummy = self.finish(weight.detach())
            if weight.grad is None:
                weight.grad = dummy
        elif weight.grad is None:
            weight.grad = self._of_parameter(gradient)
        else:
            weight.grad += self._of_parameter(gradient)

    def _of_parameter(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient as the parameter is: in its layout, a DTensor where it is one."""
        weight, local = self.parameter, self._turned(gradient)
        if not hasattr(weight, "to_local"):
            return local
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )

    def _turned(self, gradient: torch.Tensor) -> torch.Tensor:
        """Between the layout of the parameter and that of the operator."""
        return gradient.transpose(1, 2) if self.transposed else gradient


@dataclass
class _Backward:
    """A backward whose weight gradients are still to be computed."""

    tensors: ops.Tensors
    owners: dict[str, WeightOwner]
    layer: str
    group: str
    versions: dict[str, int]
    stream: torch.cuda.Stream | None  # that it ran on; None on the CPU

    def follow(self) -> None:
        """Lets the current stream use the tensors: after the stream of the backward has made them,
        and their memory goes to nobody else before the current one is done with them."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.stream.device)
        if current == self.stream:
            return
        current.wait_stream(self.stream)
        for tensor in self.tensors.values():
            if tensor is not None:
                tensor.record_stream(current)


class WeightGradQueue:
    """Backwards that wait for their weight gradients, oldest first.

    Given to :func:`flashmoe.moe` or :func:`flashmoe.experts`; :class:`flashmoe.MoE` has its own
    with ``delay_wgrad=True``. A waiting backward holds its activations and gradients.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Backward] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def backward_dw(self) -> None:
        """Computes the weight gradients of the oldest backward: into ``main_grad`` or ``grad``.

        One launch, which computes the gradient of x again: on a group of several ranks all of them
        call it, in the same order. On CUDA it goes to the current stream, after the backward.

        Raises FlashMoEError if no backward waits, or if a weight was changed in the meantime.
        """
        if not self._waiting:
            raise FlashMoEError("backward_dw: no backward waits for its weight gradients")
        backward = self._waiting.popleft()
        owners, tensors = backward.owners, backward.tensors
        with groups.refusing(backward.group, tensors["x"].is_cuda):
            for name in owners:
                if tensors[name]._version != backward.versions[name]:
                    raise FlashMoEError(
                        f"{name} was changed in place between backward and backward_dw; call "
                        "backward_dw before the optimizer's step"
                    )
        backward.follow()
        gradients = _compute(tensors, list(owners), owners, backward.layer, backward.group)
        for name, owner in owners.items():
            owner.finish_later(gradients.get(name))

    def _put(self, tensors: ops.Tensors, owners: dict[str, WeightOwner], ctx: Any) -> None:
        versions = {name: tensors[name]._version for name in owners}
        x = tensors["x"]
        stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
        self._waiting.append(_Backward(tensors, owners, ctx.layer, ctx.group, versions, stream))


def _compute(
    tensors: ops.Tensors, needs: list[str], owners: dict[str, WeightOwner], layer: str, group: str
) -> ops.Tensors:
    """One backward launch. Returns the gradients that did not go into a ``main_grad``."""
    fused = {name: owner for name, owner in owners.items() if has_main_grad(owner.parameter)}
    with groups.refusing(group, tensors["x"].is_cuda):
        gradients = ops.empty_gradients(tensors, [name for name in needs if name not in fused])
        into = {name: owner.main_grad(tensors[name]) for name, owner in fused.items()}
    flags = sum(_ACCUMULATE[name] for name, owner in fused.items() if not owner.overwrites)
    ops.launch_backward(tensors, gradients | into, layer, group, flags)
    return gradients


class _WithOwners(torch.autograd.Function):
    """The layer with parameters that take their weight gradients themselves."""

    @staticmethod
    def forward(
        ctx: Any, owners: dict[str, WeightOwner], queue: WeightGradQueue | None, *inputs: Any
    ) -> tuple[torch.Tensor, ...]:
        outputs = ops.forward(*inputs)
        ops.save(ctx, inputs, outputs)
        ctx.owners, ctx.queue = owners, queue
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            ops.refuse_double_backward()
        tensors = ops.incoming(ctx, grads)
        needs = ops.needed(ctx.needs_input_grad[2:])
        if tensors is None or not needs:
            return (None,) * (len(ops.OPERANDS) + 5)
        owners = {name: owner for name, owner in ctx.owners.items() if name in needs}
        if ctx.queue is not None:
            ctx.queue._put(tensors, owners, ctx)
            needs = [name for name in needs if name not in owners]
            owners = {}
        gradients = _compute(tensors, needs, owners, ctx.layer, ctx.group) if needs else {}
        for name, owner in owners.items():
            gradients[name] = owner.finish(tensors[name])
        return (None, None, *(gradients.get(name) for name in ops.OPERANDS), None, None, None)


@torch.compiler.disable
def forward_with_owners(
    owners: dict[str, WeightOwner], queue: WeightGradQueue | None, *inputs: Any
) -> Any:
    """``ops.forward``, its weight gradients by way of ``owners`` and, if given, ``queue``."""
    return _WithOwners.apply(owners, queue, *inputs)
