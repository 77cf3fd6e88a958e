"""Exceptions of FlashMoE.

A shape, stride or option that is not accepted is a plain ``ValueError``, a dtype or device that is
not accepted a plain ``TypeError``. Everything else is a :class:`FlashMoEError`.
"""

from __future__ import annotations

__all__ = [
    "FlashMoEError",
    "GroupAbortedError",
    "OutOfMemoryError",
    "RankMismatchError",
    "RoutingError",
    "UnsupportedError",
    "WaitTimeoutError",
]


class FlashMoEError(RuntimeError):
    """Base class of the errors below, and the class of an internal error."""


class RoutingError(FlashMoEError, ValueError):
    """Non-finite router logits, or an expert id below -1."""


class RankMismatchError(FlashMoEError, ValueError):
    """The ranks of a group disagree, or a peer refused its call: the text names rank and field."""


class WaitTimeoutError(FlashMoEError, TimeoutError):
    """A bounded wait (``FLASHMOE_TIMEOUT_S``) ran out, or the process of the rank waited for has
    ended: the text names rank, phase and epoch."""


class GroupAbortedError(FlashMoEError):
    """The group was aborted, here or by a peer."""


class UnsupportedError(FlashMoEError, NotImplementedError):
    """Valid, but not supported by this engine, build or mode."""


class OutOfMemoryError(FlashMoEError, MemoryError):
    """The workspace of a launch could not be allocated."""
