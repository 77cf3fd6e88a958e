"""`flashmoe bench --device cuda --direction backward`: the backward of one GPU against cuBLAS.

The reference is torch.bmm of the four products of a backward (dA' = dY W_down, dX = dZ W_up,
dW_down = dY^T (w A), dW_up = dZ^T X) with balanced experts and nothing else. Ours is the whole
backward in one launch, router included, once with the pre-activations Z that the forward kept and
once with Z computed again. Beside them: forward and backward of the whole layer under autograd with
its peers (`backward_peers`), the memory that each holds, and the error of every gradient
(`backward_quality`). Timing is that of `bench_cuda`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from . import backward_peers, backward_quality, bench, bench_cuda, bench_peers, ops
from .bench import OURS
from .check import same_bits
from .gpu_timing import burst, sustained
from .inputs import DTYPES
from .passes import operator_call

REFERENCE = "torch.bmm of the four products"
RECOMPUTED = "ours, Z recomputed"
SAVE_Z = {OURS: True, RECOMPUTED: False}
# case -> (floor, goal) of the ratio with Z kept, T = 8192
TARGETS = {
    "qwen3-30b": (0.78, 0.90),
    "mixtral": (0.88, 0.97),
    "scout": (0.86, 0.95),
    "olmoe": (0.80, 0.92),
    "deepseek-v3-ep8": (0.88, 0.96),
    "seed": (0.72, 0.87),
}


def planned(pattern="*"):
    """The cases with a floor that `pattern` names: globs, separated by commas."""
    return [case for case in bench_cuda.planned(pattern) if case.name in TARGETS]


def run_bench(pattern="*", *, dtype="bf16", seconds=1.0):
    """Yields a record (a dict) for every case. seconds: of each sustained measurement, four a case.

    Raises ValueError without a GPU that the layer can use.
    """
    return bench_cuda.each_case(planned(pattern), bench_case, dtype, seconds)


@torch.no_grad()
def bench_case(case, dtype, group, seconds, ceilings):
    """The record of one case."""
    calls = make_calls(case, DTYPES[dtype], group)
    backwards = {name: make_backward(case, call, group) for name, call in calls.items()}
    quality = measure_quality(case, calls[OURS], backwards)
    torch.cuda.empty_cache()  # what fp64 took: the engine allocates beside torch
    trained = {name: backward_peers.ours(call) for name, call in calls.items()}
    expected = as_leaves(calls[OURS], backwards[OURS].gradients)
    peers, absent = backward_peers.find(case, calls[OURS], expected)
    memory = {name: memory_of(one, group) for name, one in trained.items()}
    memory |= {name: memory_of(one) for name, one in peers.items()}

    cold = bench_cuda.make_flush()
    products = bare_products(case, calls[OURS])
    times, of_launches = measure_launches(case, backwards, products, group, seconds, cold)
    del backwards, products, expected  # gigabytes of gradients
    steps, eager_steps = measure_steps(trained | peers, seconds, cold)
    alone = measure_alone(trained | peers, seconds, cold)
    return {
        **bench.measurement(
            case,
            times,
            REFERENCE,
            direction="backward",
            dtype=dtype,
            quality=quality,
            launches=of_launches.pop("launches"),
            gpu=torch.cuda.get_device_name(),
        ),
        "part": "backward",
        "layout": case.layout,
        **of_launches,
        "step_us": rounded(steps),
        "step_eager_us": rounded(eager_steps),
        "backward_eager_us": rounded(alone),
        "peer_versions": bench_peers.versions(peers),
        "peers_absent": absent,
        "memory": memory,
        **ceilings,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def judged(name, ratio):
    """The floor and the goal of a case, and which of them a ratio meets."""
    floor, goal = TARGETS[name]
    met = "goal" if ratio >= goal else "floor" if ratio >= floor else "no"
    return {"floor": floor, "goal": goal, "met": met}


def rounded(times):
    return {name: round(us, 1) for name, us in times.items()}


# ---- operands and contenders ------------------------------------------------------------------


def make_calls(case, dtype, group, device="cuda"):
    """Name -> call of ours, with Z kept and computed again: the same leaves, which require
    gradients, and an arriving gradient unlike x."""
    call = trained_call(bench_cuda.make_call(case, dtype, group, device))
    return {name: keeping_z(call, save_z) for name, save_z in SAVE_Z.items()}


def trained_call(call, seed=8):
    """The call with leaves that require gradients and an arriving gradient unlike x."""
    generator = torch.Generator(call.x.device).manual_seed(seed)
    grad_y = torch.empty_like(call.x).normal_(generator=generator)
    return backward_peers.differentiable(replace(call, grad_y=grad_y))


def keeping_z(call, save_z):
    """The call with its choice of keeping the pre-activations Z for the backward."""
    return replace(call, options=call.options | {"save_z": save_z})


@dataclass(frozen=True)
class Backward:
    """The backward of one forward, launch by launch into the same gradients."""

    saved: ops.Tensors
    gradients: dict[str, torch.Tensor]
    config: str
    group: str

    def launch(self):
        ops.launch_backward(self.saved, self.gradients, self.config, self.group)

    def run(self):
        """Copies of the gradients of a launch that finds NaN in their place."""
        for gradient in self.gradients.values():
            gradient.fill_(math.nan)
        self.launch()
        return {name: gradient.clone() for name, gradient in self.gradients.items()}


def make_backward(case, call, group):
    """The backward of a call, whose forward runs here."""
    operands, config = operator_call(case, call)
    operands = {name: tensor.detach() for name, tensor in operands.items()}
    text, save_z = config.encode(), call.options["save_z"]
    inputs = [operands.get(name) for name in ops.OPERANDS]
    outputs = dict(zip(ops.OUTPUTS, ops.forward(*inputs, text, group.name, save_z), strict=True))
    kept = ("topk_ids", "topk_weights", "logits", "z")[: 4 if save_z else 3]
    saved = operands | {name: outputs[name] for name in kept} | {"grad_y": call.grad_y}
    needs = [name for name in operands if name in ops.DIFFERENTIABLE]
    return Backward(saved, ops.empty_gradients(saved, needs), text, group.name)


def bare_products(case, call):
    """The four products of a backward, with the same number of rows for every expert."""
    rows = math.ceil(case.tokens[0] * case.top_k / case.experts)
    # [E, in, out], as the forward multiplies them; gradients of weights in the weights' own form
    up, down = (bench_peers.as_matrices(call, name).detach() for name in ("w_up", "w_down"))
    transposed = call.options["transposed"]

    def rows_of(width):
        return call.x.detach().new_empty(case.experts, rows, width).normal_()

    x, dy = rows_of(case.hidden), rows_of(case.hidden)
    dz, a = rows_of(up.shape[2]), rows_of(case.intermediate)

    def weight_gradient(arriving, operand):
        one, other = (operand, arriving) if transposed else (arriving, operand)
        return torch.bmm(one.transpose(1, 2), other)

    def products():
        return (
            torch.bmm(dy, down.transpose(1, 2)),
            torch.bmm(dz, up.transpose(1, 2)),
            weight_gradient(dy, a),
            weight_gradient(dz, x),
        )

    return products


# ---- what is measured -------------------------------------------------------------------------


def measure_quality(case, call, backwards):
    """Error ratios of every gradient (plain PyTorch is 1, both against fp64), bits of two runs, the
    load. What is wrong beyond a ratio (not finite, idle experts not 0) has its reason."""
    made = {name: one.run() for name, one in backwards.items()}
    again = {name: one.run() for name, one in backwards.items()}
    bitwise = {
        variant: all(same_bits(one, again[variant][name]) for name, one in gradients.items())
        for variant, gradients in made.items()
    }
    del again
    ids = backwards[OURS].saved["topk_ids"]
    # the operands' names are those of the leaves; a transposed weight is the operator's view of it
    made = {variant: as_leaves(call, gradients) for variant, gradients in made.items()}
    plain = backward_quality.plain_gradients(case, call, ids)
    found = backward_quality.tallies(case, call, ids, made, plain)
    ratios = {name: backward_quality.ratios_of(tallies) for name, tallies in found.items()}
    failures = {
        f"{variant}, {name}": reason
        for variant, tallies in found.items()
        for name, reason in backward_quality.failures_of(tallies).items()
    }
    counts = torch.bincount(ids.flatten(), minlength=case.experts)
    return {
        "error_ratio": max(ratios[OURS].values()),
        "error_ratios": ratios[OURS],
        "recomputed_error_ratios": ratios[RECOMPUTED],
        "error_failures": failures,
        "error_tokens": case.tokens[0],  # all of them: fp64 goes expert by expert
        "bitwise": bitwise[OURS],
        "recomputed_bitwise": bitwise[RECOMPUTED],
        "load_most_over_mean": round(float(counts.max() / counts.double().mean()), 3),
        "experts_hit": int((counts > 0).sum()),
    }


def as_leaves(call, gradients):
    """Gradients of the operators' operands as those of a call's leaves."""
    turned = call.options["transposed"]
    return {
        name: gradient.swapaxes(1, 2) if turned and name in ops.WEIGHTS else gradient
        for name, gradient in gradients.items()
    }


def measure_launches(case, backwards, products, group, seconds, cold):
    """(microseconds of ours and of the reference, the fields of a record about the launches)."""
    eager = {name: one.launch for name, one in backwards.items()} | {REFERENCE: products}
    launches = bench_cuda.launches_of(eager[OURS])
    graphs = {name: bench_cuda.graphed(one) for name, one in eager.items()}
    medians, clock, power, driver = sustained(graphs, seconds, cold)
    short = burst(graphs, cold)
    phases = {
        name: bench_cuda.measure_phases(eager[name], group, cold) for name in (OURS, RECOMPUTED)
    }
    us, reference_us = medians[OURS], medians[REFERENCE]
    return {OURS: us, REFERENCE: reference_us}, {
        "launches": launches,
        **judged(case.name, reference_us / us),
        "tflops": round(2 * bench_cuda.flops(case) / us / 1e6, 1),
        "burst_us": round(short[OURS], 1),
        "burst_reference_us": round(short[REFERENCE], 1),
        "burst_ratio": round(short[REFERENCE] / short[OURS], 4),
        "recomputed_us": round(medians[RECOMPUTED], 1),
        "recomputed_ratio": round(reference_us / medians[RECOMPUTED], 4),
        "phases_us": phases[OURS],
        "recomputed_phases_us": phases[RECOMPUTED],
        "sm_clock_mhz": clock,
        "power_w": round(power, 1),
        "driver": driver,
    }


def memory_of(trained, group=None):
    """Bytes of one forward and backward beside the operands: held between the two (without y), and
    at most, gradients included. With a group, also of its launches' scratch, which is not torch's
    and which the layers of a model share."""
    trained.step()  # what a first call keeps for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.enable_grad():
        y = trained.layer()
        saved = torch.cuda.memory_allocated() - before - y.nbytes
        scratch = [group.stats()["scratch_bytes"]] if group else [0]
        gradients = torch.autograd.grad(y, list(trained.leaves.values()), trained.grad_y)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    scratch += [group.stats()["scratch_bytes"]] if group else []
    del gradients
    return {
        "saved_bytes": saved,
        "peak_bytes": peak + max(scratch),
        "scratch_bytes": max(scratch),
    }


def measure_steps(trained, seconds, cold):
    """(name -> microseconds of forward and backward as the replay of a graph, where one can be
    captured; name -> of an eager call)."""
    eager = {name: one.step for name, one in trained.items()}
    graphs = {
        name: bench_cuda.graphed(step)
        for name, step in eager.items()
        if name not in bench_peers.EAGER_ONLY
    }
    graphs = {name: one for name, one in graphs.items() if one is not None}
    by_graph, *_ = sustained(graphs, seconds, cold)
    by_call, *_ = sustained(eager, seconds, cold)
    return by_graph, by_call


def measure_alone(trained, seconds, cold):
    """Name -> microseconds of an eager backward by itself, where one forward can have several."""
    backwards = {name: one.backward() for name, one in trained.items()}
    repeatable = {n: one for n, one in backwards.items() if bench.runs(one) and bench.runs(one)}
    times, *_ = sustained(repeatable, seconds, cold)
    return times


# ---- what is shown ----------------------------------------------------------------------------


def table(records):
    """The records as aligned text: a line each of the backward alone, then of each layer that was
    trained, in milliseconds and MiB."""
    lines = [head()] + [row(one) for one in records]
    lines.append(
        f"\n{'case':17}{'forward + backward':20}{'graph ms':>10}{'eager ms':>10}"
        f"{'backward':>10}{'saved MiB':>11}{'peak MiB':>10}"
    )
    lines += [line for one in records for line in step_rows(one)]
    lines += [
        f"{one['case']}: {what}: {reason}"
        for one in records
        for what, reason in one["error_failures"].items()
    ]
    return "\n".join([*lines, *bench_cuda.footer(records)])


def timeline(records):
    """Where the launches' time goes, as aligned text: up is the gradients of activations, down
    those of inputs."""
    return bench_cuda.timeline(records)


def head():
    return (
        f"{'case':17}{'us':>9}{'bmm us':>9}{'ratio':>7}{'floor':>7}{'goal':>6}{'met':>7}"
        f"{'burst':>7}{'Z again':>9}{'TFLOP/s':>9}{'MHz':>6}{'error':>7}{'kernels':>9} bits"
    )


def row(one):
    """The line of a record's backward."""
    same = one["bitwise"] and one["recomputed_bitwise"]
    return (
        f"{one['case']:17}{one['us']:9.1f}{one['reference_us']:9.1f}{one['ratio']:7.3f}"
        f"{one['floor']:7.2f}{one['goal']:6.2f}{one['met']:>7}"
        f"{one['burst_ratio']:7.3f}{one['recomputed_ratio']:9.3f}"
        f"{one['tflops']:9.0f}{one['sm_clock_mhz']:6.0f}{one['error_ratio']:7.3f}"
        f"{one['launches']:9} {'same' if same else 'DIFFER'}"
    )


def step_rows(one):
    """The lines of a record's layers under autograd."""

    def milliseconds(us):
        return f"{us / 1e3:10.3f}" if us is not None else f"{'-':>10}"

    return [
        f"{one['case']:17}{name:20}{milliseconds(one['step_us'].get(name))}"
        f"{milliseconds(one['step_eager_us'].get(name))}"
        f"{milliseconds(one['backward_eager_us'].get(name))}"
        f"{memory['saved_bytes'] / 2**20:11.1f}{memory['peak_bytes'] / 2**20:10.1f}"
        for name, memory in one["memory"].items()
    ]
