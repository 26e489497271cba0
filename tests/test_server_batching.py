"""What waits goes through the network together, and nothing is lost or doubled. pytest tests/test_server_batching.py"""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ddad.server.batching import Batcher, BatchSettings


class Network:
    """Squares numbers, notes its batches, and can be held up."""

    def __init__(self, seconds=0.0):
        self.batches, self.seconds, self.gate = [], seconds, threading.Event()
        self.gate.set()

    def __call__(self, items):
        self.gate.wait()
        time.sleep(self.seconds)
        self.batches.append(list(items))
        return [item**2 for item in items]


def run(network, scenario, **settings):
    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(network, executor, BatchSettings(**settings))
            try:
                return await asyncio.wait_for(scenario(batcher), 20)
            finally:
                network.gate.set()

    return asyncio.run(main())


async def held(batcher, network):
    """The network is at work on item 0 and the queue is empty."""
    network.gate.clear()
    first = asyncio.create_task(batcher.submit(0))
    while not network_is_busy(batcher, first):
        await asyncio.sleep(0.001)
    return first


def network_is_busy(batcher, task):
    return not task.done() and len(batcher) == 0 and batcher._task is not None


@pytest.mark.parametrize("max_batch", [1, 4, 64])
def test_everyone_gets_their_own_result(max_batch):
    network = Network()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit(i) for i in range(100)))

    assert run(network, scenario, max_batch=max_batch) == [i**2 for i in range(100)]
    assert sorted(i for batch in network.batches for i in batch) == list(range(100))
    assert max(map(len, network.batches)) == min(max_batch, 100)


def test_what_waited_meanwhile_is_one_batch_in_order():
    network = Network()

    async def scenario(batcher):
        first = await held(batcher, network)
        others = [asyncio.create_task(batcher.submit(i)) for i in range(1, 8)]
        await asyncio.sleep(0.05)
        network.gate.set()
        await asyncio.gather(first, *others)

    run(network, scenario, max_batch=5, max_wait=0.0)
    assert network.batches == [[0], [1, 2, 3, 4, 5], [6, 7]]


def test_a_lone_item_waits_for_others_no_longer_than_said():
    network = Network()

    async def scenario(batcher):
        started = time.monotonic()
        await batcher.submit(1)
        alone = time.monotonic() - started
        late = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.05)
        await asyncio.gather(late, batcher.submit(3))
        return alone

    assert 0.2 <= run(network, scenario, max_wait=0.2) < 2
    assert network.batches == [[1], [2, 3]]


def test_a_full_batch_does_not_wait():
    async def scenario(batcher):
        started = time.monotonic()
        await asyncio.gather(*(batcher.submit(i) for i in range(4)))
        return time.monotonic() - started

    assert run(Network(), scenario, max_batch=4, max_wait=5.0) < 2


def test_what_is_cancelled_never_reaches_the_network():
    network = Network()

    async def scenario(batcher):
        first = await held(batcher, network)
        cancelled, kept = (asyncio.create_task(batcher.submit(i)) for i in (1, 3))
        await asyncio.sleep(0.01)
        assert len(batcher) == 2
        cancelled.cancel()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await batcher.submit(2)
        assert len(batcher) == 1
        network.gate.set()
        assert await asyncio.gather(first, kept) == [0, 9]

    run(network, scenario)
    assert network.batches == [[0], [3]]


def test_who_leaves_during_the_batch_leaves_the_others_their_results():
    network = Network()

    async def scenario(batcher):
        first = await held(batcher, network)
        first.cancel()
        second = asyncio.create_task(batcher.submit(2))
        await asyncio.sleep(0.01)
        network.gate.set()
        assert await second == 4

    run(network, scenario)


def test_a_failing_batch_fails_its_own_items_only():
    def network(items):
        if 13 in items:
            raise ValueError("thirteen")
        return [item**2 for item in items]

    network.gate = threading.Event()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.submit(i) for i in (1, 13, 2)), return_exceptions=True)

    one, failed, two = run(network, scenario, max_batch=1)
    assert (one, two) == (1, 4)
    assert str(failed) == "thirteen"


def test_an_unused_batcher_leaves_no_task_behind():
    async def scenario(batcher):
        assert await batcher.submit(3) == 9
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task(), *main_task}
        assert await batcher.submit(4) == 16

    main_task = []

    async def main():
        main_task.append(asyncio.current_task())
        with ThreadPoolExecutor(1) as executor:
            await asyncio.create_task(scenario(Batcher(Network(), executor, BatchSettings())))

    asyncio.run(main())


def test_when_all_have_left_the_network_is_left_alone():
    network = Network()

    async def scenario(batcher):
        alone = asyncio.create_task(batcher.submit(1))
        await asyncio.sleep(0.01)
        alone.cancel()
        await asyncio.sleep(0.3)
        assert await batcher.submit(2) == 4

    run(network, scenario, max_wait=0.2)
    assert network.batches == [[2]]


def test_waiting_times_are_told():
    told = []

    async def main():
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(Network(), executor, BatchSettings(max_wait=0.1), told.append)
            await asyncio.gather(batcher.submit(1), batcher.submit(2))

    asyncio.run(main())
    assert [len(waited) for waited in told] == [2]
    assert 0.05 < told[0][0] < 2
