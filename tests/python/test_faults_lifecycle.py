"""Groups over their whole life: thousands of launches and of groups, processes that end in every
way, joins that fail. Nothing may be wrong, and nothing may be left."""

import fcntl
import signal
import threading
import time

import flashmoe
import pytest
from faults_common import (
    SHARED_MEMORY,
    SOAK_HIDDEN,
    WRAP,
    RankProcess,
    Ranks,
    expected_outputs,
    new_token,
    rank_processes,
    segments,
    soak,
)
from flashmoe import _core, errors, passes

# What a process may gain in the second half of a long run: the allocator's slack, in MiB.
RESIDENT_SLACK = 8.0


def assert_no_leak(before, after):
    for name in ("files", "segments", "threads"):
        assert after[name] <= before[name], f"{name}: {before[name]} -> {after[name]}"
    grown = after["resident"] - before["resident"]
    assert grown < RESIDENT_SLACK, f"resident memory grew by {grown:.1f} MiB"


def soak_processes(directory, launches):
    """`launches` launches of four processes, half of them before the wrap of the epoch."""
    with rank_processes(4, directory, epoch=float(WRAP - launches // 2)) as ranks:
        start = time.monotonic()
        for process in ranks:
            process.start("soak", launches=launches, seed=launches)
        for process in ranks:
            assert process.connection.poll(800), "a rank hangs"
            epoch, before, after = process.value()
            assert epoch <= launches, "the epoch did not wrap"
            assert_no_leak(before, after)
        print(f"{launches} launches in {time.monotonic() - start:.0f} s: {before} -> {after}")
        assert ranks.printed() == ""


def test_launches_across_the_wrap(tmp_path):
    """Routing, tokens and their number change with every launch; every result is checked."""
    soak_processes(tmp_path, 3000)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundred_thousand_launches_across_the_wrap(tmp_path):
    soak_processes(tmp_path, 100_000)


@pytest.mark.slow
def test_launches_of_threads_across_the_wrap():
    launches = 2000
    groups = flashmoe.local_group(4)
    for group in groups:
        group.set("epoch", float(WRAP - launches // 2))
        group.set("num_threads", 1)
    results = passes.on_all_ranks(lambda rank: soak(groups[rank], launches, 7), 4)
    for group in groups:
        group.close()
    for result in results:
        assert isinstance(result, tuple), result
        assert result[0] <= launches


@pytest.mark.slow
def test_thousand_groups_of_processes(tmp_path):
    with rank_processes(2, tmp_path) as ranks:
        answers = ranks.all(
            "group_cycles",
            token=new_token(),
            rank=[0, 1],
            world=2,
            count=1000,
            expected=expected_outputs(2),
        )
        for answer in answers:
            assert answer.error is None, answer
            assert_no_leak(*answer.value)
        assert ranks.printed() == ""


@pytest.mark.slow
def test_thousand_groups_of_threads(tmp_path):
    alone = RankProcess(tmp_path / "alone.log")
    alone.start("thread_cycles", count=1000)
    assert_no_leak(*alone.value())
    alone.close()


@pytest.mark.parametrize("way", ["exit", "hard exit", "SIGTERM", "SIGABRT"])
def test_nothing_is_left_after_any_exit(tmp_path, way):
    """One rank ends in the middle of its peers' call: they say so, and no name stays."""
    with rank_processes(2, tmp_path, timeout_s=20.0) as ranks:
        ranks.assert_all_right(1)
        ranks[0].start("step")
        ranks[1].start("leave_by", way=way)
        answer = ranks[0].answer()
        assert answer.error == "WaitTimeoutError" and "rank 1 is gone" in answer.text
        ranks[1].process.join()
        assert not segments()


def test_names_of_killed_ranks_are_removed_by_the_next_start(tmp_path):
    """SIGKILL of a rank while it waits for others to join, when its segment still has its name."""
    token = new_token()
    alone = RankProcess(tmp_path / "alone.log")
    alone.start("join", token=token, rank=0, world=2)
    wait_for_segment(f"{token}-0")
    alone.close()
    assert segments(token), "a name is left for the next start to remove"
    with rank_processes(2, tmp_path):
        assert not segments(token)


def test_names_of_the_living_are_not_removed(tmp_path):
    """A group that is being made is left alone by another one that is."""
    token = new_token()
    waiting = Ranks(RankProcess(tmp_path / f"waiting{rank}.log") for rank in range(2))
    waiting[0].start("join", token=token, rank=0, world=2)
    wait_for_segment(f"{token}-0")
    with rank_processes(2, tmp_path):
        assert segments(token)
        waiting[1].start("join", token=token, rank=1, world=2)
        for process in waiting:
            process.value()
        waiting.assert_all_right(1)
    for process in waiting:
        process.close()


@pytest.mark.slow
def test_ranks_killed_at_random_moments(tmp_path):
    """All ranks of a group are killed, later each time, from the making of the group on."""
    for attempt in range(12):
        token = new_token()
        ranks = Ranks(RankProcess(tmp_path / f"{attempt}-{rank}.log") for rank in range(2))
        for rank, process in enumerate(ranks):
            process.start("join", token=token, rank=rank, world=2)
            process.start("step")
        time.sleep(0.01 * attempt)
        for process in ranks:
            process.signal(signal.SIGKILL)
        for process in ranks:
            process.close()
    with rank_processes(2, tmp_path):
        assert not segments()


def wait_for_segment(word):
    deadline = time.monotonic() + 20
    while not any(name.endswith(word) for name in segments()):
        assert time.monotonic() < deadline, f"no segment {word}"
        time.sleep(0.001)


def join_beside(forge):
    """What rank 0 of 2 raises when rank 1's block is `forge(rank 0's block)`."""
    token = new_token()
    raised = []

    def join():
        try:
            _core.engine().group_shm(token, 0, 2)
        except errors.FlashMoEError as error:
            raised.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    wait_for_segment(f"{token}-0")
    block = bytes(4)
    while block[:4] in (b"", bytes(4)):  # hello comes last: then the introduction is complete
        block = (SHARED_MEMORY / f"flashmoe-{token}-0").read_bytes()
    hidden = SHARED_MEMORY / f"forged-{token}"
    with hidden.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its owner does: nobody takes it for an orphan
        file.write(forge(block))
        file.flush()
        other = hidden.rename(SHARED_MEMORY / f"flashmoe-{token}-1")
        thread.join()
        other.unlink(missing_ok=True)
    assert not segments(token)
    (error,) = raised
    return error


BUILD_AT = 8  # of ControlBlock::build


def other_build(block):
    return (
        block[:BUILD_AT] + b"9.9.9, control block of 7".ljust(128, b"\0") + block[BUILD_AT + 128 :]
    )


@pytest.mark.parametrize("size", ["same", "smaller", "larger"])
def test_peer_of_another_build(size):
    """Both builds are named, whatever the size of the other one's block; at once."""
    start = time.monotonic()

    def forge(block):
        forged = other_build(block)
        return {"same": forged, "smaller": forged[:4096], "larger": forged + bytes(4096)}[size]

    error = join_beside(forge)
    assert isinstance(error, errors.RankMismatchError), error
    for word in ("build differs", "rank 1", "rank 0", "9.9.9", flashmoe.__version__):
        assert word in str(error)
    assert time.monotonic() - start < 10


def test_peer_of_another_world():
    error = join_beside(lambda block: block[:4] + (3).to_bytes(4, "little") + block[8:])
    assert isinstance(error, errors.RankMismatchError), error
    assert "world differs" in str(error) and "3" in str(error)


@pytest.mark.slow
def test_absent_rank_ends_the_join_of_all(tmp_path):
    """Two of three ranks make a group: both name the third, and no name stays."""
    token = new_token()
    ranks = Ranks(RankProcess(tmp_path / f"{rank}.log") for rank in range(2))
    for rank, process in enumerate(ranks):
        process.start("join", token=token, rank=rank, world=3, creation_s=1.0)
    answers = [process.answer() for process in ranks]
    for answer in answers:
        assert answer.error in ("WaitTimeoutError", "GroupAbortedError"), answer
        assert "rank 2" in answer.text and token in answer.text
        assert answer.seconds < 1.0 + 1.0
    assert not segments(token)
    ranks.assert_recovers()
    for process in ranks:
        process.close()


def test_soak_finds_a_wrong_row(monkeypatch):
    """The comparison of the long run fails when the layer is another one than it thinks."""
    import faults_common

    w_up, w_down = faults_common.soak_weights()
    (group,) = flashmoe.local_group(1)
    monkeypatch.setattr(
        faults_common.np, "einsum", lambda *_: faults_common.np.ones((1, SOAK_HIDDEN))
    )
    with group, pytest.raises(AssertionError, match="is wrong"):
        soak(group, 20, 1)
    assert w_up.any() and w_down.any()
