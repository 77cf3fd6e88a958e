"""The CUDA building blocks from Python, for benchmarks and GPU tests: ctypes over
libflashmoe_cuda_bench.so and torch tensors. The layer's own interface is the package."""

from __future__ import annotations

import ctypes
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "libflashmoe_cuda_bench.so"
FOLDERS = ("build/release/src/cuda", "build/cuda-bench")
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
MAJORS = ("depth", "columns")
EPILOGUES = ("store", "activate", "gated")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")  # fm_activation
GATE_ORDERS = ("concatenated", "interleaved")
STATUS_NAMES = {0: "ok", 1: "invalid value", 8: "unsupported", 9: "internal"}
TEXT_BYTES = 2048
SIZES = (  # functions that return a number of bytes or rows
    "fm_cuda_workspace_bytes",
    "fm_cuda_report_offset",
    "fm_cuda_forward_scratch_bytes",
    "fm_cuda_forward_region",
    "fm_plan_slot_rows",
)


class ProductError(RuntimeError):
    """The library refused a call, or a wait in a kernel ran out of time."""


class Call(ctypes.Structure):
    """benchmarks/cuda_entry.cu, struct Call."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("tokens", "weights", "out", "expert_begin", "expert_rows")]
        + [(n, ctypes.c_void_p) for n in ("bias", "workspace", "stream")]
        + [(n, ctypes.c_int64) for n in ("num_rows", "num_experts", "depth", "columns")]
        + [("timeout_ns", ctypes.c_int64)]
        + [(n, ctypes.c_int32) for n in ("element", "major", "epilogue", "gate_order")]
        + [("activation", ctypes.c_int32)]
        + [(n, ctypes.c_float) for n in ("alpha", "limit", "up_offset")]
    )


def find_library() -> Path | None:
    """The newest build of the library, or None."""
    named = os.environ.get("FLASHMOE_CUDA_BENCH")
    paths = [Path(named)] if named else [ROOT / folder / LIBRARY for folder in FOLDERS]
    found = [path for path in paths if path.exists()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def what_is_missing() -> str | None:
    """Why no kernel can run here, in one line; None if one can."""
    if find_library() is None:
        return f"{LIBRARY} (make build with nvcc)"
    if not torch.cuda.is_available():
        return "a CUDA GPU that torch can use"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"a Hopper GPU (sm_90): this is {torch.cuda.get_device_name()}"
    return None


@cache
def load() -> ctypes.CDLL:
    """The library. Raises ProductError if it has not been built."""
    path = find_library()
    if path is None:
        raise ProductError(f"{LIBRARY} is in none of {', '.join(FOLDERS)}: make build with nvcc")
    library = ctypes.CDLL(str(path))
    for name in SIZES:
        getattr(library, name).restype = ctypes.c_int64
    library.fm_cuda_wait_name.restype = ctypes.c_char_p
    return library


@dataclass(frozen=True)
class Form:
    """What a product computes besides the sums, and how its weights lie in memory."""

    epilogue: str = "store"  # "activate": act(sum); "gated": act(gate) * (up + up_offset)
    major: str = "depth"  # "columns": weights [E, depth, G * columns]
    gate_order: str = "concatenated"  # "interleaved": gate, up, gate, up, ...
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = math.inf
    up_offset: float = 0.0

    @property
    def gates(self):
        return 2 if self.epilogue == "gated" else 1

    def act(self, x):
        """The activation function by itself, at the precision of x."""
        if self.activation == "silu":
            return x * torch.sigmoid(self.alpha * x)
        if self.activation.startswith("gelu"):
            tanh = self.activation == "gelu_tanh"
            return torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")
        if self.activation == "identity":
            return x
        return x.relu() ** (2 if self.activation == "relu2" else 1)

    def finish(self, sums):
        """From sums (bias included) to what is stored."""
        if self.epilogue == "store":
            return sums
        if self.epilogue == "activate":
            return self.act(sums.clamp(max=self.limit))
        if self.gate_order == "interleaved":
            gate, up = sums[:, 0::2], sums[:, 1::2]
        else:
            gate, up = sums.chunk(2, dim=1)
        up = up.clamp(-self.limit, self.limit) + self.up_offset
        return self.act(gate.clamp(max=self.limit)) * up


PLAIN = Form()


class GroupedProduct:
    """out[r] = form(tokens[r] @ weights[e].T + bias[e]) for the rows r of every expert e, as one
    launch.

    tokens [rows, depth]; weights [E, G * columns, depth], or [E, depth, G * columns] for
    column-major forms; bias [E, G * columns] or None; expert_begin, expert_rows [E] int64. G is 2
    for gated forms, else 1. Rows of no expert are not written. The object keeps its operands alive.
    """

    def __init__(
        self,
        tokens,
        weights,
        expert_begin,
        expert_rows,
        form=PLAIN,
        *,
        bias=None,
        timeout_s=2.0,
        out=None,
    ):
        columns = weights.shape[1 if form.major == "depth" else 2] // form.gates
        if out is None:
            out = torch.empty(tokens.shape[0], columns, dtype=tokens.dtype, device=tokens.device)
        self.library = load()
        num_bytes = self.library.fm_cuda_workspace_bytes()
        self.workspace = torch.zeros(num_bytes // 4, dtype=torch.int32, device=tokens.device)
        self.out = out
        self.form = form
        self.operands = (tokens, weights, expert_begin, expert_rows)
        self.bias = bias
        self.call = Call(
            tokens=tokens.data_ptr(),
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            expert_begin=expert_begin.data_ptr(),
            expert_rows=expert_rows.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            workspace=self.workspace.data_ptr(),
            num_rows=tokens.shape[0],
            num_experts=weights.shape[0],
            depth=tokens.shape[1],
            columns=columns,
            timeout_ns=int(timeout_s * 1e9),
            element=ELEMENTS[tokens.dtype],
            major=MAJORS.index(form.major),
            epilogue=EPILOGUES.index(form.epilogue),
            gate_order=GATE_ORDERS.index(form.gate_order),
            activation=ACTIVATIONS.index(form.activation),
            alpha=form.alpha,
            limit=form.limit,
            up_offset=form.up_offset,
        )
        self.text = ctypes.create_string_buffer(TEXT_BYTES)

    def __call__(self):
        """Launches on torch's current stream. Raises ProductError if the launch is refused."""
        self.call.stream = torch.cuda.current_stream().cuda_stream
        call, text = ctypes.byref(self.call), self.text
        status = self.library.fm_cuda_grouped_product(call, text, ctypes.c_int64(TEXT_BYTES))
        if status:
            kind = STATUS_NAMES.get(status, str(status))
            raise ProductError(f"{kind}: {text.value.decode()}")
        return self.out

    def config(self) -> str:
        """The configuration that runs, in one line."""
        self.library.fm_cuda_grouped_product_config(
            ctypes.byref(self.call), self.text, ctypes.c_int64(TEXT_BYTES)
        )
        return self.text.value.decode()

    def check_waits(self):
        """Waits for the GPU; raises ProductError if a wait of a launch ran out of time."""
        torch.cuda.synchronize()
        first = self.library.fm_cuda_report_offset() // 4
        tag, block, thread, parity = self.workspace.tolist()[first : first + 4]
        if tag:
            name = self.library.fm_cuda_wait_name(ctypes.c_uint32(tag)).decode()
            raise ProductError(
                f"a wait ran out of time: {name}, block {block}, thread {thread}, parity {parity}"
            )


def group_offsets(counts, align=1):
    """(expert_begin, all rows) of experts with `counts` rows, each begin a multiple of `align`."""
    begin, row = [], 0
    for count in counts:
        row = -(-row // align) * align
        begin.append(row)
        row += count
    return begin, -(-row // align) * align


def expert_product(rows, weight, bias, form):
    """What one expert's rows should become, at the precision of the operands."""
    weight = weight if form.major == "columns" else weight.t()
    return form.finish(rows @ weight if bias is None else torch.addmm(bias, rows, weight))


def errors_against_fp64(product, begin, counts):
    """(ours, torch's): relative L2 errors of product.out and of torch's own product of the same
    dtype, both against fp64, over the rows of all experts."""
    tokens, weights = product.operands[:2]
    squares = torch.zeros(3, dtype=torch.float64, device=tokens.device)
    for expert, (first, count) in enumerate(zip(begin, counts, strict=True)):
        if count == 0:
            continue
        rows, weight = tokens[first : first + count], weights[expert]
        bias = None if product.bias is None else product.bias[expert]
        wide_bias = None if bias is None else bias.double()
        wanted = expert_product(rows.double(), weight.double(), wide_bias, product.form)
        plain = expert_product(rows, weight, bias, product.form)
        ours = product.out[first : first + count]
        squares[0] += (ours.double() - wanted).square().sum()
        squares[1] += (plain.double() - wanted).square().sum()
        squares[2] += wanted.square().sum()
    ours, plain, norm = squares.sqrt().tolist()
    return ours / norm, plain / norm


def count_graph_nodes(graph):
    """Kinds of the nodes of a torch.cuda.CUDAGraph(keep_graph=True), in no order."""
    from cuda.bindings import runtime

    raw = runtime.cudaGraph_t(graph.raw_cuda_graph())
    status, _, count = runtime.cudaGraphGetNodes(raw, 0)
    status, nodes, _ = runtime.cudaGraphGetNodes(raw, count)
    if status != runtime.cudaError_t.cudaSuccess:
        raise ProductError(f"cudaGraphGetNodes: {status}")
    kinds = []
    for node in nodes[:count]:
        _, kind = runtime.cudaGraphNodeGetType(node)
        kinds.append(kind.name.removeprefix("cudaGraphNodeType").lower())
    return kinds
