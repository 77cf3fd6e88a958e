"""Ranks as processes that a test may stop, kill and question: what the tests of faults share, on
the CPU and on GPUs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

ANSWER_S = 60.0  # a rank that has not answered by then hangs


@dataclass
class Answer:
    """What a rank's method returned or raised, and when (time.monotonic, the same on all ranks)."""

    value: object
    error: str | None  # name of the exception's class
    text: str
    started: float
    ended: float

    @property
    def seconds(self):
        return self.ended - self.started


def serve(connection, make, arguments, log):
    """The life of a rank process: one method of `make(*arguments)` at a time. Everything that it
    prints goes to `log`, if that is given."""
    if log is not None:
        with open(log, "ab", buffering=0) as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
    rank = make(*arguments)
    with contextlib.suppress(EOFError):
        while True:
            method, options = connection.recv()
            started = time.monotonic()
            try:
                value, error, text = getattr(rank, method)(**options), None, ""
            except Exception as failure:  # the test judges it
                value, error, text = None, type(failure).__name__, str(failure)
            connection.send(Answer(value, error, text, started, time.monotonic()))


class RankProcess:
    """A process of a multiprocessing context that serves `make(*arguments)`."""

    def __init__(self, context, make, *arguments, log=None):
        self.log = None if log is None else Path(log)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, make, arguments, self.log), daemon=True
        )
        self.process.start()
        theirs.close()

    def start(self, method, **arguments):
        """Asks the rank to run a method."""
        self.connection.send((method, arguments))

    def answer(self):
        """What the method gave."""
        assert self.connection.poll(ANSWER_S), "a rank hangs"
        return self.connection.recv()

    def value(self):
        """As `answer`; fails if the method raised."""
        answer = self.answer()
        assert answer.error is None, f"{answer.error}: {answer.text}"
        return answer.value

    def signal(self, number):
        """Sends a signal and gives the time."""
        os.kill(self.process.pid, number)
        return time.monotonic()

    def kill(self):
        when = self.signal(signal.SIGKILL)
        self.process.join()
        return when

    def wait_until_stopped(self):
        """Returns when a signal has stopped the process."""
        deadline = time.monotonic() + ANSWER_S
        while self.state() != "T":
            assert time.monotonic() < deadline, f"the rank is not stopped but {self.state()}"
            time.sleep(0.002)

    def state(self):
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rsplit(")", 1)[1].split()[0]

    def close(self):
        self.process.kill()  # unlike os.kill, content with a process that ends meanwhile
        self.process.join()
        self.connection.close()


class RankProcesses(list):
    """The rank processes of a group, in the order of their ranks. Their ranks have a method
    `join(token, rank, world, **options)`."""

    def join(self, token, **options):
        """Makes them the ranks of one new group."""
        for rank, process in enumerate(self):
            process.start("join", token=token, rank=rank, world=len(self), **options)
        for process in self:
            process.value()

    def all(self, method, **arguments):
        """The answers of every rank; `arguments` that are lists hold one value a rank."""
        for rank, process in enumerate(self):
            own = {
                name: value[rank] if isinstance(value, list) else value
                for name, value in arguments.items()
            }
            process.start(method, **own)
        return [process.answer() for process in self]

    def values(self, method, **arguments):
        """As `all`; fails if one raised."""
        answers = self.all(method, **arguments)
        for answer in answers:
            assert answer.error is None, f"{answer.error}: {answer.text}"
        return [answer.value for answer in answers]

    def close(self):
        for process in self:
            process.close()
