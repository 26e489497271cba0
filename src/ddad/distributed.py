"""The processes of one training, as `accelerate launch` or `torchrun` starts them; usually there is only one.

Each of them calls the same functions of this module in the same order. The main one (rank 0) writes and speaks. The
others do their share of every step and end when training ends: with SystemExit, since whoever called them has no more
work for them either.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from ddad.errors import ConfigError, DDADError

FAILED, STOPPED = 1, 130
TIMEOUT = timedelta(days=1)
"""The main process may have many images to read while the others wait; who has died, the launcher notices."""
HEARING = 3.0
"""Seconds that the others stay after the main process was told why all end: launchers end all when one has ended."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the training."""

    number: int
    """0 is the main process."""
    count: int
    local_count: int
    """On this machine."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.number == 0

    def share(self, batch_size: int) -> range:
        """Places in the batch that are this process' own; raises ConfigError where not all can have as many."""
        if batch_size % self.count:
            fitting = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
            raise self.told(
                ConfigError(
                    f"Expected a number of processes that share a batch of {batch_size} images evenly ({fitting}), "
                    f"found {self.count}."
                )
            )
        each = batch_size // self.count
        return range(self.number * each, (self.number + 1) * each)

    def told(self, error: Exception, code: int = FAILED) -> BaseException:
        """What to raise where all processes know of an error: itself in the main one, SystemExit in the others.

        The group ends here; a process that left it to the interpreter's end was seen to abort.
        """
        if distributed.is_initialized():
            distributed.destroy_process_group()
        if self.is_main:
            return error
        time.sleep(HEARING)
        return SystemExit(code)

    @contextmanager
    def together(self) -> Iterator[dict[str, Any]]:
        """A block that ends well in all processes or in none: the main one then raises the first one's error.

        Yields a dictionary; what the main process leaves in it, the others have afterwards.
        """
        shared: dict[str, Any] = {}
        failure: DDADError | None = None
        try:
            yield shared
        except DDADError as error:
            failure = error
        if self.count > 1:
            known: list[Any] = [None] * self.count
            distributed.all_gather_object(known, (failure, shared if self.is_main else None))
            failure = next((error for error, _ in known if error), None)
            shared.update(known[0][1])
        if failure:
            raise self.told(failure)

    def agree(self, loss: Tensor, asked: bool) -> tuple[float, bool]:
        """The mean loss of all processes, and whether any of them was asked to stop."""
        if self.count == 1:
            return float(loss), asked
        both = torch.stack([loss.float(), torch.full_like(loss, float(asked), dtype=torch.float32)])
        distributed.all_reduce(both)
        return float(both[0]) / self.count, bool(both[1])

    def as_main(self, decision: bool) -> bool:
        """The main process' decision."""
        if self.count == 1:
            return decision
        decided = torch.tensor(int(decision), device=self.device)
        distributed.broadcast(decided, 0)
        return bool(decided)

    def leave(self) -> None:
        """Training is over: the main process goes on by itself, the others end here."""
        if self.count > 1:
            distributed.destroy_process_group()
        if not self.is_main:
            raise SystemExit(0)


def join(device: torch.device) -> Processes:
    """This process among those that were launched together, each with a GPU of its own where `device` is one.

    Raises:
        ConfigError: too few GPUs, one named for all, a launch that is incomplete or over.
    """
    launched, local = _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 1)
    with alike():
        if launched > 1 and device.type == "cuda" and not distributed.is_initialized():
            if device.index is not None:
                raise ConfigError(
                    f"Expected no number in the device of {launched} processes, which take one GPU each, found "
                    f"{device}; leave --device out."
                )
            if local > (present := torch.cuda.device_count()):
                raise ConfigError(
                    f"Expected a GPU for each process, found {local} processes and {present} GPUs on this machine; "
                    "launch no more than there are, or give --device cpu."
                )
        try:
            state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
        except (ValueError, distributed.DistError) as error:
            raise ConfigError(
                f"Expected {launched} processes that find each other, found that they do not "
                f"({' '.join(str(error).split())}); start them with torchrun or accelerate launch."
            ) from None
        if state.num_processes > 1 and not distributed.is_initialized():
            raise ConfigError("Expected one training a launch, found a further one; launch it by itself.")
    return Processes(state.process_index, state.num_processes, local, state.device)


@contextmanager
def alike() -> Iterator[None]:
    """Before they have joined, processes find the same mistake each by itself: the first on a machine raises it."""
    try:
        yield
    except DDADError:
        if _number("LOCAL_RANK", 0) > 0:
            time.sleep(HEARING)
            raise SystemExit(FAILED) from None
        raise


def _number(name: str, default: int) -> int:
    """An environment variable of the launcher."""
    return int(os.environ.get(name, default))
