"""Keeps the experts of the byte-level transformer balanced without an auxiliary loss.

    python examples/train_balance.py [--steps N] [--small] [--ranks N] [--rate R]
                                     [--out FILE.png] [--json]

After every step, each expert that got fewer slots than the mean has its selection bias raised by
--rate, each that got more lowered (Wang et al. 2024, arXiv 2408.15664): the bias decides which
experts are chosen, and never enters their weights. The same model is trained with and without it.

The loop is that of Megatron: a batch is cut into microbatches, of which two are in flight; weight
gradients are left out of the backward and computed after it (`backward_dw`), added up in fp32
(`main_grad`); the tokens per expert of all microbatches and ranks go into one update of the bias.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import flashmoe
import torch
import torch.nn.functional as F
from train_bytes import (
    BITS,
    LARGE,
    SMALL,
    ByteModel,
    Curve,
    Rank,
    Sizes,
    mean_of_last,
    read_text,
    sum_gradients,
    train,
    windows,
)

MICROBATCHES = 4
MOE = partial(
    flashmoe.MoE,
    routing=flashmoe.Routing(score="sigmoid"),
    selection_bias=True,
    delay_wgrad=True,
)


# ---- training ---------------------------------------------------------------------------------


def step_gradients(model: ByteModel, batch: torch.Tensor, tokens: int) -> tuple[float, list]:
    """The gradients of one batch [B, context + 1], two microbatches in flight: its part of the mean
    loss over `tokens`, and the slots per expert of every layer."""
    layers = [block.moe for block in model.blocks]
    counts = [torch.zeros(layer.num_experts, dtype=torch.int64) for layer in layers]
    total, in_flight = 0.0, []

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        for layer in reversed(layers):
            layer.backward_dw()

    for part in batch.chunk(MICROBATCHES):
        logits, routings = model(part[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        in_flight.append(loss / tokens)
        total += in_flight[-1].item()
        for count, routing in zip(counts, routings, strict=True):
            count += routing.tokens_per_expert
        if len(in_flight) == 2:
            backward(in_flight.pop(0))
    backward(in_flight.pop())
    return total, counts


def train_rank(
    model: ByteModel,
    batches: torch.Tensor,
    sizes: Sizes,
    place: Rank,
    on_step: Callable[[], None],
    rate: float,
) -> tuple[list[float], list[list[int]]]:
    """Trains on this rank's part of all batches: losses, and slots per expert of the last layer."""
    layers = [block.moe for block in model.blocks]
    weights = [weight for layer in layers for weight in (layer.w_up, layer.w_down)]
    for weight in weights:
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, eps=1e-6)
    share = sizes.batch // place.world
    losses, all_counts = [], []
    for batch in batches:
        optimizer.zero_grad()
        for weight in weights:
            weight.main_grad.zero_()
        mine = batch[place.rank * share : (place.rank + 1) * share]
        loss, counts = step_gradients(model, mine, sizes.tokens)
        sum_gradients(model, place)
        for weight in weights:
            weight.grad = weight.main_grad
        optimizer.step()
        counts = [place.sum(count) for count in counts]
        for layer, count in zip(layers, counts, strict=True):
            layer.update_selection_bias(count, rate)
        losses.append(place.sum(torch.tensor(loss)).item())
        all_counts.append(counts[-1].tolist())
        on_step()
    return losses, all_counts


# ---- report -----------------------------------------------------------------------------------


def violations(curve: Curve) -> list[float]:
    """By how much the fullest expert is above the mean, by step: max / mean - 1."""
    counts = torch.tensor(curve.counts, dtype=torch.float64)
    return (counts.amax(1) / counts.mean(1) - 1).tolist()


def summary(curves: list[Curve], rate: float) -> dict:
    """The result as --json prints it: losses in bits per byte, means of the last twentieth."""
    return {
        "steps": len(curves[0].losses),
        "rate": rate,
        "runs": [
            {
                "name": curve.name,
                "final_loss": mean_of_last(curve.losses) * BITS,
                "final_violation": mean_of_last(violations(curve)),
                "slots_per_expert": curve.counts[-1],
                "seconds": round(curve.seconds, 2),
            }
            for curve in curves
        ],
    }


COLOURS = ("#d9822b", "#1f5fae")


def draw(curves: list[Curve], path: Path) -> None:
    """A picture of the fullest expert, the loss, and the share of every expert in each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplot_mosaic(
        [["fullest", "first"], ["loss", "second"]], figsize=(11, 5.6), layout="constrained"
    )
    for curve, colour in zip(curves, COLOURS, strict=True):
        axes["fullest"].plot(violations(curve), color=colour, lw=1.2, label=curve.name)
        losses = [loss * BITS for loss in curve.losses]
        axes["loss"].plot(losses, color=colour, lw=1.2, label=curve.name)
    axes["fullest"].set_ylim(bottom=0)
    axes["fullest"].set_ylabel("max / mean - 1")
    axes["fullest"].set_title("Slots of the fullest expert", loc="left", weight="bold")
    axes["fullest"].legend(frameon=False)
    axes["loss"].set_ylabel("bits per byte")
    axes["loss"].set_xlabel("step")
    axes["loss"].set_title("Loss", loc="left", weight="bold")
    for place, curve in zip(("first", "second"), curves, strict=True):
        draw_shares(axes[place], curve)
    axes["second"].set_xlabel("step")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_shares(axis, curve: Curve) -> None:
    from matplotlib import colormaps

    counts = torch.tensor(curve.counts, dtype=torch.float64)
    shares = (counts / counts.sum(1, keepdim=True) * 100).T
    colours = colormaps["viridis"](torch.linspace(0.1, 0.95, len(shares)).tolist())
    axis.stackplot(range(len(curve.counts)), shares, colors=colours, ec="white", lw=0.3)
    axis.set(xlim=(0, len(curve.counts) - 1), ylim=(0, 100), ylabel="share of the slots, %")
    axis.set_title(f"Experts of the last layer, {curve.name}", loc="left", weight="bold")


def main() -> int:
    parser = argparse.ArgumentParser(description="Loss-free balancing on a small MoE model.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--small", action="store_true", help="a model for a few seconds")
    parser.add_argument("--ranks", type=int, default=2, help="default: 2")
    parser.add_argument("--rate", type=float, default=0.01, help="of the bias; default: 0.01")
    parser.add_argument("--out", type=Path, default=Path("train_balance.png"), help="the picture")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = SMALL if options.small else LARGE
    ranks = options.ranks
    if ranks < 1 or sizes.experts % ranks or sizes.batch % (ranks * MICROBATCHES):
        parser.error(f"--ranks {ranks}: accepted are 1 and 2")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: accepted is 1 or more")

    batches = windows(read_text(sizes.text_bytes), sizes, options.steps)
    curves = []
    for name, rate in (("no balancing", 0.0), ("selection bias", options.rate)):
        loop = partial(train_rank, rate=rate)
        curves.append(train(name, ranks, batches, sizes, torch.float32, MOE, loop))
    result = summary(curves, options.rate)
    draw(curves, options.out)
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{result['steps']} steps on {ranks} ranks; means over the last twentieth of them")
    for run in result["runs"]:
        print(
            f"{run['name']:16} loss {run['final_loss']:.4f} bits per byte, fullest expert "
            f"{run['final_violation']:+.1%} above the mean, {run['seconds']:.1f} s"
        )
    print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
