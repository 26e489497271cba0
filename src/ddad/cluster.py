"""Ray, and the only place that knows it: work spread over the machines of a cluster.

Ray Data's own checkpoints are not relied on: a job that failed after 340 of 400 rows had saved none. What is finished
is known by the files that are there.
"""

import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from ddad.bulk.crew import MOST_IN_VAIN, Lost
from ddad.errors import ConfigError, DDADError

_OBJECT_STORE = 256 << 20
"""Bytes of a cluster on this machine alone; what travels is small."""
_ANSWER_SECONDS = 10.0
_WAIT_SECONDS = 5.0
_IDLE_SECONDS = 30.0


def connect(address: str | None = None) -> None:
    """Join a Ray cluster, or start one on this machine where none is named.

    Args:
        address: `HOST:PORT`, or `auto` for the one on this machine. By default that in RAY_ADDRESS, which
            `ray job submit` sets.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    ray = _ray()
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address:
        try:
            if match := re.fullmatch(r"([^/]+):(\d+)", address):  # Ray takes a quarter of an hour to give up
                socket.create_connection((match[1], int(match[2])), timeout=_ANSWER_SECONDS).close()
            ray.init(address=address, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Expected a Ray cluster at {address}, found none that answers ({str(error).splitlines()[0]}); start "
                "one with ray start --head, set RAY_AUTH_MODE=token where it wants a token, or leave out --address."
            ) from None
        return
    # By name: without an address Ray would join whatever cluster was begun on this machine.
    ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **options)


def room(cpus: float, gpus: float) -> int:
    """How many workers the cluster has room for as it is now, at least one."""
    there = _ray().cluster_resources()
    counts = [there.get(kind, 0) // each for kind, each in (("CPU", cpus), ("GPU", gpus)) if each]
    return max(1, int(min(counts, default=1)))


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("Expected the package ray for --engine ray, found none; pip install 'ddad[ray]'.") from None
    return ray


class Actors:
    """A crew of Ray actors: each makes its worker once, and a new one takes the place of one that died.

    All are asked for at the start. So a cluster that can grow sees how many are wanted, and whoever is up works.
    """

    def __init__(
        self,
        make: Callable[..., Callable[[int], Any]],
        arguments: tuple[Any, ...],
        *,
        most: int,
        least: int = 1,
        cpus: float = 1,
        gpus: float = 0,
        on_idle: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        """
        Args:
            make, arguments: what makes a worker in its process, and how; large arguments travel once.
            most: actors at most.
            least: how many must be up before work begins.
            cpus, gpus: what each takes of its machine.
            on_idle: hears once where nobody has worked for a while.
        """
        self._ray = _ray()
        self._make, self._arguments = make, self._ray.put(arguments)
        self._most, self._least = most, least
        self._needs = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        self._on_idle, self._idle_seconds = on_idle, 0.0
        self._in_vain = 0  # that ended before they were up, one after the other
        # No restarts and no retries of Ray's own: the loop knows what is left to do.
        self._actor = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Actor)
        self._starting: dict[Any, Any] = {}  # reference to the answer -> actor
        self._free: list[Any] = []
        self._busy: dict[Any, tuple[Any, int]] = {}

    def __enter__(self) -> Self:
        for _ in range(self._most):
            self._start()
        return self

    def __exit__(self, *details: Any) -> None:
        for actor in [*self._free, *self._starting.values(), *(actor for actor, _ in self._busy.values())]:
            self._ray.kill(actor)

    def _start(self) -> None:
        actor = self._actor.remote()
        # Loaded by a call, not by the constructor, whose errors Ray takes for the death of the actor.
        self._starting[actor.start.remote(self._make, self._arguments)] = actor

    def free(self) -> int:
        if self._least > len(self._free) + len(self._busy):
            return 0
        self._least = 0  # only at the beginning
        return len(self._free)

    def submit(self, task: int) -> None:
        actor = self._free.pop()
        self._busy[actor.work.remote(task)] = actor, task

    def wait(self) -> list[tuple[int, Any]]:
        references = [*self._busy, *self._starting]
        ready, _ = self._ray.wait(references, num_returns=1, timeout=_WAIT_SECONDS)
        if not ready and not self._busy:
            self._note_idle()
        ended: list[tuple[int, Any]] = []
        for reference in ready:
            starting = self._starting.pop(reference, None)
            actor, task = (starting, None) if starting else self._busy.pop(reference)
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                cause = error.as_instanceof_cause()
                raise (error.cause if isinstance(error.cause, DDADError) else cause) from None
            except self._ray.exceptions.RayError as error:  # the actor, its process or its machine is gone
                reason = str(error).strip().splitlines()[0]
                self._start()
                if task is not None:
                    ended.append((task, Lost(reason)))
                else:
                    self._note_stillborn(reason)
                continue
            self._free.append(actor)
            if task is None:
                self._in_vain = 0
            else:
                ended.append((task, result))
        return ended

    def _note_stillborn(self, reason: str) -> None:
        self._in_vain += 1
        if self._in_vain >= max(MOST_IN_VAIN, 3 * self._most):
            raise ConfigError(
                f"Expected workers that start, found that {self._in_vain} ended before they did ({reason}); take fewer "
                "--workers, so that each has more memory, and look at the logs of Ray."
            )

    def _note_idle(self) -> None:
        before, self._idle_seconds = self._idle_seconds, self._idle_seconds + _WAIT_SECONDS
        if before < _IDLE_SECONDS <= self._idle_seconds:
            self._on_idle(
                f"{len(self._free)} of {self._most} workers are up after {_IDLE_SECONDS:.0f} s; each wants "
                f"{self._needs} of one machine. Waiting for them to start, or for the cluster to have room."
            )


class _Actor:
    def start(self, make: Callable[..., Callable[[int], Any]], arguments: tuple[Any, ...]) -> None:
        self._call = make(*arguments)

    def work(self, task: int) -> Any:
        return self._call(task)


def run_tasks(
    function: Callable[[Any], Any], items: Iterable[Any], *, cpus: float = 1, gpus: float = 0, retries: int = 3
) -> Iterator[tuple[Any, Any]]:
    """`function(item)` of each item as a Ray task; yields (item, result), or (item, exception), as they end.

    Args:
        cpus, gpus: what each takes of its machine.
        retries: how often a task is begun again whose process or machine is gone.
    """
    ray = _ray()
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries, max_calls=1)(function)
    running = {task.remote(item): item for item in items}
    while running:
        (reference,), _ = ray.wait(list(running), num_returns=1)
        item = running.pop(reference)
        try:
            yield item, ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            yield item, error.cause if isinstance(error.cause, DDADError) else error.as_instanceof_cause()
        except ray.exceptions.RayError as error:
            yield item, error
