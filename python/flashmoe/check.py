"""`flashmoe check`: the case table against the reference.

Every case runs twice, the second time on one thread a rank and (W > 1) with random delays, on CUDA
on a few multiprocessors; both runs must agree in every bit. The first is compared with the
reference (`compare`), which runs on the same device.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch

from . import _core, compare, errors, local_group
from .cases import CASES, CUDA_DTYPES, select
from .defects import spoil
from .inputs import DTYPES, make_operands, on_device
from .passes import call_layer, engine_pass, on_all_ranks, rank_call, reference_pass

JITTER_US = 20  # longest random delay before a task in the second run
FEW_SMS = 6  # multiprocessors of the second run on CUDA


@dataclass
class Record:
    """The outcome of one case: an object of `flashmoe check --json`."""

    case: str
    dtype: str
    ranks: int
    mode: str  # values, gradients or support
    status: str = "passed"  # passed, failed or skipped
    reason: str = ""  # first mismatch, or what a skipped case misses
    error_ratio: float | None = None  # of the output that is nearest to its bar
    bar: float | None = None
    output: str = ""  # that output
    bitwise: bool | None = None  # the second run gave the same bits
    flips: int = 0  # tokens whose near-tied choice rounding decided otherwise than in fp64
    seconds: float = 0.0
    device: str = "cpu"
    outputs: dict = field(default_factory=dict)  # name -> error, yardstick, ratio, bar

    def fail(self, reason):
        """Marks the case as failed; the first reason stays."""
        self.status = "failed"
        self.reason = self.reason or reason


class GroupPool:
    """Groups of ranks as threads, kept from case to case; one that failed is replaced."""

    def __init__(self):
        self.groups = {}

    def get(self, ranks):
        """The groups of `ranks` ranks, with automatic threads, all multiprocessors, no jitter."""
        if ranks not in self.groups:
            self.groups[ranks] = local_group(ranks)
        return self.tuned(ranks, num_threads=0, max_sms=0, jitter_us=0)

    def tuned(self, ranks, **values):
        """The same groups with options set."""
        for group in self.groups[ranks]:
            for key, value in values.items():
                group.set(key, value)
        return self.groups[ranks]

    def drop(self, ranks):
        """Closes the groups of `ranks` ranks; what they failed with has its record."""
        for group in self.groups.pop(ranks, []):
            with suppress(errors.FlashMoEError):
                group.close()

    def close(self):
        """Closes all groups."""
        for ranks in list(self.groups):
            self.drop(ranks)


def run_checks(pattern="*", *, gradients=False, ranks=None, dtype=None, device="cpu"):
    """Yields a `Record` for every case that `pattern` names, as soon as it is done.

    `gradients`: forward and backward instead of forward and refusals. `ranks`, `dtype`: instead of
    the case's own. `device`: "cpu" or "cuda".
    """
    pool = GroupPool()
    torch_threads = torch.get_num_threads()
    # the reference's operators are tiny here: waking threads for them would take most of the time
    torch.set_num_threads(1)
    try:
        for mode, case, one_dtype, num_ranks in planned(pattern, gradients, ranks, dtype, device):
            record = Record(case.name, one_dtype, num_ranks, mode, device=device)
            missing = missing_for(case, one_dtype, num_ranks, device)
            if missing:
                record.status, record.reason = "skipped", missing
            else:
                check_case(case, record, pool)
            yield record
    finally:
        torch.set_num_threads(torch_threads)
        pool.close()


def planned(pattern="*", gradients=False, ranks=None, dtype=None, device="cpu"):
    """(mode, case, dtype, ranks) of every check that `run_checks` makes."""
    modes = ("gradients",) if gradients else ("values", "support")
    if device == "cpu":
        return [(mode, *chosen) for mode in modes for chosen in select(pattern, mode, ranks, dtype)]
    return [
        (mode, case.on_ranks(ranks or 1).on_cuda(), one, ranks or 1)
        for mode in modes
        for case in CASES
        if mode in case.modes
        for one in ((dtype,) if dtype else cuda_dtypes(case))
        if fnmatchcase(case.name, pattern) or fnmatchcase(case.key(one, ranks or 1), pattern)
    ]


def cuda_dtypes(case):
    """The dtypes of a case on CUDA: its own 16-bit ones, bf16 where it has none."""
    return [name for name in case.dtypes if name in CUDA_DTYPES] or ["bf16"]


def missing_for(case, dtype, ranks, device):
    """What a case needs and does not have; "" if it can run."""
    if device == "cuda" and (missing := missing_on_cuda(case, dtype, ranks)):
        return missing
    if case.refused:
        return "" if ranks in case.ranks else f"needs {' or '.join(map(str, case.ranks))} ranks"
    if case.save_z and ranks > 1 and device == "cpu":
        return "saving Z on the CPU needs one rank"
    if case.ids == "one_rank" and ranks == 1:
        return "needs more than one rank"
    return ""


def missing_on_cuda(case, dtype, ranks):
    """What a case needs and the CUDA engine does not have; "" if it can run."""
    if not torch.cuda.is_available():
        return "no CUDA device that torch can use (cuda)"
    if "built without CUDA" in _core.build_info():
        return "no CUDA engine in this build (cuda)"
    if ranks > torch.cuda.device_count():
        return f"needs {ranks} GPUs, a rank each"
    if ranks > 1 and case.refused:
        return "a refusal of one of several ranks on CUDA ends its group"
    if dtype not in CUDA_DTYPES:
        return f"the CUDA engine takes {' and '.join(CUDA_DTYPES)}"
    return ""


def check_case(case, record, pool):
    """Runs one case and fills its record."""
    start = time.perf_counter()
    try:
        judge = {"isolated_nan": check_isolated_nan}.get(case.probe, check_compared)
        judge = check_refused if case.refused else judge
        judge(case, record, pool)
        for group in pool.get(record.ranks):
            settle(group, record.device)
    except Exception as error:  # whatever a case raises is its failure, not the run's
        record.fail(f"{type(error).__name__}: {error}")
        pool.drop(record.ranks)
    record.seconds = time.perf_counter() - start


def settle(group, device):
    """Raises what a launch on CUDA reported; on the CPU its call has done so."""
    if device == "cuda":
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
        group.stats()


def operands_of(case, tokens, record, seed=0):
    """Operands on the record's device."""
    return on_device(make_operands(case, tokens, record.dtype, seed=seed), record.device)


def check_compared(case, record, pool):
    """Values, and in gradients mode gradients, against the reference; twice the same bits."""
    gradients = record.mode == "gradients"
    dtype = DTYPES[record.dtype]
    tallies = {}
    record.bitwise = True
    for step, tokens in enumerate(case.steps(record.ranks)):
        operands = operands_of(case, tokens, record, step)
        first = engine_pass(case, operands, record.dtype, pool.get(record.ranks), gradients)
        jitter_us = JITTER_US if record.ranks > 1 else 0
        few = {"num_threads": 1, "max_sms": FEW_SMS}
        groups = pool.tuned(record.ranks, jitter_us=jitter_us, **few)
        second = engine_pass(case, operands, record.dtype, groups, gradients)
        compare_bits(record, first.outputs, second.outputs)
        topk_ids = operands.topk_ids
        if case.fused_router:
            topk_ids = [routed.topk_ids for routed in first.routed]
            check_routing(case, record, operands, first.routed, dtype)
            if record.status == "failed":
                return
        oracle = reference_pass(case, operands, topk_ids, torch.float64, gradients, mirrored=True)
        plain = reference_pass(case, operands, topk_ids, dtype, gradients)
        compare.tally(tallies, case, topk_ids, first.outputs, oracle, plain)
    conclude(record, tallies)


def conclude(record, tallies):
    """Fills the record from the tallies of its outputs."""
    record.outputs = {name: one.record() for name, one in tallies.items()}
    nearest = max(tallies.values(), key=lambda one: one.ratio / one.bar)
    record.error_ratio, record.bar, record.output = nearest.ratio, nearest.bar, nearest.name
    for name, one in tallies.items():
        if not one.passed:
            record.fail(f"{name}: {one.reason}")


def compare_bits(record, first, second):
    """Fails the record unless two runs agree in every bit."""
    for name, parts in first.items():
        for rank, part in enumerate(parts):
            if not same_bits(part, second[name][rank]):
                record.bitwise = False
                record.fail(f"{name} of entry {rank} differs between two runs on the same inputs")


def same_bits(one, other):
    """Whether two float tensors are equal bit by bit (NaN too; 0 and -0 differ)."""
    raw = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.contiguous().view(raw), other.contiguous().view(raw))


def check_routing(case, record, operands, routed, dtype):
    """Ids against the oracle's selection, counts and drops against the ids."""
    flips, problem = compare.id_problem(case, operands, [one.topk_ids for one in routed], dtype)
    record.flips += flips
    if problem:
        record.fail(problem)
    for rank, one in enumerate(routed):
        problem = compare.count_problem(case, one)
        if problem:
            record.fail(f"rank {rank}: {problem}")


def check_isolated_nan(case, record, pool):
    """A token of NaN and one of inf: their own output rows are not finite, every other token's is
    bitwise unchanged."""
    operands = operands_of(case, case.steps(record.ranks)[0], record)
    groups = pool.get(record.ranks)
    clean = engine_pass(case, operands, record.dtype, groups, False).outputs["y"]
    poisoned = [x.clone() for x in operands.x]
    places = ((0, 5, float("nan")), (record.ranks - 1, 9, float("inf")))
    for rank, token_idx, value in places:
        poisoned[rank][token_idx] = value
    spoiled = replace(operands, x=poisoned)
    y = engine_pass(case, spoiled, record.dtype, groups, False).outputs["y"]
    for rank, token_idx, value in places:
        if y[rank][token_idx].isfinite().any():
            record.fail(f"y: token {token_idx} of rank {rank} is {value} in x and finite in y")
        y[rank][token_idx] = clean[rank][token_idx]
    other_tokens = "y of a token beside NaN and inf"
    compare_bits(record, {other_tokens: clean}, {other_tokens: y})
    record.bitwise = record.status == "passed"


def check_refused(case, record, pool):
    """A wrong call: every rank raises an expected error that names what is wrong, and the group
    works afterwards."""
    ranks, dtype = record.ranks, record.dtype
    groups = pool.get(ranks)
    operands = operands_of(case, case.steps(ranks)[0], record)
    calls = [
        spoil(case, rank_call(case, operands, dtype, rank, ranks, group), rank, ranks, group)
        for rank, group in enumerate(groups)
    ]

    def answer_of(rank):
        answer = call_layer(calls[rank])
        settle(groups[rank], record.device)
        return answer

    answers = on_all_ranks(answer_of, ranks)
    for rank, answer in enumerate(answers):
        kinds = {kind.__name__ for kind in type(answer).__mro__}
        if not kinds & set(case.refused):
            shown = f"{type(answer).__name__}: {answer}" if isinstance(answer, Exception) else "y"
            record.fail(f"rank {rank} gave {shown}, expected {' or '.join(case.refused)}")
    text = " ".join(str(answer) for answer in answers if isinstance(answer, Exception))
    for word in case.mentions:
        if word not in text:
            record.fail(f"the message does not name {word!r}: {text}")
    check_group_works(record, groups)


def check_group_works(record, groups):
    """Fails the record unless a correct call succeeds on the groups."""
    ranks = len(groups)
    case = next(case for case in CASES if case.name == "ranks/many")
    case = replace(case, experts=2 * ranks, top_k=2)
    operands = operands_of(case, case.steps(ranks)[0], record)
    try:
        engine_pass(case, operands, record.dtype, groups, False)
    except (errors.FlashMoEError, ValueError, TypeError) as error:
        raise RuntimeError(f"after the refusal a correct call fails: {error}") from error
