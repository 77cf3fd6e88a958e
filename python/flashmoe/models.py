"""Mixture-of-experts layers of published models, as data, and how to scale them down.

Sizes are those of the released configurations. `layout` is how Hugging Face transformers 5 holds
the experts at run time. Shared experts, where a model has them, are dense layers beside the routed
ones and no part of this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from .cases import Case
from .config import Activation, Routing

SIGMOID = Routing(score="sigmoid")
TOPK_SOFTMAX = Routing(score="topk_softmax")
RAW_SOFTMAX = Routing(renormalize=False)
LLAMA4 = Routing(score="sigmoid", renormalize=False)


@dataclass(frozen=True)
class Model:
    """The routed experts of one layer: H, I, E, k and how they are called."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    routing: Routing = field(default_factory=Routing)
    activation: str | Activation = "swiglu"
    layout: str = "concatenated"
    bias: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    weight_on_input: bool = False
    remark: str = ""

    def case(self, tokens, **changes):
        """The layer as a `Case` with `tokens` tokens on every rank."""
        case = Case(
            name=f"model/{self.name}",
            tokens=(tokens,),
            hidden=self.hidden,
            intermediate=self.intermediate,
            experts=self.experts,
            top_k=self.top_k,
            routing=self.routing,
            activation=self.activation,
            layout=self.layout,
            bias=self.bias,
            router_bias=self.router_bias,
            selection_bias=self.selection_bias,
            weight_on_input=self.weight_on_input,
        )
        return replace(case, **changes)

    def forward_flops(self, tokens):
        """Floating-point operations of the expert products for `tokens` tokens in all."""
        products = 3 if self.case(tokens).activation_spec.gated else 2
        return 2 * products * tokens * self.top_k * self.hidden * self.intermediate

    @property
    def parameters(self):
        """Parameters of the routed experts."""
        products = 3 if self.case(1).activation_spec.gated else 2
        return products * self.experts * self.hidden * self.intermediate


def with_bias(scale):
    """Sigmoid scores, chosen with a selection bias, renormalised and scaled."""
    return {"routing": replace(SIGMOID, scale=scale), "selection_bias": True}


GPT_OSS = {
    "routing": TOPK_SOFTMAX,
    "router_bias": True,
    "activation": "gpt_oss",
    "bias": True,
    "layout": "interleaved_transposed",
}
DEEPSEEK_V3 = {
    "routing": Routing(score="sigmoid", num_groups=8, top_groups=4, group_top=2, scale=2.5),
    "selection_bias": True,
}
DEEPSEEK_V4 = {
    "routing": Routing(score="sqrt_softplus", scale=1.5),
    "selection_bias": True,
    "activation": Activation(limit=10.0),
}
LLAMA4_LAYER = {"routing": LLAMA4, "weight_on_input": True, "layout": "transposed"}

MODELS = {
    model.name: model
    for model in (
        Model("qwen3-30b-a3b", 2048, 768, 128, 8),
        Model("qwen3-235b-a22b", 4096, 1536, 128, 8),
        Model("qwen3-coder-480b", 6144, 2560, 160, 8),
        Model("qwen3-next-80b", 2048, 512, 512, 10),
        Model("qwen3.5-35b-a3b", 2048, 512, 256, 8),
        Model("qwen3.5-397b-a17b", 4096, 1024, 512, 10),
        Model("mixtral-8x7b", 4096, 14336, 8, 2),
        Model("mixtral-8x22b", 6144, 16384, 8, 2),
        Model("deepseek-v3", 7168, 2048, 256, 8, **DEEPSEEK_V3),
        Model(
            "deepseek-v4-flash",
            4096,
            2048,
            256,
            6,
            **DEEPSEEK_V4,
            remark="the first 3 layers route by a hash of the token: pass their ids",
        ),
        Model("glm-4.5", 5120, 1536, 160, 8, **with_bias(2.5)),
        Model("glm-4.5-air", 4096, 1408, 128, 8, **with_bias(1.0)),
        Model("glm-4.7-flash", 2048, 1536, 64, 4, **with_bias(1.8)),
        Model("glm-5", 6144, 2048, 256, 8, **with_bias(2.5)),
        Model("kimi-k2", 7168, 2048, 384, 8, **with_bias(2.827)),
        Model("llama4-scout", 5120, 8192, 16, 1, **LLAMA4_LAYER),
        Model("llama4-maverick", 5120, 8192, 128, 1, **LLAMA4_LAYER),
        Model("gpt-oss-20b", 2880, 2880, 32, 4, **GPT_OSS),
        Model("gpt-oss-120b", 2880, 2880, 128, 4, **GPT_OSS),
        Model("olmoe", 2048, 1024, 64, 8, routing=RAW_SOFTMAX),
        Model(
            "dbrx",
            6144,
            10752,
            16,
            4,
            layout="separate",
            remark="checkpoints hold flat [E*I, H] tensors: pass views",
        ),
        Model("granite-3-1b", 1024, 512, 32, 8, routing=TOPK_SOFTMAX),
        Model("granite-3-3b", 1536, 512, 40, 8, routing=TOPK_SOFTMAX),
        Model("minimax-m2", 3072, 1536, 256, 8, **with_bias(1.0)),
        Model("ernie-4.5-21b", 2560, 1536, 64, 6, selection_bias=True),
        Model(
            "nemotron-like",
            2048,
            2048,
            64,
            2,
            activation="relu2",
            remark="plain relu^2 experts as in Nemotron-3; the sizes are not a released model's",
        ),
    )
}

# Models that the layer does not cover whole, and what to do about it.
NOT_COVERED = {
    "phi-3.5-moe": "its sparsemixer router is not supported: route outside, call flashmoe.experts",
    "kimi-k3": "its SiTU activation is not supported",
}


def find(name):
    """The model of a name. Raises ValueError with the names that are known."""
    if name in MODELS:
        return MODELS[name]
    if name in NOT_COVERED:
        raise ValueError(f"model {name}: {NOT_COVERED[name]}")
    raise ValueError(f"model {name!r} is unknown; known are {', '.join(MODELS)}")


def scaled(model, scale, ranks=1):
    """The model with hidden and intermediate size divided by `scale` (multiples of 64, at least
    64) and experts by up to `scale`, but not below 32; k stays where there are experts enough. The
    experts become a multiple of the ranks and of the routing groups. Raises ValueError unless
    scale >= 1.
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}; accepted: 1 or more")
    routing = model.routing
    unit = math.lcm(ranks, routing.num_groups)
    wanted = max(math.ceil(model.experts / scale), min(model.experts, 32))
    experts = math.ceil(wanted / unit) * unit
    eligible = experts * routing.top_groups // routing.num_groups
    return replace(
        model,
        hidden=multiple_of_64(model.hidden / scale),
        intermediate=multiple_of_64(model.intermediate / scale),
        experts=experts,
        top_k=min(model.top_k, eligible),
    )


def multiple_of_64(size):
    """The nearest multiple of 64, at least 64."""
    return max(64, round(size / 64) * 64)


def fitting_scale(model, ranks, tokens, cores, memory_bytes):
    """The smallest power of two by which the model must be scaled so that a checked run (the layer,
    plain PyTorch and the fp64 oracle, forward and backward) takes seconds on this machine.

    A run costs about 20 forward passes in fp32 (the oracle's fp64 counts double) and touches each
    parameter some 50 times in fp64; the budget is 10 s of a core's 20 GFLOP/s for the first, a
    quarter of the memory and 2e7 parameters a core for the second.
    """
    scale = 1
    while scale < 64:
        small = scaled(model, scale, ranks)
        fits_time = 20 * small.forward_flops(tokens * ranks) <= 10 * 20e9 * cores
        fits_memory = 8 * 5 * small.parameters <= memory_bytes / 4
        if fits_time and fits_memory and small.parameters <= 2e7 * cores:
            break
        scale *= 2
    return scale
