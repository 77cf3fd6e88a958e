"""The configuration file of the published FlashMoE (csrc/flashmoe_config.json there), read at run
time: `flashmoe run --config FILE`.

The published code compiles these numbers in; here they are sizes of one run. Meanings are those of
its schema and of its `ACC` type (csrc/include/flashmoe/types.cuh): T = sequence_len * mini_batch
tokens a rank, plain experts with biases, softmax routing renormalised over the chosen k, and a
capacity of ceil(T / E) * capacity_factor * k slots of each (source rank, expert).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ACTIVATIONS = ("relu", "gelu")  # hidden_act
DTYPES = ("fp32", "fp32", "bf16", "fp16")  # torch_dtype: float, tf32, bf16, fp16
MOST = 2**31 - 1
# Smallest and largest value of each integer.
BOUNDS = {
    "drop_tokens": (0, 1),
    "hidden_act": (0, len(ACTIVATIONS) - 1),
    "is_training": (0, 1),
    "torch_dtype": (0, len(DTYPES) - 1),
}
NEEDED = ("expert_top_k", "hidden_size", "intermediate_size", "num_experts", "sequence_len")


@dataclass(frozen=True)
class PublishedConfig:
    """The keys of the file, with the values of the published one for those that may be absent.

    drop_tokens 0: no capacity. is_training 0: forward only. torch_dtype 1 (TF32) is fp32 here: an
    engine that has TF32 takes it for fp32 tensors. moe_frequency: every how many of the num_layers
    layers has experts. global_batch and mini_batch are sequences; vocab_size counts parameters.
    """

    expert_top_k: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    sequence_len: int
    capacity_factor: float = 1
    drop_tokens: int = 1
    global_batch: int = 256
    hidden_act: int = 0
    is_training: int = 1
    mini_batch: int = 1
    moe_frequency: int = 1
    num_layers: int = 1
    torch_dtype: int = 1
    vocab_size: int = 32000

    @property
    def tokens(self) -> int:
        """Tokens of each rank in one launch."""
        return self.sequence_len * self.mini_batch

    @property
    def dtype(self) -> str:
        return DTYPES[self.torch_dtype]

    @property
    def activation(self) -> str:
        return ACTIVATIONS[self.hidden_act]

    def capacity(self, tokens: int, experts: int, top_k: int) -> int | None:
        """Slots of each (source rank, expert) for these sizes; None: all."""
        if not self.drop_tokens:
            return None
        return math.ceil(math.ceil(tokens / experts) * self.capacity_factor * top_k)

    def factor(self, tokens: int, experts: int, top_k: int) -> float | None:
        """The ``capacity_factor`` of FlashMoE, c in ceil(c * T * k / E), that gives that capacity:
        half a slot under it, so that no rounding reaches the next."""
        capacity = self.capacity(tokens, experts, top_k)
        if capacity is None or tokens == 0:
            return None
        return (capacity - 0.5) * experts / (tokens * top_k)

    def step(self) -> dict[str, int]:
        """What a step over the global batch is made of, on every rank."""
        micro_batches = math.ceil(self.global_batch / self.mini_batch)
        moe_layers = self.num_layers // self.moe_frequency
        hidden, layers = self.hidden_size, self.num_layers
        return {
            "micro_batches": micro_batches,
            "moe_layers": moe_layers,
            "launches": micro_batches * moe_layers * (2 if self.is_training else 1),
            # Of the dense transformer around the experts, as the published code counts them.
            "dense_parameters": hidden * (layers * (12 * hidden + 13) + self.vocab_size + hidden),
        }


KEYS = tuple(sorted(field.name for field in fields(PublishedConfig)))


def load(path: str | Path) -> PublishedConfig:
    """The configuration in a file. Raises OSError, or ValueError that names file and key."""
    return parse(Path(path).read_bytes(), str(path))


def parse(text: str | bytes, name: str) -> PublishedConfig:
    """The configuration in a text; ``name`` is for messages."""
    try:
        given = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply to be a configuration") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{name} is a {type(given).__name__}; accepted: an object of {_known()}")
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        shown = ", ".join(repr(key[:80]) for key in unknown[:5])
        raise ValueError(f"{name}: unknown key {shown}; known are {_known()}")
    missing = [key for key in NEEDED if key not in given]
    if missing:
        raise ValueError(f"{name}: missing {', '.join(missing)}; known are {_known()}")
    for key, value in given.items():
        _check(f"{name}: {key}", key, value)
    config = PublishedConfig(**given)
    if config.moe_frequency > config.num_layers:
        raise ValueError(
            f"{name}: moe_frequency is {config.moe_frequency}, so none of num_layers "
            f"{config.num_layers} has experts; accepted: 1..{config.num_layers}"
        )
    return config


def _known() -> str:
    return ", ".join(KEYS)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        raise ValueError("a key is there twice")
    return given


def _check(what: str, key: str, value: Any) -> None:
    if key == "capacity_factor":
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not 0 < value <= MOST:
            raise ValueError(f"{what} is {_shown(value)}; accepted: a number above 0")
        return
    least, most = BOUNDS.get(key, (1, MOST))
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{what} is {_shown(value)}; accepted: an integer of {least}..{most}")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except ValueError:  # more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 40 else text[:37] + "..."
