"""Trains a byte-level mixture-of-experts transformer on the source text of the standard library.

    python examples/train_bytes.py [--steps N] [--small] [--dtype float32|float64|bfloat16]
                                   [--device cuda] [--ranks N ...] [--out FILE.png] [--json]

The same model is trained with a plain PyTorch MoE layer and with flashmoe on 1, 2 and 4
expert-parallel ranks (threads of this process). Each rank holds E / W experts and B / W sequences
of every batch; the dense parameters are on all ranks and their gradients are added up. All four
start from the same parameters and read the same bytes, so their losses differ by rounding alone. It
stays in the last bit of fp32 until one rounding turns the choice of an expert for one token, from
where the runs part slowly: the table says how large the difference is after 10, 30, 100, ... steps.
With --dtype float64 no choice turns, and they stay together to the end (figures: README.md).
With bfloat16, which is the default on CUDA, the experts compute in it; their parameters and all
else are fp32. On CUDA there is one rank unless --ranks says otherwise, and each has a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import flashmoe
import torch
import torch.nn.functional as F
from flashmoe import reference
from torch import nn

SEED = 0
BALANCE = 0.01  # weight of the load-balancing loss
EXPERT_PARAMETERS = ("w_up", "w_down")
BITS = 1 / math.log(2)  # losses are shown in bits per byte


@dataclass(frozen=True)
class Sizes:
    """The model, the batch and how it is trained."""

    width: int = 128
    heads: int = 4
    layers: int = 2
    context: int = 128
    batch: int = 16  # sequences over all ranks
    experts: int = 8
    top_k: int = 2
    inner: int = 128
    text_bytes: int = 8_000_000
    learning_rate: float = 2e-3
    warmup: int = 20

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.batch * self.context


LARGE = Sizes()
SMALL = Sizes(
    width=48,
    heads=2,
    layers=1,
    context=48,
    batch=8,
    inner=48,
    text_bytes=1_000_000,
    learning_rate=6e-3,
    warmup=5,
)


# ---- text -------------------------------------------------------------------------------------


def read_text(most_bytes: int) -> torch.Tensor:
    """Bytes [n] of the standard library's *.py files, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    parts, size = [], 0
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= most_bytes:
            break
    text = b"".join(parts)[:most_bytes]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def unigram_entropy(text: torch.Tensor) -> float:
    """Nats per byte of a model that knows how often each byte occurs, and nothing else."""
    share = torch.bincount(text, minlength=256).double() / len(text)
    return -torch.special.xlogy(share, share).sum().item()


def windows(text: torch.Tensor, sizes: Sizes, steps: int) -> torch.Tensor:
    """Byte windows [steps, batch, context + 1]: inputs and, one further, targets."""
    generator = torch.Generator().manual_seed(SEED)
    last = len(text) - sizes.context - 1
    starts = torch.randint(last, (steps, sizes.batch, 1), generator=generator)
    return text[starts + torch.arange(sizes.context + 1)]


# ---- ranks ------------------------------------------------------------------------------------


class Exchange:
    """Sums over ranks that are threads: always in rank order, so that all get the same bits."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.given: list[torch.Tensor | None] = [None] * world
        self.barrier = threading.Barrier(world, timeout=300)

    def sum(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of what every rank gives; all ranks call it together."""
        if self.world == 1:
            return tensor
        self.given[rank] = tensor
        self.barrier.wait()
        total = torch.stack([part.to(tensor.device) for part in self.given]).sum(0)
        self.barrier.wait()
        return total


@dataclass
class Rank:
    """One rank's place: its group (None: the plain layer or one rank alone) and the sums."""

    rank: int = 0
    world: int = 1
    group: flashmoe.Group | None = None
    exchange: Exchange = field(default_factory=lambda: Exchange(1))
    device: str = "cpu"

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.exchange.sum(self.rank, tensor)


# ---- model ------------------------------------------------------------------------------------


class PlainMoE(flashmoe.MoE):
    """The same parameters; the layer in plain PyTorch, expert by expert."""

    def forward(self, x, return_routing=False):
        y, routing = reference.moe(
            x.flatten(0, -2),
            self.w_router,
            self.w_up,
            self.w_down,
            top_k=self.top_k,
            routing=self.routing,
        )
        return (y.view_as(x), routing) if return_routing else y.view_as(x)


class NarrowMoE(nn.Module):
    """A layer whose rows and experts are bf16; its parameters stay fp32, for the optimizer."""

    def __init__(self, moe: Callable[..., flashmoe.MoE], *sizes: int, **options: Any) -> None:
        super().__init__()
        self.layer = moe(*sizes, **options)

    def forward(
        self, x: torch.Tensor, return_routing: bool
    ) -> tuple[torch.Tensor, flashmoe.RoutingResult]:
        experts = {name: getattr(self.layer, name).bfloat16() for name in EXPERT_PARAMETERS}
        arguments = (x.bfloat16(), return_routing)
        y, routing = torch.func.functional_call(self.layer, experts, arguments)
        return y.to(x.dtype), routing


class Block(nn.Module):
    """Causal attention, then the experts."""

    def __init__(
        self, sizes: Sizes, moe: Callable[..., flashmoe.MoE], group: flashmoe.Group | None
    ) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attention_norm = nn.LayerNorm(sizes.width)
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.project = nn.Linear(sizes.width, sizes.width, bias=False)
        self.moe_norm = nn.LayerNorm(sizes.width)
        self.moe = moe(sizes.width, sizes.inner, sizes.experts, sizes.top_k, group=group)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, flashmoe.RoutingResult]:
        """x [B, S, D] -> the same, and what the router decided."""
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        y, routing = self.moe(self.moe_norm(x), return_routing=True)
        return x + y, routing


class ByteModel(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(
        self, sizes: Sizes, moe: Callable[..., flashmoe.MoE], group: flashmoe.Group | None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, sizes.width)
        self.position = nn.Parameter(torch.randn(sizes.context, sizes.width) * 0.1)
        self.blocks = nn.ModuleList(Block(sizes, moe, group) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, 256)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[flashmoe.RoutingResult]]:
        """tokens [B, S] -> logits [B, S, 256] and the routing of every layer."""
        x = self.embed(tokens) + self.position
        routings = []
        for block in self.blocks:
            x, routing = block(x)
            routings.append(routing)
        return self.head(self.norm(x)), routings


def make_model(
    sizes: Sizes, moe: Callable[..., flashmoe.MoE], place: Rank, dtype: torch.dtype
) -> ByteModel:
    """The model of one rank: the same parameters on any number of ranks, experts cut in shares."""
    if dtype == torch.bfloat16:
        moe, dtype = partial(NarrowMoE, moe), torch.float32
    torch.manual_seed(SEED)
    whole = ByteModel(sizes, moe, None).to(dtype)
    if place.world == 1:
        return whole.to(place.device)
    model = ByteModel(sizes, moe, place.group).to(dtype)
    share = sizes.experts // place.world
    mine = slice(place.rank * share, (place.rank + 1) * share)
    values = {
        name: value[mine] if name.endswith(EXPERT_PARAMETERS) else value
        for name, value in whole.state_dict().items()
    }
    model.load_state_dict(values)
    return model.to(place.device)


# ---- training ---------------------------------------------------------------------------------


@dataclass
class Curve:
    """What one training run leaves: one entry a step."""

    name: str
    ranks: int
    losses: list[float] = field(default_factory=list)  # nats per byte, before the step
    counts: list[list[int]] = field(default_factory=list)  # tokens per expert of the last layer
    seconds: float = 0.0


def balance_loss(routings: Iterable, sizes: Sizes, place: Rank) -> tuple[torch.Tensor, list[int]]:
    """This rank's share of E * sum_e f_e P_e over all layers (f_e: part of the slots that expert e
    got, P_e: its mean probability), and the tokens per expert of the last layer."""
    loss = 0.0
    for routing in routings:
        counts = place.sum(routing.tokens_per_expert)
        share = counts.to(routing.logits.dtype) / (sizes.tokens * sizes.top_k)
        loss = loss + sizes.experts * (share * routing.logits.softmax(-1).sum(0)).sum()
    return loss / sizes.tokens, counts.tolist()


def sum_gradients(model: ByteModel, place: Rank) -> None:
    """Adds up the gradients of what every rank holds. Those of the experts are complete: the layer
    gives a rank the gradient of its experts for the tokens of all ranks."""
    dense = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.endswith(EXPERT_PARAMETERS)
    ]
    total = place.sum(torch.cat([parameter.grad.flatten() for parameter in dense]))
    parts = total.split([parameter.numel() for parameter in dense])
    for parameter, part in zip(dense, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def train_rank(
    model: ByteModel, batches: torch.Tensor, sizes: Sizes, place: Rank, on_step: Callable[[], None]
) -> tuple[list[float], list[list[int]]]:
    """Trains on this rank's part of all batches: losses and tokens per expert of all ranks."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, eps=1e-6)
    warmup, steps = sizes.warmup, len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup, 1.1 - step / steps)
    )
    share = sizes.batch // place.world
    losses, all_counts = [], []
    for batch in batches:
        mine = batch[place.rank * share : (place.rank + 1) * share].to(place.device)
        logits, routings = model(mine[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="sum")
        loss = loss / sizes.tokens
        balance, counts = balance_loss(routings, sizes, place)
        optimizer.zero_grad()
        (loss + BALANCE * balance).backward()
        sum_gradients(model, place)
        optimizer.step()
        schedule.step()
        losses.append(place.sum(loss.detach()).item())
        all_counts.append(counts)
        on_step()
    return losses, all_counts


def device_of(rank: int, device: str) -> str:
    """Where a rank is: on CUDA each has a GPU."""
    return f"cuda:{rank}" if device == "cuda" else device


def train(
    name: str,
    ranks: int,
    batches: torch.Tensor,
    sizes: Sizes,
    dtype: torch.dtype,
    moe: Callable[..., flashmoe.MoE] = flashmoe.MoE,
    loop: Callable[..., tuple[list[float], list[list[int]]]] = train_rank,
    device: str = "cpu",
) -> Curve:
    """One run: `ranks` 0 is the plain layer, else `moe` on so many ranks, each running `loop`."""
    moe, world = (moe, ranks) if ranks else (PlainMoE, 1)
    groups, exchange = [None], Exchange(world)
    if world > 1:
        groups = flashmoe.local_group(world, device=None if device == "cpu" else device)
    places = [
        Rank(rank, world, groups[rank], exchange, device_of(rank, device)) for rank in range(world)
    ]
    models = [make_model(sizes, moe, place, dtype) for place in places]
    done = itertools.count(1)
    show = sys.stderr.isatty()

    def progress() -> None:
        if show:
            print(f"\r{name:24} step {next(done)} of {len(batches)} ", end="", file=sys.stderr)

    def on_rank(rank: int) -> tuple[list[float], list[list[int]]]:
        torch.set_num_threads(1 if world > 1 else threads)
        try:
            quiet = progress if rank == 0 else lambda: None
            return loop(models[rank], batches, sizes, places[rank], quiet)
        except BaseException:
            exchange.barrier.abort()
            raise

    threads = torch.get_num_threads()
    start = time.perf_counter()
    with ThreadPoolExecutor(world) as pool:
        (losses, counts), *_ = list(pool.map(on_rank, range(world)))
    torch.set_num_threads(threads)
    for group in groups:
        if group is not None:
            group.close()
    if show:
        print("\r" + " " * 60, end="\r", file=sys.stderr)
    return Curve(name, ranks, losses, counts, time.perf_counter() - start)


# ---- report -----------------------------------------------------------------------------------


def difference(curve: Curve, plain: Curve, steps: int) -> float:
    """Largest difference of two loss curves over the first steps, in nats per byte."""
    pairs = zip(curve.losses[:steps], plain.losses[:steps], strict=True)
    return max(abs(ours - theirs) for ours, theirs in pairs)


def marks(steps: int) -> list[int]:
    """After how many steps the difference is stated."""
    return [mark for mark in (10, 30, 100) if mark < steps] + [steps]


def mean_of_last(losses: list[float]) -> float:
    """The loss at the end: mean of the last twentieth of the steps."""
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last)


def summary(curves: list[Curve], entropy: float, sizes: Sizes, text_bytes: int) -> dict:
    """The result as --json prints it. Losses in nats per byte."""
    plain, *ours = curves
    steps = len(plain.losses)
    return {
        "steps": steps,
        "tokens_per_step": sizes.tokens,
        "text_bytes": text_bytes,
        "unigram_entropy": entropy,
        "largest_difference": max(difference(curve, plain, steps) for curve in ours),
        "below_entropy": all(mean_of_last(curve.losses) < entropy for curve in curves),
        "runs": [
            {
                "name": curve.name,
                "ranks": curve.ranks,
                "seconds": round(curve.seconds, 2),
                "first_loss": curve.losses[0],
                "final_loss": mean_of_last(curve.losses),
                "difference": {mark: difference(curve, plain, mark) for mark in marks(steps)},
                "losses": curve.losses,
                "tokens_per_expert": curve.counts[-1],
            }
            for curve in curves
        ],
    }


def print_table(result: dict) -> None:
    steps = marks(result["steps"])
    print(
        f"{result['steps']} steps of {result['tokens_per_step']} bytes out of "
        f"{result['text_bytes'] / 1e6:.1f} MB of Python source; losses in bits per byte, "
        "differences to plain PyTorch up to step"
    )
    heads = "".join(f"{step:>10}" for step in steps)
    print(f"{'':24} {'first':>8} {'final':>8} {'seconds':>8} {heads}")
    for run in result["runs"]:
        apart = "".join(f"{run['difference'][step] * BITS:10.1e}" for step in steps)
        first, final = run["first_loss"] * BITS, run["final_loss"] * BITS
        apart = apart if run["ranks"] else ""
        print(f"{run['name']:24} {first:8.4f} {final:8.4f} {run['seconds']:8.1f} {apart}")
    print(f"{'unigram entropy':24} {'':8} {result['unigram_entropy'] * BITS:8.4f}")


# plain PyTorch, then flashmoe on 1, 2 and 4 ranks
COLOURS = ("#b8bcc4", "#1f5fae", "#d9822b", "#2f8f5b")


def draw(curves: list[Curve], entropy: float, path: Path) -> None:
    """A picture of losses, differences and tokens per expert."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplot_mosaic(
        [["loss", "experts"], ["apart", "experts"]],
        figsize=(11, 5.6),
        height_ratios=(2, 1),
        width_ratios=(5, 4),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.06, wspace=0.03)
    draw_losses(axes["loss"], curves, entropy)
    draw_differences(axes["apart"], curves)
    draw_experts(axes["experts"], curves[-1])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_losses(axis, curves: list[Curve], entropy: float) -> None:
    styles = ((7.0, "-"), (2.6, "-"), (1.8, (0, (5, 4))), (1.8, (0, (1.2, 3))))
    for curve, colour, (width, dashes) in zip(curves, COLOURS, styles, strict=False):
        bits = [loss * BITS for loss in curve.losses]
        axis.plot(bits, color=colour, lw=width, ls=dashes, label=curve.name)
    axis.axhline(entropy * BITS, color="#888", lw=1, ls=":")
    axis.annotate(
        f"unigram entropy {entropy * BITS:.2f}",
        (len(curves[0].losses) - 1, entropy * BITS),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color="#666",
    )
    axis.set_ylabel("loss, bits per byte")
    axis.set_title("The losses lie on each other", loc="left", weight="bold")
    axis.tick_params(labelbottom=False)
    axis.legend(frameon=False)


def draw_differences(axis, curves: list[Curve]) -> None:
    plain = curves[0]
    for curve, colour in zip(curves[1:], COLOURS[1:], strict=False):
        apart = [
            abs(ours - theirs) * BITS
            for ours, theirs in zip(curve.losses, plain.losses, strict=True)
        ]
        largest = [value or math.nan for value in itertools.accumulate(apart, max)]
        axis.plot(largest, color=colour, lw=1.6)
    axis.set_yscale("log")
    axis.set_ylabel("bits per byte")
    axis.set_xlabel("step")
    axis.set_title("Largest difference to plain PyTorch so far", loc="left", weight="bold")


def draw_experts(axis, curve: Curve) -> None:
    from matplotlib import colormaps

    counts = torch.tensor(curve.counts, dtype=torch.float64)
    shares = (counts / counts.sum(1, keepdim=True) * 100).T
    colours = colormaps["viridis"](torch.linspace(0.1, 0.95, len(shares)).tolist())
    axis.stackplot(range(len(curve.counts)), shares, colors=colours, ec="white", lw=0.4)
    middles = shares[:, -1].cumsum(0) - shares[:, -1] / 2
    for expert, middle in enumerate(middles.tolist()):
        axis.annotate(
            str(expert),
            (len(curve.counts) - 1, middle),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
        )
    axis.set(xlim=(0, len(curve.counts) - 1), ylim=(0, 100), xlabel="step")
    axis.annotate(
        "expert",
        (1, 1),
        xytext=(-8, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        annotation_clip=False,
    )
    axis.set_ylabel("share of the slots, %")
    axis.set_title(f"Tokens per expert, last layer, {curve.ranks} ranks", loc="left", weight="bold")


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains a small MoE model on Python source.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a model for a few seconds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16"),
        help="default: float32, on CUDA bfloat16",
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="default: 1 2 4, on CUDA 1")
    parser.add_argument("--out", type=Path, default=Path("train_bytes.png"), help="the picture")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    on_cuda = options.device == "cuda"
    dtype = options.dtype or ("bfloat16" if on_cuda else "float32")
    if on_cuda and dtype != "bfloat16":
        parser.error(f"--dtype {dtype}: accepted with --device cuda is bfloat16")
    sizes = SMALL if options.small else LARGE
    if on_cuda and options.small:
        sizes = replace(sizes, width=64, inner=64)  # CUDA takes multiples of 64
    all_ranks = options.ranks or ([1] if on_cuda else [1, 2, 4])
    for ranks in all_ranks:
        if ranks < 1 or sizes.experts % ranks or sizes.batch % ranks:
            parser.error(f"--ranks {ranks}: accepted are divisors of {sizes.experts}")
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: accepted is 1 or more")

    text = read_text(sizes.text_bytes)
    entropy = unigram_entropy(text)
    batches = windows(text, sizes, options.steps)
    run = partial(
        train,
        batches=batches,
        sizes=sizes,
        dtype=getattr(torch, dtype),
        device=options.device,
    )
    curves = [run("plain PyTorch", 0)]
    for ranks in all_ranks:
        curves.append(run(f"flashmoe, {ranks} rank{'s' if ranks > 1 else ''}", ranks))
    result = summary(curves, entropy, sizes, len(text))
    draw(curves, entropy, options.out)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)
        print(f"picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
