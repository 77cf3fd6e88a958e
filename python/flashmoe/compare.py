"""Measures what the engine returned against the oracle, with plain PyTorch as the yardstick.

The error ratio of an output is the norm of (ours - oracle) over the norm of (plain - oracle),
pooled over ranks and steps. It must be at most `RATIO_BAR`, see `Tally.bar` for outputs of few
elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from . import reference
from .passes import wide_dtype

RATIO_BAR = 1.25

# axes of every output, for messages; those of PER_RANK come from each rank separately
AXES = {
    "y": ("token", "hidden"),
    "topk_weights": ("token", "slot"),
    "logits": ("token", "expert"),
    "grad_x": ("token", "hidden"),
    "grad_topk_weights": ("token", "slot"),
    "grad_w_router": ("expert", "hidden"),
    "grad_router_bias": ("expert",),
    "grad_w_gate": ("expert", "intermediate", "hidden"),
    "grad_w_up": ("expert", "intermediate", "hidden"),
    "grad_w_down": ("expert", "hidden", "intermediate"),
    "grad_b_gate": ("expert", "intermediate"),
    "grad_b_up": ("expert", "intermediate"),
    "grad_b_down": ("expert", "hidden"),
}


def id_problem(case, operands, topk_ids, dtype):
    """(tokens whose choice differs from the oracle's, problem or None) for ids of every rank.

    A different choice is allowed where rounding decides: the ids must be what the oracle chooses
    when every selection score may move by the rounding error of fp32 routing (fp64 for an fp64
    layer) in the engine's favour. Logits that are bit-equal by construction must give the
    oracle's ids.
    """
    flips = 0
    for rank, ids in enumerate(topk_ids):
        ours, best, consistent = judged_choice(case, operands, operands.x[rank], ids, dtype)
        differs = (ours != best).any(-1)
        wrong = ~consistent | (differs if case.exact_ids else torch.zeros_like(differs))
        if wrong.any():
            token_idx = int(wrong.nonzero()[0])
            return flips, (
                f"topk_ids of token {token_idx} on rank {rank} are {ids[token_idx].tolist()}, "
                f"the reference chooses {best[token_idx].tolist()}"
            )
        flips += int((ours.sort(-1).values != best.sort(-1).values).any(-1).sum())
    return flips, None


def count_problem(case, routed):
    """What is wrong with the counts of a RoutingResult, given its ids; "" if nothing."""
    ids = routed.topk_ids
    counts = torch.bincount(ids.flatten(), minlength=case.experts)
    kept = reference.kept_slots(ids, case.experts, case.capacity_factor)
    dropped = ids.numel() - int(kept.sum())
    if not torch.equal(routed.tokens_per_expert, counts):
        return f"tokens_per_expert {routed.tokens_per_expert.tolist()}, expected {counts.tolist()}"
    if int(routed.dropped) != dropped:
        return f"dropped {int(routed.dropped)}, expected {dropped}"
    return ""


def judged_choice(case, operands, x, topk_ids, dtype):
    """(ids [T, k], the oracle's ids [T, k], whether the ids are a possible choice [T])."""
    routing, bias = case.routing, operands.selection_bias
    logits = reference.router_logits(x, operands.w_router, operands.router_bias)
    best = reference.choose(reference.selection_scores(logits, routing, bias), case.top_k)
    ids = topk_ids.to(torch.int64)
    inside = ((ids >= 0) & (ids < case.experts)).all(-1)
    ids = ids.clamp(0, case.experts - 1)
    taken = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, True)
    distinct = taken.sum(-1) == case.top_k

    margin = selection_margin(case, operands, x, logits, dtype)
    plain = reference.scores(logits, routing.score)
    plain = plain if bias is None else plain + bias
    favoured = torch.where(taken, plain + margin, plain - margin)
    if routing.num_groups > 1:
        favoured = within_favoured_groups(favoured, taken, routing)
    chosen = torch.zeros_like(taken).scatter(-1, reference.choose(favoured, case.top_k), True)
    of_ids, slack = plain.gather(-1, ids), margin.gather(-1, ids)
    ordered = (of_ids.diff(dim=-1) <= slack[..., 1:] + slack[..., :-1]).all(-1)
    return topk_ids, best, inside & distinct & ordered & (chosen == taken).all(-1)


def within_favoured_groups(favoured, taken, routing):
    """-inf outside the groups that are eligible when scores move in the engine's favour."""
    group_scores = reference.group_scores(favoured, routing)
    eligible = reference.eligible_groups(group_scores, routing.top_groups)
    members = favoured.shape[-1] // routing.num_groups
    return favoured.masked_fill(~eligible.repeat_interleave(members, dim=-1), -math.inf)


def selection_margin(case, operands, x, logits, dtype):
    """By how much rounding may move each selection score, [T, E].

    A dot product of H terms in precision u is off by at most 6 sqrt(H) u sum|x_i w_i| with
    probability 1 - 3e-8 (Higham and Mary 2019, probabilistic bound with lambda = 6); the score
    functions pass that on with a factor of at most 1/2 (sigmoid, sqrt of softplus) or relatively
    (softmax), and add a few roundings of their own.
    """
    u = torch.finfo(wide_dtype(dtype)).eps / 2
    terms = x.abs() @ operands.w_router.abs().T
    if operands.router_bias is not None:
        terms = terms + operands.router_bias.abs()
    of_logit = 6 * math.sqrt(case.hidden + 1) * u * terms
    score = reference.scores(logits, case.routing.score)
    if case.routing.score == "softmax":
        of_score = score * 2 * of_logit.amax(-1, keepdim=True)
    elif case.routing.score == "topk_softmax":
        of_score = of_logit
    else:
        of_score = of_logit / 2
    bias = 0 if operands.selection_bias is None else operands.selection_bias.abs()
    return of_score + 8 * u * (score.abs() + bias)


@dataclass
class Tally:
    """Squared errors of one output, pooled over ranks and steps, and its worst element."""

    name: str
    ours: float = 0.0
    plain: float = 0.0
    norm: float = 0.0
    half_ulp: float = 0.0  # the error of a correctly rounded result, at most
    samples: int = 0  # independent roundings that the error is made of
    problem: str = ""  # a mismatch that no norm excuses
    worst: str = ""
    worst_error: float = 0.0

    def add(self, rank, ours, oracle, plain, samples, first=0):
        """Adds one tensor [as in AXES]; `ours` and `plain` in their own dtype, `oracle` in fp64.
        first: the number, on the first axis, that the tensor begins with."""
        where = f"rank {rank}: " if rank is not None else ""
        if ours.shape != oracle.shape:
            self.problem = f"{where}shape {list(ours.shape)}, expected {list(oracle.shape)}"
            return
        eps = torch.finfo(ours.dtype).eps
        ours, plain = ours.double(), plain.double()
        self.problem = self.problem or structural_problem(self.name, where, ours, oracle, first)
        error = (ours - oracle).abs().nan_to_num(nan=math.inf)
        norm = squared_norm(oracle)
        self.ours += squared_norm(error)
        self.plain += squared_norm(plain - oracle)
        self.norm += norm
        self.half_ulp += norm * (eps / 2) ** 2
        self.samples += min(samples, int((oracle != 0).sum()))
        if error.numel() and float(error.max()) > self.worst_error:
            self.worst_error = float(error.max())
            at = int(error.argmax())
            self.worst = element(self.name, where, at, ours, oracle, plain, first)

    @property
    def error(self):
        """Relative error of ours in norm; 0 where all is exactly 0."""
        return relative(self.ours, self.norm)

    @property
    def yardstick(self):
        """Relative error of plain PyTorch in norm, at least that of a correctly rounded result."""
        return relative(max(self.plain, self.half_ulp), self.norm)

    @property
    def ratio(self):
        """Error ratio; 0 where ours is exact, infinite where only the yardstick is."""
        return relative(self.ours, max(self.plain, self.half_ulp))

    @property
    def bar(self):
        """What the ratio may be: RATIO_BAR, times what chance may do to a ratio of two norms of n
        roundings each. Its logarithm is Fisher's z, of standard deviation 1/sqrt(n - 1); three of
        them are allowed: 1.26 in all at 1e5 roundings, 1.37 at 1000, 1.69 at 100."""
        return RATIO_BAR * math.exp(3 / math.sqrt(max(self.samples - 1, 1)))

    @property
    def passed(self):
        return not self.problem and self.ratio <= self.bar

    @property
    def reason(self):
        """Why it does not pass."""
        return self.problem or f"error ratio {self.ratio:.3g} above {self.bar:.3g}; {self.worst}"

    def record(self):
        """What `--json` shows of it."""
        return {
            "error": self.error,
            "yardstick": self.yardstick,
            "ratio": self.ratio,
            "bar": self.bar,
        }


def pooled(tallies):
    """One tally of an output from those of all ranks; its texts name the rank."""
    [name] = {one.name for one in tallies}
    whole = Tally(name)
    for what in ("ours", "plain", "norm", "half_ulp", "samples"):
        setattr(whole, what, sum(getattr(one, what) for one in tallies))
    problems = [f"rank {rank}: {one.problem}" for rank, one in enumerate(tallies) if one.problem]
    whole.problem = "; ".join(problems)
    rank, worst = max(enumerate(tallies), key=lambda item: item[1].worst_error)
    whole.worst, whole.worst_error = f"rank {rank}: {worst.worst}", worst.worst_error
    return whole


def squared_norm(tensor):
    """Sum of squares."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


def relative(square, against):
    """Root of a quotient of squares, with 0/0 = 0."""
    if square == 0:
        return 0.0
    return math.sqrt(square / against) if against > 0 else math.inf


def structural_problem(name, where, ours, oracle, first):
    """Rows that must be exactly 0 (tokens without expert, idle experts, dropped slots) and numbers
    that must be finite; "" where all is well."""
    # a router row's gradient may cancel to 0 where rounding leaves a trace
    if oracle.dim() < 2 or not oracle.numel() or "router" in name:
        return ""
    rows = oracle.reshape(-1, 1) if name == "grad_topk_weights" else oracle.flatten(1)
    touched = (ours.reshape(rows.shape) != 0).any(-1) & (rows == 0).all(-1)
    if touched.any():
        row = first + int(touched.nonzero()[0])
        return f"{where}{AXES[name][0]} {row} must be exactly 0 and is not"
    if not ours.isfinite().all() and oracle.isfinite().all():
        return f"{where}not finite"
    return ""


def element(name, where, flat_idx, ours, oracle, plain, first):
    """The coordinate of an element and its values, for a message."""
    coordinate = [int(i) for i in torch.unravel_index(torch.tensor(flat_idx), oracle.shape)]
    coordinate[0] += first
    named = ", ".join(f"{axis} {i}" for axis, i in zip(AXES[name], coordinate, strict=True))
    values = [float(tensor.reshape(-1)[flat_idx]) for tensor in (ours, oracle, plain)]
    return f"{where}{named}: %.9g, reference %.9g, plain PyTorch %.9g" % tuple(values)


def tally(tallies, case, topk_ids, ours, oracle, plain):
    """Adds one step's results (name -> list of tensors) to `tallies` (name -> Tally)."""
    for name, expected in oracle.items():
        one = tallies.setdefault(name, Tally(name))
        if name not in ours:
            one.problem = "missing"
            continue
        samples = independent_samples(case, name, topk_ids)
        for rank, reference_part in enumerate(expected):
            shown = rank if len(expected) > 1 else None
            one.add(shown, ours[name][rank], reference_part, plain[name][rank], samples[rank])


def independent_samples(case, name, topk_ids):
    """How many roundings decide the error of each entry of an output, at most.

    A weight gradient is made of the rows it sums, each with min(H, I) rounded values; whatever the
    gradient of the router weights flows into, of one rounded sum a slot.
    """
    slots = [
        int(reference.kept_slots(ids, case.experts, case.capacity_factor).sum()) for ids in topk_ids
    ]
    of_router = ("grad_topk_weights", "grad_w_router", "grad_router_bias")
    if name in of_router or (name == "grad_x" and case.fused_router):
        return slots
    if name.startswith("grad_") and name != "grad_x":
        return [sum(slots) * min(case.hidden, case.intermediate)]
    return [len(ids) * case.hidden for ids in topk_ids]
