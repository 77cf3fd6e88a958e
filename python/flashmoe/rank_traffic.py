"""What an expert-parallel exchange moves between ranks, counted from the routing.

A token travels to a rank once, however many of its experts live there, and that rank sends one sum
back. Without that (one row a slot, there and back) is what most other layers send.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# What the CUDA engine tells every rank of each slot, and of each of its experts, and what its
# backward sends home of each slot (src/cuda/config/ranks.h: RankSlot, counts, slot gradients).
# Flags, a byte a token, are not counted.
SLOT_BYTES = 8
COUNT_BYTES = 4
SLOT_GRAD_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """The exchange of one launch of W ranks. A forward sends tokens, a backward tokens and
    gradients of y; both get a sum a row back, a backward also a number a slot.

    rows[source][owner]: token rows that go from a source to an owner of experts, its own included;
    rows_plain: the same with a row for every slot. tokens: of each rank.
    """

    rows: list[list[int]]
    rows_plain: list[list[int]]
    tokens: list[int]
    top_k: int
    experts: int
    row_bytes: int
    backward: bool = False

    @property
    def world(self) -> int:
        return len(self.rows)

    def expert_rows(self) -> list[int]:
        """Rows that the experts of each rank compute."""
        return [sum(column) for column in zip(*self.rows_plain, strict=True)]

    def rows_sent(self, plain: bool = False) -> int:
        """Rows that leave their rank on the way to experts, over all ranks."""
        rows = self.rows_plain if plain else self.rows
        return sum(map(sum, rows)) - sum(rows[rank][rank] for rank in range(self.world))

    def load_most_over_mean(self) -> float:
        """Rows of the rank that computes most over the mean."""
        rows = self.expert_rows()
        return max(rows) * len(rows) / sum(rows)

    def link_bytes(self, plain: bool = False) -> list[list[int]]:
        """[from][to]: rows to experts, sums (plain: rows) and gradients of slots back, and
        metadata; 0 on the diagonal."""
        rows = self.rows_plain if plain else self.rows
        kinds = 2 if self.backward else 1

        def sent(rank: int, peer: int) -> int:
            slot_grads = self.rows_plain[peer][rank] * SLOT_GRAD_BYTES if self.backward else 0
            num_rows = kinds * rows[rank][peer] + rows[peer][rank]
            return num_rows * self.row_bytes + slot_grads + self.metadata(rank)

        ranks = range(self.world)
        return [[0 if rank == peer else sent(rank, peer) for peer in ranks] for rank in ranks]

    def bytes_sent(self, plain: bool = False) -> int:
        """Bytes on the links, over all ranks."""
        return sum(map(sum, self.link_bytes(plain)))

    def metadata(self, rank: int) -> int:
        """Bytes of slots and counts that a rank tells each other rank."""
        local_experts = self.experts // self.world
        return self.tokens[rank] * self.top_k * SLOT_BYTES + local_experts * COUNT_BYTES


def traffic_of(
    topk_ids: list[torch.Tensor], experts: int, row_bytes: int, backward: bool = False
) -> Traffic:
    """The exchange of a launch whose ranks have chosen `topk_ids`, [T, k] each; an id that is no
    expert (-1) goes nowhere. row_bytes: of a token's row."""
    world = len(topk_ids)
    local = experts // world
    rows, rows_plain = [], []
    for ids in topk_ids:
        owners = torch.where((ids >= 0) & (ids < experts), ids // local, world)
        goes_to = [owners == owner for owner in range(world)]
        rows.append([int(slots.any(-1).sum()) for slots in goes_to])
        rows_plain.append([int(slots.sum()) for slots in goes_to])
    tokens = [len(ids) for ids in topk_ids]
    return Traffic(rows, rows_plain, tokens, topk_ids[0].shape[-1], experts, row_bytes, backward)


def overlap(fused_us: float, compute_us: float, communication_us: float) -> float:
    """Share of the shorter of compute and communication that the launch hides behind the longer
    one: 1 hides all of it, 0 is one after the other."""
    shorter = min(compute_us, communication_us)
    return (communication_us + compute_us - fused_us) / shorter if shorter > 0 else 0.0
