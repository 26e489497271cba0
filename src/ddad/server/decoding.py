"""Decode strangers' photographs in processes of their own, so that no file can take the server down.

A worker is this module run as a program. Server and worker share a socket, the worker's standard input; a message is
two lengths, a JSON object and raw bytes. A worker that crashes or takes too long is killed and replaced: its file gets
an error, other files do not notice. A worker ends when the other end of its socket is gone, however that came.
"""

import io
import json
import math
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import psutil

from ddad.errors import ConfigError, DataError
from ddad.images import ImageRule, encode_jpeg, encode_png, pixel_values, probe, reduced_size, to_rgb

PHOTO_SIDE = 1024
"""Pixels of the longer side of the picture for people, at most."""
_SMALL_SIDE = 256  # up to here PNG may be the smaller file, and is quick
_PHOTO_BYTES = 4 << 20  # more than PNG needs for any picture of that size
_HEADER_BYTES = 1 << 16
_LENGTHS = struct.Struct(">II")  # of the JSON object and of the bytes behind it
_START_SECONDS = 60.0
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",  # threads would sit on address space
    # glibc keeps up to 64 MiB between files: asking the system for it each time is a third of the work.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


@dataclass(frozen=True)
class Limits:
    """What a file may cost. All but time and memory is decided from its header, before pixels are decoded."""

    max_pixels: int = 50_000_000
    max_side: int = 20_000
    min_side: int = 16
    seconds: float = 10.0
    memory: int = 2 << 30
    """Bytes of address space beyond those of an idle worker."""


@dataclass(frozen=True)
class Decoded:
    """A photograph for the model and for people."""

    image: np.ndarray
    """As the model takes it, uint8 (H, W, 3): what `read_photo` gives."""
    size: tuple[int, int]
    """Height and width of the photograph itself."""
    photo: bytes
    """The photograph, its longer side at most `PHOTO_SIDE`: JPEG, or PNG for a little one where that is smaller."""


class Decoders:
    """Worker processes, each of which decodes one file at a time.

    Raises:
        ConfigError: no worker is asked for.
        RuntimeError: a worker does not start.
    """

    def __init__(self, count: int, limits: Limits = Limits()) -> None:
        if count < 1:
            raise ConfigError(f"Expected at least 1 process that decodes, got {count}; ask for more.")
        self._limits = limits
        self._open = count
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()  # None: closed
        workers = [_Worker(limits) for _ in range(count)]  # they start side by side
        for worker in workers:
            worker.wait_until_ready()
            self._idle.put(worker)

    def decode(self, content: bytes, name: str, shape: tuple[int, int], rule: ImageRule) -> Decoded:
        """Decode a file as soon as a worker is idle. May be called from several threads.

        Args:
            name: what errors call the file.
            shape: height and width of the model's images.

        Raises:
            DataError: the file is no single photograph within the limits.
            RuntimeError: after `close`, or when a worker that died cannot be replaced.
        """
        worker = self._idle.get()
        try:
            if worker is None:
                raise RuntimeError("Expected decoders that are open, found them closed.")
            worker.wait_until_ready()
            return worker.decode(content, name, shape, rule)
        except TimeoutError:
            raise DataError(
                f"{name}: expected an image that can be decoded in {self._limits.seconds:g} s, but it took longer; "
                "reduce it."
            ) from None
        except _Died as error:
            raise DataError(
                f"{name}: expected an image that can be decoded, but the decoder died of it; save it anew or remove it."
            ) from error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Wait for files that are being decoded, then end the processes."""
        while self._open:
            worker = self._idle.get()
            assert worker
            worker.end()
            self._open -= 1
        self._idle.put(None)


class _Died(Exception):
    """A worker ended, or sent what no worker sends."""


class _Worker:
    """The server's side of a worker process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._start()

    def _start(self) -> None:
        self._is_ready = False
        self._channel, theirs = socket.socketpair()
        # No token for a decoder that a file has taken over.
        settings = {name: value for name, value in os.environ.items() if not name.startswith("DDAD_")}
        with theirs:
            self._process = subprocess.Popen(
                # -P: a file in the working folder must not pass for a module. -W: nor a stranger's file write our log.
                [sys.executable, "-P", "-W", "ignore", "-m", "ddad.server.decoding", json.dumps(asdict(self._limits))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={**settings, **_ENVIRONMENT},
                start_new_session=True,  # away from the terminal's Ctrl-C
            )

    def wait_until_ready(self) -> None:
        """Start again if killed while idle; wait until started."""
        if self._process.poll() is not None:
            self._replace()
        if not self._is_ready:
            try:
                _receive(self._channel, 0, time.monotonic() + _START_SECONDS)
            except (OSError, EOFError) as error:
                self.end()
                raise RuntimeError("Expected a process that decodes images to start, but it did not.") from error
            self._is_ready = True

    def decode(self, content: bytes, name: str, shape: tuple[int, int], rule: ImageRule) -> Decoded:
        """Raises TimeoutError or _Died, with a new process started, or DataError as the worker words it."""
        deadline = time.monotonic() + self._limits.seconds
        length = math.prod(shape) * 3
        try:
            _send(self._channel, {"name": name, "shape": shape, "white": rule.white}, content, deadline)
            answer, body = _receive(self._channel, length + _PHOTO_BYTES, deadline)
            if "error" in answer:
                raise DataError(str(answer["error"]))
            height, width = answer["size"]
            image = np.frombuffer(body, np.uint8, length).reshape(*shape, 3)
            return Decoded(image, (int(height), int(width)), bytes(body[length:]))
        except DataError:
            raise
        except BaseException as error:  # also Ctrl-C: an answer that nobody took would become the next file's
            self._replace()
            if isinstance(error, Exception) and not isinstance(error, TimeoutError):
                raise _Died from error  # whatever it is: a decoder that a file has taken over may send anything
            raise

    def _replace(self) -> None:
        self.end()
        self._start()

    def end(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()


def _send(channel: socket.socket, header: dict[str, Any], body: bytes, deadline: float | None = None) -> None:
    """Send a message. Raises OSError, and TimeoutError once `deadline` (time.monotonic) has passed."""
    text = json.dumps(header).encode()
    for part in (_LENGTHS.pack(len(text), len(body)) + text, body):
        _set_timeout(channel, deadline)
        channel.sendall(part)


def _receive(
    channel: socket.socket, max_bytes: int | None = None, deadline: float | None = None
) -> tuple[dict[str, Any], bytearray]:
    """Receive a message. Raises as `_send`; EOFError when the other end is gone or sends more than `max_bytes`."""

    def read(count: int) -> bytearray:
        data = bytearray(count)
        missing = memoryview(data)
        while missing:
            _set_timeout(channel, deadline)
            received = channel.recv_into(missing)
            if not received:
                raise EOFError
            missing = missing[received:]
        return data

    header_length, length = _LENGTHS.unpack(read(_LENGTHS.size))
    if header_length > _HEADER_BYTES or (max_bytes is not None and length > max_bytes):
        raise EOFError
    return json.loads(read(header_length)), read(length)


def _set_timeout(channel: socket.socket, deadline: float | None) -> None:
    channel.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))


class _Upload(io.BytesIO):
    """A file in memory with a name for errors."""

    def __init__(self, content: bytes | bytearray, name: str) -> None:
        super().__init__(content)
        self.name = name


def _decode(upload: _Upload, shape: tuple[int, int], rule: ImageRule, limits: Limits) -> Decoded:
    info = probe(upload, limits.max_pixels)
    if info.frames != 1:
        raise DataError(
            f"{upload.name}: expected one picture, but found {info.frames} frames; send the one to inspect."
        )
    if not limits.min_side <= min(info.height, info.width) <= max(info.height, info.width) <= limits.max_side:
        raise DataError(
            f"{upload.name}: expected sides from {limits.min_side} to {limits.max_side:,} pixels, but found "
            f"{info.width} x {info.height}; crop or replace it."
        )
    values = pixel_values(upload, rule, limits.max_pixels)
    height, width = values.shape[:2]
    shown = reduced_size(height, width, PHOTO_SIDE)
    image, small = (to_rgb(values, size, rule, upload.name) for size in (shape, shown))
    photo = encode_jpeg(small, quality=90)
    if max(small.shape) <= _SMALL_SIDE:
        photo = min(photo, encode_png(small), key=len)
    return Decoded(image, (height, width), photo)


def _answer(request: dict[str, Any], content: bytes | bytearray, limits: Limits) -> tuple[dict[str, Any], bytes]:
    name = request["name"]
    try:
        decoded = _decode(_Upload(content, name), tuple(request["shape"]), ImageRule(white=request["white"]), limits)
        return {"size": decoded.size}, decoded.image.tobytes() + decoded.photo
    except (DataError, MemoryError) as error:
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            return {
                "error": f"{name}: expected an image that can be decoded in {limits.memory >> 20:,} MiB of memory, "
                "but it needs more; reduce it."
            }, b""
        return {"error": str(error)}, b""


def _work(limits: Limits) -> None:
    """Decode until the server is gone."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a service manager sends them to all processes
        signal.signal(one, signal.SIG_IGN)
    sys.stderr = os.fdopen(os.dup(2), "w")  # for our own errors; libraries in C would tell the log about the file
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = psutil.Process().memory_info().vms + limits.memory
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    if allowed == resource.RLIM_INFINITY or memory < allowed:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with socket.fromfd(0, socket.AF_UNIX, socket.SOCK_STREAM) as channel, suppress(EOFError, ConnectionError):
        _send(channel, {}, b"")
        while True:
            request, content = _receive(channel)
            # The server watches the time, but if it is gone, this ends an endless file.
            signal.setitimer(signal.ITIMER_REAL, limits.seconds + 1)
            header, body = _answer(request, content, limits)
            _send(channel, header, body)
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _work(Limits(**json.loads(sys.argv[1])))
