"""``experts_implementation="flashmoe"`` for Hugging Face transformers, 5.17 or newer.

    flashmoe.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="flashmoe")

The router, shared experts and everything else stay the model's own: transformers calls
:func:`experts_forward` in place of a model's experts, with their ids and weights. Expert weights
are used where the checkpoint put them, through views. docs/integrations.md has the table of models.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import reference
from ..config import KINDS, Activation
from ..errors import UnsupportedError
from ..functional import experts

NAME = "flashmoe"
OLDEST = (5, 17)

# Attributes by which the configurations of transformers say that a model has experts.
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# A gate is recognised by its values, which may have been rounded to float32 on the way.
_PROBE_ROWS = 4096
_PROBE_BAR = 2.0**-20
_QUICK_GELU = 1.702  # x * sigmoid(1.702 x)

_layer_ids = itertools.count(1)


class Layout(NamedTuple):
    """How a module of transformers holds its experts: arguments of :func:`flashmoe.experts`."""

    activation: Activation
    interleaved: bool
    transposed: bool
    bias: bool


def register() -> None:
    """Makes ``experts_implementation="flashmoe"`` known to transformers, once for the process.

    Changes in transformers: an entry in its experts interface; Llama-4, whose experts do not go
    through that interface, looks at ``experts_implementation`` too; a model with experts that
    could not be served by any implementation raises instead of ignoring the choice.

    Raises:
        ImportError: transformers is not installed.
        flashmoe.errors.UnsupportedError: transformers is older than 5.17.
    """
    installed = metadata.version("transformers")
    if tuple(map(int, installed.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UnsupportedError(f"transformers is {installed}; accepted: {oldest} or newer")
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.modeling_utils import PreTrainedModel
    from transformers.models.llama4 import modeling_llama4

    if NAME in ALL_EXPERTS_FUNCTIONS:
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _refuse_quantised)
    _wrap(PreTrainedModel, "get_correct_experts_implementation", _refuse_unserved_model)
    _wrap(modeling_llama4.Llama4TextExperts, "forward", _llama4_experts)
    _wrap(modeling_llama4.Llama4TextMoe, "forward", _llama4_moe)
    _wrap(modeling_llama4.Llama4PreTrainedModel, "set_experts_implementation", _llama4_set)


def check(model: nn.Module) -> list[str]:
    """The names of the modules of ``model`` whose experts flashmoe serves.

    Raises:
        flashmoe.errors.UnsupportedError: one of them cannot be served, or there is none; the text
            has the name of each and the reason.
    """
    served, problems = [], []
    for name, module in model.named_modules():
        if not hasattr(module, "down_proj") or not isinstance(module.down_proj, nn.Parameter):
            continue
        try:
            layout(module)
            served.append(name)
        except UnsupportedError as error:
            problems.append(f"{name}: {error}")
    if problems or not served:
        reason = "; ".join(problems) or "it has no experts that flashmoe knows"
        raise UnsupportedError(f"{type(model).__name__}: {reason}")
    return served


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts of a module of transformers, in the signature of its experts interface.

    hidden_states [T, H], top_k_index [T, k] integers (ids >= the module's experts: no expert),
    top_k_weights [T, k]. Returns [T, H] in the dtype of hidden_states. The dtype of the layer is
    that of the weights: hidden_states are converted where they differ, as ``grouped_mm`` does.
    """
    return _run(self, hidden_states, top_k_index, top_k_weights, weight_on_input=False)


def _run(
    module: Any,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    weight_on_input: bool,
) -> torch.Tensor:
    found = layout(module)
    dtype = module.down_proj.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if topk_weights.dtype not in (dtype, wide):
        topk_weights = topk_weights.to(wide)
    up = "gate_up_proj" if found.activation.gated else "up_proj"
    y = experts(
        hidden_states.to(dtype).contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        getattr(module, up),
        module.down_proj,
        b_up=getattr(module, f"{up}_bias") if found.bias else None,
        b_down=module.down_proj_bias if found.bias else None,
        activation=found.activation,
        interleaved=found.interleaved,
        transposed=found.transposed,
        weight_on_input=weight_on_input,
        save_z="auto",
        layer_id=_layer_id(module),
    )
    return y.to(hidden_states.dtype)


@torch._dynamo.assume_constant_result
def layout(module: Any) -> Layout:
    """How ``module`` holds and gates its experts.

    Raises:
        flashmoe.errors.UnsupportedError: naming the class, what is not supported, and what to do.
    """
    found = module.__dict__.get("_flashmoe_layout")
    if found is None:
        found = module.__dict__["_flashmoe_layout"] = _inspect(module)
    return found


@torch._dynamo.assume_constant_result
def _layer_id(module: Any) -> int:
    """The place of a module, from 1, in the order in which this process first ran them: modules of
    transformers do not know their layer."""
    if "_flashmoe_layer_id" not in module.__dict__:
        module.__dict__["_flashmoe_layer_id"] = next(_layer_ids)
    return module.__dict__["_flashmoe_layer_id"]


def _inspect(module: Any) -> Layout:
    if getattr(module, "has_post_expert_norm", False):
        raise _unsupported(module, "it normalises the output of each expert")
    gated = getattr(module, "has_gate", True)
    interleaved = gated and not getattr(module, "is_concatenated", True)
    for name in ("gate_up_proj" if gated else "up_proj", "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 3:
            raise _unsupported(module, f"it has no {name} of 3 dimensions")
        if not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
            raise _unsupported(module, f"{name} is quantised ({weight.dtype})")
    return Layout(
        activation=_activation(module, gated, interleaved),
        interleaved=interleaved,
        transposed=getattr(module, "is_transposed", _is_llama4(module)),
        bias=getattr(module, "has_bias", False),
    )


def _activation(module: Any, gated: bool, interleaved: bool) -> Activation:
    """The activation that has the values of the module's own gate."""
    device = module.down_proj.device
    device = torch.device("cpu") if device.type == "meta" else device
    options = list(_candidates(module, gated))
    reach = max([12.0, *(2 * option.limit for option in options if option.limit)])
    generator = torch.Generator().manual_seed(0)
    z = torch.rand((_PROBE_ROWS, 4), generator=generator, dtype=torch.float64, device="cpu")
    z = ((2 * z - 1) * reach).to(device)
    try:
        with torch.no_grad():
            values = _own_gate(module, gated)(z).double()
    except Exception as error:
        raise _unsupported(module, f"its gate cannot be evaluated: {error}") from error
    for option in options:
        apart = (reference.activate(z, option, interleaved) - values).norm() / values.norm()
        if apart < _PROBE_BAR:
            return option
    acts = type(getattr(module, "act_fn", None)).__name__
    raise _unsupported(module, f"its gate is no activation of flashmoe (act_fn {acts})")


def _own_gate(module: Any, gated: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    if not gated:
        return module.act_fn
    if hasattr(module, "_apply_gate"):
        return module._apply_gate

    def gate(z: torch.Tensor) -> torch.Tensor:
        gate, up = z.chunk(2, dim=-1)
        return module.act_fn(gate) * up

    return gate


def _candidates(module: Any, gated: bool) -> Iterator[Activation]:
    """Activations that the module may mean, from the numbers that it holds."""
    numbers = {
        name: float(value)
        for name, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    limits = [value for name, value in numbers.items() if "limit" in name and value > 0]
    alphas = [value for name, value in numbers.items() if "alpha" in name]
    offsets = (0.0, 1.0) if gated else (0.0,)
    for kind in KINDS:
        of_kind = [1.0, _QUICK_GELU, *alphas] if kind == "silu" else [1.0]
        for alpha, limit, offset in itertools.product(of_kind, [None, *limits], offsets):
            yield Activation(kind, gated, alpha, limit, offset)


def _unsupported(module: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(module).__name__}: {reason}; use another experts_implementation, such as 'eager'"
    )


def _refuse_quantised(self: nn.Module, *unused: Any, **unused_too: Any) -> torch.Tensor:
    raise _unsupported(self, "its weights are quantised to fp8")


# ---- what is changed in transformers ----------------------------------------------------------


def _wrap(owner: type, name: str, wrapper: Callable[..., Callable]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(wrapper(original)))


def _refuse_unserved_model(original: Callable) -> Callable:
    def get_correct_experts_implementation(self: Any, requested_experts: str | None) -> str:
        served = self._can_set_experts_implementation() or _is_llama4(self)
        if requested_experts == NAME and not served:
            holders = (self.config, getattr(self.config, "ffn_config", None))
            counts = [getattr(holder, name, None) for holder in holders for name in _COUNTS]
            if any(isinstance(count, int) and count > 1 for count in counts):
                raise _unsupported(
                    self, "its experts do not go through the experts interface of transformers"
                )
        return original(self, requested_experts)

    return get_correct_experts_implementation


def _is_llama4(module: Any) -> bool:
    return type(module).__module__ == "transformers.models.llama4.modeling_llama4"


def _llama4_experts(original: Callable) -> Callable:
    """Llama-4 gives its experts E copies of the tokens, weighted; flashmoe the tokens and ids."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if top_k_index is None or top_k_weights is None:
            return original(self, hidden_states)
        return _run(self, hidden_states, top_k_index, top_k_weights, weight_on_input=True)

    return forward


def _llama4_set(original: Callable) -> Callable:
    """The choice reaches the text model, which transformers takes for one without a choice."""

    def set_experts_implementation(self: Any, experts_implementation: str | dict) -> None:
        original(self, experts_implementation)
        chosen: Any = experts_implementation
        if isinstance(chosen, dict):
            chosen = chosen.get("text_config", chosen.get(""))
        for module in self.modules():
            if chosen is not None and hasattr(module, "shared_expert"):
                module.shared_expert.config._experts_implementation_internal = chosen

    return set_experts_implementation


def _llama4_moe(original: Callable) -> Callable:
    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.shared_expert.config._experts_implementation != NAME:
            return original(self, hidden_states)
        if not _is_llama4(self.experts):
            raise _unsupported(self.experts, "it is no Llama4TextExperts of transformers")
        x = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(x)  # [T, E], zero where an expert is not chosen
        topk_ids = logits.topk(self.top_k, dim=1).indices
        routed = self.experts(x, topk_ids, scores.gather(1, topk_ids))
        return self.shared_expert(x) + routed, logits

    return forward
