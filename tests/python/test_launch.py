"""Launchers: what is detected, how ranks meet, and real processes under each of them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from flashmoe import cli, launch
from flashmoe import group as groups
from flashmoe.errors import FlashMoEError, RankMismatchError, UnsupportedError, WaitTimeoutError
from flashmoe.launch import Launch, detect, exchange

HERE = Path(__file__).resolve().parent
MASTER = {"MASTER_ADDR": "node7", "MASTER_PORT": "2345"}
PLAIN = {"RANK": "1", "WORLD_SIZE": "4", **MASTER}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "PMIX_NAMESPACE": "77",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2"}
SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
}

# ---- detection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "kind", "rank", "world", "address"),
    [
        (PLAIN, "environment", 1, 4, ("node7", 2345)),
        (PLAIN | {"TORCHELASTIC_RUN_ID": "x"}, "torchrun", 1, 4, ("node7", 2345)),
        (OPEN_MPI, "mpirun", 2, 3, f"flashmoe-{os.getuid()}-mpirun-77"),
        (OPEN_MPI | MASTER, "mpirun", 2, 3, ("node7", 2345)),
        (OPEN_MPI | SLURM, "mpirun", 2, 3, f"flashmoe-{os.getuid()}-mpirun-77"),
        (SLURM, "srun", 0, 2, f"flashmoe-{os.getuid()}-srun-12.3"),
        (SLURM | PLAIN, "environment", 1, 4, ("node7", 2345)),
        (PMI | MASTER, "mpirun", 1, 2, ("node7", 2345)),
        # srun --mpi=pmi2, then MPICH's mpiexec inside of a step of its own.
        (PMI | SLURM | {"SLURM_PROCID": "1"}, "srun", 1, 2, f"flashmoe-{os.getuid()}-srun-12.3"),
        (PMI | SLURM | MASTER | {"SLURM_STEP_NUM_TASKS": "1"}, "mpirun", 1, 2, ("node7", 2345)),
    ],
)
def test_each_launcher_is_detected(environment, kind, rank, world, address):
    assert detect(environment) == Launch(kind, rank, world, address)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        # The script of a batch job, outside of srun.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "12"},
    ],
)
def test_a_process_alone_is_no_launch(environment):
    assert detect(environment) is None


@pytest.mark.parametrize(
    ("environment", "error", "mentions"),
    [
        ({"RANK": "0"}, ValueError, "WORLD_SIZE is not set"),
        ({"RANK": "4", "WORLD_SIZE": "4"} | MASTER, ValueError, "RANK is '4'; accepted: an integ"),
        ({"RANK": "x", "WORLD_SIZE": "4"} | MASTER, ValueError, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "0"} | MASTER, ValueError, "WORLD_SIZE is '0'; accepted"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ValueError, "MASTER_ADDR and MASTER_PORT"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ValueError, "PMI_RANK is set, but not where"),
        (PLAIN | {"MASTER_PORT": "99999"}, ValueError, "MASTER_PORT is '99999'"),
        (PLAIN | {"LOCAL_WORLD_SIZE": "2"}, UnsupportedError, "4 ranks, 2 of them on this machine"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, UnsupportedError, "mpirun started 3"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, UnsupportedError, "on 2 machines"),
    ],
)
def test_a_wrong_environment_is_named(environment, error, mentions):
    with pytest.raises(error, match=mentions):
        detect(environment)


@pytest.mark.parametrize("command", [["run", "--ranks", "3"], ["run", "--ranks=3", "--processes"]])
def test_run_refuses_ranks_that_the_launcher_did_not_start(monkeypatch, capsys, command):
    pytest.importorskip("torch")
    for name, value in (PLAIN | {"TORCHELASTIC_RUN_ID": "x"}).items():
        monkeypatch.setenv(name, value)
    assert cli.main(command) == 2
    assert "ranks is 3; accepted: 4, the processes that torchrun started" in capsys.readouterr().err


# ---- the meeting --------------------------------------------------------------------------------


@contextmanager
def reserved_port():
    """A port of localhost that is nobody else's meanwhile: bound here, so that the system gives it
    to none, and not listened to, so that rank 0 can (both with SO_REUSEADDR)."""
    keeper, (host, _, *rest) = launch._socket(("localhost", 0))
    with keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((host, 0, *rest))
        yield keeper.getsockname()[1]


@pytest.fixture(params=["name", "port"])
def address(request):
    """A place that nobody else has; rounds start anew."""
    launch._rounds.clear()
    if request.param == "name":
        yield f"flashmoe-test-{os.getpid()}"
        return
    with reserved_port() as number:
        yield "localhost", number


def meet(*launches):
    """What exchange(rank -> its rank) gave or raised on each."""

    def one(how):
        try:
            return exchange(how, {"rank": how.rank})
        except FlashMoEError as error:
            return error

    with ThreadPoolExecutor(len(launches)) as pool:
        return list(pool.map(one, launches))


def test_all_ranks_hear_all(address):
    for _ in range(3):  # the same address again and again
        for heard in meet(*(Launch("environment", rank, 4, address) for rank in (2, 0, 3, 1))):
            assert heard == [{"rank": rank} for rank in range(4)]


def test_all_that_the_ranks_gave_is_more_than_one_may_give(address):
    value = "x" * 30_000

    def one(rank):
        return exchange(Launch("environment", rank, 4, address), value)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [[value] * 4] * 4


def test_a_rank_that_stays_away_is_named_everywhere(address, monkeypatch):
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "1.5")
    for error in meet(*(Launch("environment", rank, 4, address) for rank in (0, 2))):
        assert isinstance(error, WaitTimeoutError)
        assert "ranks 1, 3 of 4 did not come" in str(error)


def test_rank_0_that_stays_away_is_named(address, monkeypatch):
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.2")
    (error,) = meet(Launch("environment", 1, 2, address))
    assert isinstance(error, WaitTimeoutError) and "rank 1 waited 0.2 s for rank 0" in str(error)


def test_two_processes_of_one_rank(address):
    launches = [Launch("environment", rank, 3, address) for rank in (0, 1)]
    launch._rounds[1] = iter([0, 0])
    errors = meet(*launches, launches[1])
    assert all(isinstance(error, RankMismatchError) for error in errors)
    assert all("two processes were started as rank 1" in str(error) for error in errors)


def test_ranks_that_count_differently(address):
    errors = meet(Launch("environment", 0, 2, address), Launch("environment", 1, 3, address))
    assert all("rank 1 was started as one of 3 ranks" in str(error) for error in errors)


def test_others_that_look_in_are_ignored(address):
    """Something that speaks no JSON, and a rank of an earlier round."""

    def intrude():
        for text in (
            b"GET / HTTP/1.0\r\n\r\n\n",
            b'{"rank": 1, "world": 2, "round": 9}\n',
            b"[1]\n",
        ):
            while True:
                stranger, place = launch._socket(address)
                with stranger:
                    try:
                        stranger.connect(place)
                    except OSError:
                        continue
                    stranger.sendall(text)
                    stranger.recv(1)
                    break
        return exchange(Launch("environment", 1, 2, address), None)

    with ThreadPoolExecutor(1) as pool:
        rank_1 = pool.submit(intrude)
        assert exchange(Launch("environment", 0, 2, address), None) == [None, None]
        assert rank_1.result() == [None, None]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("localhost", 0)) as server:
        how = Launch("environment", 0, 2, ("localhost", server.getsockname()[1]))
        with pytest.raises(FlashMoEError, match="choose another MASTER_PORT"):
            exchange(how, None)


def test_a_group_in_the_making_stops_nobody_else():
    """The making of a group waits for its peers; other groups are made and found meanwhile."""
    waiting, go = threading.Event(), threading.Event()

    def make():
        waiting.set()
        assert go.wait(30)
        return groups._core.engine().group_self()

    with ThreadPoolExecutor(3) as pool:
        slow = [pool.submit(groups.made_once, "slow", lambda: True, make) for _ in range(2)]
        assert waiting.wait(30)

        def other():
            groups.lookup(groups.SELF)
            return groups.made_once("quick", lambda: True, groups._core.engine().group_self)

        quick = pool.submit(other).result(timeout=30)
        assert not any(one.done() for one in slow)
        go.set()
        assert slow[0].result(timeout=30) is slow[1].result(timeout=30)  # made once
    slow[0].result().close()
    quick.close()


# ---- processes ----------------------------------------------------------------------------------


def clean_environment(**more):
    """This process's environment without any launcher's variables."""
    foreign = ("OMPI_", "PMI", "SLURM_", "MASTER_", "TORCHELASTIC_", "RANK", "WORLD_", "LOCAL_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**kept, **root, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def run(*command, **options):
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=200,
        env=clean_environment(),
        cwd=HERE.parents[1],
        **options,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def mpirun(*command):
    """Skips where Open MPI or mpi4py is missing."""
    path = shutil.which("mpirun")
    if path is None:
        pytest.skip("mpirun is not installed (Debian: openmpi-bin)")
    if find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed (pip install 'flashmoe[mpi]')")
    return run(path, "--oversubscribe", "-np", "2", sys.executable, "-u", *command)


def by_hand(mode, *environments):
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "launch_ranks.py", mode],
            env=clean_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), said
    return "".join(said)


def both_done(said):
    return sorted(line for line in said.splitlines() if line) == ["rank 0 done", "rank 1 done"]


@pytest.fixture
def port():
    with reserved_port() as number:
        yield {"MASTER_ADDR": "localhost", "MASTER_PORT": str(number)}


@pytest.mark.parametrize("mode", ["world", pytest.param("torch", marks=pytest.mark.slow)])
def test_plain_processes_with_an_address(mode, port):
    if mode == "torch":
        pytest.importorskip("torch")
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2", **port} for rank in range(2)]
    assert both_done(by_hand(mode, *ranks))


def test_the_variables_of_srun():
    job = {**SLURM, "SLURM_JOB_ID": f"test{os.getpid()}"}
    assert both_done(by_hand("world", *(job | {"SLURM_PROCID": str(rank)} for rank in range(2))))


@pytest.mark.slow
def test_torchrun():
    pytest.importorskip("torch")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert both_done(run(sys.executable, *command, HERE / "launch_ranks.py", "world"))


@pytest.mark.parametrize("mode", [pytest.param("world", marks=pytest.mark.slow), "communicator"])
def test_mpirun(mode):
    assert both_done(mpirun(HERE / "launch_ranks.py", mode))


@pytest.mark.slow
def test_the_published_command():
    """mpirun -np 2 python -u scripts/run_gradcheck.py"""
    pytest.importorskip("torch")
    *rows, summary = map(
        json.loads, mpirun("scripts/run_gradcheck.py", "--quick", "--json").splitlines()
    )
    assert summary["failed"] == 0 and summary["passed"] == len(rows) > 30
    assert {row["ranks"] for row in rows} == {2}


@pytest.mark.slow
def test_flashmoe_run_under_mpirun():
    pytest.importorskip("torch")
    sizes = ["--tokens=24", "--hidden=64", "--intermediate=64", "--experts=8", "--top-k=2"]
    report = json.loads(mpirun("-m", "flashmoe", "run", *sizes, "--repeat=1", "--json"))
    assert report["launch"] == "mpirun" and report["ranks"] == 2 and report["passed"] is True


def test_a_rank_does_not_report_to_itself(monkeypatch):
    """With nobody at the port, a socket that the system gives that very port would connect."""
    ends = []

    def has_other_end(connection, address):
        ends.append(real(connection, address))
        return len(ends) > 2 and ends[-1]  # two sockets had the port that they were to call

    real = launch._has_other_end
    monkeypatch.setattr(launch, "_has_other_end", has_other_end)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        found = Launch("environment", 1, 2, server.getsockname())
        reply = pool.submit(launch._report, found, {"rank": 1}, time.monotonic() + 10)
        peer, address = server.accept()
        with peer:
            assert peer.recv(100) == b'{"rank": 1}\n'
            peer.sendall(b'{"values": [0, 1]}\n')
        assert reply.result() == {"values": [0, 1]}
    assert ends == [True, True, True] and address[1] != found.address[1]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def test_a_socket_whose_port_is_the_one_to_call_has_no_other_end(family):
    host = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}[family]
    try:
        connection = socket.socket(family)
        connection.bind((host, 0))
    except OSError:
        pytest.skip(f"needs {host}")
    with connection:
        port = connection.getsockname()[1]
        bound = SimpleNamespace(
            family=family, bind=lambda address: None, getsockname=connection.getsockname
        )
        assert not launch._has_other_end(bound, (host, port))
        assert launch._has_other_end(bound, (host, port + 1))


def test_a_local_socket_has_no_port():
    with socket.socket(socket.AF_UNIX) as connection:
        assert launch._has_other_end(connection, "\0name")
