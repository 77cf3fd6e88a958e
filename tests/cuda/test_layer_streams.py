"""Streams and threads that share one scratch, and launches that fail on the GPU."""

import subprocess
import sys
import threading

import flashmoe
import pytest
import torch
from flashmoe.errors import RoutingError, WaitTimeoutError
from flashmoe.run import PHASES
from layer_common import finish, make_layer, same_bits

ROUNDS = 30


@pytest.fixture
def group():
    [one] = flashmoe.local_group(1)
    with one:
        yield one


def test_streams_in_turn(group):
    layers = [make_layer(tokens=800, seed=seed) for seed in range(3)]
    expected = [layer.outputs(group) for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    made = []
    for _ in range(ROUNDS):
        for layer, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                made.append(layer.outputs(group))
    finish(group)
    for idx, outputs in enumerate(made):
        assert same_bits(outputs, expected[idx % len(layers)]), f"launch {idx}"


def test_threads_with_streams_of_their_own(group):
    layers = [make_layer(tokens=800, seed=seed) for seed in range(3)]
    expected = [layer.outputs(group) for layer in layers]
    torch.cuda.synchronize()
    failures = []

    def work(idx):
        with torch.cuda.stream(torch.cuda.Stream()):
            made = [layers[idx].outputs(group) for _ in range(ROUNDS)]
            torch.cuda.current_stream().synchronize()
        if not all(same_bits(outputs, expected[idx]) for outputs in made):
            failures.append(idx)

    threads = [threading.Thread(target=work, args=(idx,)) for idx in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    finish(group)
    assert not failures


def test_a_wait_that_runs_out_is_raised_once_and_the_group_works_on(group):
    layer = make_layer(tokens=2000, experts=64, hidden=1024)
    expected = layer.outputs(group)
    group.set("timeout_s", 1e-9)
    layer(group)
    torch.cuda.synchronize()
    group.set("timeout_s", 30)
    with pytest.raises(WaitTimeoutError, match=r"a wait ran out of time: .*block \d+, thread \d+"):
        layer(group)
    assert same_bits(layer.outputs(group), expected)
    finish(group)


def test_close_raises_what_the_last_launch_reported():
    [group] = flashmoe.local_group(1)
    layer = make_layer(tokens=2000, experts=64, hidden=1024)
    layer(group)
    group.set("timeout_s", 1e-9)
    layer(group)
    with pytest.raises(WaitTimeoutError, match="a wait ran out of time"):
        group.close()
    with pytest.raises(ValueError, match="closed"):
        layer(group)


def test_what_ends_a_block_is_raised_not_what_its_last_launch_reported():
    [group] = flashmoe.local_group(1)
    layer = make_layer()
    spoiled = layer.x * float("nan")
    with pytest.raises(KeyError), group:
        layer(group, spoiled)
        raise KeyError


def test_the_end_of_the_process_says_what_the_last_launch_reported():
    program = """
import flashmoe, torch
x, w_router = (torch.full((n, 64), float("nan"), device="cuda").bfloat16() for n in (8, 4))
w_up, w_down = (torch.ones(4, n, 64, device="cuda").bfloat16() for n in (128, 64))
flashmoe.moe(x, w_router, w_up, w_down, top_k=2)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "RoutingError" in ended.stderr and "router logits" in ended.stderr, ended.stderr


def test_phases_add_up_to_the_launch(group):
    for tokens in (0, 3, 300, 6000):
        layer = make_layer(tokens=tokens, hidden=1024)
        layer(group)
        group.stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        layer(group)
        end.record()
        stats = group.stats()  # waits for the launch
        torch.cuda.synchronize()
        phases = dict(zip(PHASES, stats["phase_seconds"], strict=True))
        assert all(phases[name] == 0 for name in ("push", "weight", "return")), phases
        assert all(seconds >= 0 for seconds in phases.values()), phases
        if tokens:
            assert all(phases[name] > 0 for name in ("route", "plan", "up", "combine")), phases
        assert sum(phases.values()) == pytest.approx(stats["seconds"], rel=1e-6)
        assert 1e-6 < stats["seconds"] <= start.elapsed_time(end) * 1e-3 + 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_undefined_logits_are_raised_by_the_next_call(value, group):
    layer = make_layer()
    expected = layer.outputs(group)
    spoiled = layer.x.clone()
    spoiled[37, 5] = value
    layer(group, spoiled)
    torch.cuda.synchronize()
    with pytest.raises(RoutingError, match="router logits"):
        group.stats()
    assert same_bits(layer.outputs(group), expected)
    finish(group)


def test_stats_of_a_call_that_raised_are_of_no_launch(group):
    layer = make_layer()
    spoiled = layer.x.clone()
    spoiled[37, 5] = float("nan")
    layer(group)
    assert group.stats()["epoch"] > 0
    layer(group, spoiled)
    torch.cuda.synchronize()
    with pytest.raises(RoutingError, match="router logits"):
        layer(group)
    stats = group.stats()
    assert stats["epoch"] == 0 and stats["seconds"] == 0 and not any(stats["phase_seconds"])
    layer(group)
    assert group.stats()["seconds"] > 0


def test_nan_in_the_selection_bias_names_the_expert(group):
    layer, bias = make_layer(), torch.zeros(16, device="cuda")
    layer.options["selection_bias"] = bias
    expected = layer.outputs(group)
    bias[11] = float("nan")
    layer(group)
    torch.cuda.synchronize()
    with pytest.raises(RoutingError, match=r"NaN in the selection bias \(expert 11\)"):
        group.stats()
    bias[11] = 0
    assert same_bits(layer.outputs(group), expected)
    finish(group)


def test_an_id_below_minus_one_is_raised_and_spoils_its_token(group):
    layer, bad = make_layer(), 21
    _, routed = layer(group)
    ids = routed.topk_ids.clone()

    def run():
        weights = (layer.w_up, layer.w_down)
        return flashmoe.experts(layer.x, ids, routed.topk_weights, *weights, group=group)

    expected = run().clone()
    ids[bad, 2] = -2
    made = run()
    torch.cuda.synchronize()
    with pytest.raises(RoutingError, match=rf"expert id below -1 \(first seen in token {bad}\)"):
        group.stats()
    others = torch.arange(len(ids), device="cuda") != bad
    assert torch.isnan(made[bad]).all()
    assert same_bits([made[others]], [expected[others]])
    finish(group)


def test_scratch_that_grows_on_streams_in_turn(group):
    """Every stream finds scratch that another one has just taken and cleared."""
    layers = [make_layer(tokens=tokens) for tokens in (10, 500, 3000, 20)]
    expected = [layer.outputs() for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    made = []
    for layer, stream in zip(layers, streams, strict=True):
        with torch.cuda.stream(stream):
            made.append(layer.outputs(group))
    finish(group)
    for outputs, right in zip(made, expected, strict=True):
        assert same_bits(outputs, right)


def test_the_current_device_stays():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(1):
        layer = make_layer()
    layer()
    assert torch.cuda.current_device() == 0
