"""`ddad serve`: options in, a listening process out."""

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ddad.config import Backend, Precision
from ddad.errors import ConfigError

try:
    import uvicorn

    from ddad.server.app import create_app
    from ddad.server.batching import BatchSettings
    from ddad.server.decoding import Limits
    from ddad.server.guard import GuardSettings, JsonLines
    from ddad.server.hosting import LoadSettings
    from ddad.server.station import Station, StationSettings
except ModuleNotFoundError as error:
    if error.name and error.name.startswith("ddad"):
        raise
    raise ConfigError(
        f"Expected the package {error.name} for ddad serve, found none; pip install 'ddad[serve]'."
    ) from None

TOKEN = "DDAD_TOKEN"
CONNECTIONS = 500
"""At a time; more are refused, so that idle ones do not use up what a process may open."""
DRAIN = 60
"""Seconds that what was begun may take after SIGTERM."""


@dataclass(frozen=True)
class Options:
    """As of the command line; times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    history: Path = StationSettings.history
    history_bytes: int = StationSettings.history_bytes
    max_batch: int = BatchSettings.max_batch
    max_wait: float = BatchSettings.max_wait
    max_queue: int = StationSettings.most_waiting
    max_files: int = 32
    max_bytes: int = GuardSettings.max_bytes
    max_pixels: int = Limits.max_pixels
    rate: float = GuardSettings.rate
    deadline: float = StationSettings.deadline
    fast: bool = False
    backend: Backend | None = None
    precision: Precision | None = None
    device: str | None = None
    workers: int = StationSettings.workers


def serve_forever(models: Sequence[Path], options: Options) -> None:
    """Serve until SIGTERM or Ctrl-C; what was begun is then finished.

    Raises:
        ConfigError: an address or a token that cannot be used; options that cannot work.
        ModelError: a model that cannot be served.
        DataError: no place for the history.
    """
    guard = GuardSettings(token=_token(options.token_file), max_bytes=options.max_bytes, rate=options.rate)
    if guard.token is None and not _is_loopback(options.host):
        raise ConfigError(
            f"Expected a token for an address that others can reach, found none for {options.host}; give --token-file "
            f"or set {TOKEN}, or listen on 127.0.0.1."
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("ddad", "uvicorn"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("ddad").setLevel(logging.INFO)
    listening = _listen(options.host, options.port)
    station = Station(
        models,
        StationSettings(
            history=options.history,
            history_bytes=options.history_bytes,
            batches=BatchSettings(options.max_batch, options.max_wait),
            decoding=replace(Limits(), max_pixels=options.max_pixels),
            workers=options.workers,
            most_waiting=options.max_queue,
            deadline=options.deadline,
        ),
        LoadSettings(options.fast, options.backend, options.precision, options.device),
    )
    config = uvicorn.Config(
        create_app(station, guard, min(options.max_files, options.max_queue)),
        log_config=None,
        log_level="warning",
        access_log=False,  # the guard writes one with request ids
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=DRAIN,
    )
    names = ", ".join(f"{name} (version {hosted.current.number})" for name, hosted in station.models.items())
    host, port = listening.getsockname()[:2]
    print(f"Serving {names} on http://{f'[{host}]' if ':' in host else host}:{port}. Ctrl-C ends it.", flush=True)
    # Uvicorn finishes what was begun, and then raises the signal again: this is an orderly end all the same.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    asyncio.run(uvicorn.Server(config).serve([listening]))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)  # seen to before models are loaded, which takes longer
    except OSError as error:
        raise ConfigError(
            f"Expected a free address, found that {host}:{port} cannot be used ({error.strerror}); choose another "
            "--host or --port."
        ) from None
    return listening


def _token(file: Path | None) -> str | None:
    """From the file, else from the environment.

    Raises:
        ConfigError: the file cannot be read, or holds nothing.
    """
    if file is None:
        return os.environ.get(TOKEN) or None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"Expected a token in {file}, found no text that can be read; check --token-file.") from None
    if not token:
        raise ConfigError(f"Expected a token in {file}, found nothing; make one with: openssl rand -hex 32")
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
