"""The grouped product on a GPU: values, clipping, determinism, refusals."""

import math

import cuda_products
import pytest
import torch
from cuda_products import GroupedProduct, ProductError, errors_against_fp64, group_offsets

MAX_ERROR_RATIO = 1.25  # of torch's own product of the same dtype
EDGE = [0, 1, 15, 16, 17, 0, 127, 129, 300, 193, 385, 0, 1000, 64, 65, 2]
LAYOUTS = [
    ("depth", "store", "concatenated"),
    ("columns", "store", "concatenated"),
    ("depth", "swiglu", "concatenated"),
    ("depth", "swiglu", "interleaved"),
    ("columns", "swiglu", "concatenated"),
]
# counts, depth, columns of out
SHAPES = {
    "edge": (EDGE, 256, 512),
    "one-row": ([1], 64, 64),
    "one-stage": (EDGE, 64, 256),
    "tail-columns": (EDGE, 320, 320),
    "odd-tiles": ([200, 0, 77], 704, 192),
    "all-on-one": ([0] * 70 + [2000] + [0] * 57, 256, 256),
    "many-experts": ([(7 * e) % 23 for e in range(512)], 128, 128),
    "no-rows-at-all": ([0, 0, 0], 128, 128),
}


def make(counts, depth, columns, dtype, major, epilogue, align):
    generator = torch.Generator("cuda").manual_seed(1234 + depth + columns)
    gates = 2 if epilogue == "swiglu" else 1
    begin, num_rows = group_offsets(counts, align)
    num_rows = max(num_rows, 1)
    shape = (len(counts), gates * columns, depth)
    if major == "columns":
        shape = (shape[0], shape[2], shape[1])

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    tokens = normal(num_rows, depth).to(dtype)
    weights = (normal(*shape) / math.sqrt(depth)).to(dtype)
    # Rows of nobody would poison what reads them.
    owned = torch.zeros(num_rows, dtype=torch.bool, device="cuda")
    for first, count in zip(begin, counts, strict=True):
        owned[first : first + count] = True
    tokens[~owned] = math.nan
    return tokens, weights, begin, owned


def product_of(tokens, weights, begin, counts, **options):
    as_int64 = [torch.tensor(v, dtype=torch.int64, device="cuda") for v in (begin, counts)]
    product = GroupedProduct(tokens, weights, *as_int64, **options)
    product.out.fill_(math.nan)
    return product


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("name", SHAPES)
def test_values(name, layout, dtype, align):
    counts, depth, columns = SHAPES[name]
    major, epilogue, gate_order = layout
    tokens, weights, begin, owned = make(counts, depth, columns, dtype, major, epilogue, align)
    options = dict(major=major, epilogue=epilogue, gate_order=gate_order)
    product = product_of(tokens, weights, begin, counts, **options)
    out = product()
    product.check_waits()
    assert torch.isfinite(out[owned]).all(), "rows were not written"
    assert torch.isnan(out[~owned]).all(), "rows of no expert were written"
    if not any(counts):
        return
    ours, plain = errors_against_fp64(out, tokens, weights, begin, counts, **options)
    assert ours <= MAX_ERROR_RATIO * plain, (ours, plain)


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_bitwise_equal_over_launches(layout):
    major, epilogue, gate_order = layout
    tokens, weights, begin, owned = make(EDGE, 512, 512, torch.bfloat16, major, epilogue, 1)
    options = dict(major=major, epilogue=epilogue, gate_order=gate_order)
    product = product_of(tokens, weights, begin, EDGE, **options)
    first = product().clone()
    for launch in range(40):
        product.out.fill_(math.nan)
        again = product()
        assert torch.equal(again[owned], first[owned]), f"launch {launch} differs"
    product.check_waits()


def test_bitwise_equal_with_half_the_multiprocessors():
    """A launch that gets its SMs late, beside a long product on another stream."""
    tokens, weights, begin, owned = make(EDGE, 512, 512, torch.bfloat16, "depth", "store", 1)
    product = product_of(tokens, weights, begin, EDGE)
    first = product().clone()
    torch.cuda.synchronize()
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    for _ in range(5):
        with torch.cuda.stream(side):
            busy @ busy
        product.out.fill_(math.nan)
        assert torch.equal(product()[owned], first[owned])
    product.check_waits()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_value_stays_in_its_row(bad):
    tokens, weights, begin, owned = make(EDGE, 256, 256, torch.bfloat16, "depth", "swiglu", 1)
    good = product_of(tokens, weights, begin, EDGE, epilogue="swiglu")().clone()
    row = begin[8] + 33
    tokens[row, 5] = bad
    product = product_of(tokens, weights, begin, EDGE, epilogue="swiglu")
    out = product()
    product.check_waits()
    assert not torch.isfinite(out[row]).all()
    owned[row] = False
    assert torch.equal(out[owned], good[owned])


def test_one_kernel_node_and_replays():
    """One launch in a captured graph; replays follow changed inputs and routing."""
    tokens, weights, begin, _ = make(EDGE, 256, 512, torch.bfloat16, "depth", "swiglu", 1)
    product = product_of(tokens, weights, begin, EDGE, epilogue="swiglu")
    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        product()
    assert cuda_products.count_graph_nodes(graph) == ["kernel"]
    graph.instantiate()
    generator = torch.Generator("cuda").manual_seed(5)
    for replay in range(20):
        counts = EDGE[replay % len(EDGE) :] + EDGE[: replay % len(EDGE)]
        begin, _ = group_offsets(counts)
        tokens.normal_(generator=generator)
        product.operands[2].copy_(torch.tensor(begin))
        product.operands[3].copy_(torch.tensor(counts))
        product.out.fill_(math.nan)
        graph.replay()
        ours, plain = errors_against_fp64(product.out, tokens, weights, begin, counts, "swiglu")
        assert ours <= MAX_ERROR_RATIO * plain
    product.check_waits()


@pytest.mark.parametrize(
    ("depth", "columns", "word"), [(96, 128, "depth is 96"), (128, 96, "columns is 96")]
)
def test_refuses_sizes_by_name(depth, columns, word):
    tokens, weights, begin, _ = make([3], depth, columns, torch.bfloat16, "depth", "store", 1)
    product = product_of(tokens, weights, begin, [3])
    with pytest.raises(ProductError, match=word):
        product()


def test_refuses_layout_by_name():
    tokens, weights, begin, _ = make([3], 64, 64, torch.bfloat16, "columns", "swiglu", 1)
    options = dict(major="columns", epilogue="swiglu", gate_order="interleaved")
    with pytest.raises(ProductError, match="interleaved"):
        product_of(tokens, weights, begin, [3], **options)()


def test_configuration_is_printable():
    tokens, weights, begin, _ = make([3], 64, 64, torch.bfloat16, "depth", "store", 1)
    assert "128 x 192" in product_of(tokens, weights, begin, [3]).config()
