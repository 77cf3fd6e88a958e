"""Packages that are not there: modules with the interface of sonic-moe 0.1.2.post1 and liger-kernel
0.8.5, which compute with PyTorch on the CPU and say what they were given."""

from __future__ import annotations

import types

import torch
from flashmoe import reference
from flashmoe.bench_peers import LIGER


def modules(seen):
    """Name -> module of both packages; `seen` gets what is called."""
    inner = liger_modules(seen) | sonic_modules(seen)
    outer = ("liger_kernel", "liger_kernel.ops", "sonicmoe")
    return {name: types.ModuleType(name) for name in outer} | inner


def liger_modules(seen):
    """liger_kernel.ops.fused_moe."""

    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
            assert top_k_index.dtype == torch.int32
            assert gate_up_proj.shape[1] == 2 * down_proj.shape[2]
            seen.append(LIGER)
            ids = top_k_index.long()
            return reference.experts(x, ids, top_k_weights.to(x.dtype), gate_up_proj, down_proj)

    module = types.ModuleType("liger_kernel.ops.fused_moe")
    module.LigerFusedMoEFunction = LigerFusedMoEFunction
    return {"liger_kernel.ops.fused_moe": module}


def sonic_modules(seen):
    """sonicmoe.enums and sonicmoe.functional."""

    def experts(x, ids, weights, w1, w2):
        # w1 (2*I, H, E), w2 (H, I, E), stride order (2, 0, 1); gate and up rows interleaved
        assert w1.stride(1) == w2.stride(1) == 1 and w1.shape[0] == 2 * w2.shape[1]
        w_up, w_down = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        return reference.experts(x, ids, weights.to(x.dtype), w_up, w_down, interleaved=True)

    def softmax_topk_layer(
        x, router_w, w1, b1, w2, b2, K, stream_id, activation_type="swiglu",
        is_inference_mode_enabled=False, is_softmax_over_topk=True, norm_topk_probs=False,
        concat_layout=False,
    ):  # fmt: skip
        assert b1 is None and b2 is None and activation_type == "swiglu" and not concat_layout
        assert is_inference_mode_enabled != x.requires_grad and not norm_topk_probs
        seen.append("its own router")
        logits = (x @ router_w.T).float()
        best = logits.topk(K, dim=-1)
        weights = best.values.softmax(-1)
        if not is_softmax_over_topk:
            weights = logits.softmax(-1).gather(-1, best.indices)
        return experts(x, best.indices, weights, w1, w2), logits, None

    def moe_general_routing_inputs(
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id,
        activation_type, is_inference_mode_enabled=False, concat_layout=False,
    ):  # fmt: skip
        assert is_inference_mode_enabled != x.requires_grad
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert (token_indices.diff() >= 0).all() and len(token_indices) == len(router_scores)
        seen.append("given routing")
        ids = expert_indices.long().view(len(x), -1)
        return experts(x, ids, router_scores.view(ids.shape), w1, w2), None

    enums = types.ModuleType("sonicmoe.enums")
    enums.ActivationType = types.SimpleNamespace(SWIGLU="swiglu")
    functional = types.ModuleType("sonicmoe.functional")
    functional.moe_TC_softmax_topk_layer = softmax_topk_layer
    functional.moe_general_routing_inputs = moe_general_routing_inputs
    return {"sonicmoe.enums": enums, "sonicmoe.functional": functional}
