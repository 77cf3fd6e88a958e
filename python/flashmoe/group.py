"""Expert-parallel groups: one rank alone, ranks as threads, ranks as processes of one machine.

Operators name their group by a string: ``self`` (one rank alone), ``local:<n>:<rank>/<world>`` (a
rank of :func:`local_group`) or ``pg:<name>`` (a torch process group, by its name in torch).
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import _core
from .errors import UnsupportedError

SELF = "self"

_lock = threading.RLock()
_groups: dict[str, Group] = {}
_process_groups: dict[str, weakref.ref] = {}
_serial = itertools.count()


class Group:
    """One rank's end of an expert-parallel group.

    rank, world: this rank and the number of ranks. name: how operators refer to it.

    A group is used by one launch at a time: a second caller waits. Close it when no tensor that
    was computed with it still needs a backward; ``with`` does so.
    """

    def __init__(self, handle: int, name: str) -> None:
        self.handle = handle
        self.name = name
        self.rank, self.world = _core.engine().group_rank(handle)
        with _lock:
            _groups[name] = self

    def abort(self, reason: str = "aborted by the caller") -> None:
        """Ends every wait of every rank: their launches raise GroupAbortedError from then on."""
        _core.engine().group_abort(self.handle, reason)

    def refuse(self, reason: str) -> None:
        """Takes part in the peers' launch as a rank that refuses it: RankMismatchError there."""
        _core.engine().group_refuse(self.handle, reason)

    def set(self, key: str, value: float) -> None:
        """Sets an option of the engine.

        ``timeout_s`` (0: no bound), ``num_threads`` (0: automatic), ``epoch`` (before the first
        launch, the same on all ranks), ``jitter_us`` (tests: random delay before each task).

        Raises ValueError for another key or a value out of range.
        """
        _core.engine().group_set(self.handle, key, float(value))

    def stats(self) -> dict[str, Any]:
        """What the last launch did on this rank: the fields of ``fm_stats``, lists for arrays."""
        values = dict(_core.engine().group_stats(self.handle))
        for key in ("phase_seconds", "phase_flops"):
            values[key] = [float(value) for value in values[key]]
        return values

    def close(self) -> None:
        """Releases the group; a second close does nothing."""
        with _lock:
            if _groups.get(self.name) is not self:
                return
            del _groups[self.name]
        _core.engine().group_destroy(self.handle)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __repr__(self) -> str:
        return f"flashmoe.Group(name={self.name!r}, rank={self.rank}, world={self.world})"


def local_group(num_ranks: int) -> list[Group]:
    """``num_ranks`` ranks as threads of this process: give each element to its own thread.

    Raises TypeError or ValueError unless ``num_ranks`` is an int of at least 1.
    """
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, int):
        raise TypeError(f"num_ranks is a {type(num_ranks).__name__}; accepted: an int")
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; accepted: 1 or more")
    serial = next(_serial)
    handles = list(_core.engine().group_local(num_ranks))
    return [
        Group(handle, f"local:{serial}:{rank}/{num_ranks}") for rank, handle in enumerate(handles)
    ]


def resolve(group: Any) -> tuple[str, int]:
    """Name and world size of ``group=``: None, a :class:`Group` or a torch ProcessGroup.

    Creates nothing. Raises TypeError for anything else.
    """
    if group is None:
        return SELF, 1
    if isinstance(group, Group):
        return group.name, group.world
    if not hasattr(group, "group_name") or not hasattr(group, "size"):
        raise TypeError(
            f"group is a {type(group).__name__}; accepted: None, a flashmoe.Group or a torch "
            "ProcessGroup that this rank belongs to"
        )
    world = group.size()
    return (SELF if world == 1 else f"pg:{group.group_name}"), world


def world_of(name: str) -> int:
    """Number of ranks of the group of this name, without making it."""
    if name == SELF:
        return 1
    if name.startswith("pg:"):
        return _torch_process_group(name).size()
    return lookup(name).world


def lookup(name: str) -> Group:
    """The group of this name. Makes the group of a torch process group at first use: collective.

    Raises ValueError if the group was closed, UnsupportedError if its ranks are on two machines.
    """
    if name.startswith("pg:"):
        return _of_process_group(name)
    with _lock:
        if name == SELF and SELF not in _groups:
            Group(_core.engine().group_self(), SELF)
        if name not in _groups:
            raise ValueError(f"group '{name}' is closed; accepted: a group that is open")
        return _groups[name]


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Around what a rank does before its launch: an error is told to the peers, then raised."""
    try:
        yield
    except Exception as error:
        refuse(name, error)
        raise


def refuse(name: str, error: BaseException) -> None:
    """Tells the peers that this rank found ``error`` before it could launch; nothing if alone."""
    if world_of(name) > 1:
        lookup(name).refuse(f"{type(error).__name__}: {error}")


def _torch_process_group(name: str) -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name.removeprefix("pg:"))


def _of_process_group(name: str) -> Group:
    process_group = _torch_process_group(name)
    with _lock:
        made_for = _process_groups.get(name)
        if made_for is not None and made_for() is process_group and name in _groups:
            return _groups[name]
        # torch reuses names after destroy_process_group: what is cached may belong to a dead one.
        if name in _groups:
            _groups[name].close()
        group = Group(_make_shm(process_group), name)
        _process_groups[name] = weakref.ref(process_group)
        return group


def _make_shm(process_group: Any) -> int:
    """A shared-memory group over the ranks of a process group: collective over it."""
    import secrets

    import torch.distributed as dist

    rank, world = process_group.rank(), process_group.size()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (secrets.token_hex(16), _machine()), group=process_group)
    machines = [machine for _, machine in everyone]
    others = [other for other in range(world) if machines[other] != machines[0]]
    if others:
        raise UnsupportedError(
            f"group spans machines: rank {others[0]} is not on the machine of rank 0; accepted: a "
            "process group whose ranks share one machine"
        )
    token, _ = everyone[0]
    return _core.engine().group_shm(token, rank, world)


def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        import socket

        return socket.gethostname()


@atexit.register
def _close_all() -> None:
    for group in list(_groups.values()):
        group.close()


def _forget() -> None:
    """In a forked child: the engine's threads are not there, so no group of the parent works."""
    global _lock
    _lock = threading.RLock()
    _groups.clear()
    _process_groups.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
