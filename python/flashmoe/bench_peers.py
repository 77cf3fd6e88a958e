"""Other implementations of the whole layer on a GPU, which `flashmoe bench` times beside ours.

torch.grouped_mm comes with torch; SonicMoE (`sonic-moe` with `nvidia-cutlass-dsl` and
`quack-kernels`) and the Triton layer of `liger-kernel` are used where they are installed. Weights
are given to each as it likes them best, once, outside of what is timed. A peer counts only if it
computes the layer: its output is compared with ours first, which also lets it compile and tune.
"""

from __future__ import annotations

import importlib.metadata
import os

import torch
import torch.nn.functional as F

from . import reference
from .bench import PEER as GROUPED
from .inputs import LAYOUTS

SONIC = "SonicMoE"
LIGER = "liger-kernel"
PACKAGES = {SONIC: "sonic-moe", LIGER: "liger-kernel"}
NOT_INSTALLED = "not installed"
# It reads a count back to the host in every call: no CUDA graph can hold it.
EAGER_ONLY = (LIGER,)
# Median over tokens of the relative error against ours. Peers round logits to 16 bits, so some
# tokens go to other experts; wrong weights or a wrong layout move all of them.
MOST_ERROR = 0.05


def find(case, call, y):
    """(name -> function of no arguments that gives y, name -> why it is not there) of all peers.

    y [T, H]: what ours gives for this call.
    """
    return admitted(case, call, MAKERS, lambda contender: disagreement(contender(), y))


def admitted(case, call, makers, judge):
    """(name -> what `makers` make for a call, name -> why it is not there) of all peers.

    judge(made): why it does not count, "" if it does.
    """
    contenders, absent = {}, {}
    for name, make in makers.items():
        reason = reason_against(name, case, call)
        if not reason:
            try:
                contender = make(case, call)
                reason = judge(contender)
            except ImportError as error:
                reason = f"{NOT_INSTALLED}: {PACKAGES.get(name, name)} ({error})"
            except Exception as error:  # what another project raises is unknown; it is shown
                reason = f"fails: {type(error).__name__}: {error}"
        if reason:
            absent[name] = reason
        else:
            contenders[name] = contender
    return contenders, absent


def reason_against(name, case, call):
    """Why a peer has not the layer of a case; "" if it has."""
    plain = not (case.bias or case.router_bias or case.selection_bias)
    turned = call.options["transposed"] and name != GROUPED
    if not plain or LAYOUTS[case.layout][0] != "concatenated" or turned:
        return "takes neither biases nor this order of the weights"
    if call.x.dtype != torch.bfloat16:
        return "is measured in bf16"
    if name != GROUPED and (case.weight_on_input or case.activation != "swiglu"):
        return "multiplies expert outputs by the weights, and is for SwiGLU"
    return ""


def disagreement(made, y):
    """Why a peer's output is not that of the layer; "" if it is."""
    error = (made.float() - y.float()).norm(dim=-1) / y.float().norm(dim=-1).clamp_min(1e-30)
    median = float(error.median()) if len(error) else 0.0
    return "" if median <= MOST_ERROR else f"gives other values: relative error {median:.3g}"


def versions(names):
    """Name -> version of the package, of peers that have one of their own."""
    found = {name: importlib.metadata.version(PACKAGES[name]) for name in names if name in PACKAGES}
    if LIGER in found and os.environ.get("LIGER_FUSED_MOE_AUTOTUNE", "1") == "0":
        found[LIGER] += ", not tuned"
    return found


def as_matrices(call, name):
    """An expert weight as [E, in, out]."""
    weight = call.weights[name]
    return weight if call.options["transposed"] else weight.transpose(1, 2)


def route(case, x, w_router):
    """(weights f32 [T, k], ids [T, k]) in PyTorch, for peers without a router of this kind."""
    logits = F.linear(x, w_router).float()
    scores = logits.sigmoid() if case.routing.score == "sigmoid" else logits.softmax(-1)
    weights, ids = scores.topk(case.top_k, dim=-1)
    if case.routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * case.routing.scale if case.routing.scale != 1 else weights, ids


def grouped_layer(case, call):
    """A layer around torch's grouped product, as a model file writes it: rows sorted by expert."""
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    x, w_router = call.x, call.routing["w_router"]
    every_slot = torch.arange(x.shape[0] * case.top_k, device=x.device)
    every_expert = torch.arange(case.experts, device=x.device)

    def layer():
        up, down = as_matrices(call, "w_up"), as_matrices(call, "w_down")
        weights, ids = route(case, x, w_router)
        sorted_ids, slots = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_ids, every_expert, right=True).to(torch.int32)
        weight = weights.flatten()[slots, None].to(x.dtype)
        rows = x[slots // case.top_k]
        rows = rows * weight if case.weight_on_input else rows
        hidden = reference.activate(grouped_mm(rows, up, offs=ends), case.activation_spec)
        out = grouped_mm(hidden, down, offs=ends)
        out = out if case.weight_on_input else out * weight
        back = torch.empty_like(slots).scatter_(0, slots, every_slot)
        return out[back].view(*ids.shape, -1).sum(1)

    return layer


def interleaved_rows(w_up):
    """Gate rows, then up rows [E, 2 * I, H] as SonicMoE likes them: gate row first, in turn."""
    gate, up = w_up.chunk(2, dim=1)
    return torch.stack((gate, up), dim=2).flatten(1, 2)


def sonic_layer(case, call):
    """SonicMoE's layer for inference."""
    return sonic_layer_of(case, call, interleaved_rows(call.weights["w_up"]), inference=True)


def sonic_layer_of(case, call, w_up, inference):
    """SonicMoE's layer: with its own router where that is a softmax, else with PyTorch's. w_up: as
    of `interleaved_rows`."""
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs, moe_TC_softmax_topk_layer

    x, w_router, w_down = call.x, call.routing["w_router"], call.weights["w_down"]
    score, renormalize = case.routing.score, case.routing.renormalize
    tokens = torch.arange(len(x), device=x.device, dtype=torch.int32)
    of_slots = tokens.repeat_interleave(case.top_k)

    def shared():
        return {
            "w1": w_up.permute(1, 2, 0),
            "b1": None,
            "w2": w_down.permute(1, 2, 0),
            "b2": None,
            "stream_id": torch.cuda.current_stream().cuda_stream if x.is_cuda else 0,
            "activation_type": ActivationType.SWIGLU,
            "is_inference_mode_enabled": inference,
        }

    def with_its_router():
        y, *_ = moe_TC_softmax_topk_layer(
            x,
            w_router,
            K=case.top_k,
            # softmax over all, renormalised over the chosen, is the softmax over the chosen
            is_softmax_over_topk=score == "topk_softmax" or renormalize,
            norm_topk_probs=False,
            **shared(),
        )
        return y

    def with_given_routing():
        weights, ids = route(case, x, w_router)
        y, _ = moe_general_routing_inputs(
            x,
            weights.flatten(),
            of_slots,
            ids.flatten().to(torch.int32),
            E=case.experts,
            **shared(),
        )
        return y

    is_its_own = score in ("softmax", "topk_softmax") and case.routing.scale == 1
    return with_its_router if is_its_own else with_given_routing


def liger_layer(case, call):
    """liger-kernel's Triton layer behind PyTorch's router."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    x, w_router = call.x, call.routing["w_router"]
    w_up, w_down = call.weights["w_up"], call.weights["w_down"]

    def layer():
        weights, ids = route(case, x, w_router)
        return LigerFusedMoEFunction.apply(x, w_up, w_down, ids.to(torch.int32), weights)

    return layer


MAKERS = {GROUPED: grouped_layer, SONIC: sonic_layer, LIGER: liger_layer}
