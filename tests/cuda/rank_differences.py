"""Outputs of several ranks compared bit by bit without a wait of the host."""

from __future__ import annotations

import torch


class Differences:
    """Counts, on the GPUs, outputs that are not what they should be."""

    def __init__(self, ranks=2):
        devices = [torch.device("cuda", rank) for rank in range(ranks)]
        self.counts = [torch.zeros(1, dtype=torch.int64, device=device) for device in devices]

    def add(self, made, expected):
        """Lists of outputs of all ranks, each on its GPU."""
        for rank, pair in enumerate(zip(made, expected, strict=True)):
            self.add_rank(rank, *pair)

    def add_rank(self, rank, made, expected):
        for one, other in zip(made, expected, strict=True):
            self.counts[rank] += (one.view(torch.uint8) != other.view(torch.uint8)).any()

    def total(self):
        """Of each rank; waits for its GPU."""
        return [int(count) for count in self.counts]
