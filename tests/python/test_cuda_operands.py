"""CUDA operands on a machine without a GPU: what is refused before any device is asked, and what
says that there is none. Tensors here only claim to be on a GPU; their memory is never touched."""

import ctypes

import flashmoe
import pytest
import tvm_ffi
from flashmoe import _core
from flashmoe.config import DTYPES, LayerConfig

CUDA, CPU = 2, 1  # DLDeviceType
KINDS = {"bfloat16": (4, 16), "float16": (2, 16), "float32": (2, 32), "int64": (0, 64)}
TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 5, 64, 128, 4, 2
NO_GPU = "built without CUDA|no usable CUDA device"


class DLTensor(ctypes.Structure):
    """The C struct of DLPack, and the deleter that follows it in DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Claims:
    """Makes tensors that claim a device; keeps their descriptors alive."""

    def __init__(self):
        self.kept = []
        self.address = 1 << 40

    def tensor(self, *shape, dtype="bfloat16", device=CUDA, index=0):
        code, bits = KINDS[dtype]
        dims = (ctypes.c_int64 * len(shape))(*shape)
        self.address += 1 << 32  # no two of them overlap
        described = DLTensor(self.address, device, index, len(shape), code, bits, 1, dims)
        self.kept.append((dims, described))
        new_capsule = ctypes.pythonapi.PyCapsule_New
        new_capsule.restype = ctypes.py_object
        new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return tvm_ffi.from_dlpack(new_capsule(ctypes.addressof(described), b"dltensor", None))

    def forward(self, dtype="bfloat16"):
        """The operands of a forward with ids from outside."""
        return {
            "x": self.tensor(TOKENS, HIDDEN, dtype=dtype),
            "topk_ids": self.tensor(TOKENS, TOP_K, dtype="int64"),
            "topk_weights": self.tensor(TOKENS, TOP_K, dtype="float32"),
            "w_up": self.tensor(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=dtype),
            "w_down": self.tensor(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype),
            "y": self.tensor(TOKENS, HIDDEN, dtype=dtype),
        }


@pytest.fixture
def claims():
    return Claims()


@pytest.fixture
def engine():
    compiled = _core.engine()
    if "(sm_" in compiled.build_info():
        pytest.skip("needs a machine without a GPU: these tensors have no memory")
    return compiled


def make_layer(engine, dtype="bfloat16"):
    numbers = LayerConfig(top_k=TOP_K).numbers()
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "num_experts": EXPERTS}
    return engine.layer_create(numbers | sizes | {"dtype": DTYPES.index(dtype)})


def run(engine, tensors, dtype="bfloat16", world=1):
    groups = flashmoe.local_group(world)
    try:
        engine.forward(groups[0].handle, make_layer(engine, dtype), tensors, 0)
    finally:
        for group in groups:
            group.close()


def test_the_missing_device_is_named(engine, claims):
    with pytest.raises(flashmoe.errors.UnsupportedError, match=NO_GPU):
        run(engine, claims.forward())


def test_explain_names_the_missing_device(engine, claims):
    refused = pytest.raises(flashmoe.errors.UnsupportedError, match=NO_GPU)
    with flashmoe.local_group(1)[0] as group, refused:
        engine.explain(group.handle, make_layer(engine), claims.forward())


@pytest.mark.parametrize(("device", "index"), [(CPU, 0), (CUDA, 1)], ids=["cpu", "cuda:1"])
def test_operands_on_two_devices_are_named(engine, claims, device, index):
    tensors = claims.forward()
    tensors["w_down"] = claims.tensor(EXPERTS, HIDDEN, INTERMEDIATE, device=device, index=index)
    where = "cpu" if device == CPU else "cuda:1"
    with pytest.raises(
        TypeError, match=rf"is on (cuda:0|{where}).*on (cuda:0|{where}).*one device"
    ):
        run(engine, tensors)


def test_another_kind_of_device_is_named(engine, claims):
    metal = 8
    tensors = claims.forward() | {"x": claims.tensor(TOKENS, HIDDEN, device=metal)}
    with pytest.raises(TypeError, match="x is on DLPack device type 8; accepted: cpu, cuda"):
        run(engine, tensors)


def test_shapes_are_checked_as_on_the_cpu(engine, claims):
    tensors = claims.forward() | {"y": claims.tensor(TOKENS + 1, HIDDEN)}
    with pytest.raises(ValueError, match=r"y has shape \[6, 64\], expected \[5, 64\]"):
        run(engine, tensors)


def test_float32_is_refused(engine, claims):
    with pytest.raises(flashmoe.errors.UnsupportedError, match=r"x is float32.*bfloat16 and float"):
        run(engine, claims.forward("float32"), "float32")


def test_saved_z_asks_for_the_device(engine, claims):
    tensors = claims.forward() | {"z": claims.tensor(64, 2 * INTERMEDIATE)}
    with pytest.raises(flashmoe.errors.UnsupportedError, match=NO_GPU):
        run(engine, tensors)


def test_backward_asks_for_the_device(engine, claims):
    tensors = claims.forward()
    tensors |= {"grad_y": tensors.pop("y"), "grad_x": claims.tensor(TOKENS, HIDDEN)}
    refused = pytest.raises(flashmoe.errors.UnsupportedError, match=NO_GPU)
    with flashmoe.local_group(1)[0] as group, refused:
        engine.backward(group.handle, make_layer(engine), tensors, 0, 0)


def rank_operands():
    """The operands of one of two ranks, and what keeps them alive."""
    claims = Claims()
    tensors = claims.forward()
    tensors["w_up"] = claims.tensor(EXPERTS // 2, 2 * INTERMEDIATE, HIDDEN)
    tensors["w_down"] = claims.tensor(EXPERTS // 2, HIDDEN, INTERMEDIATE)
    return tensors, claims


def test_several_ranks_learn_why_the_first_could_not_launch(engine):
    """The first to find out says it; nobody waits for a launch that will not be."""
    groups = flashmoe.local_group(2)
    operands = [rank_operands() for _ in groups]
    layer = make_layer(engine)
    with pytest.raises(flashmoe.errors.UnsupportedError, match=NO_GPU):
        engine.forward(groups[0].handle, layer, operands[0][0], 0)
    with pytest.raises(flashmoe.errors.GroupAbortedError, match=rf"rank 0: .*({NO_GPU})"):
        engine.forward(groups[1].handle, layer, operands[1][0], 0)
    for group in groups:
        group.close()


def test_a_refusal_on_cuda_aborts_the_group(engine):
    groups = flashmoe.local_group(2)
    tensors, claims = rank_operands()
    tensors["y"] = claims.tensor(TOKENS + 1, HIDDEN)
    with pytest.raises(ValueError, match=r"y has shape \[6, 64\]"):
        engine.forward(groups[0].handle, make_layer(engine), tensors, 0)
    others, kept = rank_operands()
    with pytest.raises(flashmoe.errors.GroupAbortedError, match=r"rank 0 refused.*y has shape"):
        engine.forward(groups[1].handle, make_layer(engine), others, 0)
    assert kept
    for group in groups:
        group.close()


def backward_operands():
    """The same of a backward."""
    tensors, claims = rank_operands()
    return tensors | {"grad_y": tensors.pop("y"), "grad_x": claims.tensor(TOKENS, HIDDEN)}, claims


def test_several_ranks_learn_why_the_first_backward_could_not_launch(engine):
    groups = flashmoe.local_group(2)
    operands = [backward_operands() for _ in groups]
    layer = make_layer(engine)
    with pytest.raises(flashmoe.errors.UnsupportedError, match=NO_GPU):
        engine.backward(groups[0].handle, layer, operands[0][0], 0, 0)
    with pytest.raises(flashmoe.errors.GroupAbortedError, match=rf"rank 0: .*({NO_GPU})"):
        engine.backward(groups[1].handle, layer, operands[1][0], 0, 0)
    for group in groups:
        group.close()


def test_a_backward_that_is_refused_aborts_the_group(engine):
    groups = flashmoe.local_group(2)
    tensors, claims = backward_operands()
    tensors["grad_x"] = claims.tensor(TOKENS, HIDDEN + 64)
    with pytest.raises(ValueError, match=r"grad_x has shape \[5, 128\]"):
        engine.backward(groups[0].handle, make_layer(engine), tensors, 0, 0)
    others, kept = backward_operands()
    with pytest.raises(flashmoe.errors.GroupAbortedError, match=r"rank 0 refused.*grad_x has sh"):
        engine.backward(groups[1].handle, make_layer(engine), others, 0, 0)
    assert kept
    for group in groups:
        group.close()


def test_an_aborted_group_stays_aborted(engine, claims):
    [group] = flashmoe.local_group(1)
    with group:
        group.abort("enough")
        with pytest.raises(flashmoe.errors.GroupAbortedError, match="enough"):
            engine.forward(group.handle, make_layer(engine), claims.forward(), 0)


def test_max_sms_is_an_option():
    with flashmoe.local_group(1)[0] as group:
        group.set("max_sms", 66)
        with pytest.raises(ValueError, match=r"max_sms is 1\.5, expected a whole"):
            group.set("max_sms", 1.5)


def test_explain_on_the_cpu():
    import torch

    x, w_up = torch.zeros(5, 64), torch.zeros(4, 256, 64)
    ids, weights = torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2)
    engine = _core.engine()
    tensors = {"x": x, "topk_ids": ids, "topk_weights": weights, "w_up": w_up}
    tensors |= {"w_down": torch.zeros(4, 64, 128), "y": torch.zeros(5, 64)}
    with flashmoe.local_group(1)[0] as group:
        text = engine.explain(group.handle, make_layer(engine, "float32"), tensors)
    assert "column block: 64 hidden columns" in text


def test_explain_of_a_benchmark_case():
    from flashmoe import bench_cuda
    from flashmoe.cases import CASES

    case = next(case for case in CASES if case.name == "tokens/3")
    with flashmoe.local_group(1)[0] as group:
        text = bench_cuda.explain(case, "bf16", group, device="cpu")
    assert "column block" in text


def test_records_are_kept_by_the_name_of_the_gpu(tmp_path):
    import json

    from flashmoe import bench, bench_cuda

    case = bench_cuda.gpu_cases()["olmoe"]
    record = bench.measurement(
        case,
        {bench_cuda.OURS: 20.0, bench_cuda.REFERENCE: 18.0, bench.PEER: 40.04},
        bench_cuda.REFERENCE,
        direction="forward",
        dtype="bf16",
        quality={"error_ratio": 1.0, "bitwise": True},
        launches=1,
        gpu="NVIDIA H200",
    )
    assert (record["device"], record["ratio"], record["tokens"]) == ("cuda", 0.9, 8192)
    assert record["peers"] == {bench.PEER: 40.0}
    record["part"] = "layer"
    path = bench_cuda.write_records([record], tmp_path)
    assert path.name == "h200-layer.jsonl"
    assert json.loads(path.read_text()) == record


def test_the_timeline_shows_every_phase():
    from flashmoe import bench_cuda

    phases = {"route": 10.0, "plan": 5.0, "up": 60.0, "down": 20.0, "combine": 5.0}
    text = bench_cuda.timeline([{"case": "olmoe", "phases_us": phases}])
    head, line, _ = text.splitlines()
    assert head.split() == ["case", "us", *phases]
    assert line.split()[:6] == ["olmoe", "100.0", "10.0", "10%", "5.0", "5%"]
