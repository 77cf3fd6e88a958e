"""Values and gradients of flashmoe.experts, flashmoe.moe and flashmoe.MoE."""

import flashmoe
import numpy as np
import pytest
import torch
from conftest import assert_as_exact_as_plain, make_layer, plain_experts, plain_moe
from flashmoe import config
from flashmoe.functional import RoutingResult


def moe_gradients(layer, run):
    """Outputs and gradients of a loss that reaches y, the weights and the logits."""
    y, weights, logits = run(layer)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for output in (y, weights, logits):
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        loss = loss + (output * direction.to(output.dtype)).sum()
    loss.backward()
    outputs = {"y": y, "topk_weights": weights, "logits": logits}
    grads = {f"grad_{name}": grad for name, grad in layer.grads().items()}
    return {name: tensor.detach() for name, tensor in (outputs | grads).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"bias": True, "save_z": True}])
def test_moe_matches_plain_torch(dtype, options):
    options = dict(options)
    layer = make_layer(tokens=61, bias=options.pop("bias", False), dtype=dtype)
    layer.options = options
    with torch.no_grad():
        ids = flashmoe.moe(**layer.keywords())[1].topk_ids

    def run_ours(layer):
        y, routed = flashmoe.moe(**layer.keywords())
        return y, routed.topk_weights, routed.logits

    ours = moe_gradients(layer.to(dtype), run_ours)
    plain = moe_gradients(layer.to(dtype), lambda layer: plain_moe(layer, ids))
    exact = moe_gradients(layer.to(torch.float64), lambda layer: plain_moe(layer, ids))
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_as_exact_as_plain(name, ours[name], plain[name], exact[name])


def draw_routing(tokens, experts, top_k, dtype, seed=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    return ids, weights.to(dtype).requires_grad_()


def experts_gradients(layer, ids, weights, run):
    weights = weights.detach().requires_grad_()
    y = run(layer, ids, weights)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (y * direction.to(y.dtype)).sum().backward()
    grads = {name: grad for name, grad in layer.grads().items() if name != "w_router"}
    return {"y": y.detach(), "topk_weights": weights.grad, **grads}


def run_packed(layer, ids, weights):
    return flashmoe.experts(layer.x, ids, weights, layer.w_up, layer.w_down)


def run_separate(layer, ids, weights):
    w_gate, w_up = layer.w_up.chunk(2, dim=1)
    return flashmoe.experts(layer.x, ids, weights, w_up, layer.w_down, w_gate=w_gate)


def run_interleaved(layer, ids, weights):
    gate, up = layer.w_up.chunk(2, dim=1)
    w_up = torch.stack((gate, up), dim=2).flatten(1, 2)
    return flashmoe.experts(layer.x, ids, weights, w_up, layer.w_down, interleaved=True)


def run_transposed(layer, ids, weights):
    w_up, w_down = (w.transpose(1, 2).contiguous() for w in (layer.w_up, layer.w_down))
    return flashmoe.experts(layer.x, ids, weights, w_up, w_down, transposed=True)


def run_int32(layer, ids, weights):
    return run_packed(layer, ids.to(torch.int32), weights)


def run_leading_dimensions(layer, ids, weights):
    x, ids, weights = (t.reshape(4, 15, -1) for t in (layer.x, ids, weights))
    return flashmoe.experts(x, ids, weights, layer.w_up, layer.w_down).reshape(60, -1)


@pytest.mark.parametrize(
    "run",
    [
        run_packed,
        run_separate,
        run_interleaved,
        run_transposed,
        run_int32,
        run_leading_dimensions,
    ],
)
def test_experts_match_plain_torch(run):
    layer = make_layer(tokens=60, top_k=3)
    ids, weights = draw_routing(60, 6, 3, torch.float32)

    def gradients(dtype, run):
        return experts_gradients(layer.to(dtype), ids, weights.to(dtype), run)

    ours = gradients(torch.float32, run)
    plain = gradients(torch.float32, plain_experts)
    exact = gradients(torch.float64, plain_experts)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_as_exact_as_plain(name, ours[name], plain[name], exact[name])


def test_fp64_gradients_pass_gradcheck():
    layer = make_layer(
        tokens=4, hidden=5, intermediate=3, experts=4, dtype=torch.float64, bias=True
    )
    names = list(layer.tensors())

    def outputs(*tensors):
        y, routed = flashmoe.moe(**dict(zip(names, tensors, strict=True)), top_k=2)
        return y, routed.topk_weights, routed.logits

    assert torch.autograd.gradcheck(outputs, tuple(layer.tensors().values()))


def test_routing_result():
    layer = make_layer(tokens=40)
    layer.options = {"capacity_factor": 0.5}
    y, routed = flashmoe.moe(**layer.keywords())
    assert isinstance(routed, RoutingResult)
    counts = torch.bincount(routed.topk_ids.flatten(), minlength=6)
    assert torch.equal(routed.tokens_per_expert, counts)
    capacity = -(-40 * 2 // (2 * 6))
    assert routed.dropped.tolist() == [int((counts - capacity).clamp(min=0).sum())]
    assert routed.dropped.item() > 0
    dtypes = [tensor.dtype for tensor in routed]
    assert dtypes == [torch.int64, torch.float32, torch.float32, torch.int64, torch.int64]
    requires = [tensor.requires_grad for tensor in routed]
    assert requires == [False, True, True, False, False]
    assert y.shape == layer.x.shape


def test_no_tokens():
    layer = make_layer(tokens=0)
    y, routed = flashmoe.moe(**layer.keywords())
    assert y.shape == (0, 32)
    assert routed.tokens_per_expert.tolist() == [0] * 6
    y.sum().backward()
    for name, grad in layer.grads().items():
        assert not grad.any(), name
    assert layer.grads().keys() == layer.tensors().keys()


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_numpy_gives_the_bits_of_torch(dtype):
    layer = make_layer(dtype=getattr(torch, dtype), bias=True)
    with torch.no_grad():
        y, routed = flashmoe.moe(**layer.keywords())
    arrays = {name: tensor.detach().numpy() for name, tensor in layer.tensors().items()}
    arrays["w_up"] = arrays["w_up"].copy()
    arrays["w_up"].flags.writeable = False
    y_numpy, routed_numpy = flashmoe.moe(**arrays, top_k=2)
    assert isinstance(y_numpy, np.ndarray)
    np.testing.assert_array_equal(y_numpy, y.numpy())
    for ours, expected in zip(routed_numpy, routed, strict=True):
        np.testing.assert_array_equal(ours, expected.numpy())


def test_numpy_experts_keep_leading_dimensions():
    layer = make_layer(tokens=24)
    ids, weights = draw_routing(24, 6, 2, torch.float32)
    tensors = [layer.x.reshape(2, 12, 32), ids.reshape(2, 12, 2), weights.reshape(2, 12, 2)]
    tensors += [layer.w_up, layer.w_down]
    with torch.no_grad():
        expected = flashmoe.experts(*tensors)
    ours = flashmoe.experts(*(tensor.detach().numpy() for tensor in tensors))
    np.testing.assert_array_equal(ours, expected.numpy())


def test_module_is_the_function():
    torch.manual_seed(0)
    layer = flashmoe.MoE(32, 24, 6, 2, bias=True, router_bias=True, selection_bias=True)
    x = torch.randn(3, 7, 32, requires_grad=True)
    y, routed = layer(x, return_routing=True)
    parameters = dict(layer.named_parameters()) | dict(layer.named_buffers())
    expected, _ = flashmoe.moe(x, **parameters, top_k=2)
    assert torch.equal(y, expected)
    assert torch.equal(layer(x), y)
    assert routed.topk_ids.shape == (21, 2)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_module_parameters_and_state():
    layer = flashmoe.MoE(
        16, 8, 4, 2, activation="relu2", bias=True, transposed=True, dtype=torch.float64
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "w_router": (4, 16),
        "w_up": (4, 16, 8),
        "w_down": (4, 8, 16),
        "b_up": (4, 8),
        "b_down": (4, 16),
    }
    other = flashmoe.MoE(
        16, 8, 4, 2, activation="relu2", bias=True, transposed=True, dtype=torch.float64
    )
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 16, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))
    assert layer.w_up.abs().max() <= 16**-0.5
    assert layer.w_down.abs().max() > 0.9 * 8**-0.5
    text = repr(layer)
    for word in ("hidden_size=16", "num_experts=4", "activation='relu2'", "transposed=True"):
        assert word in text


def test_config_survives_its_text():
    given = config.LayerConfig(3, activation="gelu", gated=False, scale=2.5, act_limit=7.0)
    assert config.LayerConfig.decode(given.encode()) == given
    with pytest.raises(ValueError, match="no flashmoe layer"):
        config.LayerConfig.decode("top_k=2;colour='red'")
