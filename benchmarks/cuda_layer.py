"""The layer's forward as one launch by itself, for benchmarks and GPU tests: ctypes over
libflashmoe_cuda_bench.so and torch tensors, with scratch that the caller holds and can read."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from cuda_products import TEXT_BYTES, ProductError, load
from flashmoe import ops
from flashmoe.passes import operator_call, rank_call

TENSOR_DTYPES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int32: 4,
    torch.int64: 5,
}
EMPTY = (ctypes.c_char * 64)()  # where a tensor without elements points
REPORT_WORDS = 8  # of src/cuda/sync/report.h, struct WaitReport; the first is its tag


class Layer(ctypes.Structure):
    """include/flashmoe/c_api.h, struct fm_layer."""

    _fields_ = (
        [("struct_size", ctypes.c_uint32), ("dtype", ctypes.c_int32)]
        + [(n, ctypes.c_int64) for n in ("hidden", "intermediate", "num_experts", "top_k")]
        + [(n, ctypes.c_int32) for n in ("activation", "gated", "gate_layout", "weight_on_input")]
        + [(n, ctypes.c_double) for n in ("act_alpha", "act_limit", "up_offset", "capacity_factor")]
        + [("score", ctypes.c_int32), ("renormalize", ctypes.c_int32), ("scale", ctypes.c_double)]
        + [(n, ctypes.c_int64) for n in ("num_groups", "top_groups", "group_top", "layer_id")]
    )


class Tensor(ctypes.Structure):
    """fm_tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64 * 3),
    )


class Operands(ctypes.Structure):
    """fm_forward_args."""

    _fields_ = (
        [("struct_size", ctypes.c_uint32), ("flags", ctypes.c_uint32)]
        + [(name, Tensor) for name in (*ops.OPERANDS, "y", "logits")]
        + [(name, Tensor) for name in ("tokens_per_expert", "dropped", "z")]
        + [("device_type", ctypes.c_int32), ("device", ctypes.c_int32)]
        + [("stream", ctypes.c_void_p)]
    )


class Launch(ctypes.Structure):
    """benchmarks/cuda_entry.cu, struct Launch."""

    _fields_ = (
        ("scratch", ctypes.c_void_p),
        ("reports", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("timeout_ns", ctypes.c_int64),
        ("max_sms", ctypes.c_int32),
        ("column_pairs", ctypes.c_int32),
    )


def as_struct(tensor):
    """A torch tensor as an fm_tensor."""
    data = tensor.data_ptr() or ctypes.addressof(EMPTY)  # NULL would mean "absent"
    out = Tensor(data=data, dtype=TENSOR_DTYPES[tensor.dtype], ndim=tensor.dim())
    for dim in range(tensor.dim()):
        out.shape[dim], out.stride[dim] = tensor.shape[dim], tensor.stride(dim)
    return out


def as_layer(config, tensors):
    """A LayerConfig with the sizes of its operands as an fm_layer."""
    hidden, intermediate = tensors["w_down"].shape[1:]
    return Layer(
        struct_size=ctypes.sizeof(Layer),
        dtype=TENSOR_DTYPES[tensors["x"].dtype],
        hidden=hidden,
        intermediate=intermediate,
        **config.numbers(),
    )


@dataclass(frozen=True)
class Plan:
    """slot_row [T, k] int32 on the host: the row of each slot, below 0 for none. rows: of all
    experts, padding included."""

    slot_row: torch.Tensor
    rows: int


class Forward:
    """One rank's forward of a case on the GPU, on operands that are there.

    outputs: y and, with a router, topk_ids, topk_weights and logits; tokens_per_expert [E] and
    dropped [1]; all poisoned (-1 or NaN) when made. The scratch is full of NaN but for its head.
    """

    def __init__(self, case, operands, dtype, *, timeout_s=2.0):
        self.library = load()
        self.tensors, config = operator_call(case, rank_call(case, operands, dtype, 0, 1, None))
        self.layer = as_layer(config, self.tensors)
        made = ops._empty_outputs(
            dict.fromkeys(ops.OPERANDS) | self.tensors, config.encode(), "self", False
        )
        self.outputs = {name: tensor for name, tensor in made.items() if tensor is not None}
        for tensor in self.outputs.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
        self.operands = Operands(struct_size=ctypes.sizeof(Operands), device_type=1)
        for name, tensor in (self.tensors | self.outputs).items():
            setattr(self.operands, name, as_struct(tensor))
        self.timeout_ns = int(timeout_s * 1e9)
        self.reports = torch.zeros(2, REPORT_WORDS, dtype=torch.int32).pin_memory()
        self.scratch = self._poisoned_scratch(self.tensors["x"].device)

    def _poisoned_scratch(self, device):
        size = self.library.fm_cuda_forward_scratch_bytes(*self._call())
        scratch = torch.full((size,), 255, dtype=torch.uint8, device=device)
        begin, size = self._region("state")
        scratch[begin : begin + size] = 0
        return scratch

    def _call(self):
        return ctypes.byref(self.layer), ctypes.byref(self.operands)

    def _region(self, name):
        size = ctypes.c_int64()
        begin = self.library.fm_cuda_forward_region(
            *self._call(), name.encode(), ctypes.byref(size)
        )
        if begin < 0:
            raise ProductError(f"the scratch of a forward has no region '{name}'")
        return begin, size.value

    def __call__(self, *, max_sms=0, column_pairs=0):
        """Launches on torch's current stream. Raises ProductError if the launch is refused.
        column_pairs: column blocks of so many times 256 columns, 0 for the engine's choice."""
        stream = torch.cuda.current_stream().cuda_stream
        launch = Launch(
            scratch=self.scratch.data_ptr(),
            reports=self.reports.data_ptr(),
            stream=stream,
            timeout_ns=self.timeout_ns,
            max_sms=max_sms,
            column_pairs=column_pairs,
        )
        text = ctypes.create_string_buffer(TEXT_BYTES)
        if self.library.fm_cuda_forward(
            *self._call(), ctypes.byref(launch), text, ctypes.c_int64(TEXT_BYTES)
        ):
            raise ProductError(text.value.decode())

    def check_waits(self):
        """Waits for the GPU; raises ProductError for what the launch has reported."""
        torch.cuda.synchronize()
        for report in self.reports.tolist():
            if tag := report[0]:
                name = self.library.fm_cuda_wait_name(ctypes.c_uint32(tag)).decode()
                raise ProductError(f"the launch reported: {name}, {report}")

    @property
    def holder(self):
        """A view of the word that says which launch has the scratch, src/cuda/sync/holder.h."""
        begin, _ = self._region("state")
        return self.scratch[begin : begin + 4].view(torch.int32)[0]

    def region(self, name, dtype=torch.int32):
        """A copy of a region of the scratch, on the host."""
        begin, size = self._region(name)
        return self.scratch[begin : begin + size].view(dtype).cpu()

    def expected_plan(self, topk_ids):
        """The Plan that the CPU engine's code makes of these ids [T, k] int32 on the host."""
        ids = topk_ids.contiguous()
        slot_row = torch.empty_like(ids)
        rows = self.library.fm_plan_slot_rows(
            ctypes.byref(self.layer),
            ctypes.c_int64(len(ids)),
            ctypes.c_void_p(ids.data_ptr()),
            ctypes.c_void_p(slot_row.data_ptr()),
        )
        return Plan(slot_row, rows)
