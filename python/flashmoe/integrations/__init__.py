"""FlashMoE inside other libraries. Each module is imported by name and changes nothing until its
``register()`` is called."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'flashmoe.integrations' has no attribute '{name}'")
    return import_module(f".{name}", __name__)
