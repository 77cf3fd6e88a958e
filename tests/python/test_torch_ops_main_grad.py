"""Weight gradients that are added up in ``main_grad``, by the protocol of Megatron."""

import flashmoe
import pytest
import torch
from conftest import make_layer
from flashmoe.errors import UnsupportedError

WEIGHTS = ("w_up", "w_down")


def run(layer, **changes):
    y, _ = flashmoe.moe(**{**layer.keywords(), **changes})
    (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)).sum().backward()


def reference(dtype=torch.float32):
    layer = make_layer(tokens=12, dtype=dtype)
    run(layer)
    return layer.grads()


def with_main_grad(dtype=torch.float32, start=0.0, **attributes):
    """A layer whose expert weights are parameters with main_grad."""
    layer = make_layer(tokens=12, dtype=dtype)
    for name in WEIGHTS:
        parameter = torch.nn.Parameter(getattr(layer, name).detach())
        parameter.main_grad = torch.full(parameter.shape, start, dtype=torch.float32)
        for key, value in attributes.items():
            setattr(parameter, key, value)
        setattr(layer, name, parameter)
    return layer


def test_gradient_is_added_to_main_grad():
    expected = reference()
    layer = with_main_grad()
    for passes in (1, 2):
        run(layer)
        for name in WEIGHTS:
            parameter = getattr(layer, name)
            assert torch.equal(parameter.main_grad, passes * expected[name])
            assert parameter.grad is None
    assert torch.equal(layer.x.grad, 2 * expected["x"])
    assert torch.equal(layer.w_router.grad, 2 * expected["w_router"])


def test_what_is_there_is_kept():
    expected = reference()
    layer = with_main_grad(start=1.0)
    run(layer)
    for name in WEIGHTS:
        torch.testing.assert_close(getattr(layer, name).main_grad, expected[name] + 1)


def test_overwrite():
    expected = reference()
    layer = with_main_grad(start=7.0, overwrite_main_grad=True)
    run(layer)
    for name in WEIGHTS:
        assert torch.equal(getattr(layer, name).main_grad, expected[name])


@pytest.mark.parametrize("zero_out", [False, True])
def test_dummy_gradient_when_the_parameter_is_marked(zero_out):
    expected = reference()
    layer = with_main_grad(grad_added_to_main_grad=False, zero_out_wgrad=zero_out)
    run(layer)
    for name in WEIGHTS:
        parameter = getattr(layer, name)
        assert parameter.grad_added_to_main_grad is True
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.dtype == parameter.dtype
        assert torch.equal(parameter.main_grad, expected[name])
        if zero_out:
            assert not parameter.grad.any()


def test_get_main_grad():
    expected = reference()
    layer = make_layer(tokens=12)
    parameter = torch.nn.Parameter(layer.w_up.detach())
    buffer = torch.zeros(parameter.shape)
    parameter.get_main_grad = lambda: buffer
    layer.w_up = parameter
    run(layer)
    assert torch.equal(buffer, expected["w_up"])
    assert torch.equal(layer.w_down.grad, expected["w_down"])


def test_bf16_weights_add_up_in_fp32():
    """fp32 accumulation keeps what a bf16 gradient rounds away."""
    exact = make_layer(tokens=12, dtype=torch.bfloat16).to(torch.float64)
    run(exact)
    rounded = reference(torch.bfloat16)
    layer = with_main_grad(torch.bfloat16)
    run(layer)
    for name in WEIGHTS:
        main_grad = getattr(layer, name).main_grad
        assert main_grad.dtype == torch.float32
        assert torch.equal(main_grad.bfloat16(), rounded[name])
        assert not torch.equal(main_grad, rounded[name].float())


def test_transposed_weights():
    layer = make_layer(tokens=12)
    for name in WEIGHTS:
        transposed = getattr(layer, name).detach().transpose(1, 2).contiguous()
        setattr(layer, name, torch.nn.Parameter(transposed))
    run(layer, transposed=True)
    expected = layer.w_up.grad
    layer.w_up.grad = None
    layer.w_up.main_grad = torch.zeros(layer.w_up.shape)
    run(layer, transposed=True)
    assert torch.equal(layer.w_up.main_grad, expected)
    assert layer.w_up.grad is None


def test_main_grad_is_not_saved_for_backward():
    layer = with_main_grad()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        y, _ = flashmoe.moe(**layer.keywords())
    replaced = {name: torch.zeros_like(getattr(layer, name)) for name in WEIGHTS}
    for name in WEIGHTS:
        assert getattr(layer, name).main_grad.data_ptr() not in saved
        getattr(layer, name).main_grad = replaced[name]
    y.sum().backward()
    for name in WEIGHTS:
        assert replaced[name].any()


def test_frozen_parameter_has_no_gradient():
    layer = with_main_grad()
    layer.w_up.requires_grad_(False)
    run(layer)
    assert not layer.w_up.main_grad.any()
    assert layer.w_down.main_grad.any()


def test_separate_gate():
    layer = make_layer(tokens=12)
    expected = reference()
    gate, up = (torch.nn.Parameter(w.detach().clone()) for w in layer.w_up.chunk(2, dim=1))
    gate.main_grad, up.main_grad = torch.zeros(gate.shape), torch.zeros(up.shape)
    run(layer, w_gate=gate, w_up=up)
    assert torch.equal(torch.cat((gate.main_grad, up.main_grad), dim=1), expected["w_up"])


BAD = {
    "dtype": (TypeError, torch.zeros(6, 48, 32).bfloat16(), "bfloat16; accepted: torch.float32"),
    "shape": (ValueError, torch.zeros(6, 48), r"shape \(6, 48\); accepted: \(6, 48, 32\)"),
    "type": (TypeError, 3.0, "is a float; accepted: a tensor"),
}


@pytest.mark.parametrize(("error", "main_grad", "text"), BAD.values(), ids=BAD)
def test_bad_main_grad_is_named(error, main_grad, text):
    layer = with_main_grad()
    layer.w_up.main_grad = main_grad
    with pytest.raises(error, match=f"w_up.main_grad .*{text}"):
        run(layer)


def test_double_backward_is_refused():
    layer = with_main_grad()
    y, _ = flashmoe.moe(**layer.keywords())
    with pytest.raises(UnsupportedError, match="double backward"):
        torch.autograd.grad(y.square().sum(), layer.x, create_graph=True)


def test_compile_breaks_the_graph_and_adds_all_the_same():
    torch._dynamo.reset()
    expected = reference()
    layer = with_main_grad()

    def loss(x):
        y, _ = flashmoe.moe(**{**layer.keywords(), "x": x})
        return (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum()

    torch.compile(loss, backend="aot_eager")(layer.x).backward()
    for name in WEIGHTS:
        assert torch.equal(getattr(layer, name).main_grad, expected[name])

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(loss, backend="aot_eager", fullgraph=True)(layer.x)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward_with_owners"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(layer.x)
