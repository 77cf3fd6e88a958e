"""The peers of `flashmoe bench --device cuda`: how they are called, and when they do not count.

The packages themselves need a GPU; `fake_peers` stands in their place.
"""

import sys
from dataclasses import replace

import fake_peers
import flashmoe
import pytest
import torch
from flashmoe import bench_cuda, bench_peers
from flashmoe.bench_peers import GROUPED, LIGER, SONIC
from flashmoe.cases import Case
from flashmoe.config import Routing
from flashmoe.passes import call_layer

CASE = Case("peers", tokens=(40,), hidden=64, intermediate=48, experts=8, top_k=3)


@pytest.fixture
def installed(monkeypatch):
    """Both packages; gives the list of what was called."""
    seen = []
    for name, module in fake_peers.modules(seen).items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.fixture
def group():
    [one] = flashmoe.local_group(1)
    with one:
        yield one


def found(case, group, dtype=torch.bfloat16):
    call = bench_cuda.make_call(case, dtype, group, device="cpu")
    with torch.no_grad():
        return bench_peers.find(case, call, call_layer(call)[0])


@pytest.mark.parametrize(
    ("routing", "of_sonic"),
    [
        (Routing(), "its own router"),
        (Routing(renormalize=False), "its own router"),
        (Routing(score="topk_softmax"), "its own router"),
        (Routing(score="sigmoid"), "given routing"),
        (Routing(score="sigmoid", scale=2.5), "given routing"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.score}-{value.renormalize}",
)
def test_peers_compute_the_layer(routing, of_sonic, installed, group):
    contenders, absent = found(replace(CASE, routing=routing), group)
    assert {SONIC, LIGER} <= set(contenders), absent
    assert installed == [of_sonic, LIGER]


def test_what_is_not_installed_is_said(monkeypatch, group):
    monkeypatch.setitem(sys.modules, "sonicmoe", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    contenders, absent = found(CASE, group)
    assert not {SONIC, LIGER} & set(contenders)
    assert absent[SONIC].startswith("not installed: sonic-moe (")
    assert absent[LIGER].startswith("not installed: liger-kernel (")


def test_a_peer_that_gives_other_values_does_not_count(installed, monkeypatch, group):
    monkeypatch.setitem(
        bench_peers.MAKERS, LIGER, lambda case, call: lambda: torch.zeros_like(call.x)
    )
    contenders, absent = found(CASE, group)
    assert LIGER not in contenders and "other values: relative error 1" in absent[LIGER]


def test_a_peer_that_fails_does_not_count(installed, monkeypatch, group):
    def raises():
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(bench_peers.MAKERS, SONIC, lambda case, call: raises)
    contenders, absent = found(CASE, group)
    assert LIGER in contenders and absent[SONIC] == "fails: RuntimeError: no kernel image"


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"weight_on_input": True}, {SONIC, LIGER}),
        ({"activation": "geglu"}, {SONIC, LIGER}),
        ({"bias": True}, {GROUPED, SONIC, LIGER}),
        ({"layout": "interleaved"}, {GROUPED, SONIC, LIGER}),
        ({"layout": "transposed"}, {SONIC, LIGER}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "-".join(sorted(value)),
)
def test_layers_that_a_peer_has_not(changes, missing, installed, group):
    contenders, absent = found(replace(CASE, **changes), group)
    assert missing <= set(absent) and not missing & set(contenders)
    assert "not installed" not in "".join(absent.values())


def test_the_table_shows_every_peer_that_was_timed():
    record = {
        "case": "qwen3-30b", "us": 10.0, "reference_us": 9.0, "ratio": 0.9, "burst_ratio": 0.91,
        "eager_ratio": 0.8, "eager_reference_us": 10.0, "over_floor": 1.1, "tflops": 700.0,
        "sm_clock_mhz": 1500.0, "error_ratio": 1.0, "bitwise": True, "gpu": "NVIDIA H200",
        "dtype": "bf16", "peak_tflops": 750.0, "read_gb_per_s": 4300.0,
        "peers": {GROUPED: 18.0}, "beside_peers": {"us": 10.0, "reference_us": 9.0},
        "eager_peers": {GROUPED: 30.0, LIGER: 40.0},
        "peer_versions": {LIGER: "0.8.5"},
        "peers_absent": {SONIC: "not installed: sonic-moe (No module named 'sonicmoe')"},
    }  # fmt: skip
    head, line, *rest = bench_cuda.table([record]).splitlines()
    assert head.split()[-2:] == [GROUPED, LIGER]
    assert line.split()[-3:] == ["0.500", "0.250", "e"]
    assert rest[1:] == [
        "liger-kernel 0.8.5",
        "SonicMoE: not installed: sonic-moe (No module named 'sonicmoe')",
    ]
