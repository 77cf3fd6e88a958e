"""What a Megatron-style training loop asks of the layer: ``main_grad`` with its hooks, delayed
weight gradients, microbatches in flight, counts for balancing.

FLASHMOE_TEST_DEVICE names another device than the CPU to run the tests on one rank on.
"""

import gc
import os
import weakref

import flashmoe
import pytest
import torch
from conftest import assert_as_exact_as_plain
from flashmoe import reference
from flashmoe.errors import FlashMoEError, RankMismatchError
from torch import nn

DEVICE = torch.device(os.environ.get("FLASHMOE_TEST_DEVICE", "cpu"))
SIZES = dict(hidden_size=32, intermediate_size=24, num_experts=8, top_k=2)
TOKENS = 12
WEIGHTS = ("w_up", "w_down")


def make_moe(dtype=torch.float32, group=None, rank=0, world=1, **options):
    """A layer whose weights are shares of the same whole on any number of ranks."""
    layer = flashmoe.MoE(**SIZES, dtype=dtype, group=group, device=DEVICE, **options)
    generator = torch.Generator().manual_seed(0)
    share = SIZES["num_experts"] // world
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            whole = name in WEIGHTS
            shape = (SIZES["num_experts"], *parameter.shape[1:]) if whole else parameter.shape
            draw = torch.randn(shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(draw[rank * share : (rank + 1) * share] if whole else draw)
    return layer


def with_main_grad(layer, **attributes):
    for name in WEIGHTS:
        parameter = getattr(layer, name)
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        for key, value in attributes.items():
            setattr(parameter, key, value)
    return layer


def microbatch(index, dtype=torch.float32, rank=0):
    generator = torch.Generator().manual_seed(100 * rank + index)
    tokens = TOKENS + index  # another size each time
    x = torch.randn((tokens, SIZES["hidden_size"]), generator=generator, dtype=torch.float64)
    return x.to(dtype).to(DEVICE).requires_grad_()


def loss_of(layer, x):
    y = layer(x)
    return (y * torch.linspace(-1, 1, y.numel(), device=DEVICE).to(y).view_as(y)).sum()


def main_grads(layer):
    return {name: getattr(layer, name).main_grad.clone() for name in WEIGHTS}


class DataParallel:
    """Megatron's hook for each parameter: adds the gradient that autograd gave unless the layer has
    done so, and drops it. ``ready`` has the parameters in the order in which they were complete."""

    def __init__(self, layer):
        self.ready = []
        for name in WEIGHTS:
            parameter = getattr(layer, name)
            parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.grad_added_to_main_grad = False
            if getattr(parameter, "skip_backward_post_hook", False):
                layer.register_wgrad_accumulation_and_reduce_hooks(self.hook(name, parameter))
            else:
                hook = self.hook(name, parameter)
                parameter.register_post_accumulate_grad_hook(lambda _, hook=hook: hook())

    def hook(self, name, parameter):
        def on_gradient():
            assert parameter.grad is not None, "overlapped reduction needs a gradient, if a dummy"
            zero = getattr(parameter, "zero_out_wgrad", False)
            if not parameter.grad_added_to_main_grad or zero:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None
            self.ready.append(name)

        return on_gradient


# ---- delayed weight gradients -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_backward_dw_gives_the_same_bits(dtype, transposed):
    """Into ``grad``: the gradients of x and the router come at once, those of the weights later."""
    layers = [
        make_moe(dtype, bias=True, transposed=transposed, delay_wgrad=delay)
        for delay in (False, True)
    ]
    inputs = [microbatch(0, dtype) for _ in layers]
    for layer, x in zip(layers, inputs, strict=True):
        loss_of(layer, x).backward()
    now, later = layers
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for name, parameter in later.named_parameters():
        if name in WEIGHTS:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, getattr(now, name).grad)
    assert later.need_backward_dw() and not now.need_backward_dw()
    later.backward_dw()
    now.backward_dw()
    for name in WEIGHTS:
        assert torch.equal(getattr(later, name).grad, getattr(now, name).grad)
        assert getattr(now, name).grad.abs().sum() > 0


def test_backward_dw_adds_to_grad():
    layers = [make_moe(delay_wgrad=delay) for delay in (False, True)]
    for layer in layers:
        for index in range(3):
            loss_of(layer, microbatch(index)).backward()
            layer.backward_dw()
    for name in WEIGHTS:
        assert torch.equal(*(getattr(layer, name).grad for layer in layers))


@pytest.mark.parametrize("overwrite", [False, True])
def test_backward_dw_into_main_grad(overwrite):
    layers = [
        with_main_grad(make_moe(torch.bfloat16, delay_wgrad=delay), overwrite_main_grad=overwrite)
        for delay in (False, True)
    ]
    for layer in layers:
        for index in range(2):
            loss_of(layer, microbatch(index, torch.bfloat16)).backward()
    now, later = map(main_grads, layers)
    assert all(now[name].any() and not later[name].any() for name in WEIGHTS)
    last = with_main_grad(make_moe(torch.bfloat16))
    loss_of(last, microbatch(1, torch.bfloat16)).backward()
    for name, expected in main_grads(last).items():
        assert torch.equal(now[name], expected) == overwrite
    for _ in range(2):
        layers[1].backward_dw()
    for name, expected in now.items():
        assert torch.equal(getattr(layers[1], name).main_grad, expected)
        assert getattr(layers[1], name).grad is None


def test_queue_of_the_functional_form():
    """experts() with separate gates: three weights, one queue."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"w_gate": (4, 6, 8), "w_up": (4, 6, 8), "w_down": (4, 8, 6)}
    x = torch.randn((5, 8), generator=generator).to(DEVICE)
    ids = torch.randint(0, 4, (5, 2), generator=generator).to(DEVICE)
    weights = torch.rand((5, 2), generator=generator).to(DEVICE)
    queue, grads = flashmoe.WeightGradQueue(), []
    for given in (None, queue):
        generator.manual_seed(4)
        operands = {
            name: nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE))
            for name, shape in shapes.items()
        }
        flashmoe.experts(x, ids, weights, **operands, weight_grad_queue=given).sum().backward()
        if given is not None:
            assert len(queue) == 1 and all(one.grad is None for one in operands.values())
            queue.backward_dw()
        grads.append([one.grad for one in operands.values()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert len(queue) == 0


def test_waiting_backward_is_freed():
    layer = make_moe(delay_wgrad=True)
    x = microbatch(0)
    rows = x * 1
    held = weakref.ref(rows)
    loss_of(layer, rows).backward()
    del rows
    gc.collect()
    assert held() is not None
    layer.backward_dw()
    gc.collect()
    assert held() is None


def test_frozen_weights_do_not_wait():
    layer = make_moe(delay_wgrad=True)
    layer.w_up.requires_grad_(False)
    loss_of(layer, microbatch(0)).backward()
    layer.backward_dw()
    assert layer.w_up.grad is None and layer.w_down.grad.any()
    layer.w_down.requires_grad_(False)
    loss_of(layer, microbatch(0)).backward()
    layer.backward_dw()
    assert len(layer.weight_grad_queue) == 0


def test_backward_dw_without_a_backward():
    layer = make_moe(delay_wgrad=True)
    with pytest.raises(FlashMoEError, match="backward_dw: no backward waits"):
        layer.backward_dw()


def test_weight_changed_before_backward_dw():
    layer = make_moe(delay_wgrad=True)
    loss_of(layer, microbatch(0)).backward()
    with torch.no_grad():
        layer.w_down.mul_(2)
    with pytest.raises(FlashMoEError, match=r"w_down was changed .* before the optimizer"):
        layer.backward_dw()


def test_wrong_queue_is_named():
    layer = make_moe()
    layer.weight_grad_queue = []
    with pytest.raises(TypeError, match="weight_grad_queue is a list; accepted"):
        layer(microbatch(0))
    x, ids = torch.ones(3, 8).numpy(), torch.zeros(3, 1, dtype=torch.int64).numpy()
    w_up, w_down = torch.ones(2, 8, 8).numpy(), torch.ones(2, 8, 4).numpy()
    with pytest.raises(TypeError, match="weight_grad_queue is given with NumPy arrays"):
        queue = flashmoe.WeightGradQueue()
        flashmoe.experts(x, ids, x[:, :1], w_up, w_down, weight_grad_queue=queue)


# ---- the hooks of data parallelism ------------------------------------------------------------


@pytest.mark.parametrize("zero_out", [False, True])
@pytest.mark.parametrize("delay", [False, True])
def test_data_parallel_hooks(delay, zero_out):
    """Accumulation over two microbatches: nothing is added twice, nothing is lost."""
    expected = with_main_grad(make_moe(torch.bfloat16))
    layer = make_moe(torch.bfloat16, delay_wgrad=delay)
    parallel = DataParallel(layer)
    for name in WEIGHTS:
        getattr(layer, name).zero_out_wgrad = zero_out
    for index in range(2):
        loss_of(expected, microbatch(index, torch.bfloat16)).backward()
        loss_of(layer, microbatch(index, torch.bfloat16)).backward()
        if delay:
            assert len(parallel.ready) == 2 * index
            layer.backward_dw()
        assert sorted(parallel.ready) == sorted(WEIGHTS * (index + 1))
    for name in WEIGHTS:
        parameter = getattr(layer, name)
        assert parameter.grad_added_to_main_grad is True and parameter.grad is None
        assert torch.equal(parameter.main_grad, getattr(expected, name).main_grad)


# ---- microbatches in flight -------------------------------------------------------------------


def one_forward_one_backward(num_microbatches, warmup, lag):
    """1F1B of one pipeline stage: ("F" | "B" | "W", microbatch); W follows its B by ``lag`` Bs."""
    steps = [("F", index) for index in range(warmup)]
    for index in range(num_microbatches):
        if warmup + index < num_microbatches:
            steps.append(("F", warmup + index))
        steps.append(("B", index))
        if index >= lag:
            steps.append(("W", index - lag))
    return steps + [("W", index) for index in range(num_microbatches - lag, num_microbatches)]


def run_schedule(layers, steps, rank=0):
    """Main gradients by layer, and the gradient of each microbatch's input."""
    inputs, losses = {}, {}
    for step, index in steps:
        if step == "F":
            inputs[index] = microbatch(index, rank=rank)
            losses[index] = loss_of(nn.Sequential(*layers), inputs[index])
        elif step == "B":
            losses.pop(index).backward()
        else:
            for layer in reversed(layers):
                layer.backward_dw()
    return [main_grads(layer) for layer in layers], {i: x.grad for i, x in inputs.items()}


SEQUENTIAL = [(step, index) for index in range(6) for step in "FBW"]
PIPELINED = one_forward_one_backward(6, warmup=3, lag=2)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("delay", [False, True])
def test_one_forward_one_backward(world, delay, ranks):
    """Two layers, up to four microbatches in flight: the bits of one microbatch after the other."""

    def on_rank(rank, group):
        results = []
        for steps in (SEQUENTIAL, PIPELINED):
            layers = [
                with_main_grad(make_moe(torch.float32, group, rank, world, delay_wgrad=delay))
                for _ in range(2)
            ]
            results.append(run_schedule(layers, steps, rank))
        return results

    if world == 1:
        outcomes = [on_rank(0, None)]
    else:
        outcomes = ranks(world).values(on_rank)
    for (grads, input_grads), (pipelined, pipelined_inputs) in outcomes:
        for layer, expected in zip(pipelined, grads, strict=True):
            for name in WEIGHTS:
                assert expected[name].any() and torch.equal(layer[name], expected[name])
        for index, expected in input_grads.items():
            assert expected.any() and torch.equal(pipelined_inputs[index], expected)


def test_rank_whose_queue_is_empty_tells_its_peers(ranks):
    def on_rank(rank, group):
        layer = make_moe(torch.float32, group, rank, 2, delay_wgrad=True)
        loss_of(layer, microbatch(0, rank=rank)).backward()
        if rank == 0:
            with torch.no_grad():
                layer.w_up.mul_(2)
        layer.backward_dw()

    first, second = ranks(2).run(on_rank)
    assert type(first) is FlashMoEError and "w_up was changed in place" in str(first)
    assert isinstance(second, RankMismatchError) and "w_up was changed in place" in str(second)


# ---- counts and balance -----------------------------------------------------------------------


def test_auxiliary_loss_from_the_counts():
    """E * sum_e f_e P_e: the counts come out, the gradient goes in through the logits."""
    layer = make_moe()
    x = microbatch(0)
    gradients = {}
    for key, dtype in (("ours", torch.float32), ("plain", torch.float32), ("exact", torch.float64)):
        weights = {
            name: parameter.detach().to(dtype).requires_grad_()
            for name, parameter in layer.named_parameters()
        }
        run = flashmoe.moe if key == "ours" else reference.moe
        y, routing = run(x.detach().to(dtype), **weights, top_k=2, routing=layer.routing)
        share = routing.tokens_per_expert.to(dtype) / routing.tokens_per_expert.sum()
        balance = SIZES["num_experts"] * (share * routing.logits.softmax(-1).mean(0)).sum()
        (balance + 0 * y.sum()).backward()
        gradients[key] = weights["w_router"].grad
        counts = torch.bincount(routing.topk_ids.flatten(), minlength=SIZES["num_experts"])
        assert torch.equal(routing.tokens_per_expert, counts)
    assert gradients["exact"].norm() > 0
    assert_as_exact_as_plain("w_router", *gradients.values())


def test_selection_bias_moves_towards_balance():
    layer = make_moe(selection_bias=True, routing=flashmoe.Routing(score="sigmoid"))
    with torch.no_grad():
        layer.w_router[0] += 1  # an expert that most tokens would choose
    x = (microbatch(500).detach() + 0.3).requires_grad_()
    loads = []
    for _ in range(150):
        _, routing = layer(x, return_routing=True)
        before = layer.selection_bias.clone()
        layer.update_selection_bias(routing.tokens_per_expert, rate=0.01)
        loads.append(routing.tokens_per_expert.double())
        expected = 0.01 * torch.sign(loads[-1].mean() - loads[-1])
        torch.testing.assert_close(layer.selection_bias, before + expected.to(before))
    assert loads[0].max() > 2.5 * loads[0].mean()
    assert loads[-1].max() < 1.3 * loads[-1].mean()


def test_selection_bias_that_is_not_there():
    counts = torch.ones(SIZES["num_experts"], dtype=torch.int64)
    with pytest.raises(ValueError, match="made without selection_bias"):
        make_moe().update_selection_bias(counts)
    with pytest.raises(ValueError, match=r"tokens_per_expert has shape \(3,\); accepted: \(8,\)"):
        make_moe(selection_bias=True).update_selection_bias(counts[:3])
