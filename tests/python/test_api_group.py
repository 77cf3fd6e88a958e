"""Groups: ranks as threads, a torch process group, errors on every rank."""

import copy
import os
import subprocess
import sys
import textwrap
from contextlib import suppress

import flashmoe
import pytest
import torch
from conftest import assert_as_exact_as_plain, make_layer, plain_experts
from flashmoe import group as groups
from flashmoe.errors import (
    GroupAbortedError,
    RankMismatchError,
    RoutingError,
    UnsupportedError,
)


def shard(layer, rank, num_ranks):
    """The experts of one rank, as leaves of their own."""
    share = layer.w_up.shape[0] // num_ranks
    mine = slice(rank * share, (rank + 1) * share)
    return {
        name: tensor.detach()[mine].clone().requires_grad_()
        for name, tensor in layer.tensors().items()
        if name in ("w_up", "w_down", "b_up", "b_down")
    }


def tokens_of(layer, rank, num_ranks):
    """A different number of tokens on every rank, none on the last of three."""
    ends = {2: (0, 17, 24), 3: (0, 5, 24, 24)}[num_ranks]
    return slice(ends[rank], ends[rank + 1])


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_as_threads_give_the_gradients_of_one(ranks, num_ranks):
    layer = make_layer(tokens=24, bias=True)
    ids = torch.randint(-1, 7, (24, 2), generator=torch.Generator().manual_seed(5))
    weights = torch.rand(24, 2, generator=torch.Generator().manual_seed(6))
    direction = torch.randn(24, 32, generator=torch.Generator().manual_seed(7))

    def on_rank(rank, group):
        mine = tokens_of(layer, rank, num_ranks)
        x = layer.x.detach()[mine].clone().requires_grad_()
        my_weights = weights[mine].clone().requires_grad_()
        local = shard(layer, rank, num_ranks)
        y = flashmoe.experts(x, ids[mine], my_weights, **local, group=group)
        (y * direction[mine]).sum().backward()
        by_token = {"y": y.detach(), "x": x.grad, "topk_weights": my_weights.grad}
        return by_token, {name: tensor.grad for name, tensor in local.items()}

    results = ranks(num_ranks).values(on_rank)
    ours = {
        name: torch.cat([part[name] for parts in results for part in parts if name in part])
        for name in ("y", "x", "topk_weights", "w_up", "w_down", "b_up", "b_down")
    }

    def plain(dtype):
        given, its_weights = layer.to(dtype), weights.detach().to(dtype).requires_grad_()
        y = plain_experts(given, ids, its_weights)
        (y * direction.to(dtype)).sum().backward()
        return {"y": y.detach(), "topk_weights": its_weights.grad, **given.grads()}

    same_dtype, exact = plain(torch.float32), plain(torch.float64)
    for name in ours:
        assert_as_exact_as_plain(name, ours[name], same_dtype[name], exact[name])


def test_module_on_a_group(ranks):
    x = torch.randn(2, 9, 16)

    def on_rank(rank, group):
        torch.manual_seed(0)
        layer = flashmoe.MoE(16, 8, 4, 2, group=group)
        assert layer.w_up.shape == (2, 16, 16)
        assert copy.deepcopy(layer).group is group
        y, routed = layer(x[rank], return_routing=True)
        y.sum().backward()
        return routed.tokens_per_expert, layer.w_router.grad is not None

    for counts, has_gradient in ranks(2).values(on_rank):
        assert counts.shape == (4,)
        assert has_gradient


def test_group_describes_itself(ranks):
    first, second = ranks(2).groups
    assert (first.rank, first.world) == (0, 2)
    assert (second.rank, second.world) == (1, 2)
    assert first.name != second.name
    assert "rank=1, world=2" in repr(second)
    first.set("timeout_s", 5)


def test_stats_of_a_launch():
    (group,) = flashmoe.local_group(1)
    layer = make_layer(tokens=10)
    with group:
        flashmoe.moe(**layer.keywords(), group=group)
        stats = group.stats()
    assert stats["rows"] == 20
    assert stats["rows_sent"] == 0
    assert len(stats["phase_seconds"]) == 8
    assert stats["seconds"] > 0


def everything_of(stats):
    """All numbers of `Group.stats`."""
    lists = [value if isinstance(value, list) else [value] for value in stats.values()]
    return [number for one in lists for number in one]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_stats_of_a_call_that_raised_are_of_no_other(ranks, num_ranks):
    layer = make_layer(experts=4)
    spoiled = layer.x.detach() * float("nan")

    def on_rank(rank, group):
        good = layer.keywords() | shard(layer, rank, num_ranks) | {"group": group}
        found = []
        for changes in ({}, {"x": spoiled} if rank == 0 else {}, {}):
            with suppress(RoutingError, RankMismatchError):
                flashmoe.moe(**good | changes)
            found.append(group.stats())
        return found

    for before, raised, after in ranks(num_ranks).values(on_rank):
        assert before["rows"] > 0 and before["seconds"] > 0
        assert not any(everything_of(raised)), raised
        assert after["epoch"] > before["epoch"] and after["rows"] == before["rows"]


@pytest.mark.parametrize(
    "changes", [{"activation": "swish"}, {"b_up": torch.zeros(2, 3)}], ids=["python", "engine"]
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_refused_call_is_a_launch_where_peers_take_part(ranks, num_ranks, changes):
    layer = make_layer(experts=4)

    def on_rank(rank, group):
        good = layer.keywords() | shard(layer, rank, num_ranks) | {"group": group}
        flashmoe.moe(**good)
        before = group.stats()
        with pytest.raises((ValueError, RankMismatchError)):
            flashmoe.moe(**good | (changes if rank == 0 else {}))
        return before, group.stats()

    for before, after in ranks(num_ranks).values(on_rank):
        assert after == before if num_ranks == 1 else not any(everything_of(after))


ONE_BAD_RANK = {
    "python": ({"activation": "swish"}, ValueError, "swish"),
    "python_type": ({"w_up": None}, TypeError, "w_up is None"),
    "engine": ({"b_up": torch.zeros(2, 3)}, ValueError, "b_up"),
    "save_z": ({"save_z": True}, UnsupportedError, "save_z"),
}


@pytest.mark.parametrize(
    ("changes", "error", "word"), ONE_BAD_RANK.values(), ids=ONE_BAD_RANK.keys()
)
def test_error_of_one_rank_reaches_all_at_once(ranks, changes, error, word):
    layer = make_layer(tokens=6, hidden=16, intermediate=8, experts=4)

    def on_rank(rank, group):
        arguments = {**shard(layer, rank, 2), **(changes if rank == 1 else {})}
        return flashmoe.moe(layer.x, layer.w_router, **arguments, top_k=2, group=group)[0]

    started = ranks(2)
    first, second = started.run(on_rank)
    assert type(second) is error and word in str(second), second
    assert isinstance(first, RankMismatchError) and word in str(first), first

    changes = {}
    for y in started.values(on_rank):
        assert y.shape == layer.x.shape


def test_ranks_that_disagree(ranks):
    def on_rank(rank, group):
        layer = make_layer(tokens=6, hidden=16 + 8 * rank, intermediate=8, experts=4)
        return flashmoe.moe(layer.x, layer.w_router, **shard(layer, rank, 2), top_k=2, group=group)

    for result in ranks(2).run(on_rank):
        assert isinstance(result, RankMismatchError) and "hidden" in str(result), result


def test_experts_not_divisible_over_the_ranks(ranks):
    (first, _) = ranks(2).groups
    with pytest.raises(ValueError, match="num_experts is 5 on a group of 2 ranks"):
        flashmoe.MoE(16, 8, 5, 2, group=first)


def test_abort_ends_the_wait_of_a_peer(ranks):
    layer = make_layer(tokens=6, hidden=16, intermediate=8, experts=4)

    def on_rank(rank, group):
        if rank == 1:
            group.abort("the test says so")
            return None
        return flashmoe.moe(layer.x, layer.w_router, **shard(layer, rank, 2), top_k=2, group=group)

    waiting, _ = ranks(2).run(on_rank)
    assert isinstance(waiting, GroupAbortedError) and "the test says so" in str(waiting), waiting


PROCESS_GROUP = """
    import sys, torch
    import torch.distributed as dist
    import flashmoe
    from flashmoe import group as groups

    rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((4, 16), (4, 16, 16), (4, 16, 8))]
    x = torch.randn(2, 5, 16)
    w_router, *both = weights
    local = [w[2 * rank : 2 * rank + 2].clone().requires_grad_() for w in both]
    pg = dist.group.WORLD
    y, _ = flashmoe.moe(x[rank], w_router, *local, top_k=2, group=pg)
    y.sum().backward()
    alone, _ = flashmoe.moe(x[rank], *weights, top_k=2)
    torch.testing.assert_close(y, alone)
    assert local[0].grad.abs().sum() > 0

    # one group per process group; a single rank needs none
    assert groups.lookup("pg:" + pg.group_name) is groups.lookup("pg:" + pg.group_name)
    singles = [dist.new_group([other]) for other in range(2)]
    assert groups.resolve(singles[rank]) == ("self", 1)

    # compiled: the operator takes the group by its name. PyTorch 2.11 traces no hasattr of a group
    def untraceable(value, name):
        raise AssertionError(f"hasattr(group, {name!r})")

    groups.hasattr = untraceable
    for part, shard in ((pg, local), (singles[rank], weights[1:])):
        layer = lambda x: flashmoe.moe(x, w_router, *shard, top_k=2, group=part)[0]
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x[rank]), layer(x[rank]))

    # an error that one rank finds before its launch
    try:
        flashmoe.moe(x[rank], w_router, *local, top_k=2, group=pg, save_z=bool(rank))
    except flashmoe.errors.FlashMoEError as error:
        print(type(error).__name__)

    # it goes with its process group
    def mapped():
        return open("/proc/self/maps").read().count("/dev/shm/flashmoe-")

    before = (len(groups._groups), mapped())
    for _ in range(3):
        part = dist.new_group([0, 1])
        flashmoe.moe(x[rank], w_router, *local, top_k=2, group=part)
        assert mapped() > before[1]
        dist.destroy_process_group(part)
        del part
        assert (len(groups._groups), mapped()) == before

    # a name that torch uses again belongs to a new group
    old = groups.lookup("pg:" + pg.group_name)
    dist.destroy_process_group()
    store = dist.FileStore(sys.argv[2] + ".again", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    again, _ = flashmoe.moe(x[rank], w_router, *local, top_k=2, group=dist.group.WORLD)
    assert torch.equal(again, y)
    assert groups.lookup("pg:" + dist.group.WORLD.group_name) is not old
    dist.destroy_process_group()
    print("done")
"""


def test_torch_process_group(tmp_path):
    environment = {**os.environ, "FLASHMOE_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS_GROUP), str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    assert outputs[0][0].split() == ["RankMismatchError", "done"]
    assert outputs[1][0].split() == ["UnsupportedError", "done"]


def test_ranks_on_two_machines_are_refused():
    with pytest.raises(UnsupportedError, match="rank 1 is not on the machine of rank 0"):
        groups.make_shm(0, 2, lambda mine: [mine, ["token", "another machine"]])


def test_forked_child_makes_its_own_group():
    layer = make_layer(tokens=4)
    with torch.no_grad():
        expected = flashmoe.moe(**layer.keywords())[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(flashmoe.moe(**layer.keywords())[0], expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


FORKS = """
import os, sys, threading, time
import flashmoe

over = threading.Event()
def work():
    while not over.is_set():
        flashmoe.local_group(1)[0].close()

flashmoe.local_group(1)[0].close()  # what the first call imports is there
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for attempt in range(60):
    child = os.fork()
    if child == 0:
        flashmoe.local_group(1)[0].close()
        os._exit(0)
    end = time.monotonic() + 5
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(child, 9)
            print("child", attempt, "hangs")
            os._exit(1)
        time.sleep(0.0005)
over.set()
"""


def test_a_child_that_is_forked_while_groups_come_and_go_does_not_hang():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_errors_name_the_layer_that_has_a_number():
    layer = make_layer(tokens=4)
    spoiled = layer.keywords() | {"x": layer.keywords()["x"] * float("nan")}
    with pytest.raises(RoutingError, match=r"\(layer 17\)$"):
        flashmoe.moe(**spoiled, layer_id=17)
    with pytest.raises(RoutingError) as nameless:
        flashmoe.moe(**spoiled)
    assert "(layer" not in str(nameless.value)
    narrow = layer.keywords()
    narrow["w_down"] = narrow["w_down"][:, 1:]
    with pytest.raises(ValueError, match=r"w_down.*\(layer 17\)$"):
        flashmoe.moe(**narrow, layer_id=17)


class Engine:
    """Groups whose handles are numbers; those of `failing` have a launch to report."""

    def __init__(self, *failing):
        self.failing = failing
        self.destroyed = []

    def group_rank(self, handle):
        return 0, 1

    def group_destroy(self, handle):
        self.destroyed.append(handle)
        if handle in self.failing:
            raise RoutingError(f"launch of {handle}")


@pytest.fixture
def only_these(monkeypatch):
    """A function that makes groups of an engine of one's own, the only ones there are."""
    from flashmoe import _core

    def make(engine, count):
        monkeypatch.setattr(_core, "engine", lambda: engine)
        monkeypatch.setattr(groups, "_groups", {})
        return [groups.Group(handle, f"fake:{handle}") for handle in range(count)]

    return make


def test_close_raises_what_a_launch_has_reported_and_closes(only_these):
    engine = Engine(0)
    [group] = only_these(engine, 1)
    with pytest.raises(RoutingError, match="launch of 0"):
        group.close()
    group.close()
    assert engine.destroyed == [0]


def test_leaving_a_block_raises_it_unless_the_block_has_failed(only_these):
    one, other = only_these(Engine(0, 1), 2)
    with pytest.raises(RoutingError), one:
        pass
    with pytest.raises(KeyError), other:
        raise KeyError


def test_the_end_of_the_process_closes_all_groups_and_raises_the_first_failure(only_these):

    engine = Engine(1, 2)
    only_these(engine, 4)
    with pytest.raises(RoutingError, match="launch of 1"):
        groups._close_all()
    assert engine.destroyed == [0, 1, 2, 3]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_reservation_changes_nothing_on_the_cpu(ranks, num_ranks):
    group = flashmoe.local_group(num_ranks, max_tokens=100)
    for one in group:
        one.reserve(5000, hidden=64, top_k=2, num_experts=8)
        assert one.stats()["symmetric_bytes"] == 0
        one.close()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_tokens": -1}, ValueError, "max_tokens is -1"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens is a float"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'"),
        ({"devices": [0]}, ValueError, "devices has 1 entries; accepted: one a rank, 2"),
        ({"devices": [0, -1]}, ValueError, "devices is -1"),
        ({"devices": [0, True]}, TypeError, "devices is a bool"),
    ],
    ids=str,
)
def test_wrong_arguments_of_a_local_group(arguments, error, words):
    with pytest.raises(error, match=words):
        flashmoe.local_group(2, **arguments)


def test_more_ranks_than_gpus_are_refused():
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"there are {count} CUDA devices"):
        flashmoe.local_group(count + 1, device="cuda")


def test_wrong_arguments_of_a_reservation():
    one, _ = groups_of_two = flashmoe.local_group(2)
    with pytest.raises(ValueError, match="hidden is -3"):
        one.reserve(10, hidden=-3)
    with pytest.raises(ValueError, match=r"max_tokens is \d+, expected 0"):
        one.reserve(1 << 50)
    with pytest.raises(ValueError, match=r"device is 0\.5"):
        one.set("device", 0.5)
    for group in groups_of_two:
        group.close()


def test_a_rank_alone_has_no_device_of_its_own():
    [one] = flashmoe.local_group(1)
    with one, pytest.raises(ValueError, match="a rank alone launches where its operands are"):
        one.set("device", 0)
