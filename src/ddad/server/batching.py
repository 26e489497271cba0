"""Requests that arrive one by one go through the network together.

A batch is what waits when the network gets free: at most `max_batch` items, and while there are fewer it waits for
others until the oldest has waited `max_wait` seconds. So a lone request is delayed by no more than that, and under
load the batches fill by themselves. What is cancelled while it waits leaves the queue, and the network never sees it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchSettings:
    max_batch: int = 8
    """Items that go through the network together; 1: no batching."""
    max_wait: float = 0.005
    """Seconds that the first item of a batch waits for others."""


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: "asyncio.Future[Result]"
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Item, Result]):
    """Collects items into batches and runs one batch at a time.

    Args:
        run: results of a batch of items, in their order; called in `executor`. What it raises, all of the batch get.
        executor: where to run; several batchers may share one.
        on_batch: told the size of each batch and how long each of its items had waited, in seconds.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        executor: Executor,
        settings: BatchSettings = BatchSettings(),
        on_batch: Callable[[list[float]], None] = lambda waited: None,
    ) -> None:
        self._run, self._executor, self._settings, self._on_batch = run, executor, settings, on_batch
        self._queue: deque[_Waiting[Item, Result]] = deque()
        self._changed = asyncio.Event()
        self.seconds_an_item = 0.0
        """What one item of the last batch took."""
        self._task: asyncio.Task[None] | None = None  # only while something waits: an unused batcher needs no closing

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._queue)

    async def submit(self, item: Item) -> Result:
        """The result for one item."""
        waiting: _Waiting[Item, Result] = _Waiting(item, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        try:
            return await waiting.future
        finally:
            if waiting in self._queue:  # cancelled
                self._queue.remove(waiting)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            if not (batch := await self._collect()):
                continue
            started = time.monotonic()
            self._on_batch([started - waiting.since for waiting in batch])
            try:
                results = await loop.run_in_executor(self._executor, self._run, [waiting.item for waiting in batch])
            except Exception as error:
                for waiting in batch:
                    if not waiting.future.done():
                        waiting.future.set_exception(error)
                continue
            self.seconds_an_item = (time.monotonic() - started) / len(batch)
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(result)
        self._task = None

    async def _collect(self) -> list[_Waiting[Item, Result]]:
        """The next batch; empty where everybody has left meanwhile."""
        while self._queue and len(self._queue) < self._settings.max_batch:
            left = self._queue[0].since + self._settings.max_wait - time.monotonic()
            if left <= 0:
                break
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()
        return [self._queue.popleft() for _ in range(min(len(self._queue), self._settings.max_batch))]
