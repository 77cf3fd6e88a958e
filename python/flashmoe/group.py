"""Expert-parallel groups: one rank alone, ranks as threads, ranks as processes of one machine.

Operators name their group by a string: ``self`` (one rank alone), ``local:<n>:<rank>/<world>`` (a
rank of :func:`local_group`), ``pg:<name>`` (a torch process group, by its name in torch),
``mpi:<n>`` (an mpi4py communicator) or ``world`` (:func:`flashmoe.world_group`).
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import _core
from .errors import FlashMoEError, UnsupportedError

SELF = "self"

_lock = threading.RLock()
_groups: dict[str, Group] = {}
_making: dict[str, threading.Lock] = {}
_process_groups: dict[str, weakref.ref] = {}
_communicators: dict[str, Any] = {}
_communicator_key: int | None = None  # the MPI attribute that holds a communicator's name
_serial = itertools.count()


class Group:
    """One rank's end of an expert-parallel group.

    rank, world: this rank and the number of ranks. name: how operators refer to it.

    On CUDA (at most 16 ranks, on GPUs that reach each other) a launch waits for its peers on the
    GPU: the call returns at once, and a peer's failure is raised by a later call or by `stats`.

    A group is used by one launch at a time. A second thread waits on a group of one rank; on a
    larger one it gets UnsupportedError and the group is aborted, because the ranks could serve the
    two in different orders: give each thread a group of its own. Close a group when no tensor that
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
        """Takes part in the peers' launch as a rank that refuses it: RankMismatchError there. On
        CUDA, where launches cannot be refused in order, the group is aborted with the reason."""
        _core.engine().group_refuse(self.handle, reason)

    def reserve(
        self, max_tokens: int, *, hidden: int = 0, top_k: int = 0, num_experts: int = 0
    ) -> None:
        """Makes room for larger calls in the memory that the ranks of a group share on CUDA.

        That memory is made by the first CUDA call: for the largest call of any process, or, for
        ranks of one process, for the call that comes first. A call that needs more raises
        ValueError with the numbers to give here. max_tokens: most tokens of any rank. hidden,
        top_k, num_experts: the largest of any layer; 0: as it is, or as the first call has it.

        All ranks call it, between the same two calls. Before the first call it only notes the
        numbers. After that it makes new memory, once no launch of the group is on its way, and
        waits for all that the ranks' GPUs do; graphs that were captured before keep the old one.
        It does nothing for a rank alone or on the CPU.

        Raises TypeError or ValueError for a number that is none, and what a wait for the other
        processes raises. OutOfMemoryError, and UnsupportedError for a size beyond the limits, are
        those of every rank, and the memory is then as it was.
        """
        numbers = {"max_tokens": max_tokens, "hidden": hidden, "top_k": top_k}
        numbers["num_experts"] = num_experts
        for name, number in numbers.items():
            _check_number(name, number, lowest=0)
        _core.engine().group_reserve(self.handle, *numbers.values())

    def set(self, key: str, value: float) -> None:
        """Sets an option of the engine.

        ``timeout_s`` (0: no bound), ``num_threads`` (0: automatic), ``max_sms`` (multiprocessors of
        a CUDA launch, 0: all), ``device`` (of a rank of :func:`local_group`, before its first CUDA
        call), ``epoch`` (before the first launch, the same on all ranks), ``jitter_us`` (tests:
        random delay before each task),
        ``stop_in_phase`` (tests: the process stops itself at that ``fm_phase`` + 1, once).

        Raises ValueError for another key or a value out of range.
        """
        _core.engine().group_set(self.handle, key, float(value))

    def stats(self) -> dict[str, Any]:
        """What the last launch did on this rank: the fields of ``fm_stats``, lists for arrays.

        All are 0 if its call raised, on CUDA also what an earlier launch had left to report. A call
        that is refused for its arguments is no launch on a rank alone or on CUDA.

        On CUDA waits for that launch, and raises what a launch has reported.
        """
        values = dict(_core.engine().group_stats(self.handle))
        for key in ("phase_seconds", "phase_flops"):
            values[key] = [float(value) for value in values[key]]
        return values

    def close(self) -> None:
        """Releases the group; a second close does nothing.

        On CUDA waits for its launches, and raises what one has reported that no call has raised:
        the group is closed all the same.
        """
        with _lock:
            if _groups.get(self.name) is not self:
                return
            del _groups[self.name]
        _core.engine().group_destroy(self.handle)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: object) -> None:
        try:
            self.close()
        except FlashMoEError:
            if kind is None:  # else what ended the block is the news
                raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __repr__(self) -> str:
        return f"flashmoe.Group(name={self.name!r}, rank={self.rank}, world={self.world})"


def local_group(
    num_ranks: int,
    *,
    device: str | None = None,
    devices: Sequence[int] | None = None,
    max_tokens: int = 0,
) -> list[Group]:
    """``num_ranks`` ranks of this process.

    On the CPU each element belongs to a thread of its own. On CUDA rank r has ``cuda:r``, or
    ``devices[r]``, where its operands have to be, and one thread may drive all ranks::

        groups = flashmoe.local_group(2, device="cuda", max_tokens=8192)
        for rank, group in enumerate(groups):
            outputs.append(flashmoe.moe(x[rank], ..., group=group))

    because a call returns while its launch waits for the other ranks. In such a loop, call the
    layer of all ranks before anything else runs on the first one's GPU: CUDA loads a kernel at its
    first use, and may wait with that for the launches of the GPU (CUDA_MODULE_LOADING=EAGER avoids
    it). Ranks may share a GPU, for tests: each with a part of its multiprocessors
    (``group.set("max_sms", n)``) and a stream of its own.

    device: "cuda" checks now that there are GPUs enough; otherwise the first call does. devices:
    the CUDA device of each rank. max_tokens: most tokens of a rank in a call (`Group.reserve`); the
    first call's where it is larger.

    Raises TypeError or ValueError for a number or device that is none, or more ranks than GPUs.
    """
    _check_number("num_ranks", num_ranks, lowest=1)
    _check_number("max_tokens", max_tokens, lowest=0)
    chosen = _devices_of(num_ranks, device, devices)
    serial = next(_serial)
    handles = list(_core.engine().group_local(num_ranks))
    groups = [
        Group(handle, f"local:{serial}:{rank}/{num_ranks}") for rank, handle in enumerate(handles)
    ]
    if num_ranks > 1:
        for group, index in zip(groups, chosen, strict=False):
            group.set("device", index)
        groups[0].reserve(max_tokens)
    return groups


def _check_number(name: str, number: Any, lowest: int) -> None:
    """Raises TypeError or ValueError unless it is an int of at least ``lowest``."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} is a {type(number).__name__}; accepted: an int")
    if number < lowest:
        raise ValueError(f"{name} is {number}; accepted: {lowest} or more")


def _devices_of(num_ranks: int, device: str | None, devices: Sequence[int] | None) -> list[int]:
    """The CUDA device of each rank; nothing where the engine's own choice stands."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; accepted: 'cpu' or 'cuda' (devices= names GPUs)")
    if devices is None and device != "cuda":
        return []
    chosen = list(range(num_ranks)) if devices is None else list(devices)
    for index in chosen:
        _check_number("devices", index, lowest=0)
    if len(chosen) != num_ranks:
        raise ValueError(f"devices has {len(chosen)} entries; accepted: one a rank, {num_ranks}")
    if device == "cuda":
        import torch

        count = torch.cuda.device_count()
        if max(chosen) >= count:
            raise ValueError(
                f"rank {chosen.index(max(chosen))} would have cuda:{max(chosen)}, and there are "
                f"{count} CUDA devices; accepted: fewer ranks, or devices= with what there is"
            )
    return chosen


def resolve(group: Any) -> tuple[str, int]:
    """Name and world size of ``group=``: None, a :class:`Group`, a torch ProcessGroup or an mpi4py
    communicator.

    Creates nothing. Raises TypeError for anything else, ValueError for ``MPI.COMM_NULL``.
    """
    if group is None:
        return SELF, 1
    if isinstance(group, Group):
        return group.name, group.world
    if _is_communicator(group):
        return _resolve_communicator(group)
    if not _is_process_group(group):
        raise TypeError(
            f"group is a {type(group).__name__}; accepted: None, a flashmoe.Group, or a torch "
            "ProcessGroup or mpi4py intracommunicator that this rank belongs to"
        )
    world = group.size()
    return (SELF if world == 1 else f"pg:{group.group_name}"), world


def world_of(name: str) -> int:
    """Number of ranks of the group of this name, without making it."""
    if name == SELF:
        return 1
    if name.startswith("pg:"):
        return _torch_process_group(name).size()
    if name.startswith("mpi:"):
        return _communicator(name).Get_size()
    return lookup(name).world


def lookup(name: str) -> Group:
    """The group of this name. Makes the group of a torch process group or of a communicator at its
    first use: collective.

    Raises ValueError if the group was closed, UnsupportedError if its ranks are on two machines.
    """
    if name.startswith("pg:"):
        return _of_process_group(name)
    if name.startswith("mpi:"):
        return _of_communicator(name)
    with _lock:
        if name == SELF and SELF not in _groups:
            Group(_core.engine().group_self(), SELF)
        if name not in _groups:
            raise ValueError(f"group '{name}' is closed; accepted: a group that is open")
        return _groups[name]


@contextmanager
def refusing(name: str, on_cuda: bool = False) -> Iterator[None]:
    """Around what a rank does before its launch: an error is told to the peers, then raised."""
    try:
        yield
    except Exception as error:
        refuse(name, error, on_cuda)
        raise


def refuse(name: str, error: BaseException, on_cuda: bool = False) -> None:
    """Tells the peers that this rank found ``error`` before it could launch; nothing if alone.
    ``on_cuda``: where peers wait on the GPU, so that the group is aborted."""
    if world_of(name) == 1:
        return
    group, reason = lookup(name), f"{type(error).__name__}: {error}"
    if on_cuda:
        group.abort(f"refused the call: {reason}")
    else:
        group.refuse(reason)


def made_once(name: str, is_current: Callable[[], bool], make: Callable[[], int]) -> Group:
    """The group of this name; ``make`` gives its handle where there is none or what is there is not
    current. ``make`` is collective: while it waits for the peers, only callers for the same name
    wait for it."""
    with _lock:
        group = _groups.get(name)
        if group is not None and is_current():
            return group
        turn = _making.setdefault(name, threading.Lock())
    with turn:
        group = _groups.get(name)
        if group is not None and is_current():
            return group
        if group is not None:
            group.close()
        return Group(make(), name)


def _is_process_group(group: Any) -> bool:
    """By its class, which Dynamo traces in every PyTorch; 2.11 refuses to ask for an attribute."""
    torch_groups = sys.modules.get("torch.distributed.distributed_c10d")
    return torch_groups is not None and isinstance(group, torch_groups.ProcessGroup)


def _torch_process_group(name: str) -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name.removeprefix("pg:"))


def _of_process_group(name: str) -> Group:
    process_group = _torch_process_group(name)

    # torch reuses names after destroy_process_group: what is cached may belong to a dead one.
    def is_current() -> bool:
        made_for = _process_groups.get(name)
        return made_for is not None and made_for() is process_group

    def gather(value: Any) -> list[Any]:
        import torch.distributed as dist

        everyone: list[Any] = [None] * process_group.size()
        dist.all_gather_object(everyone, value, group=process_group)
        return everyone

    def make() -> int:
        handle = make_shm(process_group.rank(), process_group.size(), gather)
        _process_groups[name] = weakref.ref(process_group, gone)
        return handle

    def gone(reference: weakref.ref[Any]) -> None:
        """After destroy_process_group, once nobody holds the process group any more."""
        with _lock:
            if _process_groups.get(name) is not reference:
                return
            del _process_groups[name]
            _making.pop(name, None)
            group = _groups.get(name)
        if group is not None:
            group.close()

    return made_once(name, is_current, make)


def _is_communicator(group: Any) -> bool:
    mpi = sys.modules.get("mpi4py.MPI")  # who has a communicator has imported it
    return mpi is not None and isinstance(group, mpi.Comm)


def _resolve_communicator(communicator: Any) -> tuple[str, int]:
    """Name and size of an mpi4py communicator, which keeps its name as an MPI attribute: gone with
    it, and not copied to its duplicates."""
    from mpi4py import MPI

    global _communicator_key
    if communicator == MPI.COMM_NULL:
        raise ValueError("group is MPI.COMM_NULL; accepted: one that this rank belongs to")
    if communicator.Is_inter():
        raise TypeError("group is an MPI intercommunicator; accepted: an intracommunicator")
    world = communicator.Get_size()
    if world == 1:
        return SELF, 1
    with _lock:
        if _communicator_key is None:
            _communicator_key = MPI.Comm.Create_keyval(delete_fn=_forget_communicator)
        name = communicator.Get_attr(_communicator_key)
        if name is None:
            name = f"mpi:{next(_serial)}"
            communicator.Set_attr(_communicator_key, name)
            _communicators[name] = communicator
    return name, world


def _forget_communicator(communicator: Any, key: int, name: str) -> None:
    """MPI calls this when a communicator is freed."""
    with _lock:
        _communicators.pop(name, None)
        group = _groups.get(name)
    if group is not None:
        group.close()


def _communicator(name: str) -> Any:
    with _lock:
        if name not in _communicators:
            raise ValueError(f"group '{name}': its communicator was freed; accepted: one in use")
        return _communicators[name]


def _of_communicator(name: str) -> Group:
    communicator = _communicator(name)

    def make() -> int:
        return make_shm(communicator.Get_rank(), communicator.Get_size(), communicator.allgather)

    return made_once(name, lambda: True, make)


def make_shm(rank: int, world: int, gather: Callable[[Any], list[Any]]) -> int:
    """Handle of a shared-memory group; collective. ``gather`` gives every rank what each of them
    gave: plain lists of text. Raises UnsupportedError if the ranks are on two machines."""
    import secrets

    everyone = gather([secrets.token_hex(16), _machine()])
    machines = [machine for _, machine in everyone]
    others = [other for other in range(world) if machines[other] != machines[0]]
    if others:
        raise UnsupportedError(
            f"group spans machines: rank {others[0]} is not on the machine of rank 0; accepted: a "
            "group whose ranks share one machine"
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
    mpi = sys.modules.get("mpi4py.MPI")
    for communicator in list(_communicators.values()):
        # MPI would call back into Python when it ends, after Python has.
        if mpi is not None and not mpi.Is_finalized():
            communicator.Delete_attr(_communicator_key)
    _process_groups.clear()
    first = None
    for group in list(_groups.values()):
        try:
            group.close()
        except FlashMoEError as error:
            first = first or error
    if first is not None:
        raise first


def _forget() -> None:
    """In a forked child: the engine's threads are not there, so no group of the parent works."""
    global _lock
    _lock = threading.RLock()
    _groups.clear()
    _making.clear()
    _process_groups.clear()
    _communicators.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
