"""Whole layers under autograd, forward and backward: ours and its peers (`bench_peers`).

A peer counts only if its gradients are those of ours. Weights that a peer likes in another form are
its leaves in that form, as a model that trains with it holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import bench_peers
from .bench_peers import GROUPED, LIGER, SONIC
from .passes import call_layer

# Relative error in norm of a whole gradient against ours. Peers round logits to 16 bits: one slot
# in a hundred goes to another expert and moves a tenth; another scale, layout or term moves all.
MOST_ERROR = 0.3


@dataclass(frozen=True)
class Trained:
    """A layer that autograd differentiates."""

    layer: Callable[[], torch.Tensor]  # gives y [T, H]
    leaves: dict[str, torch.Tensor]
    grad_y: torch.Tensor
    natural: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, gradient: gradient

    @torch.enable_grad()
    def step(self):
        """Forward and backward: the gradients of the leaves, in their order."""
        return torch.autograd.grad(self.layer(), list(self.leaves.values()), self.grad_y)

    @torch.enable_grad()
    def backward(self):
        """A function of no arguments that runs the backward of one forward, again and again."""
        y, leaves = self.layer(), list(self.leaves.values())
        return lambda: torch.autograd.grad(y, leaves, self.grad_y, retain_graph=True)

    def gradients(self):
        """Name -> gradient in the form of ours."""
        made = zip(self.leaves, self.step(), strict=True)
        return {name: self.natural(name, gradient) for name, gradient in made}


def differentiable(call):
    """The call on the same memory, with leaves that require gradients."""

    def leaf(name, tensor):
        return tensor.detach().requires_grad_(name != "selection_bias")

    return replace(
        call,
        x=leaf("x", call.x),
        routing={name: leaf(name, tensor) for name, tensor in call.routing.items()},
        weights={name: leaf(name, tensor) for name, tensor in call.weights.items()},
    )


def ours(call):
    """FlashMoE's layer. call: of `differentiable`."""
    return Trained(lambda: call_layer(call)[0], call.leaves(), call.grad_y)


def find(case, call, expected):
    """(name -> `Trained`, name -> why it is not there) of all peers. call: of `differentiable`.
    expected: name -> gradient, of ours."""

    def judge(peer):
        return disagreement(peer.gradients(), expected)

    return bench_peers.admitted(case, call, MAKERS, judge)


def disagreement(made, expected):
    """Why a peer's gradients are not those of the layer; "" if they are."""
    for name, gradient in expected.items():
        if name == "x":
            reason = bench_peers.disagreement(made[name], gradient)
        else:
            ours_there = gradient.float()
            error = float((made[name].float() - ours_there).norm() / ours_there.norm())
            within = error <= MOST_ERROR
            reason = "" if within else f"gives other values: relative error {error:.3g}"
        if reason:
            return f"{reason} of grad_{name}"
    return ""


def grouped(case, call):
    """torch's grouped products."""
    return Trained(bench_peers.grouped_layer(case, call), call.leaves(), call.grad_y)


def liger(case, call):
    """liger-kernel's Triton layer."""
    return Trained(bench_peers.liger_layer(case, call), call.leaves(), call.grad_y)


def sonic(case, call):
    """SonicMoE's layer, on its own form of the up weights."""
    w_up = bench_peers.interleaved_rows(call.weights["w_up"].detach()).requires_grad_()
    layer = bench_peers.sonic_layer_of(case, call, w_up, inference=False)

    def natural(name, gradient):
        if name != "w_up":
            return gradient
        return torch.cat((gradient[:, 0::2], gradient[:, 1::2]), dim=1)

    return Trained(layer, call.leaves() | {"w_up": w_up}, call.grad_y, natural)


MAKERS = {GROUPED: grouped, SONIC: sonic, LIGER: liger}
