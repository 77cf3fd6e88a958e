"""What a layer is: activation, routing, and their one-line encoding for the torch operators."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

# Names in the order of the enums in include/flashmoe/c_api.h.
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
SCORES = ("softmax", "topk_softmax", "sigmoid", "sqrt_softplus")
GATE_LAYOUTS = ("concatenated", "interleaved", "separate")
DTYPES = ("float64", "float32", "bfloat16", "float16")


def one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raises TypeError or ValueError unless ``value`` is one of the ``accepted`` strings."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: {', '.join(accepted)}")
    if value not in accepted:
        raise ValueError(f"{name} is '{value}'; accepted: {', '.join(accepted)}")


def flag(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: True or False")


def save_z_choice(value: Any) -> None:
    """Raises TypeError or ValueError unless ``value`` is True, False or "auto"."""
    if not isinstance(value, (bool, str)):
        raise TypeError(f"save_z is a {type(value).__name__}; accepted: True, False or 'auto'")
    if isinstance(value, str) and value != "auto":
        raise ValueError(f"save_z is '{value}'; accepted: True, False or 'auto'")


def number(name: str, value: Any, *, above: float | None = None) -> None:
    """Raises TypeError unless ``value`` is a number, ValueError unless finite and > ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: a number")
    bound = "" if above is None else f" above {above:g}"
    if not math.isfinite(value) or (above is not None and value <= above):
        raise ValueError(f"{name} is {value}; accepted: a finite number{bound}")


def count(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is an int, ValueError unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: an int")
    if value < 1:
        raise ValueError(f"{name} is {value}; accepted: 1 or more")


@dataclass(frozen=True)
class Activation:
    """The function between the two expert products.

    Gated: ``act(gate) * (up + up_offset)``; plain: ``act(up)``.

    kind: ``silu`` (``v * sigmoid(alpha * v)``), ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``relu2``
        (``relu(v)**2``) or ``identity``.
    limit: ``gate = min(gate, limit)`` and ``up = clamp(up, -limit, limit)`` first; None: no clamp.

    Raises TypeError or ValueError, naming the field.
    """

    kind: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        one_of("Activation.kind", self.kind, KINDS)
        flag("Activation.gated", self.gated)
        number("Activation.alpha", self.alpha)
        number("Activation.up_offset", self.up_offset)
        if self.limit is not None:
            number("Activation.limit", self.limit, above=0)
        if self.alpha != 1 and self.kind != "silu":
            raise ValueError(
                f"Activation.alpha is {self.alpha} for '{self.kind}'; only silu has it"
            )
        if self.up_offset != 0 and not self.gated:
            raise ValueError(f"Activation.up_offset is {self.up_offset}; only gated ones have it")


ACTIVATIONS = {
    "swiglu": Activation("silu"),
    "geglu": Activation("gelu"),
    "geglu_tanh": Activation("gelu_tanh"),
    "reglu": Activation("relu"),
    "bilinear": Activation("identity"),
    "gpt_oss": Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0),
    "silu": Activation("silu", gated=False),
    "gelu": Activation("gelu", gated=False),
    "gelu_tanh": Activation("gelu_tanh", gated=False),
    "relu": Activation("relu", gated=False),
    "relu2": Activation("relu2", gated=False),
    "identity": Activation("identity", gated=False),
}


def resolve_activation(activation: Any) -> Activation:
    """An :class:`Activation`, or the one of that name. Raises TypeError or ValueError."""
    if isinstance(activation, Activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"activation is a {type(activation).__name__}; accepted: a name or flashmoe.Activation"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is '{activation}'; accepted: {', '.join(ACTIVATIONS)}, "
            "or a flashmoe.Activation"
        )
    return ACTIVATIONS[activation]


@dataclass(frozen=True)
class Routing:
    """How router logits become expert ids and weights.

    score: ``softmax`` (over all experts, then top-k), ``topk_softmax`` (top-k of the logits, then
        softmax over the chosen k), ``sigmoid`` or ``sqrt_softplus``.
    renormalize: divide the k weights by their sum + 1e-20 (no effect for ``topk_softmax``).
    scale: multiplies the weights last.
    num_groups, top_groups, group_top: only the experts of the ``top_groups`` best of ``num_groups``
        groups are eligible; the score of a group is the sum of its best ``group_top``.

    Raises TypeError or ValueError, naming the field.
    """

    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 2

    def __post_init__(self) -> None:
        one_of("Routing.score", self.score, SCORES)
        flag("Routing.renormalize", self.renormalize)
        number("Routing.scale", self.scale)
        for name in ("num_groups", "top_groups", "group_top"):
            count(f"Routing.{name}", getattr(self, name))


@dataclass(frozen=True)
class LayerConfig:
    """The fields of ``fm_layer`` that do not follow from the tensors of a call.

    ``num_experts`` 0 means E_loc * W. ``encode`` and ``decode`` are inverse: the text alone is
    enough, so it survives pickling and compile caches.
    """

    top_k: int
    num_experts: int = 0
    activation: str = "silu"
    gated: bool = True
    gate_layout: str = "concatenated"
    weight_on_input: bool = False
    act_alpha: float = 1.0
    act_limit: float = 0.0
    up_offset: float = 0.0
    capacity_factor: float = 0.0
    score: str = "softmax"
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 2
    layer_id: int = 0

    def encode(self) -> str:
        """``top_k=2;num_experts=0;activation='silu';...``"""
        return ";".join([f"{name}={getattr(self, name)!r}" for name in CONFIG_FIELDS])

    @staticmethod
    @cache
    def decode(text: str) -> LayerConfig:
        """The config of an encoding. Raises ValueError if it is not one."""
        try:
            pairs = [item.split("=", 1) for item in text.split(";")]
            return LayerConfig(**{name: _value(value) for name, value in pairs})
        except (TypeError, ValueError) as error:
            raise ValueError(f"config is '{text}', which is no flashmoe layer: {error}") from error

    def numbers(self) -> dict[str, float]:
        """The fields as numbers, named as in ``fm_layer``."""
        values = {name: getattr(self, name) for name in CONFIG_FIELDS}
        values["activation"] = KINDS.index(self.activation)
        values["gate_layout"] = GATE_LAYOUTS.index(self.gate_layout)
        values["score"] = SCORES.index(self.score)
        return values


def _value(text: str) -> Any:
    """The bool, number or plain name whose ``repr`` this is. Raises ValueError.

    Not ast.literal_eval: in Python 3.11 it may raise SystemError when two threads parse at once.
    """
    if text in ("True", "False"):
        return text == "True"
    if len(text) > 1 and text[0] == text[-1] == "'":
        return text[1:-1]
    return int(text) if text.lstrip("-").isdigit() else float(text)


CONFIG_FIELDS = tuple(field.name for field in fields(LayerConfig))


def gate_layout(activation: Activation, has_w_gate: bool, interleaved: bool) -> str:
    """The row order of w_up. Raises ValueError where the arguments contradict each other."""
    if has_w_gate and not activation.gated:
        raise ValueError("w_gate is given, but the activation is not gated; accepted: None")
    if has_w_gate and interleaved:
        raise ValueError("interleaved is True with a separate w_gate; accepted: False")
    if interleaved and not activation.gated:
        raise ValueError("interleaved is True, but the activation is not gated; accepted: False")
    if has_w_gate:
        return "separate"
    return "interleaved" if interleaved else "concatenated"


def keeps_z(
    save_z: bool | str, hidden: int, intermediate: int, world: int, on_cuda: bool = False
) -> bool:
    """Whether a forward whose gradients are wanted keeps its pre-activations z.

    ``"auto"`` keeps them where I <= H. To compute an element of z again costs 2 H operations, so a
    byte of it buys more time the larger H is, while a token has k * G * I of them: the many narrow
    experts of Qwen3 or DeepSeek-V3 keep z, the wide ones of Mixtral or Llama-4 compute it again.
    Several ranks on the CPU always do.
    """
    if save_z == "auto":
        return (world == 1 or on_cuda) and intermediate <= hidden
    return bool(save_z)


def z_rows(tokens: Any, top_k: int, num_local_experts: int, world: int = 1) -> Any:
    """Rows of ``z``: ``fm_z_rows``, also for symbolic ``tokens``.

    Every expert's rows start at a multiple of 16 at most. Of several ranks a quarter more than an
    even share: where more come the backward computes them again.
    """
    slots = tokens * top_k
    if world > 1:
        slots += slots // 4
    return (slots + num_local_experts * world * 15 + 15) // 16 * 16
