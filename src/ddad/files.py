"""Write, then rename: whatever this package saves is whole, or is as it was before.

Files and folders are written under a temporary name beside their place and renamed when complete, so that a process
killed at any moment leaves no half of anything under a real name.
"""

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddad.errors import ConfigError, DataError

TEMPORARY_PREFIX = ".unfinished-"
_HERE, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h: relative to the working folder; swap


def write_bytes(path: str | os.PathLike[str], content: bytes, flush: bool = True) -> None:
    """Write a file atomically, making missing folders; `flush` waits until it is on the disk.

    Raises:
        DataError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            Path(name).chmod(0o644)  # mkstemp makes it private
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"Expected a place to write {path}, found that it cannot be written ({error.strerror or error}); "
            "free space or choose another folder."
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`write_bytes` of indented JSON; NaN and infinity are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name once the block has ended without an error.

    A folder that was there before is replaced.

    Raises:
        DataError: no folder can be made there.
    """
    path = Path(os.path.realpath(path))  # a link stays, and leads to the new folder
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    except OSError as error:
        raise DataError(
            f"Expected a place for the folder {path}, found that none can be made there ({error.strerror or error}); "
            "choose another one."
        ) from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for entry in [*temporary.rglob("*"), temporary]:
            _flush(entry)
        if path.exists():
            _exchange(temporary, path)
        else:
            temporary.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders, so that at every moment one of them stands at `old`; where the system cannot, nearly so."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux; Python has no name for it
    if swap and swap(_HERE, os.fsencode(new), _HERE, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    between = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=old.parent))
    old.rename(between / old.name)
    new.rename(old)
    (between / old.name).rename(new)
    between.rmdir()


def check_place(folder: Path, mark: str, what: str) -> None:
    """Raises ConfigError where a new `what`, known by its file `mark`, would replace something else in `folder`."""
    if folder.exists() and not (folder / mark).is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"Expected a new or empty folder, or an older {what}, found other files in {folder}.")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove what a killed process left unfinished in a folder; `name` limits it to the folder of that name."""
    # tempfile ends a name in eight random characters; a plain prefix would take a neighbour's folder too.
    for leftover in folder.glob(f"{TEMPORARY_PREFIX}{name}-????????" if name else f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
