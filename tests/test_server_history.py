"""What the server remembers: limits, hostile names, threads, damage, real kills. pytest tests/test_server_history.py"""

import io
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import cache
from itertools import count, groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from ddad.errors import DataError
from ddad.images import encode_jpeg, encode_png
from ddad.server.history import ROW_BYTES, History, Inspection

PLENTY = 1 << 30
TIME = datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC)


def inspection(**changes):
    values = {
        "time": TIME,
        "request_id": "r1",
        "file": "part.png",
        "model": "tile",
        "version": "1",
        "anomaly_score": 1.25,
        "p_value": 0.01,
        "is_anomalous": True,
        "threshold": 1.5,
        "false_alarms": 0.01,
        "height": 480,
        "width": 640,
        "regions": [{"score": 2.5, "box": [1, 2, 30, 40]}],
        "photo": {"brightness": 120.5, "focus": -0.5, "horizontal": 0.5, "vertical": 0.25},
    }
    return Inspection(**values | changes)


@cache
def pictures(seed):
    """Another pair for each seed, a JPEG and a PNG, about 2 kB together."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    return {"photo": encode_jpeg(pixels), "heatmap": encode_png(pixels)}


def add(history, seeds, **changes):
    return history.add([(inspection(**changes), pictures(seed)) for seed in seeds])


def opened(folder, max_bytes=PLENTY):
    return closing(History(folder, max_bytes))


def files(folder):
    return {path for path in (folder / "pictures").rglob("*") if path.is_file()}


def listed(history):
    return {f"{one.id}-{kind}" for one in history.latest(1_000_000) for kind in one.pictures}


@pytest.fixture
def history(tmp_path):
    with opened(tmp_path / "history") as history:
        yield history


def test_everything_comes_back_after_a_restart(tmp_path):
    names = [
        "Prüfling 7 – 電.png",
        "../../etc/passwd",
        "a\0b",
        "'); DROP TABLE inspections; --",
        "lone \udcff surrogate",
        "",
    ]
    with opened(tmp_path) as history:
        added = history.add([(inspection(file=name), pictures(seed)) for seed, name in enumerate(names)])
        assert [history.get(one.id) for one in added] == added
    with opened(tmp_path) as history:
        assert history.latest(10) == added[::-1]
        for seed, one in enumerate(added):
            assert {kind: history.picture(one.id, kind) for kind in one.pictures} == pictures(seed)
    assert added[0] == replace(inspection(file=names[0]), id=added[0].id, pictures=("photo", "heatmap"))
    assert [one.file for one in added] == [*names[:4], "lone ? surrogate", ""]
    assert len({one.id for one in added}) == len(names)
    outside = set(tmp_path.iterdir()) - {tmp_path / "pictures"}
    assert {path.name for path in outside} == {"history.sqlite", "lock"}
    assert {str(path.relative_to(tmp_path)) for path in files(tmp_path)} == {
        f"pictures/{one.id[:2]}/{one.id}-{name}" for one in added for name in ("photo.jpg", "heatmap.png")
    }


def test_long_names_are_cut(history):
    (one,) = add(history, [0], file="ü" * 10_000)
    assert one.file == "ü" * 255


def test_times_are_in_utc_and_order_is_that_of_adding(history):
    (first,) = add(history, [0], time=datetime(2026, 3, 1, 14, 0, tzinfo=timezone(timedelta(hours=2))))
    (second,) = add(history, [1], time=first.time - timedelta(days=1))  # the clock was set back
    assert first.time.isoformat() == "2026-03-01T12:00:00+00:00"
    assert history.latest(2) == [second, first]


def test_nothing_but_ids_and_listed_kinds_lead_to_anything(history, tmp_path):
    (one,) = add(history, [0])
    (tmp_path / "history" / "secret").write_text("secret")
    for id in ("", "0" * 32, one.id.upper(), one.id[:-1], one.id + "\n", f"../{one.id}", "\udcff", "%", "é" * 32):
        assert history.get(id) is None
        assert history.picture(id, "photo") is None
        assert history.latest(10, before=id) == []
    for kind in ("", "overlay", "../secret", "photo.jpg", "/etc/passwd", "\udcff"):
        assert history.picture(one.id, kind) is None


def test_pages_filters_and_counts(history):
    added = []
    for i in range(30):
        added += add(history, [i], is_anomalous=i % 3 == 0, model="ab"[i % 2])
    newest = added[::-1]
    assert history.latest(1000) == newest
    for is_anomalous in (None, False, True):
        for model in (None, "a", "b", "unknown"):
            chosen = {"is_anomalous": is_anomalous, "model": model}
            expected = [
                one for one in newest if is_anomalous in (None, one.is_anomalous) and model in (None, one.model)
            ]
            assert history.count(**chosen) == len(expected)
            pages = [history.latest(4, **chosen)]
            while pages[-1]:
                pages.append(history.latest(4, **chosen, before=pages[-1][-1].id))
            assert [one for page in pages for one in page] == expected
            assert all(len(page) == 4 for page in pages[:-2])


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ("is_anomalous = 1", "by_verdict"),
        ("model = 'a'", "by_model"),
        ("model = 'a' AND is_anomalous = 1", "by_model_"),
    ],
)
def test_pages_need_neither_a_scan_nor_a_sort(history, tmp_path, filters, index):
    with closing(sqlite3.connect(tmp_path / "history" / "history.sqlite")) as database:
        plan = database.execute(
            f"EXPLAIN QUERY PLAN SELECT * FROM inspections WHERE {filters} AND number < 9 ORDER BY number DESC LIMIT 5"
        ).fetchall()
    assert len(plan) == 1
    assert f"SEARCH inspections USING INDEX {index}" in plan[0][-1]


def test_settings_outlive_the_server(tmp_path):
    with opened(tmp_path) as history:
        assert history.setting("budget/tile") is None
        history.keep_setting("budget/tile", 0.01)
        history.keep_setting("budget/tile", 0.05)
        history.keep_setting("drift/ü", {"recent": [[0.1, 2, None]], "on": True})
    with opened(tmp_path) as history:
        assert history.setting("budget/tile") == 0.05
        assert history.setting("drift/ü") == {"recent": [[0.1, 2, None]], "on": True}


def test_the_oldest_make_room(tmp_path):
    one_size = (
        ROW_BYTES + len(json.dumps(inspection().regions)) + max(sum(map(len, pictures(i).values())) for i in range(60))
    )
    limit = 20 * one_size
    with opened(tmp_path, limit) as history:
        added = []
        for i in range(60):
            added += add(history, [i])
            kept = history.latest(100)[::-1]
            assert kept == added[-len(kept) :]  # the newest, with all their pictures
            assert {path.stem for path in files(tmp_path)} == listed(history)
            used = sum(path.stat().st_size for path in files(tmp_path)) + ROW_BYTES * len(kept)
            assert used <= limit
            assert i < 19 or len(kept) >= 18
        gone = added[0]
        assert history.get(gone.id) is None
        assert history.picture(gone.id, "photo") is None
        assert history.latest(5, before=gone.id) == []
        assert history.count() == len(kept)
    with opened(tmp_path, limit // 2) as history:  # a smaller limit holds at once
        kept = history.latest(100)[::-1]
        assert kept == added[-len(kept) :]
        assert 8 <= len(kept) <= 10
        assert {path.stem for path in files(tmp_path)} == listed(history)


def test_the_newest_stays_whatever_the_limit(tmp_path):
    with opened(tmp_path, 1) as history:
        for i in range(3):
            first, second = add(history, [2 * i, 2 * i + 1])
            assert history.latest(10) == [second]
            assert first.pictures == ()  # gone already
            assert history.picture(second.id, "photo") == pictures(2 * i + 1)["photo"]
            assert len(files(tmp_path)) == 2


def test_many_threads(history, tmp_path):
    def work(worker):
        added = []
        for i in range(25):
            seed = 1000 * worker + i
            added += zip(add(history, [seed, seed + 500], request_id=str(seed)), (seed, seed + 500), strict=True)
            history.keep_setting(f"last/{worker}", seed)
            assert history.latest(3)
        return added

    with ThreadPoolExecutor(8) as threads:
        added = [pair for pairs in threads.map(work, range(8)) for pair in pairs]
    assert history.count() == len(added) == 400
    for one, seed in added:
        assert history.get(one.id) == one
        assert {kind: history.picture(one.id, kind) for kind in one.pictures} == pictures(seed)
    newest = history.latest(1000)
    for first, second in zip(newest[1::2], newest[::2], strict=True):
        assert first.request_id == second.request_id  # requests do not mix
    assert [history.setting(f"last/{worker}") for worker in range(8)] == [1000 * worker + 24 for worker in range(8)]


HOLD = """
import sys, pathlib
from ddad.server.history import History
history = History(pathlib.Path(sys.argv[1]), 1)
print("open", flush=True)
input()
"""


def test_one_process_at_a_time(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(
            DataError, match=r"found another process working on .*; stop it or choose another --history\."
        ):
            History(tmp_path, PLENTY)
        process.kill()
    with opened(tmp_path) as history, pytest.raises(DataError, match="another process"):
        History(tmp_path, PLENTY)
    history.close()  # twice does no harm


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\); choose another --history\."):
        History(tmp_path / "file" / "history", PLENTY)


def fill_with_garbage(path):
    path.write_bytes(b"garbage" * 1000)


def overwrite_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : -4096] = b"\xff" * (len(content) - 4096 - len(content) // 2)
    path.write_bytes(content)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def overwrite_an_index(path):
    with closing(sqlite3.connect(path)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'by_model'").fetchone()
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)


@pytest.mark.parametrize("damage", [fill_with_garbage, overwrite_the_middle, cut_short, overwrite_an_index])
def test_a_damaged_database_is_refused_and_left_alone(tmp_path, damage):
    with opened(tmp_path) as history:
        add(history, range(100))
    database, kept = tmp_path / "history.sqlite", files(tmp_path)
    damage(database)
    content = database.read_bytes()
    for _ in range(2):  # and nothing stays locked
        with pytest.raises(DataError, match=r"^Expected a sound history in .*found its database damaged.*move it away"):
            History(tmp_path, PLENTY)
    assert database.read_bytes() == content
    assert files(tmp_path) == kept


@pytest.mark.parametrize(
    ("statement", "version"), [("PRAGMA user_version = 7", 7), ("CREATE TABLE other (a)", 0)], ids=["newer", "other"]
)
def test_another_version_is_refused_and_left_alone(tmp_path, statement, version):
    database = tmp_path / "history.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(statement)
    content = database.read_bytes()
    message = (
        rf"Expected a history of version 1 in .*, found version {version}; move it away or choose another --history\."
    )
    with pytest.raises(DataError, match=message):
        History(tmp_path, PLENTY)
    assert database.read_bytes() == content


def test_starting_removes_strays_and_only_those(tmp_path):
    with opened(tmp_path) as history:
        kept, emptied = add(history, [0, 1])
    folder = tmp_path / "pictures" / "ab"
    folder.mkdir(exist_ok=True)
    strays = [
        folder / f"ab{'0' * 30}-photo.jpg",
        folder / ".unfinished-x7",
        tmp_path / "pictures" / kept.id[:2] / f"{kept.id}-other.png",
    ]
    mine = [folder / "holiday.jpg", tmp_path / "pictures" / "holiday.jpg", tmp_path / "pictures" / ".unfinished-song"]
    for path in (*strays, *mine):
        path.write_bytes(b"something")
    empty = tmp_path / "pictures" / emptied.id[:2] / f"{emptied.id}-photo.jpg"
    empty.write_bytes(b"")  # as after a power failure
    with opened(tmp_path) as history:
        assert not any(path.exists() for path in (*strays, empty))
        assert all(path.exists() for path in mine)
        assert history.latest(2) == [replace(emptied, pictures=("heatmap",)), kept]


def test_a_missing_picture_is_not_listed(history, tmp_path):
    (one,) = add(history, [0])
    (path,) = (tmp_path / "history" / "pictures").rglob("*-photo.jpg")
    path.unlink()
    assert history.get(one.id) == replace(one, pictures=("heatmap",))
    assert history.picture(one.id, "photo") is None
    assert history.picture(one.id, "heatmap") == pictures(0)["heatmap"]


def test_other_content_than_pictures_is_refused(history, tmp_path):
    with pytest.raises(DataError, match="Expected a PNG or JPEG picture"):
        history.add([(inspection(), pictures(0)), (inspection(), {"photo": b"GIF89a"})])
    assert history.count() == 0
    assert not files(tmp_path / "history")


@contextmanager
def no_file_larger_than(size):
    """What a full disk does to a process, for real: writing beyond this size fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("what", "message"), [("picture", "cannot be written"), ("database", "damaged or not writable .*free space")]
)
def test_a_request_that_cannot_be_written_leaves_nothing(history, tmp_path, what, message):
    (before,) = add(history, [0])
    size = 1200 if what == "picture" else (tmp_path / "history" / "history.sqlite-wal").stat().st_size
    assert len(pictures(1)["photo"]) < 1200 < len(pictures(1)["heatmap"]) < 10_000
    with no_file_larger_than(size), pytest.raises(DataError, match=message):
        add(history, [1, 2])
    assert {path.stem for path in files(tmp_path / "history")} == listed(history)
    assert history.latest(10) == [before]
    (after,) = add(history, [3])
    assert history.latest(10) == [after, before]


LIMIT = 25_000  # a few inspections: once they are in, each request of two makes the oldest go
BATCH = 2


def stored(folder):
    """Ids and how many pictures each has on the disk, oldest first, as the database of a killed process tells.

    From a copy, so that the next start finds what the kill left.
    """
    with TemporaryDirectory() as copy:
        for path in folder.glob("history.sqlite*"):
            shutil.copy(path, copy)
        with closing(sqlite3.connect(Path(copy) / "history.sqlite")) as database:
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            (counted,) = database.execute("SELECT bytes FROM size").fetchone()
            assert counted == database.execute("SELECT SUM(bytes) FROM inspections").fetchone()[0] <= LIMIT
            ids = [id for (id,) in database.execute("SELECT id FROM inspections ORDER BY number")]
    on_disk = Counter(path.name[:32] for path in files(folder))
    return {id: on_disk.pop(id, 0) for id in ids}, on_disk.total()


def check_all(history, folder, seeds):
    """Every row is whole, with its pictures; there are no others; the newest are there; the limit holds."""
    rows = history.latest(10_000)[::-1]
    assert [one.id for one in rows] == list(seeds)[-len(rows) :]
    assert {path.stem for path in files(folder)} == listed(history)
    assert sum(path.stat().st_size for path in files(folder)) + ROW_BYTES * len(rows) <= LIMIT
    for one in rows:
        assert one == replace(inspection(request_id=one.request_id), id=one.id, pictures=("photo", "heatmap"))
        for kind, expected in pictures(seeds[one.id]).items():
            content = history.picture(one.id, kind)
            assert content == expected
            assert Image.open(io.BytesIO(content)).convert("RGB").size == (24, 20)


def add_until_killed(folder, seed):
    """Runs in a process of its own: adds requests as fast as it can, and prints each when it is in."""
    history = History(Path(folder), LIMIT)
    while True:
        added = add(history, range(seed, seed + BATCH), request_id=str(seed))
        print(seed, *(one.id for one in added), flush=True)
        seed += BATCH


def test_killed_at_any_moment_nothing_is_half_there(tmp_path):
    moment = random.Random(0)
    seeds = {}  # by id, in the order of adding
    kills = strays = 0
    while kills < 6 or not strays:
        assert kills < 40, "no kill came between a picture and its row"
        code = f"from test_server_history import add_until_killed; add_until_killed(r'{tmp_path}', {kills * 1_000_000})"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE)
        with process:
            lines = [process.stdout.readline()]
            time.sleep(moment.uniform(0, 0.4))
            process.kill()
            lines += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        kills += 1
        if not lines[-1].endswith(b"\n"):  # killed while it said so
            lines.pop()
        for line in lines:
            seed, *ids = line.decode().split()
            seeds |= {id: int(seed) + i for i, id in enumerate(ids)}
        rows, left = stored(tmp_path)
        strays += left
        assert set(rows.values()) == {2}
        unseen = [id for id in rows if id not in seeds]  # in, but killed before it said so
        assert len(unseen) in (0, BATCH)
        with opened(tmp_path, LIMIT) as history:
            seeds |= {id: int(history.get(id).request_id) + i for i, id in enumerate(unseen)}
            check_all(history, tmp_path, seeds)
    assert len(rows) * BATCH < len(seeds)  # the limit was reached


def add_and_die(folder, left):
    """Add a request, and kill this process after so many lines of our code, if it gets there.

    The third run through a line of a loop, and those after it, do not count.
    """
    runs = Counter()

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_globals["__name__"] not in ("ddad.files", "ddad.server.history"):
            return None
        place = frame.f_code, frame.f_lineno
        runs[place] += event == "line"
        left -= event == "line" and runs[place] <= 2
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    history = History(folder, LIMIT)
    sys.settrace(trace)
    add(history, range(1000, 1000 + BATCH), request_id="1000")
    sys.settrace(None)


def die_at_every_line(full, out):
    """Runs in a process of its own: copies `full` again and again, and in each copy a child dies one line later."""
    for line in count(1):
        folder = Path(out, f"{line:04d}")
        shutil.copytree(full, folder)
        child = os.fork()
        if not child:
            try:
                add_and_die(folder, line)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(status)


@pytest.mark.slow
def test_killed_at_every_line_of_adding_and_making_room(tmp_path):
    with opened(tmp_path / "full", LIMIT) as history:
        seeds = {one.id: seed for seed in range(20) for one in add(history, [seed], request_id=str(seed))}
        before = history.count()
    assert before < 20
    (tmp_path / "out").mkdir()
    code = (
        f"from test_server_history import die_at_every_line; die_at_every_line(r'{tmp_path}/full', r'{tmp_path}/out')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)

    outcomes = []
    for folder in sorted((tmp_path / "out").iterdir()):
        rows, strays = stored(folder)
        assert set(rows.values()) == {2}
        new = [id for id in rows if id not in seeds]
        assert len(new) in (0, BATCH)
        assert len(rows) <= before
        outcomes.append((bool(new), bool(strays)))
        with opened(folder, LIMIT) as history:
            check_all(history, folder, seeds | {id: 1000 + i for i, id in enumerate(new)})
    # Nothing; new pictures only; the rows, and pictures of those removed; all done.
    assert [key for key, _ in groupby(outcomes)] == [(False, False), (False, True), (True, True), (True, False)]
