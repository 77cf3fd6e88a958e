"""Bad input: each message names the argument, what was given and what is accepted."""

import flashmoe
import numpy as np
import pytest
import torch
from conftest import make_layer
from flashmoe.errors import FlashMoEError, UnsupportedError


def keywords(**changes):
    """Arguments of flashmoe.moe for a good layer, with some changed."""
    layer = make_layer(tokens=5, hidden=16, intermediate=8, experts=4)
    return {**layer.keywords(), **changes}


def experts_arguments(**changes):
    """Arguments of flashmoe.experts for a good layer, with some changed."""
    layer = make_layer(tokens=5, hidden=16, intermediate=8, experts=4)
    good = {
        "x": layer.x,
        "topk_ids": torch.zeros(5, 2, dtype=torch.int64),
        "topk_weights": torch.ones(5, 2),
        "w_up": layer.w_up,
        "w_down": layer.w_down,
    }
    return {**good, **changes}


MOE_CASES = {
    "x_list": (TypeError, {"x": [1.0]}, ["x", "list", "torch tensor"]),
    "x_integer": (TypeError, {"x": torch.zeros(5, 16, dtype=torch.int8)}, ["x", "int8", "float32"]),
    "x_int64": (TypeError, {"x": torch.zeros(5, 16).long()}, ["x", "int64", "float32"]),
    "x_scalar": (ValueError, {"x": torch.tensor(1.0)}, ["x", "no dimensions"]),
    "x_hidden": (ValueError, {"x": torch.zeros(5, 24)}, ["24", "16"]),
    "x_sparse": (TypeError, {"x": torch.zeros(5, 16).to_sparse()}, ["x", "sparse", "strided"]),
    "w_up_none": (TypeError, {"w_up": None}, ["w_up", "None"]),
    "w_up_numpy": (TypeError, {"w_up": np.zeros((4, 16, 16))}, ["w_up", "ndarray", "torch"]),
    "w_up_dims": (ValueError, {"w_up": torch.zeros(16, 16)}, ["w_up", "(16, 16)", "3"]),
    "w_up_rows": (ValueError, {"w_up": torch.zeros(4, 24, 16)}, ["w_up", "24", "16"]),
    "w_up_dtype": (TypeError, {"w_up": torch.zeros(4, 16, 16).bfloat16()}, ["w_up", "b", "32"]),
    "w_down_experts": (ValueError, {"w_down": torch.zeros(3, 16, 8)}, ["w_down", "3", "4"]),
    "w_down_stride": (
        ValueError,
        {"w_down": torch.zeros(4, 32, 16)[:, ::2, ::2]},
        ["w_down", "stride"],
    ),
    "w_router_experts": (ValueError, {"w_router": torch.zeros(3, 16)}, ["w_router", "3", "4"]),
    "router_bias": (ValueError, {"router_bias": torch.zeros(7)}, ["router_bias", "7", "4"]),
    "selection_bias": (ValueError, {"selection_bias": torch.zeros(7)}, ["selection_bias", "7"]),
    "b_up": (ValueError, {"b_up": torch.zeros(4, 8)}, ["b_up", "8", "16"]),
    "b_down": (ValueError, {"b_down": torch.zeros(4, 8)}, ["b_down", "8", "16"]),
    "top_k_bool": (TypeError, {"top_k": True}, ["top_k", "bool", "int"]),
    "top_k_zero": (ValueError, {"top_k": 0}, ["top_k", "0", "1"]),
    "top_k_large": (ValueError, {"top_k": 5}, ["top_k", "5", "num_experts"]),
    "activation": (ValueError, {"activation": "swish"}, ["activation", "swish", "swiglu"]),
    "activation_type": (TypeError, {"activation": 3}, ["activation", "int", "Activation"]),
    "routing": (TypeError, {"routing": "softmax"}, ["routing", "str", "Routing"]),
    "capacity": (ValueError, {"capacity_factor": 0.0}, ["capacity_factor", "0", "above 0"]),
    "capacity_nan": (ValueError, {"capacity_factor": float("nan")}, ["capacity_factor", "nan"]),
    "num_experts": (ValueError, {"num_experts": 6}, ["6", "4"]),
    "layer_id": (ValueError, {"layer_id": 2**40}, ["layer_id", "2**31"]),
    "layer_id_type": (TypeError, {"layer_id": "first"}, ["layer_id", "str", "int"]),
    "transposed": (TypeError, {"transposed": 1}, ["transposed", "int", "True or False"]),
    "save_z": (TypeError, {"save_z": None}, ["save_z", "NoneType"]),
    "save_z_name": (ValueError, {"save_z": "always"}, ["save_z", "always", "auto"]),
    "group": (TypeError, {"group": "world"}, ["group", "str", "ProcessGroup"]),
    "interleaved_plain": (
        ValueError,
        {"activation": "relu", "interleaved": True},
        ["interleaved", "gated"],
    ),
    "w_gate_plain": (
        ValueError,
        {"activation": "relu", "w_gate": torch.zeros(4, 8, 16)},
        ["w_gate", "gated"],
    ),
    "w_gate_interleaved": (
        ValueError,
        {"interleaved": True, "w_gate": torch.zeros(4, 8, 16)},
        ["interleaved", "w_gate"],
    ),
    "groups": (
        ValueError,
        {"routing": flashmoe.Routing(num_groups=3)},
        ["num_groups", "3", "num_experts"],
    ),
}


@pytest.mark.parametrize(("error", "changes", "words"), MOE_CASES.values(), ids=MOE_CASES)
def test_moe_names_the_argument(error, changes, words):
    with pytest.raises(error) as caught:
        flashmoe.moe(**keywords(**changes))
    for word in words:
        assert word in str(caught.value)


EXPERTS_CASES = {
    "ids_float": (TypeError, {"topk_ids": torch.zeros(5, 2)}, ["topk_ids", "float32", "int64"]),
    "ids_rows": (ValueError, {"topk_ids": torch.zeros(4, 2).long()}, ["topk_ids", "4", "5"]),
    "weights_k": (ValueError, {"topk_weights": torch.ones(5, 3)}, ["topk_weights", "3", "2"]),
    "weights_dtype": (
        TypeError,
        {"topk_weights": torch.ones(5, 2, dtype=torch.float64)},
        ["topk_weights", "float64", "float32"],
    ),
    "weights_none": (TypeError, {"topk_weights": None}, ["topk_weights", "None"]),
    "ids_below": (
        flashmoe.errors.RoutingError,
        {"topk_ids": torch.full((5, 2), -2)},
        ["topk_ids", "-2"],
    ),
}


@pytest.mark.parametrize(("error", "changes", "words"), EXPERTS_CASES.values(), ids=EXPERTS_CASES)
def test_experts_names_the_argument(error, changes, words):
    with pytest.raises(error) as caught:
        flashmoe.experts(**experts_arguments(**changes))
    for word in words:
        assert word in str(caught.value)


def test_nan_logits_are_refused():
    bad = keywords()
    bad["x"].data[3, 0] = float("nan")
    with pytest.raises(flashmoe.errors.RoutingError, match="3"):
        flashmoe.moe(**bad)


OPTION_CASES = {
    "kind": (ValueError, lambda: flashmoe.Activation("tanh"), ["kind", "tanh", "silu"]),
    "alpha": (ValueError, lambda: flashmoe.Activation("relu", alpha=2.0), ["alpha", "silu"]),
    "limit": (ValueError, lambda: flashmoe.Activation(limit=-1.0), ["limit", "-1", "above 0"]),
    "gated": (TypeError, lambda: flashmoe.Activation(gated=1), ["gated", "int"]),
    "offset": (ValueError, lambda: flashmoe.Activation(gated=False, up_offset=1), ["up_offset"]),
    "score": (ValueError, lambda: flashmoe.Routing("tanh"), ["score", "tanh", "sigmoid"]),
    "score_type": (TypeError, lambda: flashmoe.Routing(3), ["score", "int", "sigmoid"]),
    "scale": (TypeError, lambda: flashmoe.Routing(scale="2"), ["scale", "str", "number"]),
    "num_groups": (ValueError, lambda: flashmoe.Routing(num_groups=0), ["num_groups", "0"]),
    "ranks": (ValueError, lambda: flashmoe.local_group(0), ["num_ranks", "0", "1"]),
    "ranks_type": (TypeError, lambda: flashmoe.local_group(2.0), ["num_ranks", "float", "int"]),
    "module_k": (ValueError, lambda: flashmoe.MoE(8, 8, 4, 5), ["top_k", "5", "4"]),
    "module_size": (TypeError, lambda: flashmoe.MoE(8.0, 8, 4, 2), ["hidden_size", "float"]),
    "module_bias": (TypeError, lambda: flashmoe.MoE(8, 8, 4, 2, bias=1), ["bias", "int"]),
}


@pytest.mark.parametrize(("error", "make", "words"), OPTION_CASES.values(), ids=OPTION_CASES)
def test_option_names_the_field(error, make, words):
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["w_up", "w_router"])
def test_two_devices_are_named(name):
    bad = keywords()
    bad[name] = bad[name].detach().to("meta")
    with pytest.raises(TypeError, match=f"{name} is on meta; accepted: cpu, where x is"):
        flashmoe.moe(**bad)


def test_numpy_dtype_is_named():
    arguments = {name: tensor.detach().numpy() for name, tensor in experts_arguments().items()}
    arguments["x"] = arguments["x"].astype(np.complex64)
    with pytest.raises(TypeError, match="x has dtype complex64; accepted"):
        flashmoe.experts(**arguments)


def test_closed_group_is_named():
    (group,) = flashmoe.local_group(1)
    with group:
        flashmoe.moe(**keywords(group=group))
    group.close()
    with pytest.raises(ValueError, match=r"group 'local:.*' is closed"):
        flashmoe.moe(**keywords(group=group))


def test_group_option_is_named():
    (group,) = flashmoe.local_group(1)
    with group, pytest.raises(ValueError, match="colour"):
        group.set("colour", 1)


def test_binding_names_an_unknown_tensor():
    from flashmoe import _core
    from flashmoe.config import LayerConfig

    engine = _core.engine()
    handle = engine.group_self()
    x = torch.zeros(5, 16)
    layer = _core.layer(
        LayerConfig(2).encode(), 1, x, torch.zeros(4, 16, 16), torch.zeros(4, 16, 8)
    )
    with pytest.raises(ValueError, match="'colour' is not a field"):
        engine.forward(handle, layer, {"colour": x}, 0)
    with pytest.raises(TypeError, match="x is int, expected a tensor"):
        engine.forward(handle, layer, {"x": 3}, 0)
    with pytest.raises(ValueError, match="'colour' is not a field"):
        engine.layer_create({"colour": 1})
    with pytest.raises(ValueError, match="layer handle 999 was never made"):
        engine.forward(handle, 999, {}, 0)
    engine.group_destroy(handle)
    with pytest.raises(ValueError, match=r"group handle .* is closed"):
        engine.group_rank(handle)


def test_error_classes():
    for name in flashmoe.errors.__all__:
        assert issubclass(getattr(flashmoe.errors, name), FlashMoEError)
    assert issubclass(flashmoe.errors.RankMismatchError, ValueError)
    assert issubclass(flashmoe.errors.WaitTimeoutError, TimeoutError)
    assert issubclass(UnsupportedError, NotImplementedError)
    assert issubclass(flashmoe.errors.OutOfMemoryError, MemoryError)
