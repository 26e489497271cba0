"""Workers without a network, for crews of real processes. Each writes a line a task: which one, and who did it."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil

from ddad.bulk.crew import Lost, Processes, drive
from ddad.errors import DataError


def squares(folder, *what):
    """A worker that squares numbers, after what `what` says: (task, kind), for that task alone."""
    kinds = dict(what)

    def square(task):
        kind = kinds.get(task)
        first = not (Path(folder) / f"{task}").exists()
        with open(Path(folder) / f"{task}", "a") as log:
            log.write(f"{os.getpid()}\n")
        if kind == "dies" or (kind == "dies once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "exits":
            sys.exit(3)
        if kind == "sentence":
            raise DataError("Expected a number, found none; count again.")
        if kind == "trace":
            raise BrokenPipeError("somebody else's pipe")
        if kind == "unsendable":
            return lambda: None
        if kind == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "sleeps":
            time.sleep(60)
        return task * task

    return square


def dead(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def still_running(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def until(true, seconds=30):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


if __name__ == "__main__":  # a driver that a test kills
    with Processes(squares, [(sys.argv[1], (0, "sleeps"), (1, "sleeps"))] * 2) as crew:
        for _, result in drive(crew, range(4), lambda *loss: None):
            assert not isinstance(result, Lost)
