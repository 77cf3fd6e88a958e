"""The torch operators: opcheck, compile, checkpoint, autograd, DTensor."""

import pickle

import flashmoe
import pytest
import torch
from conftest import Layer, make_layer, plain_experts
from flashmoe import _core, config, ops
from flashmoe.config import LayerConfig
from flashmoe.errors import UnsupportedError
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

CONFIG = LayerConfig(top_k=2).encode()


def small_layer(**options):
    return make_layer(tokens=5, hidden=8, intermediate=6, experts=4, **options)


def fused_arguments(layer, save_z=False):
    routing = (layer.w_router, layer.router_bias, None, None, None)
    return (
        layer.x,
        *routing,
        None,
        layer.w_up,
        layer.w_down,
        layer.b_up,
        layer.b_down,
        CONFIG,
        "self",
        save_z,
    )


def external_arguments(layer):
    ids, weights = torch.tensor([[0, 1], [2, -1], [3, 3], [1, 4], [0, 2]]), torch.rand(5, 2)
    routing = (None, None, None, ids, weights.requires_grad_())
    return (layer.x, *routing, None, layer.w_up, layer.w_down, None, None, CONFIG, "self", False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("save_z", [False, True])
def test_opcheck_fused_router(bias, save_z):
    torch.library.opcheck(ops.forward, fused_arguments(small_layer(bias=bias), save_z))


def test_opcheck_external_routing():
    torch.library.opcheck(ops.forward, external_arguments(small_layer()))


def test_opcheck_separate_gate_and_transposed_views():
    layer = small_layer()
    gate, up = (
        w.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for w in layer.w_up.chunk(2, dim=1)
    )
    text = LayerConfig(top_k=2, gate_layout="separate").encode()
    arguments = (layer.x, layer.w_router, None, None, None, None, gate, up, layer.w_down)
    torch.library.opcheck(ops.forward, (*arguments, None, None, text, "self", True))


def test_opcheck_backward():
    layer = small_layer(bias=True)
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in fused_arguments(layer)]
    *operands, text, group, _ = arguments
    outputs = dict(zip(ops.OUTPUTS, ops.forward(*arguments), strict=True))
    saved = dict(zip(ops.OPERANDS, operands, strict=True))
    saved |= {name: outputs[name] for name in ("topk_ids", "topk_weights", "logits")}
    saved |= {"z": None, "grad_y": torch.randn(5, 8), "grad_weights": None, "grad_logits": None}
    tensors = [saved[name] for name in (*ops.SAVED, *ops.INCOMING)]
    for needs in ("x,w_router,router_bias,w_up,w_down,b_up,b_down", "x", "w_up,b_down"):
        torch.library.opcheck(ops.backward, (*tensors, text, group, needs))


def loss_of_moe(x, w_router, w_up, w_down, **options):
    y, routed = flashmoe.moe(x, w_router, w_up, w_down, top_k=2, **options)
    return y.square().sum() + routed.logits.square().sum() + routed.topk_weights[:, 0].sum()


def loss_of_experts(x, w_router, w_up, w_down):
    ids = torch.arange(2 * x.shape[0]).reshape(-1, 2) % 4
    weights = torch.sigmoid(x[:, :2])
    return flashmoe.experts(x, ids, weights, w_up, w_down, save_z=True).square().sum()


def gradients(loss, layer):
    layer = layer.to(layer.x.dtype)
    value = loss(layer.x, layer.w_router, layer.w_up, layer.w_down)
    value.backward()
    return {"loss": value.detach(), **layer.grads()}


def assert_same_bits(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.parametrize("loss", [loss_of_moe, loss_of_experts])
def test_compile_without_graph_breaks(loss):
    torch._dynamo.reset()
    layer = small_layer()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(compiled, layer), gradients(loss, layer))


def test_compile_with_inductor():
    """Inductor fuses what surrounds the layer; the layer's own gradients keep their bits."""
    torch._dynamo.reset()
    module = flashmoe.MoE(8, 6, 4, 2, bias=True)
    x = torch.randn(3, 5, 8)
    module(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    torch.compile(module, fullgraph=True)(x).sum().backward()
    assert_same_bits({name: p.grad for name, p in module.named_parameters()}, expected)


def test_compile_with_dynamic_tokens():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of_experts, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (5, 9, 23, 64):
        layer = make_layer(tokens=tokens, hidden=8, intermediate=6, experts=4)
        assert_same_bits(gradients(compiled, layer), gradients(loss_of_experts, layer))
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4, "compiled again for another number of tokens"


def test_compile_on_a_group(ranks):
    torch._dynamo.reset()
    layer = small_layer()
    (group,) = ranks(1).groups

    def loss(x, w_router, w_up, w_down):
        return flashmoe.moe(x, w_router, w_up, w_down, top_k=2, group=group)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_bits(gradients(compiled, layer), gradients(loss, layer))


def test_meta_tensors_give_shapes():
    layer = flashmoe.MoE(16, 8, 4, 2, device="meta")
    y, routed = layer(torch.empty(2, 3, 16, device="meta"), return_routing=True)
    assert y.shape == (2, 3, 16)
    assert routed.logits.shape == (6, 4)
    assert y.device.type == "meta"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    layer = small_layer()

    def loss(*operands):
        return checkpoint(loss_of_moe, *operands, use_reentrant=use_reentrant)

    assert_same_bits(gradients(loss, layer), gradients(loss_of_moe, layer))


def test_many_in_flight_and_backward_in_any_order():
    layers = [small_layer(seed=seed) for seed in range(4)]
    expected = [gradients(loss_of_moe, layer) for layer in layers]
    leaves = [layer.to(torch.float32) for layer in layers]
    losses = [loss_of_moe(d.x, d.w_router, d.w_up, d.w_down) for d in leaves]
    flashmoe.moe(**layers[0].keywords())  # a forward whose graph is never used
    for index in (2, 0, 3, 1):
        losses[index].backward()
        ours = {"loss": losses[index].detach(), **leaves[index].grads()}
        assert_same_bits(ours, expected[index])


def test_second_backward_through_a_kept_graph():
    layer = small_layer()
    loss = loss_of_moe(layer.x, layer.w_router, layer.w_up, layer.w_down)
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in layer.grads().items()}
    loss.backward()
    assert_same_bits(layer.grads(), {name: grad + grad for name, grad in once.items()})
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused():
    layer = small_layer()
    y, _ = flashmoe.moe(**layer.keywords())
    (grad,) = torch.autograd.grad(y.square().sum(), layer.x, create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward"):
        grad.sum().backward()


WANTED = [["x"], ["w_router"], ["w_up", "b_up"], ["w_down"], ["b_down", "router_bias"]]


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
def test_only_what_is_wanted_is_computed(wanted, monkeypatch):
    full = small_layer(bias=True)
    y, _ = flashmoe.moe(**full.keywords())
    y.square().sum().backward()
    asked = []
    launch = ops.launch_backward

    def record(tensors, grads, *rest):
        asked.append(sorted(grads))
        launch(tensors, grads, *rest)

    monkeypatch.setattr(ops, "launch_backward", record)
    part = small_layer(bias=True)
    for name, tensor in part.tensors().items():
        tensor.requires_grad_(name in wanted)
    y, _ = flashmoe.moe(**part.keywords())
    y.square().sum().backward()
    assert asked == [sorted(wanted)]
    assert_same_bits(part.grads(), {name: full.grads()[name] for name in wanted})


def test_gradient_that_arrives_at_the_routing_only():
    layer = small_layer()
    _, routed = flashmoe.moe(**layer.keywords())
    routed.logits.square().sum().backward()
    logits = torch.nn.functional.linear(layer.x, layer.w_router)
    expected = torch.autograd.grad(logits.square().sum(), (layer.x, layer.w_router))
    torch.testing.assert_close(layer.x.grad, expected[0])
    torch.testing.assert_close(layer.w_router.grad, expected[1])
    assert not layer.w_up.grad.any()


def test_expanded_gradient_and_unused_output():
    layer = small_layer()
    y, routed = flashmoe.moe(**layer.keywords())
    y.sum().backward()
    ones = small_layer()
    y, _ = flashmoe.moe(**ones.keywords())
    y.backward(torch.ones_like(y))
    assert_same_bits(layer.grads(), ones.grads())
    assert routed.topk_weights.grad_fn is not None


def test_weight_gradients_keep_the_strides_of_the_weights():
    layer = small_layer()
    transposed = layer.w_up.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y, _ = flashmoe.moe(layer.x, layer.w_router, transposed, layer.w_down, top_k=2)
    y.sum().backward()
    assert transposed.grad.stride() == transposed.stride()


def test_z_is_saved_only_when_asked_for():
    layer = make_layer(tokens=50, bias=True)
    sizes = {}
    for save_z in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor) or tensor,  # noqa: B023
            lambda tensor: tensor,
        ):
            flashmoe.moe(**layer.keywords(), save_z=save_z)
        operands = {tensor.data_ptr() for tensor in layer.tensors().values()}
        extra = [tensor for tensor in saved if tensor.data_ptr() not in operands]
        sizes[save_z] = sorted(tuple(tensor.shape) for tensor in extra)
    assert sizes[False] == [(50, 2), (50, 2), (50, 6)]
    assert sizes[True] == sorted([*sizes[False], (config.z_rows(50, 2, 6), 48)])


AUTO = {  # hidden, intermediate, ranks, on CUDA: kept
    "qwen3-30b": (2048, 768, 1, False, True),
    "deepseek-v3": (7168, 2048, 1, False, True),
    "square": (64, 64, 1, False, True),
    "mixtral": (4096, 14336, 1, True, False),
    "scout": (5120, 8192, 1, False, False),
    "ranks": (2048, 768, 2, False, False),
    "ranks-on-cuda": (2048, 768, 2, True, True),
    "mixtral-on-ranks": (4096, 14336, 8, True, False),
}


@pytest.mark.parametrize(
    ("hidden", "intermediate", "world", "cuda", "kept"), AUTO.values(), ids=AUTO
)
def test_z_is_kept_by_size(hidden, intermediate, world, cuda, kept):
    assert config.keeps_z("auto", hidden, intermediate, world, cuda) is kept
    assert config.keeps_z(True, hidden, intermediate, world, cuda) is True
    assert config.keeps_z(False, hidden, intermediate, world, cuda) is False


def keeps(monkeypatch, layer, **options):
    """Whether a forward was asked to write z."""
    asked = []
    forward = ops.forward
    monkeypatch.setattr(ops, "forward", lambda *args: asked.append(args[-1]) or forward(*args))
    flashmoe.moe(**layer.keywords(), **options)
    return asked[0]


def test_auto_looks_at_the_layer_and_at_what_is_wanted(monkeypatch):
    narrow = make_layer(hidden=32, intermediate=24)
    wide = make_layer(hidden=16, intermediate=24)
    assert keeps(monkeypatch, narrow, save_z="auto") is True
    assert keeps(monkeypatch, wide, save_z="auto") is False
    assert keeps(monkeypatch, wide, save_z=True) is True
    for choice in ("auto", True):
        with torch.no_grad():
            assert keeps(monkeypatch, narrow, save_z=choice) is False
    for tensor in narrow.tensors().values():
        tensor.requires_grad_(False)
    assert keeps(monkeypatch, narrow, save_z="auto") is False
    narrow.w_down.requires_grad_()
    assert keeps(monkeypatch, narrow, save_z="auto") is True


def test_gradients_become_those_of_the_leaves_without_a_copy(monkeypatch):
    written = set()
    allocate = ops.empty_gradients

    def record(*args):
        gradients = allocate(*args)
        written.update(tensor.data_ptr() for tensor in gradients.values())
        return gradients

    monkeypatch.setattr(ops, "empty_gradients", record)
    layer = make_layer(bias=True)
    turned = {
        name: getattr(layer, name).detach().transpose(1, 2).contiguous().requires_grad_()
        for name in ("w_up", "w_down")
    }
    for transposed, weights in ((False, {}), (True, turned)):
        written.clear()
        leaves = layer.tensors() | weights
        y, _ = flashmoe.moe(**layer.keywords() | weights, transposed=transposed)
        grads = torch.autograd.grad(y.square().sum(), leaves.values())
        assert {grad.data_ptr() for grad in grads} == written
        y, _ = flashmoe.moe(**layer.keywords() | weights, transposed=transposed)
        written.clear()
        y.square().sum().backward()
        assert {leaf.grad.data_ptr() for leaf in leaves.values()} == written
        for leaf in leaves.values():
            leaf.grad = None


STRIDED = {
    "rows apart": lambda grad: torch.cat([grad, grad], dim=1)[:, : grad.shape[1]],
    "columns apart": lambda grad: grad.T.contiguous().T,
    "one row": lambda grad: grad[:1].expand_as(grad),
    "one number": lambda grad: grad[0, 0].expand_as(grad),
}


@pytest.mark.parametrize("strided", STRIDED.values(), ids=STRIDED)
def test_arriving_gradients_of_any_strides(strided, monkeypatch):
    layer = small_layer()
    generator = torch.Generator().manual_seed(3)
    y, routed = flashmoe.moe(**layer.keywords())
    ends = (y, routed.topk_weights, routed.logits)
    arriving = [strided(torch.randn(end.shape, generator=generator)) for end in ends]
    leaves = tuple(layer.tensors().values())
    dense = [grad.contiguous() for grad in arriving]
    expected = torch.autograd.grad(ends, leaves, dense, retain_graph=True)
    made = torch.autograd.grad(ends, leaves, arriving)
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert ops._as_rows(dense[0]) is dense[0]
    rows_apart = STRIDED["rows apart"](dense[0])
    assert ops._as_rows(rows_apart) is rows_apart


def test_z_rows_are_those_of_the_engine():
    x, w_up, w_down = torch.zeros(1, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6)
    handle = _core.layer(CONFIG, 1, x, w_up, w_down)
    group = _core.engine().group_self()
    for tokens in (0, 1, 7, 8, 9, 1000, 12345):
        expected = _core.engine().z_rows(group, handle, tokens)
        assert config.z_rows(tokens, 2, 4) == expected
    _core.engine().group_destroy(group)


def test_z_rows_of_several_ranks_are_those_of_the_engine():
    world = 3
    x, w_up, w_down = torch.zeros(1, 8), torch.zeros(4, 12, 8), torch.zeros(4, 8, 6)
    handle = _core.layer(CONFIG, world, x, w_up, w_down)
    groups = flashmoe.local_group(world)
    for tokens in (0, 1, 7, 8, 9, 1000, 12345):
        expected = _core.engine().z_rows(groups[0].handle, handle, tokens)
        assert config.z_rows(tokens, 2, 4, world) == expected > 2 * tokens
    for group in groups:
        group.close()


def test_inputs_are_not_changed():
    layer = small_layer(bias=True)
    versions = {name: tensor._version for name, tensor in layer.tensors().items()}
    copies = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    y, _ = flashmoe.moe(**layer.keywords())
    y.sum().backward()
    for name, tensor in layer.tensors().items():
        assert tensor._version == versions[name]
        assert torch.equal(tensor, copies[name])


def test_operator_works_in_a_process_that_never_encoded_the_layer():
    text = pickle.loads(pickle.dumps(CONFIG))
    LayerConfig.decode.cache_clear()
    _core._layer.cache_clear()
    layer = small_layer()
    *arguments, _, group, save_z = fused_arguments(layer)
    y = ops.forward(*arguments, text, group, save_z)[0]
    assert torch.equal(y, flashmoe.moe(**layer.keywords())[0])


def test_autocast_casts_nothing_and_says_so():
    layer = small_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flashmoe.moe(**layer.keywords())[0].dtype == torch.float32
        x = torch.nn.functional.linear(layer.x, torch.eye(8))
        with pytest.raises(TypeError, match="w_up"):
            flashmoe.moe(x, layer.w_router, layer.w_up, layer.w_down, top_k=2)


@pytest.fixture
def mesh():
    """A device mesh of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def distributed(layer, mesh):
    """The layer with DTensor parameters, sharded over the experts."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def parameter(tensor):
        return torch.nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)]))

    names = ("w_router", "w_up", "w_down")
    return Layer(layer.x, **{name: parameter(getattr(layer, name)) for name in names})


def test_dtensor_parameters_are_taken_by_their_local_part(mesh):
    from torch.distributed.tensor import DTensor

    layer = small_layer()
    expected = gradients(loss_of_moe, layer)
    sharded = distributed(layer, mesh)
    loss_of_moe(sharded.x, sharded.w_router, sharded.w_up, sharded.w_down).backward()
    for name in ("w_router", "w_up", "w_down"):
        grad = getattr(sharded, name).grad
        assert isinstance(grad, DTensor)
        assert torch.equal(grad.to_local(), expected[name])
    assert torch.equal(sharded.x.grad, expected["x"])


def test_dtensor_input_is_refused(mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    layer = small_layer()
    x = distribute_tensor(layer.x.detach(), mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"x is a DTensor; accepted: .*to_local"):
        flashmoe.moe(x, layer.w_router, layer.w_up, layer.w_down, top_k=2)


def test_dtensor_main_grad(mesh):
    layer = small_layer()
    expected = gradients(loss_of_moe, layer)
    sharded = distributed(layer, mesh)
    sharded.w_up.main_grad = torch.zeros_like(sharded.w_up.data)
    loss_of_moe(sharded.x, sharded.w_router, sharded.w_up, sharded.w_down).backward()
    assert torch.equal(sharded.w_up.main_grad.to_local(), expected["w_up"])
    assert sharded.w_up.grad is None


def test_dtensor_parameters_with_delayed_weight_gradients(mesh):
    from flashmoe.weight_grads import WeightGradQueue
    from torch.distributed.tensor import DTensor

    layer, queue = small_layer(), WeightGradQueue()
    expected = gradients(loss_of_moe, layer)
    sharded = distributed(layer, mesh)
    for times in (1, 2):
        loss_of_moe(
            sharded.x, sharded.w_router, sharded.w_up, sharded.w_down, weight_grad_queue=queue
        ).backward()
        queue.backward_dw()
        for name in ("w_up", "w_down"):
            grad = getattr(sharded, name).grad
            assert isinstance(grad, DTensor)
            assert torch.equal(grad.to_local(), times * expected[name])
    torch.optim.SGD([sharded.w_up, sharded.w_down], lr=0.1).step()


def test_process_group_of_one_rank_is_self(mesh):
    layer = small_layer()
    group = mesh.get_group()
    y, _ = flashmoe.moe(**layer.keywords(), group=group)
    assert torch.equal(y, flashmoe.moe(**layer.keywords())[0])


def test_plain_layer_of_the_tests_drops_sentinels():
    """The yardstick itself: a token without expert has an output of exactly 0."""
    layer = small_layer()
    ids = torch.tensor([[-1, 4]] * 5)
    assert not plain_experts(layer, ids, torch.ones(5, 2)).any()
