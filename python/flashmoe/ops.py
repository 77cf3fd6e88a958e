"""The torch operators ``flashmoe::forward`` and ``flashmoe::backward``.

An operator takes tensors, a layer as the text of a :class:`~flashmoe.config.LayerConfig` and a
group by name. What an operator does not produce in a call is returned with no elements, because a
schema has no optional outputs. What a backward needs is held by the autograd node of its forward,
so any number of forwards may be in flight and their backwards may run in any order.
"""

from __future__ import annotations

from typing import Any

import torch

from . import _core, config
from . import group as groups
from .errors import UnsupportedError

OPERANDS = (
    "x",
    "w_router",
    "router_bias",
    "selection_bias",
    "topk_ids",
    "topk_weights",
    "w_gate",
    "w_up",
    "w_down",
    "b_up",
    "b_down",
)
OUTPUTS = ("y", "topk_ids", "topk_weights", "logits", "tokens_per_expert", "dropped", "z")
SAVED = (*OPERANDS, "logits", "z")
INCOMING = ("grad_y", "grad_weights", "grad_logits")
DIFFERENTIABLE = tuple(name for name in OPERANDS if name not in ("selection_bias", "topk_ids"))
WEIGHTS = ("w_gate", "w_up", "w_down")

_REQUIRED = {"x", "w_up", "w_down"}

Tensors = dict[str, torch.Tensor | None]


def _schema(names: tuple[str, ...], required: set[str], tail: str, num_outputs: int) -> str:
    tensors = [f"Tensor{'' if name in required else '?'} {name}" for name in names]
    return f"({', '.join(tensors)}, {tail}) -> ({', '.join(['Tensor'] * num_outputs)})"


def _present(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _empty_outputs(tensors: Tensors, layer: str, group: str, save_z: bool) -> Tensors:
    """Outputs of a forward: None for what it does not produce."""
    x, w_up, w_router = tensors["x"], tensors["w_up"], tensors["w_router"]
    decoded = config.LayerConfig.decode(layer)
    world = groups.world_of(group)
    num_experts = decoded.num_experts or w_up.shape[0] * world
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    outputs: Tensors = dict.fromkeys(OUTPUTS)
    outputs["y"] = x.new_empty(x.shape)
    outputs["tokens_per_expert"] = x.new_empty(num_experts, dtype=torch.int64)
    outputs["dropped"] = x.new_empty(1, dtype=torch.int64)
    if w_router is not None:
        chosen = (x.shape[0], decoded.top_k)
        outputs["topk_ids"] = x.new_empty(chosen, dtype=torch.int64)
        outputs["topk_weights"] = x.new_empty(chosen, dtype=wide)
        outputs["logits"] = x.new_empty((x.shape[0], num_experts), dtype=wide)
    if save_z:
        if world > 1 and not x.is_cuda:
            raise UnsupportedError(
                f"save_z is True on a group of {world} ranks on the CPU, where the rows of z "
                "depend on all ranks' routing; accepted: False"
            )
        rows = config.z_rows(x.shape[0], decoded.top_k, w_up.shape[0], world)
        width = w_up.shape[1] * (2 if decoded.gate_layout == "separate" else 1)
        # Not all rows are used: an output must not show what was in the memory before. On CUDA
        # that would be a second kernel.
        outputs["z"] = (x.new_empty if x.is_cuda else x.new_zeros)((rows, width))
    return outputs


def empty_gradients(tensors: Tensors, needs: list[str]) -> Tensors:
    """Gradients of the operands in ``needs``; those of the weights keep the weights' strides."""
    gradients: Tensors = {}
    for name in needs:
        tensor = tensors[name]
        keeps_strides = name in WEIGHTS
        gradients[name] = (
            torch.empty_like(tensor) if keeps_strides else tensor.new_empty(tensor.shape)
        )
    return gradients


def _filled(tensors: Tensors, names: tuple[str, ...], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the order of ``names``, one without elements for each that is None."""
    found = [tensors.get(name) for name in names]
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in found)


def _forward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    *operands, layer, group, save_z = args
    tensors = dict(zip(OPERANDS, operands, strict=True))
    return _filled(_empty_outputs(tensors, layer, group, save_z), OUTPUTS, tensors["x"])


def _forward(*args: Any) -> tuple[torch.Tensor, ...]:
    *operands, layer, group, save_z = args
    tensors = dict(zip(OPERANDS, operands, strict=True))
    member = groups.lookup(group)
    with groups.refusing(group, tensors["x"].is_cuda):
        outputs = _empty_outputs(tensors, layer, group, save_z)
        handle = _core.layer(layer, member.world, tensors["x"], tensors["w_up"], tensors["w_down"])
    present = _present(tensors) | _present(outputs)
    _core.engine().forward(member.handle, handle, present, _core.stream_of(tensors["x"]))
    return _filled(outputs, OUTPUTS, tensors["x"])


def explain(tensors: Tensors, layer: str, group: str) -> str:
    """How a forward of these operands would run, a line for each fact; launches nothing.

    Raises UnsupportedError where it would not run.
    """
    operands = dict.fromkeys(OPERANDS) | tensors
    outputs = _empty_outputs(operands, layer, group, False)
    member = groups.lookup(group)
    handle = _core.layer(layer, member.world, operands["x"], operands["w_up"], operands["w_down"])
    present = _present(operands) | _present(outputs)
    return str(_core.engine().explain(member.handle, handle, present))


def _backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    *operands, _, _, needs = args
    tensors = dict(zip(SAVED, operands, strict=False))
    return _filled(empty_gradients(tensors, needs.split(",")), DIFFERENTIABLE, tensors["x"])


def _backward(*args: Any) -> tuple[torch.Tensor, ...]:
    *operands, layer, group, needs = args
    tensors = dict(zip((*SAVED, *INCOMING), operands, strict=True))
    with groups.refusing(group, tensors["x"].is_cuda):
        gradients = empty_gradients(tensors, needs.split(","))
    launch_backward(tensors, gradients, layer, group)
    return _filled(gradients, DIFFERENTIABLE, tensors["x"])


def _as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor [T, H] where the engines read it in place, else a copy: rows contiguous and apart,
    on CUDA in units of 16 bytes. What arrives at an output has any strides."""
    stride = tensor.stride(0)
    readable = tensor.stride(1) == 1 and stride >= tensor.shape[1]
    if tensor.is_cuda:
        readable &= tensor.data_ptr() % 16 == 0 and stride * tensor.element_size() % 16 == 0
    return tensor if readable else tensor.clone(memory_format=torch.contiguous_format)


def launch_backward(
    tensors: Tensors, gradients: Tensors, layer: str, group: str, flags: int = 0
) -> None:
    """One launch: writes ``gradients``, or adds to them where ``flags`` (fm_backward_flags) say."""
    member = groups.lookup(group)
    x = tensors["x"]
    with groups.refusing(group, x.is_cuda):
        handle = _core.layer(layer, member.world, x, tensors["w_up"], tensors["w_down"])
        operands = _present(tensors)
        operands["grad_y"] = _as_rows(operands["grad_y"])
        outputs = {f"grad_{name}": gradient for name, gradient in gradients.items()}
        # Every rank takes part in the exchange of dX, so the engine always writes it.
        if "grad_x" not in outputs:
            outputs["grad_x"] = x.new_empty(x.shape)
    stream = _core.stream_of(x)
    _core.engine().backward(member.handle, handle, operands | outputs, flags, stream)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Keeps what the backward needs: operands, the routing and, if it was asked for, z."""
    *operands, ctx.layer, ctx.group, save_z = inputs
    tensors = dict(zip(OPERANDS, operands, strict=True))
    outputs = dict(zip(OUTPUTS, output, strict=True))
    tensors["logits"] = tensors["z"] = None
    constant = ["topk_ids", "tokens_per_expert", "dropped", "z"]
    if tensors["w_router"] is not None:
        for name in ("topk_ids", "topk_weights", "logits"):
            tensors[name] = outputs[name]
    else:
        constant += ["topk_weights", "logits"]
    if save_z:
        tensors["z"] = outputs["z"]
    ctx.save_for_backward(*(tensors[name] for name in SAVED))
    ctx.mark_non_differentiable(*(outputs[name] for name in constant))
    ctx.set_materialize_grads(False)


def incoming(ctx: Any, grads: tuple[torch.Tensor | None, ...]) -> Tensors | None:
    """Saved tensors and arriving gradients by name; None if no gradient arrives."""
    by_output = dict(zip(OUTPUTS, grads, strict=True))
    grad_y, grad_weights, grad_logits = (by_output[k] for k in ("y", "topk_weights", "logits"))
    if grad_y is None and grad_weights is None and grad_logits is None:
        return None
    tensors = dict(zip(SAVED, ctx.saved_tensors, strict=True))
    tensors["grad_y"] = torch.zeros_like(tensors["x"]) if grad_y is None else grad_y
    tensors["grad_weights"] = grad_weights
    tensors["grad_logits"] = grad_logits
    return tensors


def needed(needs_input_grad: tuple[bool, ...]) -> list[str]:
    """The operands whose gradient autograd asks for."""
    wanted = [name for name, needed in zip(OPERANDS, needs_input_grad, strict=False) if needed]
    return [name for name in wanted if name in DIFFERENTIABLE]


def _backward_formula(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    tensors = incoming(ctx, grads)
    needs = needed(ctx.needs_input_grad)
    nothing = (None,) * (len(OPERANDS) + 3)
    if tensors is None or not needs:
        return nothing
    operands = [tensors[name] for name in (*SAVED, *INCOMING)]
    gradients = backward(*operands, ctx.layer, ctx.group, ",".join(needs))
    by_name = dict(zip(DIFFERENTIABLE, gradients, strict=True))
    return (*(by_name[name] if name in needs else None for name in OPERANDS), None, None, None)


def refuse_double_backward(*unused: Any) -> None:
    """Raises UnsupportedError."""
    raise UnsupportedError(
        "double backward: flashmoe has no gradient of its backward; call backward without "
        "create_graph=True, or detach what depends on the first gradient"
    )


def _save_nothing(*, ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _save_forward(*, ctx: Any, inputs: Any, output: Any) -> None:
    save(ctx, inputs, output)


forward = torch.library.custom_op(
    "flashmoe::forward",
    _forward,
    mutates_args=(),
    schema=_schema(OPERANDS, _REQUIRED, "str layer, str group, bool save_z", len(OUTPUTS)),
)
forward.register_fake(_forward_fake)
forward.register_autograd(_backward_formula, setup_context=_save_forward)

backward = torch.library.custom_op(
    "flashmoe::backward",
    _backward,
    mutates_args=(),
    schema=_schema(
        (*SAVED, *INCOMING),
        _REQUIRED | {"topk_ids", "topk_weights", "grad_y"},
        "str layer, str group, str needs",
        len(DIFFERENTIABLE),
    ),
)
backward.register_fake(_backward_fake)
backward.register_autograd(refuse_double_backward, setup_context=_save_nothing)
