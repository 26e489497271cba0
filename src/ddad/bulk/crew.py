"""Workers that may die, and a loop that loses no work with them.

A crew is any number of workers, each with something expensive in memory, that take one task at a time. `Processes` are
those of this machine; `ddad.cluster.Actors` those of a Ray cluster. Both are driven by the same loop.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, Self

from ddad.errors import ConfigError, DDADError

MOST_LOSSES = 5
"""A task that ended so many workers is given up, not the others: it, not the machines, is likely the cause."""
MOST_IN_VAIN = 20
"""Workers that may end before any task is done, or three times as many as there were at once: then none is likely to
live, as where their memory does not suffice."""


@dataclass(frozen=True)
class Lost:
    """A worker ended before its task was done."""

    reason: str


class Crew(Protocol):
    """Workers that come and go."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *details: Any) -> None: ...
    def free(self) -> int:
        """How many workers could be given a task now."""

    def submit(self, task: int) -> None:
        """Give a task to a free worker."""

    def wait(self) -> list[tuple[int, Any]]:
        """Wait a few seconds at most for tasks to end: each with its result, or `Lost`; raises what a worker raised."""


def drive(crew: Crew, tasks: Iterable[int], on_lost: Callable[[int, str], None]) -> Iterator[tuple[int, Any]]:
    """Every task with its result, in the order in which they end; those of lost workers are given out again.

    A task that was lost `MOST_LOSSES` times comes with the last `Lost`. `on_lost` hears of each loss.

    Raises:
        ConfigError: no worker lives.
    """
    remaining, again = iter(tasks), deque[int]()
    losses: Counter[int] = Counter()
    busy = most_busy = 0
    exhausted = some_done = False
    while True:
        while crew.free() and not (exhausted and not again):
            task = next(remaining, None)
            if task is None:
                exhausted = True
                if not again:
                    break
                task = again.popleft()
            crew.submit(task)
            busy += 1
        most_busy = max(most_busy, busy)
        if not busy and exhausted and not again:
            return
        for task, result in crew.wait():
            busy -= 1
            if isinstance(result, Lost):
                losses[task] += 1
                on_lost(task, result.reason)
                if not some_done and losses.total() >= max(MOST_IN_VAIN, 3 * most_busy):
                    raise ConfigError(
                        f"Expected workers that do tasks, found that {losses.total()} ended before any was done "
                        f"({result.reason}); take fewer --workers, so that each has more memory."
                    )
                if losses[task] < MOST_LOSSES:
                    again.append(task)  # last, so that the others are done if it is to blame
                    continue
            else:
                some_done = True
            yield task, result


class Processes:
    """Processes of this machine; each makes its worker once, and a new one takes the place of one that died."""

    def __init__(self, make: Callable[..., Callable[[int], Any]], arguments: Sequence[tuple[Any, ...]]) -> None:
        """
        Args:
            make: a function of a module, which makes what is called with tasks.
            arguments: of `make`, for each worker; their number is the number of workers.

        Raises:
            ConfigError: there is no worker.
        """
        if not arguments:
            raise ConfigError("Expected at least one worker, found none.")
        self._make = make
        self._idle = list(arguments)  # workers not started yet
        self._free: list[_Process] = []
        self._busy: dict[Connection, tuple[_Process, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: Any) -> None:
        for worker in [*self._free, *(worker for worker, _ in self._busy.values())]:
            worker.stop()

    def free(self) -> int:
        return len(self._free) + len(self._idle)

    def submit(self, task: int) -> None:
        worker = self._free.pop() if self._free else _Process(self._make, self._idle.pop(0))
        self._busy[worker.connection] = worker, task
        with suppress(OSError):  # it has died meanwhile, which `wait` will see
            worker.connection.send(task)

    def wait(self) -> list[tuple[int, Any]]:
        ended = []
        for connection in wait(list(self._busy), timeout=5):
            assert isinstance(connection, Connection)
            worker, task = self._busy.pop(connection)
            try:
                result = connection.recv()
            except (EOFError, OSError):
                ended.append((task, Lost(worker.cause())))
                self._idle.append(worker.arguments)
                continue
            self._free.append(worker)
            if isinstance(result, _Raised):
                raise result.error()
            ended.append((task, result))
        return ended


@dataclass(frozen=True)
class _Raised:
    pickled: bytes | None
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Self:
        return cls(pickle.dumps(error) if isinstance(error, DDADError) else None, traceback.format_exc())

    def error(self) -> Exception:
        return pickle.loads(self.pickled) if self.pickled else RuntimeError(f"A worker failed:\n{self.trace}")


class _Process:
    def __init__(self, make: Callable[..., Callable[[int], Any]], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.arguments = arguments
        self.connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()  # ours only: it reads the end of the file when the process is gone

    def cause(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        return f"process {self._process.pid} ended by " + (
            f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        )

    def stop(self) -> None:
        self.connection.close()
        self._process.kill()  # what it writes is whole or not there; a stopped process would never see SIGTERM
        self._process.join()


def _work(connection: Connection, make: Callable[..., Callable[[int], Any]], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    call = None
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            task = connection.recv()
            try:
                call = call or make(*arguments)
                answer = pickle.dumps(call(task))
            except Exception as error:
                answer = pickle.dumps(_Raised.of(error))
            connection.send_bytes(answer)


def _end_with_parent() -> None:
    """A parent that was killed has told nobody; a task may take long, and the next run begins it anew."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(0)
