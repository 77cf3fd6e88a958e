"""A small layer on the GPU beside the CPU engine's: what `flashmoe doctor` tries."""

from __future__ import annotations

from statistics import median

import torch

from ._core import build_info
from .functional import moe
from .gpu_timing import microseconds, timed
from .group import local_group

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 256, 512, 256, 8, 2
HOPPER = (9, 0)
LAUNCHES = 21
# The engines round the same products to bf16 (2^-9); near-tied experts may be chosen otherwise.
MOST_ERROR = 0.01
LEAST_SAME_IDS = 0.95


def missing() -> str:
    """Why no layer can be tried on a GPU here; "" if one can."""
    if "built without CUDA" in build_info():
        return "this build has no CUDA part"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, not {HOPPER}"
    return ""


def operands() -> list[torch.Tensor]:
    """x, w_router, w_up and w_down in bf16, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    return [
        normal(TOKENS, HIDDEN),
        normal(EXPERTS, HIDDEN, scale=HIDDEN**-0.5),
        normal(EXPERTS, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5),
        normal(EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5),
    ]


@torch.no_grad()
def compare(device: str) -> tuple[float, float]:
    """(share of tokens with the CPU's experts, relative error of their y against the CPU's)."""
    y, routed = moe(*operands(), top_k=TOP_K)
    [group] = local_group(1)
    with group:
        moved = [tensor.to(device) for tensor in operands()]
        y_there, routed_there = moe(*moved, top_k=TOP_K, group=group)
        group.stats()
    same = (routed_there.topk_ids.cpu() == routed.topk_ids).all(-1)
    ours, expected = y_there.cpu()[same].double(), y[same].double()
    return float(same.double().mean()), float((ours - expected).norm() / expected.norm())


@torch.no_grad()
def time_us() -> float:
    """Microseconds of a launch on the GPU, the median of a few."""
    moved = [tensor.cuda() for tensor in operands()]
    [group] = local_group(1)
    with group:

        def run() -> None:
            moe(*moved, top_k=TOP_K, group=group)

        run()
        return float(median(microseconds([timed(run) for _ in range(LAUNCHES)])))


def check(device: str = "cuda") -> str:
    """Tries the layer; how it went, as text. Raises AssertionError where it is wrong."""
    same, error = compare(device)
    if not (same >= LEAST_SAME_IDS and error <= MOST_ERROR):
        raise AssertionError(
            f"a layer on the GPU is not the CPU's: {same:.1%} of the tokens have the same experts, "
            f"relative error {error:.2g} (at least {LEAST_SAME_IDS:.0%}, at most {MOST_ERROR})"
        )
    return (
        f"{torch.cuda.get_device_name()}: a layer (T {TOKENS}, H {HIDDEN}, I {INTERMEDIATE}, "
        f"E {EXPERTS}, k {TOP_K}, bf16) is the CPU's to {error:.1g} and takes {time_us():.0f} us"
    )
