"""The grouped product by itself against cuBLAS's batched product, on one GPU.

    python benchmarks/cuda_grouped_product.py [--cases qwen3-30b,...] [--output FILE]

Ours and torch._grouped_mm get ragged experts (random routing); torch.bmm, the reference, gets the
same number of rows split evenly. Two figures each, sustained (`us` and `ratio`) and burst, see
python/flashmoe/gpu_timing.py.

Every timed product is first checked against fp64, with its output poisoned.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from cuda_products import Form, GroupedProduct, errors_against_fp64, group_offsets  # noqa: E402
from flashmoe.bench import source_hash  # noqa: E402
from flashmoe.gpu_timing import burst, sustained  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BITWISE_LAUNCHES = 40
REFERENCE = "torch.bmm"
PEER = "torch._grouped_mm"
OURS = "ours"


@dataclass(frozen=True)
class Case:
    """One layer: T tokens, H, I, E local experts. `slots`: routed rows of this GPU, T * k here."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int


CASES = {
    case.name: case
    for case in (
        Case("qwen3-30b", 8192, 2048, 768, 128, 8),
        Case("mixtral", 8192, 4096, 14336, 8, 2),
        Case("scout", 8192, 5120, 8192, 16, 1),
        Case("olmoe", 8192, 2048, 1024, 64, 8),
        Case("deepseek-v3-ep8", 8192, 7168, 2048, 32, 8),
        Case("seed", 8192, 2048, 2048, 64, 2),
        Case("gpt-oss-20b", 8192, 2880, 2880, 32, 4),
        Case("qwen3-30b-t128", 128, 2048, 768, 128, 8),
        Case("mixtral-t128", 128, 4096, 14336, 8, 2),
    )
}


@dataclass(frozen=True)
class Variant:
    """Which product of a case: the up product with or without its activation, or the down one."""

    direction: str  # "up", "down"
    form: Form

    def sizes(self, case):
        """(depth, weight columns) of the product."""
        up = self.direction == "up"
        return (case.hidden, 2 * case.intermediate) if up else (case.intermediate, case.hidden)


VARIANTS = {
    "up": Variant("up", Form("gated")),
    "up-store": Variant("up", Form("store")),
    "down": Variant("down", Form("store")),
    "up-columns": Variant("up", Form("gated", "columns")),
    "up-pairs": Variant("up", Form("gated", "columns", "interleaved")),
    "down-columns": Variant("down", Form("store", "columns")),
}


def make_operands(case, variant, dtype):
    """Rows sorted by expert, weights in the variant's layout, and where experts begin."""
    generator = torch.Generator("cuda").manual_seed(7)
    depth, columns = variant.sizes(case)
    logits = torch.randn(case.tokens, case.experts, device="cuda", generator=generator)
    chosen = logits.topk(case.top_k, dim=1).indices
    counts = torch.bincount(chosen.flatten(), minlength=case.experts).tolist()
    begin, num_rows = group_offsets(counts)
    tokens = torch.randn(num_rows, depth, device="cuda", generator=generator).to(dtype)
    shape = (columns, depth) if variant.form.major == "depth" else (depth, columns)
    weights = torch.empty(case.experts, *shape, dtype=dtype, device="cuda")
    for expert in range(case.experts):
        values = torch.randn(*shape, device="cuda", generator=generator)
        weights[expert] = values / math.sqrt(depth)
    return tokens, weights, begin, counts


def make_contenders(product, variant):
    """Name -> a function that launches once."""
    tokens, weights, begin, counts = product.operands
    as_matrix = weights.transpose(1, 2) if variant.form.major == "depth" else weights
    balanced = tokens.view(weights.shape[0], -1, tokens.shape[1])
    ends = (begin + counts).to(torch.int32)
    contenders = {OURS: product, REFERENCE: lambda: torch.bmm(balanced, as_matrix)}

    def peer():
        return torch._grouped_mm(tokens, as_matrix, offs=ends)

    # In fp16 it is a loop on the host, whose pauses would cool the card down for the others.
    if tokens.dtype == torch.bfloat16:
        contenders[PEER] = peer
    return contenders


def quality(product):
    """error_ratio against torch's own product, and whether the bits repeat."""
    begin, counts = (values.tolist() for values in product.operands[2:])
    product.out.fill_(math.nan)
    first = product().clone()
    product.check_waits()
    ours, plain = errors_against_fp64(product, begin, counts)
    bitwise = True
    for _ in range(BITWISE_LAUNCHES - 1):
        product.out.fill_(math.nan)
        bitwise = bitwise and torch.equal(product(), first)
    product.check_waits()
    return {"error_ratio": round(ours / plain, 4), "bitwise": bitwise}


def measure(case, name, dtype_name, seconds):
    """The record of one product."""
    variant, dtype = VARIANTS[name], DTYPES[dtype_name]
    tokens, weights, begin, counts = make_operands(case, variant, dtype)
    as_int64 = [torch.tensor(values, device="cuda") for values in (begin, counts)]
    product = GroupedProduct(tokens, weights, *as_int64, variant.form)
    checked = quality(product)
    contenders = make_contenders(product, variant)
    for contender in contenders.values():
        contender()
    short = burst(contenders)
    long, clock, power, driver = sustained(contenders, seconds)
    product.check_waits()
    depth, columns = variant.sizes(case)
    flop = 2 * tokens.shape[0] * depth * columns
    peak = clock * 1e6 * 4096 * torch.cuda.get_device_properties(0).multi_processor_count
    rounded = {
        key: {n: round(v, 1) for n, v in times.items()}
        for key, times in (("burst", short), ("sustained", long))
    }
    return {
        "case": case.name,
        "direction": variant.direction,
        "tokens": case.tokens,
        "hidden": case.hidden,
        "intermediate": case.intermediate,
        "experts": case.experts,
        "top_k": case.top_k,
        "dtype": dtype_name,
        "ranks": 1,
        "device": "cuda",
        "gpu": torch.cuda.get_device_name(),
        "us": rounded["sustained"][OURS],
        "reference": REFERENCE,
        "reference_us": rounded["sustained"][REFERENCE],
        "ratio": round(long[REFERENCE] / long[OURS], 4),
        **checked,
        "launches": 1,
        "peers": peers_of(rounded["sustained"]),
        "source": source_hash(),
        "date": datetime.date.today().isoformat(),
        "part": "grouped product",
        "epilogue": variant.form.epilogue,
        "major": variant.form.major,
        "gate_order": variant.form.gate_order,
        "burst_us": rounded["burst"][OURS],
        "burst_reference_us": rounded["burst"][REFERENCE],
        "burst_ratio": round(short[REFERENCE] / short[OURS], 4),
        "burst_peers": peers_of(rounded["burst"]),
        "tflops": round(flop / long[OURS] / 1e6, 1),
        "tensor_use": round(flop / long[OURS] * 1e6 / peak, 4) if peak else None,
        "sm_clock_mhz": clock,
        "power_w": round(power, 1),
        "rows_per_expert": [min(counts), max(counts)],
        "config": product.config(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }


def peers_of(times):
    return {name: value for name, value in times.items() if name not in (OURS, REFERENCE)}


def line_of(record):
    peer, burst_peer = (record[key].get(PEER, math.nan) for key in ("peers", "burst_peers"))
    return (
        f"{record['case']:16} {record['direction']:4} {record['epilogue']:5} "
        f"{record['major']:7} {record['dtype']} "
        f"sustained {record['us']:7.1f} us {record['tflops']:5.0f} TFLOP/s "
        f"{record['ratio']:6.1%} of bmm {record['reference_us']:7.1f}, "
        f"peer {peer:7.1f} | burst {record['burst_us']:7.1f} {record['burst_ratio']:6.1%} "
        f"peer {burst_peer:7.1f} | {record['sm_clock_mhz']:4.0f} MHz "
        f"{record['power_w']:3.0f} W use {record['tensor_use']:5.1%} | "
        f"error {record['error_ratio']:.3f} bits {'same' if record['bitwise'] else 'DIFFER'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--variants", default="up,up-store,down", help=", ".join(VARIANTS))
    parser.add_argument("--dtypes", default="bf16", help=", ".join(DTYPES))
    parser.add_argument("--seconds", type=float, default=1.0, help="of a sustained measurement")
    parser.add_argument("--output", type=Path, help="append the records to this file")
    options = parser.parse_args()
    for case_name in options.cases.split(","):
        for variant in options.variants.split(","):
            for dtype in options.dtypes.split(","):
                record = measure(CASES[case_name], variant, dtype, options.seconds)
                print(line_of(record), flush=True)
                if options.output:
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
