"""The grouped product on a GPU: values, clipping, determinism, refusals."""

import math

import pytest
import torch
from cuda_products import (
    ACTIVATIONS,
    Form,
    GroupedProduct,
    ProductError,
    count_graph_nodes,
    errors_against_fp64,
    group_offsets,
)

MAX_ERROR_RATIO = 1.25  # of torch's own product of the same dtype
EDGE = [0, 1, 15, 16, 17, 0, 127, 129, 300, 193, 385, 0, 1000, 64, 65, 2]
FORMS = {
    "store": Form(),
    "store-columns": Form(major="columns"),
    "gated": Form("gated"),
    "gated-interleaved": Form("gated", gate_order="interleaved"),
    "gated-columns": Form("gated", "columns"),
    "gated-columns-interleaved": Form("gated", "columns", "interleaved"),
    "activate": Form("activate", activation="relu2"),
    "activate-columns": Form("activate", "columns", activation="gelu"),
}
GPT_OSS = dict(alpha=1.702, limit=0.7, up_offset=1.0)
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


def make(counts, depth, columns, form, *, dtype=torch.bfloat16, align=1, with_bias=False):
    """(product with its output poisoned, begin, which rows have an expert); the others are NaN."""
    generator = torch.Generator("cuda").manual_seed(1234 + depth + columns)
    begin, num_rows = group_offsets(counts, align)
    num_rows = max(num_rows, 1)
    shape = (len(counts), form.gates * columns, depth)
    if form.major == "columns":
        shape = (shape[0], shape[2], shape[1])

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    tokens = normal(num_rows, depth).to(dtype)
    weights = (normal(*shape) / math.sqrt(depth)).to(dtype)
    bias = normal(len(counts), form.gates * columns).to(dtype) if with_bias else None
    owned = torch.zeros(num_rows, dtype=torch.bool, device="cuda")
    for first, count in zip(begin, counts, strict=True):
        owned[first : first + count] = True
    tokens[~owned] = math.nan
    as_int64 = [torch.tensor(v, dtype=torch.int64, device="cuda") for v in (begin, counts)]
    product = GroupedProduct(tokens, weights, *as_int64, form, bias=bias)
    product.out.fill_(math.nan)
    return product, begin, owned


def run_and_check(product, begin, counts, owned):
    out = product()
    product.check_waits()
    assert torch.isfinite(out[owned]).all(), "rows were not written"
    assert torch.isnan(out[~owned]).all(), "rows of no expert were written"
    if any(counts):
        ours, plain = errors_against_fp64(product, begin, counts)
        assert ours <= MAX_ERROR_RATIO * plain, (ours, plain)


@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPES)
def test_values(name, form, dtype, align):
    counts, depth, columns = SHAPES[name]
    product, begin, owned = make(counts, depth, columns, FORMS[form], dtype=dtype, align=align)
    run_and_check(product, begin, counts, owned)


@pytest.mark.parametrize("limits", [{}, GPT_OSS], ids=["plain", "clamped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", ["activate", "gated"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations(dtype, epilogue, activation, limits):
    form = Form(epilogue, activation=activation, **limits)
    product, begin, owned = make(EDGE, 128, 192, form, dtype=dtype, with_bias=True)
    run_and_check(product, begin, EDGE, owned)


@pytest.mark.parametrize("form", FORMS)
def test_bias(form):
    product, begin, owned = make(EDGE, 128, 320, FORMS[form], with_bias=True)
    run_and_check(product, begin, EDGE, owned)


@pytest.mark.parametrize("form", FORMS)
def test_bitwise_equal_over_launches(form):
    product, _, owned = make(EDGE, 512, 512, FORMS[form], with_bias=True)
    first = product().clone()
    for launch in range(40):
        product.out.fill_(math.nan)
        again = product()
        assert torch.equal(again[owned], first[owned]), f"launch {launch} differs"
    product.check_waits()


def test_bitwise_equal_beside_another_stream():
    """Launches that get their multiprocessors late, after products of a side stream."""
    product, _, owned = make(EDGE, 512, 512, Form())
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
    product, begin, owned = make(EDGE, 256, 256, Form("gated"))
    good = product().clone()
    row = begin[8] + 33
    product.operands[0][row, 5] = bad
    out = product()
    product.check_waits()
    assert not torch.isfinite(out[row]).all()
    owned[row] = False
    assert torch.equal(out[owned], good[owned])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_keep_nan(activation):
    form = Form("gated", activation=activation, **GPT_OSS)
    product, _, _ = make([40], 64, 64, form)
    product.operands[0][7] = math.nan
    assert torch.isnan(product()[7]).all()


def test_one_kernel_node_and_replays():
    """One launch in a captured graph; replays follow changed inputs and routing."""
    product, _, _ = make(EDGE, 256, 512, Form("gated"))
    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        product()
    assert count_graph_nodes(graph) == ["kernel"]
    graph.instantiate()
    generator = torch.Generator("cuda").manual_seed(5)
    tokens, _, expert_begin, expert_rows = product.operands
    for replay in range(20):
        counts = EDGE[replay % len(EDGE) :] + EDGE[: replay % len(EDGE)]
        begin, _ = group_offsets(counts)
        tokens.normal_(generator=generator)
        expert_begin.copy_(torch.tensor(begin))
        expert_rows.copy_(torch.tensor(counts))
        product.out.fill_(math.nan)
        graph.replay()
        ours, plain = errors_against_fp64(product, begin, counts)
        assert ours <= MAX_ERROR_RATIO * plain
    product.check_waits()


@pytest.mark.parametrize(
    ("depth", "columns", "word"), [(96, 128, "depth is 96"), (128, 96, "columns is 96")]
)
def test_refuses_sizes_by_name(depth, columns, word):
    product, _, _ = make([3], depth, columns, Form())
    with pytest.raises(ProductError, match=word):
        product()


def test_configuration_is_printable():
    product, _, _ = make([3], 64, 64, Form())
    assert "128 x 176" in product.config()
