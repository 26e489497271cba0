"""Work through any number of things in order, a few in memory at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ddad.errors import DataError

Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of at most `size` items, in order."""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Items and what threads made of them, in order, never more than `ahead` before they are used."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        queue: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            queue.append((item, pool.submit(work, item)))
            if len(queue) > ahead:
                first, future = queue.popleft()
                yield first, future.result()
        for first, future in queue:
            yield first, future.result()


def in_batches(
    items: Iterable[Item],
    read: Callable[[Item], Read | DataError],
    process: Callable[[Sequence[Read]], Sequence[Result]],
    batch_size: int,
    workers: int,
) -> Iterator[tuple[Item, Result | DataError]]:
    """Each item in order with what `process` made of it, or with the error that `read` returned for it.

    `workers` threads read ahead of `process`, which gets what could be read of `batch_size` items.
    """
    for batch in chunks(in_threads(read, items, workers, ahead=2 * batch_size), batch_size):
        ready = [content for _, content in batch if not isinstance(content, DataError)]
        results = iter(process(ready))
        for item, content in batch:
            yield item, content if isinstance(content, DataError) else next(results)
