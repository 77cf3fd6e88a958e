"""Trains a small Qwen3-MoE of Hugging Face transformers with each implementation of its experts.

    python benchmarks/transformers_training.py [--device cuda] [--steps N] [--tokens N] [--small]
                                               [--experts NAME ...] [--json]

Every run starts from the same weights (bf16, AdamW) and reads the same tokens. The table has the
median time of a step (forward, backward, optimizer) after the first five, on CUDA by the GPU's
clock, the largest memory that tensors took in a step, and the loss at the start and at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from flashmoe.group import lookup, resolve
from flashmoe.integrations.transformers import register

EXPERTS = ("eager", "grouped_mm", "flashmoe")
WARMUP = 5
VOCABULARY = 256
# The experts of Qwen3-30B-A3B in a model of two layers.
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "head_dim": 128,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
}


@dataclass
class Run:
    """What one implementation of the experts gave."""

    experts: str
    losses: list[float]  # nats per token
    step_ms: float
    peak_bytes: int  # 0 on the CPU


def make_model(sizes: dict[str, int], experts: str, device: str) -> Any:
    """The model with random weights, the same for every implementation."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **sizes,
        num_hidden_layers=2,
        num_key_value_heads=sizes["num_attention_heads"],
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    return model.to(device, torch.bfloat16).train()


class Clock:
    """Times steps: by events of the GPU, whose queue stays full, or by the host's clock."""

    def __init__(self, device: str) -> None:
        self.on_cuda = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def median_ms(self) -> float:
        """Of the steps between marks."""
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        if self.on_cuda:
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(end) for start, end in pairs)
        return statistics.median((end - start) * 1e3 for start, end in pairs)


def train(
    experts: str, sizes: dict[str, int], batches: torch.Tensor, device: str, rate: float
) -> Run:
    """One implementation over all batches [steps, sequences, length]."""
    model = make_model(sizes, experts, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, eps=1e-6)
    clock = Clock(device)
    if clock.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    losses = []
    for step, batch in enumerate(batches):
        if step >= WARMUP:
            clock.mark()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    clock.mark()
    peak = torch.cuda.max_memory_allocated() if clock.on_cuda else 0
    if clock.on_cuda and experts == "flashmoe":  # beside torch's allocator
        peak += lookup(resolve(None)[0]).stats()["scratch_bytes"]
    return Run(experts, torch.stack(losses).tolist(), clock.median_ms(), peak)


def make_batches(steps: int, tokens: int, length: int, device: str) -> torch.Tensor:
    """Token ids [steps, sequences, length] of counting sequences, which a model can learn."""
    generator = torch.Generator().manual_seed(0)
    shape = (steps, max(tokens // length, 1), 1)
    start = torch.randint(VOCABULARY, shape, generator=generator)
    stride = torch.randint(1, 4, shape, generator=generator)
    return ((start + stride * torch.arange(length)) % VOCABULARY).to(device)


def main() -> int:
    parser = argparse.ArgumentParser(description="Step times of a small Qwen3-MoE.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--tokens", type=int, help="of a step; default: 8192, with --small 512")
    parser.add_argument("--small", action="store_true", help="a model for a CPU")
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=EXPERTS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.steps <= WARMUP:
        parser.error(f"--steps {options.steps}: accepted is more than {WARMUP}, the warm-up")
    register()
    sizes, length = (SMALL, 64) if options.small else (LARGE, 1024)
    tokens = options.tokens or (512 if options.small else 8192)
    batches = make_batches(options.steps, tokens, length, options.device)
    rate = 1e-2 if options.small else 1e-3
    runs = [train(name, sizes, batches, options.device, rate) for name in options.experts]
    if options.json:
        print(json.dumps({"tokens": tokens, "runs": [asdict(run) for run in runs]}))
        return 0
    print(f"{'experts':12} {'ms a step':>10} {'peak GiB':>9} {'first loss':>10} {'last':>8}")
    for run in runs:
        print(
            f"{run.experts:12} {run.step_ms:10.2f} {run.peak_bytes / 2**30:9.2f} "
            f"{run.losses[0]:10.4f} {run.losses[-1]:8.4f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
