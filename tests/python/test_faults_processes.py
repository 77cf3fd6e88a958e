"""Ranks that are killed, stopped, late or wrong, as processes over shared memory: a named error on
every survivor in bounded time, one diagnostic each, and a process that goes on with a new group."""

import os
import signal
import subprocess
import sys
import time

import pytest
from faults_common import SHARED_MEMORY, Ranks, expected_outputs, new_token, rank_processes

DEADLINE_S = 1.5
VICTIM = 1

# Where a rank is hit: before its rows are sent, between dispatch and combine, in the backward.
FORWARD = ["route", "plan", "push", "up", "down", "return", "combine"]
BACKWARD = ["plan", "up", "weight", "combine"]
PLACES = [("forward", phase) for phase in FORWARD] + [("backward", phase) for phase in BACKWARD]
QUICK = [("forward", "up"), ("backward", "weight")]


def start_step_with_a_stop(ranks, direction, phase, again=False):
    """All ranks in a step that the victim is stopped in; returns when it is."""
    for rank, process in enumerate(ranks):
        stop = {"stop_in": phase, "direction": direction} if rank == VICTIM else {}
        process.start("step", again=again, **stop)
    ranks[VICTIM].wait_until_stopped()


def assert_named_errors(answers, since, deadline, names=()):
    """One error a survivor: in time, and with the rank, the phase, the epoch and both values."""
    for answer in answers:
        assert answer.error in ("WaitTimeoutError", "GroupAbortedError"), answer
        for word in (f"rank {VICTIM}", "phase", "epoch", "expected", "seen", *names):
            assert word in answer.text, answer.text
        assert answer.ended - since < deadline + 1.0, answer
    assert any(answer.error == "WaitTimeoutError" for answer in answers)


def survivors(ranks):
    return Ranks(process for rank, process in enumerate(ranks) if rank != VICTIM)


@pytest.mark.parametrize(
    ("direction", "phase"),
    [pytest.param(*place, marks=() if place in QUICK else pytest.mark.slow) for place in PLACES],
    ids=["-".join(place) for place in PLACES],
)
def test_killed_peer(tmp_path, direction, phase):
    """SIGKILL in every phase of both directions: the survivors need not even wait for the
    deadline, because the system tells them that the process is gone."""
    with rank_processes(3, tmp_path, timeout_s=20.0) as ranks:
        ranks.assert_all_right(1)
        # In the last phases the victim has sent all that its peers need: they see it a call later.
        start_step_with_a_stop(ranks, direction, phase, again=True)
        when = ranks[VICTIM].kill()
        left = survivors(ranks)
        answers = [process.answer() for process in left]
        assert_named_errors(answers, when, 0.0, [f"rank {VICTIM} is gone"])
        left.assert_recovers(100 if (direction, phase) == ("forward", "up") else 4)
        assert left.printed() == ""


def test_killed_between_two_calls(tmp_path):
    with rank_processes(3, tmp_path, timeout_s=20.0) as ranks:
        ranks.assert_all_right(1)
        ranks[VICTIM].kill()
        left = survivors(ranks)
        when = time.monotonic()
        assert_named_errors(left.all("step"), when, 0.0, [f"rank {VICTIM} is gone", "plan"])
        left.assert_recovers(4)
        assert left.printed() == ""


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "phase"), [("forward", "up"), ("backward", "return")])
def test_peer_stopped_inside_the_deadline(tmp_path, direction, phase):
    with rank_processes(3, tmp_path, timeout_s=20.0) as ranks:
        start_step_with_a_stop(ranks, direction, phase)
        time.sleep(0.7)
        ranks[VICTIM].signal(signal.SIGCONT)
        expected = expected_outputs(3)
        for rank, process in enumerate(ranks):
            for name, value in process.value().items():
                assert value.tobytes() == expected[rank][name].tobytes(), name
        ranks.assert_all_right(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "phase"), [("forward", "plan"), ("forward", "up"), ("backward", "down")]
)
def test_peer_stopped_past_the_deadline(tmp_path, direction, phase):
    """The others give up in time, and so does the stopped one as soon as it goes on."""
    with rank_processes(3, tmp_path, timeout_s=DEADLINE_S) as ranks:
        ranks.assert_all_right(1)
        start_step_with_a_stop(ranks, direction, phase)
        when = time.monotonic()
        answers = [process.answer() for process in survivors(ranks)]
        assert_named_errors(answers, when, DEADLINE_S, [f"waited {DEADLINE_S:g} s"])
        when = ranks[VICTIM].signal(signal.SIGCONT)
        late = ranks[VICTIM].answer()
        assert late.error == "GroupAbortedError" and f"rank {VICTIM}" in late.text, late
        assert late.ended - when < 1.0
        ranks.assert_recovers(100 if phase == "up" else 4)
        assert ranks.printed() == ""


@pytest.mark.slow
def test_all_stopped_past_the_deadline(tmp_path):
    """A job that is suspended as a whole goes on: time in which a rank itself did not run is not
    held against its peers."""
    with rank_processes(3, tmp_path, timeout_s=DEADLINE_S) as ranks:
        start_step_with_a_stop(ranks, "forward", "up")
        time.sleep(0.3)  # the others wait now
        for process in survivors(ranks):
            process.signal(signal.SIGSTOP)
            process.wait_until_stopped()
        time.sleep(DEADLINE_S + 0.5)
        for process in ranks:
            process.signal(signal.SIGCONT)
        for process in ranks:
            process.value()
        ranks.assert_all_right(2)


MISUSES = {
    "direction": "operation",
    "shape": "hidden size",
    "top_k": "top_k",
    "layer": "layer_id",
    "dtype": "dtype",
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "field"), MISUSES.items(), ids=MISUSES)
def test_peer_that_calls_something_else(tmp_path, kind, field):
    """Every rank names the field; the group stays usable."""
    with rank_processes(3, tmp_path) as ranks:
        for rank, process in enumerate(ranks):
            wrong = rank == VICTIM
            process.start("misuse" if wrong else "step", **({"kind": kind} if wrong else {}))
        for answer in [process.answer() for process in ranks]:
            assert answer.error == "RankMismatchError", answer
            assert f"{field} " in answer.text and "differs between ranks" in answer.text
            assert f"rank {VICTIM}" in answer.text
        ranks.assert_all_right(2)
        ranks.assert_recovers(4)
        assert ranks.printed() == ""


@pytest.mark.slow
def test_peer_that_raises_and_skips_the_call(tmp_path):
    with rank_processes(3, tmp_path, timeout_s=DEADLINE_S) as ranks:
        ranks.assert_all_right(1)
        when = time.monotonic()
        for rank, process in enumerate(ranks):
            wrong = rank == VICTIM
            process.start("misuse" if wrong else "step", **({"kind": "raises"} if wrong else {}))
        failed = ranks[VICTIM].answer()
        assert failed.error == "RuntimeError" and "loader" in failed.text
        answers = [process.answer() for process in survivors(ranks)]
        assert_named_errors(answers, when, DEADLINE_S)
        ranks.assert_recovers()
        assert ranks.printed() == ""


@pytest.mark.slow
def test_abort_from_another_thread(tmp_path):
    """All waits of all processes end within a tenth of a second; the best of three."""
    slowest = []
    with rank_processes(3, tmp_path, timeout_s=20.0) as ranks:
        for attempt in range(3):
            if attempt > 0:
                ranks.join()
            left = survivors(ranks)
            for process in left[1:]:
                process.start("step")
            left[0].start("abort_in", seconds=0.3)
            aborted, ended, text = left[0].value()
            answers = [process.answer() for process in left[1:]]
            assert "the user pressed stop" in text
            for answer in answers:
                assert answer.error == "GroupAbortedError" and "rank 0" in answer.text, answer
                assert "the user pressed stop" in answer.text
            slowest.append(max([ended, *(answer.ended for answer in answers)]) - aborted)
        ranks.assert_recovers()
    assert min(slowest) < 0.1


@pytest.mark.slow
def test_random_delays_in_every_phase(tmp_path):
    """0 to 5 ms before each task, on one rank more than on the others: the same bits."""
    with rank_processes(3, tmp_path, jitter_us=5000.0, num_threads=2) as ranks:
        ranks.assert_all_right(3)


@pytest.mark.slow
def test_rank_late_by_ten_seconds(tmp_path):
    """With a deadline of 12 s for each wait: no false timeout, here or in what follows, because
    the clock of a wait starts with that wait, after the ranks have met."""
    expected = expected_outputs(3)
    with rank_processes(3, tmp_path, timeout_s=12.0, num_threads=2) as ranks:
        late = [10.0 * (rank == VICTIM) for rank in range(3)]
        answers = ranks.all("late", seconds=late, expected=expected)
        assert [answer.value for answer in answers] == [1, 1, 1], answers
        assert answers[0].seconds > 9.5
        ranks.assert_all_right(3)


def test_two_groups_on_the_same_processes(tmp_path):
    """Each in a thread of its own, at the same time, in no common order: isolated."""
    with rank_processes(2, tmp_path) as ranks:
        tokens = (new_token(), new_token())
        answers = ranks.all(
            "two_groups",
            tokens=tokens,
            rank=[0, 1],
            world=2,
            count=20,
            expected=expected_outputs(2),
        )
        assert [answer.value for answer in answers] == [[20, 20]] * 2, answers


@pytest.mark.slow
def test_overlapping_groups(tmp_path):
    """Groups of {0, 1} and {1, 2}: the rank in both serves one after the other."""
    with rank_processes(3, tmp_path) as ranks:
        expected = expected_outputs(2)
        for first, second in ((0, 1), (1, 2), (0, 2), (0, 1)):
            pair = Ranks([ranks[first], ranks[second]])
            pair.join()
            for answer in pair.all("steps", count=3, expected=expected):
                assert answer.value == 3, answer


@pytest.mark.slow
def test_two_threads_on_one_group_are_refused(tmp_path):
    """The ranks could serve them in different orders: an error on all, at once. The peer comes
    later, so that the first of the two threads, whichever it is, still waits for it."""
    with rank_processes(2, tmp_path, timeout_s=20.0) as ranks:
        ranks.assert_all_right(1)
        ranks[0].start("two_threads")
        errors = ranks[0].value()
        assert sorted(error for error, _ in errors) == ["GroupAbortedError", "UnsupportedError"]
        assert all("two threads of rank 0" in text for _, text in errors)
        (peer,) = Ranks(ranks[1:]).all("step")
        assert peer.error == "GroupAbortedError" and "two threads of rank 0" in peer.text
        ranks.assert_recovers()


JOIN = """
import sys
from flashmoe import _core
from flashmoe.errors import FlashMoEError
token, rank = sys.argv[1], int(sys.argv[2])
try:
    _core.engine().group_shm(token, rank, 2)
except FlashMoEError as error:
    print(type(error).__name__, error)
"""


def test_a_peer_that_ended_before_it_could_be_watched_is_gone_at_once():
    """Rank 1 has looked for what the dead left behind, and is held up; rank 0 comes and is killed.
    Its memory is still there when rank 1 goes on."""
    token = new_token()
    environment = {**os.environ, "FLASHMOE_TIMEOUT_S": "30"}

    def start(rank):
        command = [sys.executable, "-c", JOIN, token, str(rank)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        name = SHARED_MEMORY / f"flashmoe-{token}-{rank}"
        end = time.monotonic() + 20
        while not name.exists() or not name.stat().st_size:
            assert time.monotonic() < end and process.poll() is None, f"rank {rank} did not come"
            time.sleep(0.001)
        time.sleep(0.05)  # it has filled its block, and waits for the other rank's
        return process

    survivor = start(1)
    survivor.send_signal(signal.SIGSTOP)
    victim = start(0)
    victim.kill()
    victim.communicate()
    since = time.monotonic()
    survivor.send_signal(signal.SIGCONT)
    said, _ = survivor.communicate(timeout=20)
    assert time.monotonic() - since < 5
    assert "WaitTimeoutError rank 0 is gone: its process has ended" in said, said
    for rank in range(2):
        (SHARED_MEMORY / f"flashmoe-{token}-{rank}").unlink(missing_ok=True)
