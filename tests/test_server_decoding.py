"""No file takes the server down, and every photograph is read as always. pytest tests/test_server_decoding.py"""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import numpy as np
import psutil
import pytest
from PIL import Image

import hostile
from ddad.errors import ConfigError, DataError
from ddad.images import ImageRule, encode_png, read_image, read_photo
from ddad.server.decoding import Decoders, Limits

SHAPE = (48, 64)
RULE = ImageRule(white=hostile.WHITE)
PATIENT = Limits(seconds=60)
HOSTILE, BENIGN = hostile.corpus(), hostile.benign()


def children():
    return [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]


@contextmanager
def opened(count, limits=PATIENT):
    """Decoders, and a function that lists their processes."""
    others = children()
    with closing(Decoders(count, limits)) as decoders:
        yield decoders, lambda: [one for one in children() if one not in others]


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def lives(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def busy(processes):
    """The one that has worked half a second more than the others."""
    times = sorted((one.cpu_times().user + one.cpu_times().system, one.pid) for one in processes)
    return times[-1][1] if len(times) == 1 or times[-1][0] > times[-2][0] + 0.5 else None


def assert_reads(decoders, name):
    content = BENIGN[name]
    decoded = decoders.decode(content, name, SHAPE, RULE)
    image, size = read_photo(content, SHAPE, RULE)
    np.testing.assert_array_equal(decoded.image, image)
    assert decoded.image.dtype == np.uint8
    assert decoded.size == size
    return decoded


def refusal(decoders, content, name="part.png"):
    with pytest.raises(DataError) as caught:
        decoders.decode(content, name, SHAPE, RULE)
    return str(caught.value)


@pytest.fixture(scope="module")
def decoders():
    """Two workers that no test may harm."""
    with opened(2) as (decoders, workers):
        started = workers()
        yield decoders
        assert workers() == started


# What is answered


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in hostile.ENDLESS])
def test_a_hostile_file_is_refused_in_one_sentence(decoders, name):
    message = refusal(decoders, HOSTILE[name], name)
    assert message.startswith(f"{name}: expected ")
    assert re.search(r"[a-z0-9)]; [a-z].*[a-z]\.$|none of these; convert or remove it\.$", message)
    assert "\n" not in message
    assert len(message) < 300
    assert not re.search(
        r"Traceback|File \"|line \d|0x[0-9a-f]|/(usr|home|root|tmp|work)/|\.py\b|died|longer;", message
    )
    assert_reads(decoders, "photo.jpg")


@pytest.mark.parametrize("name", hostile.ENDLESS)
def test_an_endless_file_ends(name):
    with opened(1, Limits(seconds=1)) as (decoders, workers):
        (first,) = workers()
        started = time.monotonic()
        message = refusal(decoders, HOSTILE[name], name)
        assert 1 <= time.monotonic() - started < 5
        assert message == (f"{name}: expected an image that can be decoded in 1 s, but it took longer; reduce it.")
        assert not lives(first.pid)
        assert_reads(decoders, "photo.jpg")


@pytest.mark.parametrize("name", BENIGN)
def test_a_photograph_is_read_as_always(decoders, name):
    decoded = assert_reads(decoders, name)
    with Image.open(io.BytesIO(decoded.photo)) as photo:
        assert photo.format in ("JPEG", "PNG")
        shown = np.asarray(photo.convert("RGB"))
    scale = min(1, 1024 / max(decoded.size))
    assert shown.shape[:2] == tuple(round(side * scale) for side in decoded.size)
    assert np.abs(shown.astype(int) - read_image(BENIGN[name], shown.shape[:2], RULE)).mean() < 6


@pytest.mark.parametrize(("height", "width", "shown"), [(2000, 1500, (1024, 768)), (1024, 700, (1024, 700))])
def test_people_see_the_longer_side_at_1024(decoders, height, width, shown):
    decoded = decoders.decode(hostile.encoded(hostile.photo(height, width), "JPEG"), "part.jpg", SHAPE, RULE)
    with Image.open(io.BytesIO(decoded.photo)) as photo:
        assert (photo.height, photo.width) == shown
    assert decoded.size == (height, width)


def test_people_see_little_pictures_without_loss_where_that_is_smaller(decoders):
    drawn = np.zeros((64, 64, 3), np.uint8)
    drawn[20:40, 20:40] = (255, 0, 0)
    photo = decoders.decode(encode_png(drawn), "drawn.png", SHAPE, RULE).photo
    np.testing.assert_array_equal(read_image(photo), drawn)


def test_limits_are_told():
    wide, flat = encode_png(np.zeros((40, 90), np.uint8)), encode_png(np.zeros((90, 20), np.uint8))
    film = hostile.encoded(Image.new("L", (50, 50)), "TIFF", save_all=True, append_images=[Image.new("L", (50, 50), 9)])
    with closing(Decoders(1, Limits(max_pixels=3000, max_side=80, min_side=30))) as decoders:
        assert [refusal(decoders, content) for content in (wide, flat, film)] == [
            "part.png: expected between 1 and 3,000 pixels, but found 90 x 40; reduce or crop the image.",
            "part.png: expected sides from 30 to 80 pixels, but found 20 x 90; crop or replace it.",
            "part.png: expected one picture, but found 2 frames; send the one to inspect.",
        ]


def test_a_large_picture_takes_no_more_memory_than_allowed():
    large = encode_png(np.zeros((5000, 5000), np.uint8))
    with opened(1, Limits(memory=64 << 20, seconds=60)) as (decoders, workers):
        before = workers()
        assert refusal(decoders, large) == (
            "part.png: expected an image that can be decoded in 64 MiB of memory, but it needs more; reduce it."
        )
        assert_reads(decoders, "photo.jpg")
        assert workers() == before
    with opened(1) as (decoders, _):
        assert decoders.decode(large, "part.png", SHAPE, RULE).size == (5000, 5000)


def test_everyone_gets_their_own_answer(decoders):
    names = [name for name in BENIGN if BENIGN[name]] * 4
    wrong = [name for name in HOSTILE if "cut" in name]

    def one(i):
        if i % 3 == 0:
            return refusal(decoders, HOSTILE[wrong[i % len(wrong)]], f"file {i}").startswith(f"file {i}: ")
        return assert_reads(decoders, names[i % len(names)]) is not None

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(one, range(160)))


# What becomes of the processes


def test_killed_while_decoding_only_its_own_file_notices():
    with opened(2) as (decoders, workers), ThreadPoolExecutor(2) as threads:
        first = workers()
        doomed = threads.submit(refusal, decoders, HOSTILE["many scans.jpg"], "doomed.jpg")
        wait_for(lambda: busy(first))
        stop = threading.Event()

        def others():
            count = 0
            while not stop.is_set() or not count:
                assert_reads(decoders, "photo.png")
                count += 1
            return count

        other = threads.submit(others)
        os.kill(busy(first), signal.SIGKILL)
        assert doomed.result(30) == (
            "doomed.jpg: expected an image that can be decoded, but the decoder died of it; save it anew or remove it."
        )
        stop.set()
        assert other.result(30)
        for _ in range(4):
            assert_reads(decoders, "photo.jpg")
        assert len(workers()) == 2
        assert len(set(workers()) & set(first)) == 1


def test_killed_while_idle_nobody_notices():
    with opened(2) as (decoders, workers):
        for one in workers():
            one.kill()
        wait_for(lambda: not workers())
        for _ in range(4):
            assert_reads(decoders, "photo.jpg")
        assert len(workers()) == 2


def test_closing_ends_the_processes_and_takes_nothing_more():
    with opened(2) as (decoders, workers):
        assert len(workers()) == 2
        decoders.close()
        assert not workers()
        for _ in range(2):
            with pytest.raises(RuntimeError):
                decoders.decode(BENIGN["photo.jpg"], "part.png", SHAPE, RULE)


def test_closing_waits_for_what_is_decoded():
    large = encode_png(np.zeros((4000, 4000), np.uint8))
    with opened(1) as (decoders, workers), ThreadPoolExecutor(1) as threads:
        (one,) = workers()
        idle = sum(one.cpu_times()[:2])
        begun = threads.submit(decoders.decode, large, "part.png", SHAPE, RULE)
        wait_for(lambda: sum(one.cpu_times()[:2]) > idle)
        decoders.close()
        assert begun.result().size == (4000, 4000)


def test_no_workers_cannot_be():
    with pytest.raises(ConfigError, match="Expected at least 1 process that decodes, got 0"):
        Decoders(0)


def test_a_worker_loads_no_torch():
    with opened(1) as (_, workers):
        libraries = " ".join(one.path for process in workers() for one in process.memory_maps())
    assert "numpy" in libraries
    assert "torch" not in libraries


def test_a_worker_does_not_know_the_token(monkeypatch):
    monkeypatch.setenv("DDAD_TOKEN", "secret")
    with opened(1) as (_, workers):
        (worker,) = workers()
        assert "PATH" in worker.environ()
        assert "secret" not in worker.environ().values()


def test_an_answer_that_nobody_took_is_not_the_next_files():
    """Ctrl-C while the main thread waits for an answer."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran earlier in this process
    try:
        with opened(1) as (decoders, workers):
            (one,) = workers()
            idle = sum(one.cpu_times()[:2])

            def interrupt():
                wait_for(lambda: sum(one.cpu_times()[:2]) > idle)
                os.kill(os.getpid(), signal.SIGINT)

            with ThreadPoolExecutor(1) as threads:
                threads.submit(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    decoders.decode(hostile.corpus()[hostile.ENDLESS[0]], "endless", SHAPE, RULE)
            assert_reads(decoders, "photo.jpg")
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_in_the_working_folder_is_no_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    with opened(1) as (decoders, _):
        assert_reads(decoders, "photo.jpg")


SERVER = """
import os, psutil, signal, sys, threading
import hostile
from ddad.images import ImageRule
from ddad.server.decoding import Decoders, Limits

signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: None)
decoders = Decoders(2, Limits(seconds=4))
print(*(one.pid for one in psutil.Process().children()), flush=True)
for line in sys.stdin:
    if line == "photo\\n":
        for _ in range(2):
            decoded = decoders.decode(hostile.benign()["photo.jpg"], "photo.jpg", (48, 64), ImageRule())
        print(decoded.size, flush=True)
    else:
        endless = hostile.corpus()["many scans.jpg"], "many scans.jpg", (48, 64), ImageRule()
        threading.Thread(target=decoders.decode, args=endless).start()
"""


@pytest.fixture
def server():
    """A process with two workers, in a group of its own, as a shell would start it; and the workers' ids."""
    folder = os.path.dirname(__file__)
    paths = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={**os.environ, "PYTHONPATH": paths},
        process_group=0,
    ) as process:
        started = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(started) == 2
        yield process, [one.pid for one in started]
        process.kill()
        for one in started:  # where a test has failed
            with suppress(psutil.NoSuchProcess):
                one.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_signals_are_for_the_server_alone(server, number):
    process, pids = server
    os.killpg(process.pid, number)
    for pid in pids:
        os.kill(pid, number)  # as a service manager does
    process.stdin.write("photo\n")
    assert process.stdout.readline() == "(96, 128)\n"
    assert all(map(lives, pids))


def test_workers_end_with_a_killed_server(server):
    process, pids = server
    assert all(map(lives, pids))
    process.kill()
    wait_for(lambda: not any(map(lives, pids)), 5)


@pytest.mark.slow
def test_a_worker_with_an_endless_file_ends_with_a_killed_server(server):
    process, pids = server
    process.stdin.write("endless\n")
    wait_for(lambda: busy(map(psutil.Process, pids)))
    at_work = busy(map(psutil.Process, pids))
    process.kill()
    process.wait()
    assert lives(at_work)
    wait_for(lambda: not any(map(lives, pids)), 10)
