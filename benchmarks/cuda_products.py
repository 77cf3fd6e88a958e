"""The CUDA building blocks from Python, for benchmarks and GPU tests: ctypes over
libflashmoe_cuda_bench.so and torch tensors. The layer's own interface is the package."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "libflashmoe_cuda_bench.so"
FOLDERS = ("build/release/src/cuda", "build/cuda-bench")
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
MAJORS = ("depth", "columns")
EPILOGUES = ("store", "swiglu")
GATE_ORDERS = ("concatenated", "interleaved")
STATUS_NAMES = {0: "ok", 1: "invalid value", 8: "unsupported", 9: "internal"}
TEXT_BYTES = 2048


class ProductError(RuntimeError):
    """The library refused a call, or a wait in a kernel ran out of time."""


class Call(ctypes.Structure):
    """benchmarks/cuda_entry.cu, struct Call."""

    _fields_ = (
        [(n, ctypes.c_void_p) for n in ("tokens", "weights", "out", "expert_begin", "expert_rows")]
        + [(n, ctypes.c_void_p) for n in ("workspace", "stream")]
        + [(n, ctypes.c_int64) for n in ("num_rows", "num_experts", "depth", "columns")]
        + [("timeout_ns", ctypes.c_int64)]
        + [(n, ctypes.c_int32) for n in ("element", "major", "epilogue", "gate_order")]
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
    library.fm_cuda_workspace_bytes.restype = ctypes.c_int64
    library.fm_cuda_report_offset.restype = ctypes.c_int64
    library.fm_cuda_wait_name.restype = ctypes.c_char_p
    return library


class GroupedProduct:
    """out[r] = act(tokens[r] @ weights[e].T) for the rows r of every expert e, as one launch.

    tokens [rows, depth]; weights [E, G * columns, depth], or [E, depth, G * columns] for
    major="columns"; expert_begin, expert_rows [E] int64. epilogue "swiglu" has G = 2, else 1.
    Rows of no expert are not written. The object keeps its operands alive.
    """

    def __init__(
        self,
        tokens,
        weights,
        expert_begin,
        expert_rows,
        *,
        major="depth",
        epilogue="store",
        gate_order="concatenated",
        timeout_s=2.0,
        out=None,
    ):
        gates = 2 if epilogue == "swiglu" else 1
        columns = weights.shape[1 if major == "depth" else 2] // gates
        if out is None:
            out = torch.empty(tokens.shape[0], columns, dtype=tokens.dtype, device=tokens.device)
        self.library = load()
        num_bytes = self.library.fm_cuda_workspace_bytes()
        self.workspace = torch.zeros(num_bytes // 4, dtype=torch.int32, device=tokens.device)
        self.out = out
        self.operands = (tokens, weights, expert_begin, expert_rows)
        self.call = Call(
            tokens=tokens.data_ptr(),
            weights=weights.data_ptr(),
            out=out.data_ptr(),
            expert_begin=expert_begin.data_ptr(),
            expert_rows=expert_rows.data_ptr(),
            workspace=self.workspace.data_ptr(),
            num_rows=tokens.shape[0],
            num_experts=weights.shape[0],
            depth=tokens.shape[1],
            columns=columns,
            timeout_ns=int(timeout_s * 1e9),
            element=ELEMENTS[tokens.dtype],
            major=MAJORS.index(major),
            epilogue=EPILOGUES.index(epilogue),
            gate_order=GATE_ORDERS.index(gate_order),
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


def expert_product(rows, weight, epilogue, major="depth", gate_order="concatenated"):
    """What one expert's rows should become, at the precision of the operands."""
    product = rows @ (weight if major == "columns" else weight.t())
    if epilogue == "store":
        return product
    if gate_order == "interleaved":
        gate, up = product[:, 0::2], product[:, 1::2]
    else:
        gate, up = product.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def errors_against_fp64(out, tokens, weights, begin, counts, epilogue, major="depth", **layout):
    """(ours, torch's): relative L2 errors of `out` and of torch's own product of the same dtype,
    both against fp64, over the rows of all experts."""
    squares = torch.zeros(3, dtype=torch.float64, device=out.device)
    for expert, (first, count) in enumerate(zip(begin, counts, strict=True)):
        if count == 0:
            continue
        rows, weight = tokens[first : first + count], weights[expert]
        wanted = expert_product(rows.double(), weight.double(), epilogue, major, **layout)
        plain = expert_product(rows, weight, epilogue, major, **layout)
        ours = out[first : first + count]
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
