"""Workers that die, and the loop that loses no work with them. Real processes. pytest tests/test_crew.py"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import crew_work
from crew_work import still_running, until
from ddad.bulk import crew
from ddad.bulk.crew import MOST_LOSSES, Lost, Processes, drive
from ddad.errors import ConfigError, DataError


def done_by(workers, tasks):
    """Results by task, and the losses; every task must come once."""
    losses, results = [], []
    with workers:
        results = list(drive(workers, tasks, lambda task, reason: losses.append((task, reason))))
    assert sorted(task for task, _ in results) == sorted(tasks)
    return dict(results), losses


def who_did(folder, task):
    return (folder / str(task)).read_text().split()


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_once(tmp_path, workers):
    results, losses = done_by(Processes(crew_work.squares, [(tmp_path,)] * workers), range(20))
    assert results == {task: task * task for task in range(20)}
    assert losses == []
    assert all(len(who_did(tmp_path, task)) == 1 for task in range(20))


def test_no_tasks_start_no_worker(tmp_path):
    assert done_by(Processes(crew_work.dead, [(tmp_path,)]), []) == ({}, [])


def test_a_crew_of_nobody_is_refused():
    with pytest.raises(ConfigError, match=r"^Expected at least one worker, found none\.$"):  # it would wait for ever
        Processes(crew_work.squares, [])


def test_another_worker_does_the_task_of_one_that_was_killed(tmp_path):
    results, losses = done_by(Processes(crew_work.squares, [(tmp_path, (2, "dies once"))] * 2), range(5))
    assert results == {task: task * task for task in range(5)}
    before, after = who_did(tmp_path, 2)
    assert before != after
    assert losses == [(2, f"process {before} ended by signal SIGKILL")]


def test_a_task_that_kills_its_workers_is_given_up_and_the_others_are_done(tmp_path):
    results, losses = done_by(Processes(crew_work.squares, [(tmp_path, (0, "dies"), (1, "exits"))]), range(4))
    assert [results[2], results[3]] == [4, 9]
    assert isinstance(results[0], Lost)
    assert results[0].reason.endswith("ended by signal SIGKILL")
    assert results[1].reason.endswith("ended by exit code 3")
    assert [task for task, _ in losses].count(0) == [task for task, _ in losses].count(1) == MOST_LOSSES


def test_killed_while_idle(tmp_path):
    """A worker may die between its tasks too: what it is given then is not lost."""
    losses = []
    with Processes(crew_work.squares, [(tmp_path,)]) as one:
        for task, result in drive(one, range(3), lambda task, reason: losses.append(task)):
            assert result == task * task
            if task == 0:
                os.kill(int(*who_did(tmp_path, 0)), signal.SIGKILL)
                time.sleep(0.1)
    assert losses == [1]


def test_where_no_worker_lives_the_loop_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(crew, "MOST_IN_VAIN", 6)
    words = (
        r"found that 6 ended before any was done \(process \d+ ended by signal SIGKILL\); take fewer --workers, so that"
    )
    with pytest.raises(ConfigError, match=words):
        done_by(Processes(crew_work.dead, [(tmp_path,)] * 2), range(1000))


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("sentence", DataError, r"^Expected a number, found none; count again\.$"),
        ("trace", RuntimeError, r"(?s)^A worker failed:.*in square\n.*BrokenPipeError: somebody else's pipe"),
        ("unsendable", RuntimeError, r"(?s)^A worker failed:.*pickle"),
    ],
)
def test_what_a_worker_raises_is_raised_here(tmp_path, kind, error, words):
    with pytest.raises(error, match=words):
        done_by(Processes(crew_work.squares, [(tmp_path, (1, kind))] * 2), range(3))
    assert not still_running(int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split())


def test_a_stopped_worker_does_not_stop_the_end(tmp_path):
    with Processes(crew_work.squares, [(tmp_path, (0, "stops"))]) as one:
        one.submit(0)
        until(lambda: (tmp_path / "0").exists() and (tmp_path / "0").read_text().endswith("\n"))
    assert not still_running([int(*who_did(tmp_path, 0))])


def test_workers_end_with_a_driver_that_is_killed(tmp_path):
    """In the middle of a task of a minute: nobody is left who computes what the next run computes again."""
    driver = subprocess.Popen([sys.executable, crew_work.__file__, tmp_path])
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [process.pid for process in psutil.Process(driver.pid).children()]
    driver.kill()
    driver.wait()
    until(lambda: not still_running(workers))
    assert {path.name for path in Path(tmp_path).iterdir()} == {"0", "1"}
