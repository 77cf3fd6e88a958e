"""The layer as functions: :func:`experts` without, :func:`moe` with a router.

Both take torch tensors (differentiable) or NumPy arrays (forward only), all of one library. Under
``torch.autocast`` nothing is cast: the floating operands of a layer share the dtype of x, but the
router's may be float32.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from . import group as groups
from .config import (
    Activation,
    LayerConfig,
    Routing,
    count,
    flag,
    gate_layout,
    keeps_z,
    number,
    resolve_activation,
    save_z_choice,
)
from .errors import UnsupportedError

_DEFAULT_ROUTING = Routing()
_NUM_DIMS = {"w_router": 2, "w_gate": 3, "w_up": 3, "w_down": 3}
_NUMPY_DTYPES = ("float64", "float32", "float16", "int32", "int64")
_EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down")


class RoutingResult(NamedTuple):
    """What the router of a call decided, for this rank's T tokens.

    Gradients that arrive at ``topk_weights`` and ``logits`` flow back into the router.
    """

    topk_ids: Any
    """[T, k] int64: experts in order of choice."""
    topk_weights: Any
    """[T, k] float32 (float64 for a float64 layer)."""
    logits: Any
    """[T, E] float32 (float64): router output with its bias, before the scores."""
    tokens_per_expert: Any
    """[E] int64: slots this rank routed to each expert, dropped ones included."""
    dropped: Any
    """[1] int64: slots of this rank over the capacity."""


def experts(
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    w_up: Any,
    w_down: Any,
    *,
    w_gate: Any = None,
    b_up: Any = None,
    b_down: Any = None,
    activation: str | Activation = "swiglu",
    num_experts: int | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    weight_on_input: bool = False,
    capacity_factor: float | None = None,
    group: Any = None,
    save_z: bool | str = False,
    weight_grad_queue: Any = None,
    layer_id: int = 0,
) -> Any:
    """The experts of a layer on tokens that are already routed.

    ``y[t] = sum_j topk_weights[t, j] * (act(x[t] w_up[e]^T + b_up[e]) w_down[e]^T + b_down[e])``,
    ``e = topk_ids[t, j]``. T tokens, H hidden size, I intermediate size, E experts on W ranks,
    E_loc = E / W of them here (expert e on rank e // E_loc), G = 2 for a gated activation, else 1.

    Args:
        x: [..., H] float64, float32, bfloat16 or float16: the dtype of the layer.
        topk_ids: [..., k] int32 or int64 global expert ids; -1 and >= E mean no expert.
        topk_weights: [..., k] float32 or the dtype of x (float64 for a float64 layer).
        w_up: [E_loc, G*I, H]: I gate rows, then I up rows; [E_loc, I, H] with ``w_gate``.
        w_down: [E_loc, H, I].
        w_gate: [E_loc, I, H], when gate and up are two tensors.
        b_up: [E_loc, G*I] in the row order of w_up (gate, then up with ``w_gate``).
        b_down: [E_loc, H].
        activation: a name of ``flashmoe.config.ACTIVATIONS`` or an :class:`Activation`.
        num_experts: E, where it is not W * E_loc of the tensors given.
        interleaved: gate row i of w_up at 2i, up row i at 2i + 1.
        transposed: w_up is [E_loc, H, G*I], w_gate [E_loc, H, I] and w_down [E_loc, I, H].
        weight_on_input: the weight multiplies x instead of the expert's output.
        capacity_factor: c keeps the first ceil(c*T*k/E) slots of each (rank, expert); None: all.
        group: None, a :class:`flashmoe.Group`, a torch ProcessGroup or an mpi4py communicator; all
            its ranks call together.
        save_z: True keeps the pre-activations for the backward (on the CPU W = 1), False computes
            them again there, "auto" chooses by the sizes (:func:`flashmoe.config.keeps_z`). Nothing
            is kept where no gradient is wanted.
        weight_grad_queue: a :class:`flashmoe.WeightGradQueue`, whose ``backward_dw()`` computes the
            gradients of the expert weights after the backward.
        layer_id: a number of the layer in its model. Ranks that call layers of different numbers
            get a RankMismatchError, where layers of the same sizes could not be told apart.

    Returns:
        y, with the shape and dtype of x.

    Raises:
        TypeError: a dtype, device or Python type that is not accepted.
        ValueError: a shape, stride or option that is not accepted.
        flashmoe.errors.FlashMoEError: RoutingError, RankMismatchError, WaitTimeoutError,
            GroupAbortedError, UnsupportedError or OutOfMemoryError.
    """
    operands = {
        "x": x,
        "topk_ids": topk_ids,
        "topk_weights": topk_weights,
        "w_gate": w_gate,
        "w_up": w_up,
        "w_down": w_down,
        "b_up": b_up,
        "b_down": b_down,
    }
    return _call(
        operands,
        ("x", "topk_ids", "topk_weights", "w_up", "w_down"),
        None,
        _DEFAULT_ROUTING,
        activation=activation,
        num_experts=num_experts,
        interleaved=interleaved,
        transposed=transposed,
        weight_on_input=weight_on_input,
        capacity_factor=capacity_factor,
        layer_id=layer_id,
        group=group,
        save_z=save_z,
        weight_grad_queue=weight_grad_queue,
    )[0]


def moe(
    x: Any,
    w_router: Any,
    w_up: Any,
    w_down: Any,
    *,
    top_k: int,
    routing: Routing = _DEFAULT_ROUTING,
    router_bias: Any = None,
    selection_bias: Any = None,
    w_gate: Any = None,
    b_up: Any = None,
    b_down: Any = None,
    activation: str | Activation = "swiglu",
    num_experts: int | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    weight_on_input: bool = False,
    capacity_factor: float | None = None,
    group: Any = None,
    save_z: bool | str = False,
    weight_grad_queue: Any = None,
    layer_id: int = 0,
) -> tuple[Any, RoutingResult]:
    """The whole layer: router and experts.

    Args:
        w_router: [E, H] dtype of x or float32 (float64 for a float64 layer).
        top_k: experts per token, 1 to E.
        routing: how logits become ids and weights.
        router_bias: [E] as w_router, added to the logits.
        selection_bias: [E] float32 (float64), added to the scores for the choice only; no gradient.

    The other arguments and the errors are those of :func:`experts`.

    Returns:
        y, with the shape and dtype of x, and a :class:`RoutingResult`.
    """
    operands = {
        "x": x,
        "w_router": w_router,
        "router_bias": router_bias,
        "selection_bias": selection_bias,
        "w_gate": w_gate,
        "w_up": w_up,
        "w_down": w_down,
        "b_up": b_up,
        "b_down": b_down,
    }
    y, *routed, _ = _call(
        operands,
        ("x", "w_router", "w_up", "w_down"),
        top_k,
        routing,
        activation=activation,
        num_experts=num_experts,
        interleaved=interleaved,
        transposed=transposed,
        weight_on_input=weight_on_input,
        capacity_factor=capacity_factor,
        layer_id=layer_id,
        group=group,
        save_z=save_z,
        weight_grad_queue=weight_grad_queue,
    )
    return y, RoutingResult(*routed)


def _call(
    operands: dict[str, Any],
    required: tuple[str, ...],
    top_k: int | None,
    routing: Routing,
    *,
    transposed: bool,
    group: Any,
    save_z: bool | str,
    weight_grad_queue: Any,
    **options: Any,
) -> tuple[Any, ...]:
    """Checks the arguments and runs the layer; a rank that finds an error tells its peers."""
    name, world = groups.resolve(group)
    try:
        library = _check_operands(operands, required)
        flag("transposed", transposed)
        save_z_choice(save_z)
        if weight_grad_queue is not None:
            _check_queue(library, weight_grad_queue)
        if save_z is True and world > 1 and not getattr(operands["x"], "is_cuda", False):
            raise UnsupportedError(
                f"save_z is True on a group of {world} ranks on the CPU, where the rows of z "
                "depend on all ranks' routing; accepted: False or 'auto'"
            )
        if top_k is None:
            top_k = operands["topk_ids"].shape[-1]
        else:
            count("top_k", top_k)
        has_w_gate = operands["w_gate"] is not None
        config = _config(top_k, routing, has_w_gate, **options).encode()
    except Exception as error:
        groups.refuse(name, error, getattr(operands["x"], "is_cuda", False))
        raise
    return _run(library, operands, config, name, world, transposed, save_z, weight_grad_queue)


def _config(
    top_k: int,
    routing: Routing,
    has_w_gate: bool,
    *,
    activation: str | Activation,
    num_experts: int | None,
    interleaved: bool,
    weight_on_input: bool,
    capacity_factor: float | None,
    layer_id: int,
) -> LayerConfig:
    """The layer of a call. Raises TypeError or ValueError naming the argument."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is a {type(routing).__name__}; accepted: a flashmoe.Routing")
    act = resolve_activation(activation)
    flag("interleaved", interleaved)
    flag("weight_on_input", weight_on_input)
    if capacity_factor is not None:
        number("capacity_factor", capacity_factor, above=0)
    if num_experts is not None:
        count("num_experts", num_experts)
    if isinstance(layer_id, bool) or not isinstance(layer_id, int):
        raise TypeError(f"layer_id is a {type(layer_id).__name__}; accepted: an int")
    if abs(layer_id) > 2**31:
        raise ValueError(f"layer_id is {layer_id}; accepted: up to 2**31")
    return LayerConfig(
        top_k=top_k,
        num_experts=num_experts or 0,
        activation=act.kind,
        gated=act.gated,
        gate_layout=gate_layout(act, has_w_gate, interleaved),
        weight_on_input=weight_on_input,
        act_alpha=float(act.alpha),
        act_limit=float(act.limit or 0),
        up_offset=float(act.up_offset),
        capacity_factor=float(capacity_factor or 0),
        score=routing.score,
        renormalize=routing.renormalize,
        scale=float(routing.scale),
        num_groups=routing.num_groups,
        top_groups=routing.top_groups,
        group_top=routing.group_top,
        layer_id=layer_id,
    )


def _check_operands(operands: dict[str, Any], required: tuple[str, ...]) -> str:
    """``torch`` or ``numpy``: the library of the operands.

    Shapes are checked by the engine, but for what the outputs are allocated from.
    """
    library = _library("x", operands["x"])
    for name, tensor in operands.items():
        if tensor is None:
            if name in required:
                raise TypeError(f"{name} is None; accepted: a {library} tensor")
            continue
        if _library(name, tensor) != library:
            raise TypeError(
                f"{name} is a {type(tensor).__name__} while x is of {library}; accepted: all of "
                "one library"
            )
        expected = _NUM_DIMS.get(name)
        if expected is not None and tensor.ndim != expected:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; accepted: {expected} dimensions"
            )
        if tensor.ndim == 0:
            raise ValueError(f"{name} has no dimensions; accepted: 1 or more")
    if library == "numpy":
        _check_numpy(operands)
    else:
        _check_torch(operands)
    return library


def _library(name: str, tensor: Any) -> str:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return "torch"
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(tensor, numpy.ndarray):
        return "numpy"
    raise TypeError(f"{name} is a {type(tensor).__name__}; accepted: a torch tensor or NumPy array")


def _check_numpy(operands: dict[str, Any]) -> None:
    for name, array in operands.items():
        if array is not None and array.dtype.name not in _NUMPY_DTYPES:
            raise TypeError(
                f"{name} has dtype {array.dtype}; accepted from NumPy: {', '.join(_NUMPY_DTYPES)}"
            )


def _check_torch(operands: dict[str, Any]) -> None:
    import torch

    if hasattr(operands["x"], "to_local"):
        raise TypeError("x is a DTensor; accepted: the local tensor of this rank (x.to_local())")
    device = operands["x"].device
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} has layout {tensor.layout}; accepted: torch.strided")
        if tensor.device != device:
            raise TypeError(f"{name} is on {tensor.device}; accepted: {device}, where x is")


def _check_queue(library: str, queue: Any) -> None:
    if library != "torch":
        raise TypeError("weight_grad_queue is given with NumPy arrays; accepted: None")
    from .weight_grads import WeightGradQueue

    if not isinstance(queue, WeightGradQueue):
        raise TypeError(
            f"weight_grad_queue is a {type(queue).__name__}; accepted: a flashmoe.WeightGradQueue"
        )


def _run(
    library: str,
    operands: dict[str, Any],
    config: str,
    group: str,
    world: int,
    transposed: bool,
    save_z: bool | str,
    queue: Any,
) -> tuple[Any, ...]:
    """All outputs of the forward operator, y in the shape of x."""
    x = operands["x"]
    owners = _weight_owners(operands, transposed, queue) if library == "torch" else {}
    flat = {name: _operand(name, tensor, transposed) for name, tensor in operands.items()}
    if library == "numpy":
        outputs = _run_numpy(flat, config, group)
    else:
        from . import ops

        inputs = [flat.get(name) for name in ops.OPERANDS]
        keep = _wants_gradients(inputs) and keeps_z(
            save_z, flat["x"].shape[1], flat["w_down"].shape[2], world, flat["x"].is_cuda
        )
        if owners:
            from .weight_grads import forward_with_owners

            outputs = forward_with_owners(owners, queue, *inputs, config, group, keep)
        else:
            outputs = ops.forward(*inputs, config, group, keep)
    y, *others = outputs
    return (y if x.ndim == 2 else y.reshape(x.shape)), *others


def _operand(name: str, tensor: Any, transposed: bool) -> Any:
    """A tensor as the engine takes it: leading dimensions flattened, [.., out, in], local part."""
    if tensor is None:
        return None
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if name in ("x", "topk_ids", "topk_weights") and tensor.ndim != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    if transposed and name in _EXPERT_WEIGHTS:
        tensor = tensor.swapaxes(1, 2)
    return tensor


def _wants_gradients(inputs: list[Any]) -> bool:
    import torch

    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs
    )


def has_main_grad(weight: Any) -> bool:
    """Whether the gradient of a parameter goes into a tensor of its own."""
    return getattr(weight, "main_grad", None) is not None or hasattr(weight, "get_main_grad")


def _weight_owners(operands: dict[str, Any], transposed: bool, queue: Any) -> dict[str, Any]:
    """The expert weights whose gradient does not go through autograd, by name."""
    import torch

    owners: dict[str, Any] = {}
    if not torch.is_grad_enabled():
        return owners
    for name in _EXPERT_WEIGHTS:
        weight = operands[name]
        if weight is None or not weight.requires_grad:
            continue
        if queue is None and not has_main_grad(weight):
            continue
        from .weight_grads import WeightOwner

        owners[name] = WeightOwner(name, weight, transposed)
    return owners


def _run_numpy(operands: dict[str, Any], config: str, group: str) -> tuple[Any, ...]:
    import numpy

    from . import _core

    member = groups.lookup(group)
    with groups.refusing(group):
        present = {name: array for name, array in operands.items() if array is not None}
        x, w_up = present["x"], present["w_up"]
        decoded = LayerConfig.decode(config)
        num_experts = decoded.num_experts or w_up.shape[0] * member.world
        wide = numpy.float64 if x.dtype == numpy.float64 else numpy.float32
        outputs = {
            "y": numpy.empty(x.shape, x.dtype),
            "tokens_per_expert": numpy.empty(num_experts, numpy.int64),
            "dropped": numpy.empty(1, numpy.int64),
        }
        if "w_router" in present:
            chosen = (x.shape[0], decoded.top_k)
            outputs["topk_ids"] = numpy.empty(chosen, numpy.int64)
            outputs["topk_weights"] = numpy.empty(chosen, wide)
            outputs["logits"] = numpy.empty((x.shape[0], num_experts), wide)
        handle = _core.layer(config, member.world, x, w_up, present["w_down"])
        tensors = {name: _core.from_numpy(array) for name, array in (present | outputs).items()}
    _core.engine().forward(member.handle, handle, tensors, 0)
    names = ("y", "topk_ids", "topk_weights", "logits", "tokens_per_expert", "dropped")
    return (*(outputs.get(name) for name in names), None)
