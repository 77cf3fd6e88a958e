"""FlashMoE: a mixture-of-experts layer, forward and backward, over one rank or many.

    y = flashmoe.experts(x, topk_ids, topk_weights, w_up, w_down)
    y, routing = flashmoe.moe(x, w_router, w_up, w_down, top_k=2)
    layer = flashmoe.MoE(hidden_size=512, intermediate_size=1024, num_experts=16, top_k=2)

Importing this package imports neither torch nor NumPy nor the compiled engine: each is loaded by
the first call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors
from .config import Activation, Routing
from .functional import RoutingResult, experts, moe
from .group import Group, local_group

if TYPE_CHECKING:
    from .launch import world_group as world_group
    from .layer import MoE as MoE
    from .run import run_moe as run_moe
    from .weight_grads import WeightGradQueue as WeightGradQueue

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Group",
    "MoE",
    "Routing",
    "RoutingResult",
    "WeightGradQueue",
    "errors",
    "experts",
    "local_group",
    "moe",
    "run_moe",
    "world_group",
]

# Attributes that are imported when they are first used: some need torch, run_moe the checks.
_LAZY = {
    "MoE": "layer",
    "WeightGradQueue": "weight_grads",
    "integrations": "integrations",
    "run_moe": "run",
    "world_group": "launch",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flashmoe' has no attribute '{name}'")
    from importlib import import_module

    module = import_module(f".{_LAZY[name]}", __name__)
    value = module if name == _LAZY[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
