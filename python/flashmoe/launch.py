"""The processes that a launcher started together: which one this is, and a group over them all.

    group = flashmoe.world_group()

Started by `torchrun`, by `mpirun` (Open MPI, or any MPI with PMI), by `srun`, or by hand with
``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` in the environment, the processes meet
without PyTorch and without an MPI library. They meet at ``MASTER_ADDR:MASTER_PORT`` where that is
set; else, for Open MPI and Slurm, at a local socket that carries the name of the job. Where
``torch.distributed`` is initialised, its process group is used instead.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from . import group as groups
from .errors import FlashMoEError, RankMismatchError, UnsupportedError, WaitTimeoutError
from .group import Group

# (kind, rank, number of ranks, how many of them on this machine): the first pair that is set
# counts. An explicit RANK comes first: users set it inside of jobs of the others.
_VARIABLES = (
    ("environment", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    # Only srun sets SLURM_STEP_NUM_TASKS: the script of a batch job is no rank.
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", None),
)
# What names a job among all jobs of this machine.
_JOB_NAMES = {
    "OMPI_COMM_WORLD_RANK": ("PMIX_NAMESPACE",),
    "SLURM_PROCID": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
}
_CONNECT_PAUSE_S = 0.02
_HELLO_S = 5.0  # a rank speaks as soon as it is connected
_MOST_BYTES = 1 << 16  # of one rank's message

# Meetings of each rank so far. By rank, since tests have several in one process.
_rounds: dict[int, Iterator[int]] = defaultdict(itertools.count)


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    kind: ``torchrun``, ``mpirun``, ``srun``, or ``environment`` (started by hand).
    address: where the ranks meet: (host, port), or the name of a local socket.
    """

    kind: str
    rank: int
    world: int
    address: tuple[str, int] | str


def detect(environment: Mapping[str, str] | None = None) -> Launch | None:
    """How this process was started; None if it is alone, or one of one.

    Raises ValueError, naming the variable, where the environment contradicts itself or lacks the
    address, UnsupportedError where the launcher says that the ranks are on several machines.
    """
    given = os.environ if environment is None else environment
    for kind, rank_name, world_name, local_name in _VARIABLES:
        if not given.get(rank_name) or (kind == "srun" and not given.get(world_name)):
            continue
        # srun --mpi=pmi2 speaks PMI too, but it is srun's job that has a name.
        if rank_name == "PMI_RANK" and given.get("SLURM_STEP_NUM_TASKS") == given.get("PMI_SIZE"):
            continue
        world = _number(given, world_name, 1, None)
        rank = _number(given, rank_name, 0, world - 1)
        if world == 1:
            return None
        local = world
        if local_name and given.get(local_name):
            local = _number(given, local_name, 1, world)
        nodes = 1
        if kind == "srun" and given.get("SLURM_STEP_NUM_NODES"):
            nodes = _number(given, "SLURM_STEP_NUM_NODES", 1, None)
        if local != world or nodes != 1:
            raise UnsupportedError(
                f"{kind} started {world} ranks, {local} of them on this machine"
                + (f", on {nodes} machines" * (nodes > 1))
                + "; accepted: ranks that share one machine"
            )
        if "TORCHELASTIC_RUN_ID" in given and kind == "environment":
            kind = "torchrun"
        return Launch(kind, rank, world, _address(given, kind, rank_name))
    return None


def _number(given: Mapping[str, str], name: str, least: int, most: int | None) -> int:
    text = given.get(name)
    if not text:
        raise ValueError(f"{name} is not set, although the rank is; accepted: the number of ranks")
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        bound = f"{least} or more" if most is None else f"{least}..{most}"
        raise ValueError(f"{name} is {text!r}; accepted: an integer of {bound}")
    return value


def _address(given: Mapping[str, str], kind: str, rank_name: str) -> tuple[str, int] | str:
    if given.get("MASTER_ADDR") and given.get("MASTER_PORT"):
        return given["MASTER_ADDR"], _number(given, "MASTER_PORT", 1, 65535)
    names = [given.get(name) for name in _JOB_NAMES.get(rank_name, ())]
    if names and all(names):
        return f"flashmoe-{os.getuid()}-{kind}-{'.'.join(map(str, names))}"
    raise ValueError(
        f"{rank_name} is set, but not where the ranks meet; accepted: MASTER_ADDR and MASTER_PORT, "
        "the same on all ranks"
    )


# ---- the meeting ---------------------------------------------------------------------------------


def exchange(launch: Launch, value: Any) -> list[Any]:
    """What every rank gave, in rank order; collective. Values are JSON, a few KiB at most.

    Raises WaitTimeoutError, naming the ranks that stay away for ``FLASHMOE_TIMEOUT_S``, and
    RankMismatchError where two processes have the same rank or another number of ranks.
    """
    if launch.kind == "torchrun":
        return _exchange_by_store(launch, value)
    timeout = _timeout_s()
    deadline = time.monotonic() + timeout if timeout else None
    hello = {
        "rank": launch.rank,
        "world": launch.world,
        "round": next(_rounds[launch.rank]),
        "value": value,
    }
    if launch.rank == 0:
        reply = _gather(launch, hello, deadline)
    else:
        reply = _report(launch, hello, deadline)
    if "error" in reply:
        kinds = {kind.__name__: kind for kind in (WaitTimeoutError, RankMismatchError)}
        raise kinds[reply["kind"]](reply["error"])
    return reply["values"]


def _timeout_s() -> float:
    """FLASHMOE_TIMEOUT_S as the engine reads it (src/base/env.h)."""
    text = os.environ.get("FLASHMOE_TIMEOUT_S") or "60"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise ValueError(f"FLASHMOE_TIMEOUT_S is {text!r}; accepted: a number of 0..1e9")
    return value


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.001)


def _sooner(deadline: float | None, seconds: float) -> float:
    soon = time.monotonic() + seconds
    return soon if deadline is None else min(deadline, soon)


def _socket(address: tuple[str, int] | str) -> tuple[socket.socket, Any]:
    """A socket and the address to give it. A name is in Linux' abstract namespace: it goes when the
    last process that has it goes."""
    if isinstance(address, str):
        return socket.socket(socket.AF_UNIX), "\0" + address
    host, port = address
    try:
        family, kind, protocol, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
    except OSError as error:
        raise FlashMoEError(f"MASTER_ADDR is {host!r}, which is no host: {error}") from error
    return socket.socket(family, kind, protocol), found


def _place(address: tuple[str, int] | str) -> str:
    return address if isinstance(address, str) else f"{address[0]}:{address[1]}"


def _gather(launch: Launch, own: dict[str, Any], deadline: float | None) -> dict[str, Any]:
    """Rank 0: hears all ranks, then tells all of them the outcome."""
    listener, address = _socket(launch.address)
    peers: dict[int, socket.socket] = {}
    try:
        with listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(address)
            except OSError as error:
                raise FlashMoEError(
                    f"rank 0 cannot listen at {_place(launch.address)}: {error.strerror}; choose "
                    "another MASTER_PORT, and rank 0's own machine as MASTER_ADDR"
                ) from error
            listener.listen(launch.world)
            reply = _hear(launch, own, listener, peers, deadline)
        text = json.dumps(reply).encode() + b"\n"
        for peer in peers.values():
            # A peer that is gone learns nothing; its absence shows at the group's first wait.
            with peer, suppress(OSError):
                peer.sendall(text)
        return reply
    finally:
        for peer in peers.values():
            peer.close()


def _hear(
    launch: Launch,
    own: dict[str, Any],
    listener: socket.socket,
    peers: dict[int, socket.socket],
    deadline: float | None,
) -> dict[str, Any]:
    """The reply for all, once every rank has come or the deadline has passed."""
    values = {0: own["value"]}
    while len(values) < launch.world:
        listener.settimeout(_left(deadline))
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            missing = [rank for rank in range(launch.world) if rank not in values]
            return _failure(
                WaitTimeoutError,
                f"rank 0 waited {_timeout_s():g} s at {_place(launch.address)}, and rank"
                f"{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {launch.world} did "
                "not come. Do all ranks call world_group(), on this machine?",
            )
        hello = _receive(peer, _sooner(deadline, _HELLO_S))
        rank = hello.get("rank")
        if not isinstance(rank, int) or hello.get("round") != own["round"]:
            peer.close()  # something else that looked in
            continue
        if hello.get("world") != launch.world:
            peers[-1] = peer
            return _failure(
                RankMismatchError,
                f"rank {rank} was started as one of {hello.get('world')} ranks, rank 0 as one of "
                f"{launch.world}",
            )
        if rank in values or not 0 < rank < launch.world:
            peers[-1] = peer
            return _failure(RankMismatchError, f"two processes were started as rank {rank}")
        peers[rank], values[rank] = peer, hello.get("value")
    return {"values": [values[rank] for rank in range(launch.world)]}


def _failure(kind: type[FlashMoEError], text: str) -> dict[str, Any]:
    return {"kind": kind.__name__, "error": text}


def _receive(
    peer: socket.socket, deadline: float | None, most_bytes: int = _MOST_BYTES
) -> dict[str, Any]:
    """One line of JSON, an empty dict if there is none."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < most_bytes:
            peer.settimeout(_left(deadline))
            part = peer.recv(4096)
            if not part:
                break
            data += part
        message = json.loads(data)
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _has_other_end(connection: socket.socket, address: Any) -> bool:
    """Gives the socket a port; False if that is the one it is to call. With nobody there, a socket
    whose port happens to be that one connects to itself."""
    if connection.family == socket.AF_UNIX:
        return True
    connection.bind(("::" if connection.family == socket.AF_INET6 else "", 0))
    return bool(connection.getsockname()[1] != address[1])


def _report(launch: Launch, own: dict[str, Any], deadline: float | None) -> dict[str, Any]:
    """Another rank: tells rank 0 its value, and hears the outcome."""
    text = json.dumps(own).encode() + b"\n"
    while deadline is None or time.monotonic() < deadline:
        connection, address = _socket(launch.address)
        with connection:
            connection.settimeout(_left(deadline))
            try:
                if not _has_other_end(connection, address):
                    continue
                connection.connect(address)
                connection.sendall(text)
            except OSError:  # rank 0 does not listen yet
                time.sleep(_CONNECT_PAUSE_S)
                continue
            # Rank 0 tells of its own deadline: the last word is worth a moment more.
            last_word = None if deadline is None else deadline + 1.0
            reply = _receive(connection, last_word, _MOST_BYTES * (launch.world + 1))
            if reply:
                return reply
        time.sleep(_CONNECT_PAUSE_S)
    return _failure(
        WaitTimeoutError,
        f"rank {launch.rank} waited {_timeout_s():g} s for rank 0 at {_place(launch.address)}. Do "
        "all ranks call world_group(), on this machine?",
    )


def _exchange_by_store(launch: Launch, value: Any) -> list[Any]:
    """By the store that torchrun keeps at MASTER_ADDR:MASTER_PORT."""
    from datetime import timedelta

    import torch.distributed as dist

    timeout = timedelta(seconds=_timeout_s() or 1e9)
    store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world, timeout=timeout))
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"flashmoe/{restart}/{next(_rounds[launch.rank])}", store)
    store.set_timeout(timeout)
    store.set(str(launch.rank), json.dumps(value))
    values = []
    for rank in range(launch.world):
        try:
            values.append(json.loads(store.get(str(rank))))
        except dist.DistStoreError as error:
            raise WaitTimeoutError(
                f"rank {launch.rank} waited {_timeout_s():g} s for rank {rank} in torchrun's "
                "store. Do all ranks call world_group()?"
            ) from error
    return values


# ---- groups over it ------------------------------------------------------------------------------


def world_group() -> Group:
    """The group of all processes that were started with this one; collective at its first call.

    Later calls return the same group until it is closed. A process that was started alone is a
    group of one rank.

    Raises ValueError where the environment contradicts itself, UnsupportedError where the ranks are
    on several machines, WaitTimeoutError where one does not come, RankMismatchError where they
    disagree.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return groups.lookup(groups.resolve(dist.group.WORLD)[0])
    launch = detect()
    if launch is None:
        return groups.lookup(groups.SELF)
    return groups.made_once(
        "world",
        lambda: True,
        lambda: groups.make_shm(launch.rank, launch.world, lambda value: exchange(launch, value)),
    )


@contextmanager
def torch_process_group() -> Iterator[Any]:
    """The default process group of torch (gloo) over all processes that were started with this one:
    the one that is there, or one for the time of the context. Collective.

    Raises ValueError in a process that was started alone, and what :func:`world_group` raises.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        yield dist.group.WORLD
        return
    launch = detect()
    if launch is None:
        raise ValueError("this process was started alone; accepted: one of several ranks")
    if launch.kind in ("torchrun", "environment"):
        dist.init_process_group("gloo")
    else:
        dist.init_process_group(
            "gloo", store=_hosted_store(launch), rank=launch.rank, world_size=launch.world
        )
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _hosted_store(launch: Launch) -> Any:
    """A torch store that rank 0 keeps at a port that is free."""
    import torch.distributed as dist

    host, hosted, port = "127.0.0.1", None, 0
    if launch.rank == 0:
        hosted = dist.TCPStore(host, 0, launch.world, is_master=True, wait_for_workers=False)
        port = hosted.port
    port = exchange(launch, port)[0]
    return hosted or dist.TCPStore(host, port, launch.world, is_master=False)
