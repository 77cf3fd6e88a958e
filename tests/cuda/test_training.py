"""Training on CUDA tensors: what autograd, graphs, streams and Megatron's protocols make of the one
launch forward and the one launch backward. Values of single gradients are tested elsewhere
(test_backward.py); here whole steps have the bits of the plain order of calls."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import flashmoe
import pytest
import torch
from cuda_products import count_graph_nodes
from layer_common import finish, make_layer, same_bits
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 256, "intermediate_size": 192, "num_experts": 16, "top_k": 4}
RUNS = 30
REPLAYS = 50


@pytest.fixture
def group():
    [one] = flashmoe.local_group(1)
    with one:
        yield one


def make_moe(group=None, dtype=torch.bfloat16, **options):
    """A layer with biases and a selection bias, the same parameters each time."""
    options = {"bias": True, "router_bias": True, "save_z": "auto"} | options
    layer = flashmoe.MoE(**SIZES, group=group, dtype=dtype, device="cuda", **options)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            scale = parameter.shape[-1] ** -0.5
            draw = torch.randn(*parameter.shape, device="cuda", generator=generator)
            parameter.copy_(draw * scale)
    return layer


def batch(index, tokens=None, dtype=torch.bfloat16):
    """Tokens [T, H] of a microbatch, of another number each time."""
    generator = torch.Generator("cuda").manual_seed(index)
    tokens = 200 + 37 * index if tokens is None else tokens
    return torch.randn(
        tokens, SIZES["hidden_size"], device="cuda", generator=generator
    ).to(dtype)  # fmt: skip


def ramp_of(y):
    """Weights of a loss that differ from element to element."""
    return torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)


def loss_of(y, ramp=None):
    """A loss whose gradient differs from element to element."""
    return (y.float() * (ramp_of(y) if ramp is None else ramp)).sum()


def gradients_of(layer):
    """Gradients of all parameters, copied; the parameters have none afterwards."""
    made = [parameter.grad.clone() for parameter in layer.parameters()]
    layer.zero_grad()
    return made


def step(layer, x):
    """Gradients of x and of all parameters of one step."""
    x = x.detach().requires_grad_()
    loss_of(layer(x)).backward()
    return [x.grad, *gradients_of(layer)]


def captured(call, **options):
    """A CUDA graph of one call, after a call to warm up on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(**options)
    with torch.cuda.graph(graph):
        call()
    return graph


# ---- the three forms of the layer ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_module_and_functions_have_the_same_gradients(dtype, group):
    layer, x = make_moe(group, dtype), batch(0, dtype=dtype)
    of_module = step(layer, x)
    weights = dict(layer.named_parameters())
    leaves = [x.requires_grad_(), *weights.values()]
    options = {"save_z": "auto", "group": group}
    y, routed = flashmoe.moe(x, **weights, top_k=4, **options)
    assert same_bits(torch.autograd.grad(loss_of(y), leaves), of_module)

    experts = {name: weights[name] for name in ("w_up", "w_down", "b_up", "b_down")}
    topk_weights = routed.topk_weights.detach().requires_grad_()
    y = flashmoe.experts(x, routed.topk_ids, topk_weights, **experts, **options)
    made = torch.autograd.grad(loss_of(y), [topk_weights, *experts.values()])
    assert made[0].dtype == torch.float32 and made[0].isfinite().all() and made[0].any()
    names = list(weights)
    assert same_bits(made[1:], [of_module[1 + names.index(name)] for name in experts])
    finish(group)


def test_leading_dimensions_and_a_frozen_part(group):
    layer, x = make_moe(group), batch(0, tokens=96)
    expected = step(layer, x)
    folded = x.view(4, 24, -1).detach().requires_grad_()
    layer.w_router.requires_grad_(False)
    layer.b_down.requires_grad_(False)
    loss_of(layer(folded)).backward()
    assert layer.w_router.grad is None and layer.b_down.grad is None
    made = {name: parameter.grad for name, parameter in layer.named_parameters()}
    names = ["x", *made]
    assert same_bits([folded.grad.view_as(x)], expected[:1])
    for name, right in zip(names[1:], expected[1:], strict=True):
        if made[name] is not None:
            assert same_bits([made[name]], [right]), name
    finish(group)


@pytest.mark.parametrize("save_z", [True, "auto", False])
def test_kept_and_computed_pre_activations_agree(save_z, group):
    """Both are rounded to the layer's dtype, by two kernels: apart by roundings at most."""
    expected = step(make_moe(group, save_z=False), batch(0))
    made = step(make_moe(group, save_z=save_z), batch(0))
    for one, other in zip(made, expected, strict=True):
        assert (one.double() - other.double()).norm() <= 2.0**-7 * other.double().norm()
    assert same_bits(step(make_moe(group, save_z=save_z), batch(0)), made)
    finish(group)


# ---- one launch each way ------------------------------------------------------------------------


@pytest.mark.parametrize("save_z", [False, True])
def test_a_step_is_two_kernels(save_z, group):
    """Forward and backward through autograd, all leaves: no copy, no fill, no cast beside them."""
    layer, x = make_moe(group, save_z=save_z), batch(0).requires_grad_()
    arriving = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def call():
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(arriving)

    graph = captured(call, keep_graph=True)
    assert count_graph_nodes(graph) == ["kernel", "kernel"]
    finish(group)


def test_a_step_with_main_grad_is_two_kernels(group):
    layer, x = make_moe(group), batch(0).requires_grad_()
    arriving = torch.randn_like(x)
    for weight in (layer.w_up, layer.w_down):
        weight.main_grad = torch.zeros(weight.shape, device="cuda")
        weight.grad_added_to_main_grad = False

    def call():
        for leaf in [x, *layer.parameters()]:
            leaf.grad = None
        layer(x).backward(arriving)

    graph = captured(call, keep_graph=True)
    assert count_graph_nodes(graph) == ["kernel", "kernel"]
    finish(group)


def test_a_step_does_not_wait_for_the_gpu(group):
    layer, delayed = make_moe(group), make_moe(group, delay_wgrad=True)
    step(layer, batch(0))
    step_delayed(delayed, batch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, batch(0))
        step_delayed(delayed, batch(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    finish(group)


ARRIVING = {
    "columns apart": lambda grad: grad.T.contiguous().T,
    "rows apart": lambda grad: torch.cat([grad, grad], dim=1)[:, : grad.shape[1]],
    "rows apart by odd numbers": lambda grad: torch.cat([grad, grad[:, :3]], dim=1)[
        :, : grad.shape[1]
    ],
    "odd address": lambda grad: torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view_as(grad),
    "one row": lambda grad: grad[:1].expand_as(grad),
    "one number": lambda grad: grad[0, 0].expand_as(grad),
}


@pytest.mark.parametrize("strided", ARRIVING.values(), ids=ARRIVING)
def test_arriving_gradients_of_any_strides(strided, group):
    layer, x = make_moe(group), batch(1).requires_grad_()
    leaves = [x, *layer.parameters()]
    y, routed = layer(x, return_routing=True)
    ends = (y, routed.topk_weights, routed.logits)
    generator = torch.Generator("cuda").manual_seed(3)
    arriving = [
        strided(torch.randn(*end.shape, device="cuda", generator=generator).to(end.dtype))
        for end in ends
    ]
    dense = [grad.clone(memory_format=torch.contiguous_format) for grad in arriving]
    expected = torch.autograd.grad(ends, leaves, dense, retain_graph=True)
    assert same_bits(torch.autograd.grad(ends, leaves, arriving), expected)
    finish(group)


# ---- compile, checkpoints, graphs ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile(mode):
    torch._dynamo.reset()
    layer = make_moe()

    def block(x, ramp):
        return loss_of(x + layer(x * 2), ramp)

    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for seed in range(5):
        x = batch(seed, tokens=256).requires_grad_()
        ramp = ramp_of(x)  # outside: a compiler may round it otherwise
        block(x, ramp).backward()
        expected = [x.grad.clone(), *gradients_of(layer)]
        x.grad = None
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x, ramp).backward()
        made = [x.grad.clone(), *gradients_of(layer)]
        for one, right in zip(made[1:], expected[1:], strict=True):
            assert same_bits([one], [right])
        # x has a gradient by two ways, whose sum inductor may round once less
        apart = (made[0].double() - expected[0].double()).norm()
        assert apart <= 2.0**-7 * expected[0].double().norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, group):
    layer = make_moe(group)
    expected = step(layer, batch(0))
    x = batch(0).requires_grad_()
    loss_of(checkpoint(layer, x, use_reentrant=use_reentrant)).backward()
    assert same_bits([x.grad, *gradients_of(layer)], expected)
    finish(group)


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_graph_of_a_training_step_has_the_bits_of_eager_steps(with_main_grad, group):
    """Forward, loss, backward and the optimizer; inputs and so the routing change each time."""
    eager, replayed = make_moe(), make_moe(group)
    x = batch(0, tokens=300)
    starts = [parameter.detach().clone() for parameter in replayed.parameters()]
    if with_main_grad:
        for layer in (eager, replayed):
            for weight in (layer.w_up, layer.w_down):
                weight.main_grad = torch.zeros(weight.shape, device="cuda")
                weight.overwrite_main_grad = True

    def train_step(layer):
        for parameter in layer.parameters():
            parameter.grad = None
        loss = loss_of(layer(x)) / x.numel()
        loss.backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                grad = parameter.main_grad if parameter.grad is None else parameter.grad
                parameter.sub_(2.0 * grad.to(parameter.dtype))

    graph = captured(lambda: train_step(replayed))
    with torch.no_grad():
        for parameter, start in zip(replayed.parameters(), starts, strict=True):
            parameter.copy_(start)
    for replay in range(REPLAYS):
        x.copy_(batch(replay, tokens=300))
        graph.replay()
        train_step(eager)
        assert same_bits(list(replayed.parameters()), list(eager.parameters())), f"step {replay}"
    assert not same_bits(starts, list(replayed.parameters()))
    finish(group)


# ---- several backwards --------------------------------------------------------------------------


def test_gradient_accumulation(group):
    layer = make_moe(group)
    singles = [step(layer, batch(index))[1:] for index in range(3)]
    for index in range(3):
        loss_of(layer(batch(index))).backward()
    sums = [first + second + third for first, second, third in zip(*singles, strict=True)]
    assert same_bits(gradients_of(layer), sums)
    finish(group)


def test_a_kept_graph_runs_backward_again_and_again(group):
    layer, x = make_moe(group), batch(0)
    expected = step(layer, x)[1:]
    loss = loss_of(layer(x))
    for _ in range(3):
        loss.backward(retain_graph=True)
        assert same_bits(gradients_of(layer), expected)
    finish(group)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_microbatches_in_flight(order, group):
    layer = make_moe(group)
    for index in order:
        loss_of(layer(batch(index))).backward()
    expected = gradients_of(layer)
    losses = [loss_of(layer(batch(index))) for index in range(4)]
    layer(batch(5))  # a forward whose graph is never used
    for index in order:
        losses[index].backward()
    assert same_bits(gradients_of(layer), expected)
    finish(group)


def test_one_layer_used_twice(group):
    layer = make_moe(group)
    x = batch(0).requires_grad_()
    inner = layer(x)
    middle = inner.detach().requires_grad_()
    loss_of(layer(middle)).backward()
    inner.backward(middle.grad)
    expected = [x.grad.clone(), *gradients_of(layer)]
    assert same_bits(step_through(layer, batch(0), lambda x: layer(layer(x))), expected)
    finish(group)


def step_through(layer, x, forward):
    x = x.detach().requires_grad_()
    loss_of(forward(x)).backward()
    return [x.grad, *gradients_of(layer)]


# ---- Megatron's protocols -----------------------------------------------------------------------


def test_main_grad_sums_microbatches_without_rounding(group):
    layer = make_moe(group)
    weights = (layer.w_up, layer.w_down)
    for weight in weights:
        weight.main_grad = torch.zeros(weight.shape, device="cuda")
    sums = [0, 0]
    for index in range(3):
        for weight in weights:
            weight.overwrite_main_grad = True
        loss_of(layer(batch(index))).backward()
        sums = [one + weight.main_grad for one, weight in zip(sums, weights, strict=True)]
    for weight in weights:
        weight.main_grad.zero_()
        weight.overwrite_main_grad, weight.grad_added_to_main_grad = False, False
    for index in range(3):
        loss_of(layer(batch(index))).backward()
        for weight in weights:
            assert weight.grad_added_to_main_grad is True
            assert weight.grad.shape == weight.shape
            weight.grad, weight.grad_added_to_main_grad = None, False
    assert same_bits([weight.main_grad for weight in weights], sums)
    finish(group)


def step_delayed(layer, x):
    """As `step`, of a layer with delayed weight gradients."""
    x = x.detach().requires_grad_()
    loss_of(layer(x)).backward()
    assert layer.w_up.grad is None and layer.w_down.grad is None
    layer.backward_dw()
    return [x.grad, *gradients_of(layer)]


def test_delayed_weight_gradients(group):
    plain, delayed = make_moe(group), make_moe(group, delay_wgrad=True)
    assert same_bits(step_delayed(delayed, batch(0)), step(plain, batch(0)))
    for index in range(3):
        loss_of(plain(batch(index))).backward()
    losses = [loss_of(delayed(batch(index))) for index in range(3)]
    for loss in losses:
        loss.backward()
    for _ in losses:
        delayed.backward_dw()
    assert same_bits(gradients_of(delayed), gradients_of(plain))
    finish(group)


def test_delayed_weight_gradients_on_another_stream(group):
    """backward_dw() follows its backward, and what it reads is not given away before its end."""
    plain, delayed = make_moe(group), make_moe(group, delay_wgrad=True)
    side = torch.cuda.Stream()
    for index in range(RUNS):
        x = batch(index % 5)
        expected = step(plain, x)
        loss_of(delayed(x)).backward()
        with torch.cuda.stream(side):
            delayed.backward_dw()
        noise = [torch.full_like(x, float("nan")) for _ in range(8)]
        torch.cuda.current_stream().wait_stream(side)
        assert same_bits(gradients_of(delayed), expected[1:]), f"run {index}"
        del noise
    finish(group)


# ---- what must not reach the gradients ----------------------------------------------------------


@pytest.mark.parametrize("place", ["x", "grad_y"])
def test_a_token_with_nan_keeps_it(place, group):
    """Other tokens, and experts that it did not choose, have the bits that they have without."""
    layer, bad = make_layer(tokens=333), 77
    _, routed = layer(group)
    ids = routed.topk_ids
    arriving = batch(9, tokens=333)

    def run(x, grad_y):
        leaves = [x, routed.topk_weights.detach(), layer.w_up, layer.w_down]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = flashmoe.experts(leaves[0], ids, *leaves[1:], group=group)
        return torch.autograd.grad(y, leaves, grad_y)

    expected = run(layer.x, arriving)
    x, grad_y = layer.x.clone(), arriving.clone()
    (x if place == "x" else grad_y)[bad] = float("nan")
    grad_x, grad_weights, grad_up, grad_down = run(x, grad_y)
    others = torch.arange(333, device="cuda") != bad
    idle = torch.ones(16, dtype=torch.bool, device="cuda")
    idle[ids[bad]] = False
    assert grad_x[bad].isnan().all() and grad_weights[bad].isnan().all()
    assert same_bits([grad_x[others], grad_weights[others]], [one[others] for one in expected[:2]])
    assert same_bits([grad_up[idle], grad_down[idle]], [one[idle] for one in expected[2:]])
    assert same_bits(run(layer.x, arriving), expected)
    finish(group)


def poison(group, tokens):
    """Leaves NaN in the scratch, where a row of every kind lies, and in memory that torch has free:
    that of the next outputs and gradients."""
    layer = make_layer(tokens=tokens)
    ids = torch.randint(16, (tokens, 4), device="cuda")
    weights = torch.full((tokens, 4), float("nan"), device="cuda")
    leaves = [layer.x * float("nan"), weights, layer.w_up, layer.w_down]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = flashmoe.experts(leaves[0], ids, *leaves[1:], group=group, save_z=True)
    torch.autograd.grad(y, leaves, torch.full_like(y, float("nan")))
    for size in (256, 4096, 2**16, 2**20, 2**23):
        kept = [torch.full((size,), float("nan"), device="cuda") for _ in range(8)]
        del kept


@pytest.mark.parametrize("save_z", [False, True])
def test_same_bits_after_poisoning(save_z, group):
    layer, x = make_moe(group, save_z=save_z), batch(2)
    expected = step(layer, x)
    for tokens in itertools.islice(itertools.cycle((274, 1000, 16)), 9):
        poison(group, tokens)
        assert same_bits(step(layer, x), expected), f"after {tokens} tokens of NaN"
    finish(group)


@pytest.mark.parametrize("max_sms", [0, 64], ids=["all", "half"])
def test_same_bits_beside_other_work(max_sms, group):
    layer, x = make_moe(group), batch(2, tokens=1500)
    expected = step(layer, x)
    group.set("max_sms", max_sms)
    side, matrix = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for run in range(RUNS):
        with torch.cuda.stream(side):
            for _ in range(4):
                matrix @ matrix
        assert same_bits(step(layer, x), expected), f"run {run}"
    finish(group)


def test_streams_in_turn(group):
    """A backward runs on its forward's stream, wherever it is called from."""
    layer = make_moe(group)
    expected = [step(layer, batch(index)) for index in range(3)]
    streams = [torch.cuda.Stream() for _ in expected]
    torch.cuda.synchronize()
    for run in range(RUNS):
        index = run % 3
        x = batch(index).requires_grad_()
        streams[index].wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[index]):
            loss = loss_of(layer(x))
        torch.cuda.current_stream().wait_stream(streams[index])
        loss.backward()
        torch.cuda.current_stream().wait_stream(streams[index])
        assert same_bits([x.grad, *gradients_of(layer)], expected[index]), f"run {run}"
    finish(group)


def test_hundred_training_steps_have_the_same_bits(group):
    """From the same parameters, with biases, momentum and fp32 sums of the experts' gradients."""

    def trained():
        layer = make_moe(group)
        for weight in (layer.w_up, layer.w_down):
            weight.main_grad = torch.zeros(weight.shape, device="cuda")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
        for index in range(100):
            optimizer.zero_grad()
            x = batch(index % 7)
            (loss_of(layer(x)) / x.numel()).backward()
            for weight in (layer.w_up, layer.w_down):
                weight.grad = weight.main_grad.to(weight.dtype)
                weight.main_grad.zero_()
            optimizer.step()
        return [parameter.detach().clone() for parameter in layer.parameters()]

    first = trained()
    assert all(parameter.isfinite().all() for parameter in first)
    starts = make_moe().parameters()
    assert not any(same_bits([one], [start]) for one, start in zip(first, starts, strict=True))
    assert same_bits(trained(), first)
    finish(group)


# ---- programs -----------------------------------------------------------------------------------


def run_program(path, *options):
    """The last line that a program of this repository prints, as JSON."""
    command = [sys.executable, str(ROOT / path), "--device", "cuda", "--json", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_element_of_every_gradient():
    said = run_program("scripts/run_gradcheck.py", "--quick")
    assert said["failed"] == 0 and said["elements"] > 1e6


@pytest.mark.slow
def test_the_loss_follows_the_plain_model(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, for the picture")
    picture = tmp_path / "picture.png"
    said = run_program("examples/train_bytes.py", "--small", "--steps", 60, "--out", picture)
    plain, ours = said["runs"]
    assert said["below_entropy"]
    assert ours["difference"]["10"] < 2.0**-9 * plain["first_loss"]
    assert abs(ours["final_loss"] / plain["final_loss"] - 1) < 2.0**-7


@pytest.mark.slow
def test_qwen3_moe_of_transformers_trains():
    pytest.importorskip("transformers", minversion="5.17", reason="needs transformers 5.17")
    said = run_program("benchmarks/transformers_training.py", "--small", "--steps", 12)
    runs = {run["experts"]: run for run in said["runs"]}
    assert runs.keys() == {"eager", "grouped_mm", "flashmoe"}
    for run in runs.values():
        assert run["losses"][-1] < run["losses"][0]
    apart = abs(runs["flashmoe"]["losses"][-1] / runs["eager"]["losses"][-1] - 1)
    assert apart < 2.0**-6
