"""The same bits whatever runs beside the layer and however many multiprocessors it has."""

import flashmoe
import pytest
import torch
from layer_common import finish, make_layer, same_bits

HOLDER = r"""
extern "C" __global__ void hold(long long nanoseconds, float* sink) {
  extern __shared__ float memory[];
  long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do {
    memory[threadIdx.x] = start;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
  if (sink != nullptr) sink[threadIdx.x] = memory[threadIdx.x];
}
"""
SHAPES = {
    "small": {},
    "few": {"tokens": 7, "experts": 64, "top_k": 4, "hidden": 2048, "intermediate": 832},
    "one-tile": {"tokens": 20, "experts": 8, "top_k": 2},
    "many-experts": {"tokens": 2000, "experts": 128, "top_k": 8, "hidden": 512},
    "wide": {"tokens": 1500, "experts": 8, "top_k": 2, "hidden": 2048, "intermediate": 1024},
}


@pytest.fixture
def group():
    [one] = flashmoe.local_group(1)
    with one:
        yield one


@pytest.mark.parametrize("shape", SHAPES)
def test_100_runs(shape, group):
    layer = make_layer(**SHAPES[shape])
    first = layer.outputs(group)
    for run in range(100):
        assert same_bits(layer.outputs(group), first), f"run {run}"
    finish(group)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_multiprocessors(shape, group):
    layer = make_layer(**SHAPES[shape])
    first = layer.outputs(group)
    for max_sms in (2, 4, 8, 10, 34, 66, 100, 130, 132):
        group.set("max_sms", max_sms)
        assert same_bits(layer.outputs(group), first), f"{max_sms} multiprocessors"
    finish(group)


class Holder:
    """Holds half of the multiprocessors on a stream of its own."""

    def __init__(self):
        cupy = pytest.importorskip("cupy", reason="needs cupy, to compile the holding kernel")
        self.kernel = cupy.RawKernel(HOLDER, "hold")
        self.shared_bytes = 200 * 1024  # nothing else fits beside it on a multiprocessor
        self.kernel.max_dynamic_shared_size_bytes = self.shared_bytes
        self.blocks = torch.cuda.get_device_properties().multi_processor_count // 2
        self.side = torch.cuda.Stream()
        self.stream = cupy.cuda.ExternalStream(self.side.cuda_stream)

    def __call__(self, seconds):
        with self.stream:
            grid, block = (self.blocks,), (256,)
            arguments = (int(seconds * 1e9), 0)
            self.kernel(grid, block, arguments, shared_mem=self.shared_bytes)


@pytest.mark.parametrize("max_sms", [0, 64], ids=["all", "half"])
@pytest.mark.parametrize("shape", SHAPES)
def test_beside_a_stream_that_holds_half_of_the_gpu(shape, max_sms, group):
    """With all of its multiprocessors the launch waits for them; with half it runs beside."""
    layer = make_layer(**SHAPES[shape])
    first = layer.outputs(group)
    group.set("max_sms", max_sms)
    hold = Holder()
    for run in range(10):
        hold(0.003)
        assert same_bits(layer.outputs(group), first), f"run {run}"
    finish(group)


def test_scratch_is_shared_by_layers_of_other_sizes(group):
    layers = [make_layer(**options, seed=seed) for seed, options in enumerate(SHAPES.values())]
    layers += [make_layer(tokens=tokens) for tokens in (0, 1, 64, 999)]
    first = [layer.outputs() for layer in layers]
    for _ in range(20):
        for layer, expected in zip(layers, first, strict=True):
            assert same_bits(layer.outputs(group), expected)
    finish(group)


def test_no_memory_is_taken_after_the_first_call(group):
    layer = make_layer(tokens=4000, hidden=1024, experts=64, top_k=8)
    small = layer.with_x(100, seed=3)
    layer.outputs(group)
    finish(group)
    free, _ = torch.cuda.mem_get_info()
    scratch = group.stats()["allocated_bytes"]
    for _ in range(20):
        layer.outputs(group)
        small.outputs(group)
    finish(group)
    assert torch.cuda.mem_get_info()[0] == free
    assert group.stats()["allocated_bytes"] == scratch
