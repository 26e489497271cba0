"""Files and folders wherever fsspec reaches: local disks, S3, GCS, HTTP and others.

A place is a local path, or a URI such as s3://bucket/folder. What is written is whole or is not there: locally by a
temporary name that is renamed, elsewhere as one object.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from ddad.errors import ConfigError, DataError
from ddad.files import TEMPORARY_PREFIX, write_bytes
from ddad.images import SUFFIXES, is_hidden

MAX_FILE = 1 << 30
"""Bytes; no photograph is larger, and a worker would not survive some that are."""
_PATIENCE = (1.0, 4.0)
"""Seconds between attempts to read a file; networks fail now and then."""
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_local(place: str) -> bool:
    """Whether this is a path of this machine rather than a URI."""
    return "://" not in place


def absolute(place: str | os.PathLike[str]) -> str:
    """The place so that it means the same in every process: local paths from the root, URIs as they are."""
    text = os.fspath(place)
    text = text.removeprefix("file://")
    return os.path.abspath(text) if is_local(text) else text.rstrip("/")


def join(folder: str, name: str) -> str:
    """A place inside a folder; `name` as it is, where it is absolute already."""
    if not folder or not is_local(name) or name.startswith("/"):
        return name
    return f"{folder.rstrip('/')}/{name}"


def file_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a place, and its path there.

    Raises:
        ConfigError: its package is not installed, which is nothing that another file would mend.
        DataError: there is no such kind of place.
    """
    if is_local(place):
        return fsspec.filesystem("file"), place  # whatever its name has: fsspec would take a "::" for a chain
    try:
        return fsspec.core.url_to_fs(place)
    except ImportError as error:
        raise ConfigError(
            f"Expected the package that reads {place}, found none ({reason(error)}); pip install it."
        ) from None
    except ValueError as error:
        raise DataError(
            f"Expected a path, or a URI of a kind that fsspec reads, found {place} ({reason(error)}); check its name."
        ) from None


def exists(place: str) -> bool:
    """Whether a file or folder is there; raises DataError where nobody can say."""
    with _named(place):
        files, path = file_system(place)
        files.invalidate_cache(path)  # another process may have written it
        try:
            files.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True  # `files.exists` would also say no where a network fails, and a job be begun anew


def state(place: str) -> str | None:
    """What tells a file from a later one of this name: its ETag, or its size and time; None for a folder.

    Raises:
        DataError: nothing is there.
    """
    with _named(place):
        files, path = file_system(place)
        info = files.info(path)
    if info["type"] == "directory":
        return None
    times = (info.get(name) for name in ("mtime", "created", "LastModified", "Last-Modified"))
    return _etag(info) or f"{info['size']} bytes of {next(filter(None, times), '?')}"


def read(place: str) -> bytes:
    """The content of a file; what may be the network's fault is tried again.

    Raises:
        ConfigError: the package for such places is not installed.
        DataError: it cannot be read.
    """
    place = place.removeprefix("file://")
    for patience in (*_PATIENCE, None):
        try:
            if is_local(place):
                return _read_local(place)
            files, path = file_system(place)
            return files.cat_file(path)
        except (ConfigError, DataError):
            raise
        except Exception as error:  # a file system raises what its package likes
            if is_local(place) or patience is None or _is_final(error):
                raise DataError(f"{place}: expected a readable file, found none ({reason(error)}).") from None
            time.sleep(patience)
    raise AssertionError


def _read_local(place: str) -> bytes:
    status = os.stat(place)
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
        raise DataError(f"{place}: expected a readable file, found a folder or a device.")
    if status.st_size > MAX_FILE:
        raise DataError(f"{place}: expected at most {MAX_FILE:,} bytes, found {status.st_size:,}; remove the file.")
    return Path(place).read_bytes()


def _is_final(error: Exception) -> bool:
    """Whether another attempt would end alike: also answers of HTTP that blame the question, save three about time."""
    status = getattr(error, "status", None)
    blames = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(error, _FINAL) or blames


def write(place: str, content: bytes) -> None:
    """Write a file, whole or not at all; a file of this name is replaced.

    Raises:
        DataError: it cannot be written.
    """
    if is_local(place):
        write_bytes(place, content)
        return
    with _named(place):
        files, path = file_system(place)
        folder, _, name = path.rpartition("/")
        files.makedirs(folder, exist_ok=True)
        if type(files).mv is AbstractFileSystem.mv:  # a store of objects: it cannot rename, and shows whole ones only
            files.pipe_file(path, content)
            return
        temporary = f"{folder}/{TEMPORARY_PREFIX}{name}-{os.urandom(4).hex()}"
        files.pipe_file(temporary, content)
        files.mv(temporary, path)


@contextmanager
def lines(place: str) -> Iterator[Callable[[str], None]]:
    """A text file that is written line by line: at once where it is local, elsewhere when the block ends.

    Raises:
        DataError: it cannot be written.
    """
    with _named(place):
        files, path = file_system(place)
        files.makedirs(path.rpartition("/")[0], exist_ok=True)
        opened = files.open(path, "w", encoding="utf-8")
    with opened:

        def write_line(line: str) -> None:
            opened.write(line + "\n")
            if is_local(place):
                opened.flush()

        yield write_line


def create(place: str, content: bytes) -> bool:
    """`write`, unless a file of this name is there already; says whether it was written."""
    if not is_local(place):
        if exists(place):
            return False
        write(place, content)  # of two at the same moment the later one stays
        return True
    temporary = Path(f"{place}{TEMPORARY_PREFIX}{os.urandom(4).hex()}")
    write_bytes(temporary, content)
    try:
        os.link(temporary, place)
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links there, as on FAT and some network disks; then as with URIs
        if os.path.lexists(place):
            return False
        temporary.replace(place)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def names(folder: str) -> list[str]:
    """Names of the files in a folder, sorted; none where there is no folder."""
    with _named(folder):
        files, path = file_system(folder)
        files.invalidate_cache(path)
        try:
            entries = files.ls(path, detail=True)
        except FileNotFoundError:
            return []
    return sorted(entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "file")


def images(folder: str) -> Iterator[tuple[str, str | None]]:
    """Place and ETag, where there is one, of each image in a folder and its sub-folders, by their endings, in order.

    Hidden files are left out, links to folders not followed. One folder at a time is in memory, so a flat one of a
    hundred million files is better given as a manifest.

    Raises:
        DataError: the folder cannot be read.
    """
    if is_local(folder):
        yield from _local_images(folder)
        return
    with _named(folder):
        files, path = file_system(folder)
    yield from _images(files, path, folder)


def _local_images(folder: str) -> Iterator[tuple[str, None]]:
    """Names only: what fsspec says of a file takes a kilobyte and a call for each."""
    with _named(folder), os.scandir(folder) as entries:
        found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if _is_meant(entry))
    for name, is_folder in found:
        if not is_folder:
            # A name that is no UTF-8 cannot be in a table; written so, it is a row that cannot be read.
            yield join(folder, name).encode(errors="backslashreplace").decode(), None
    for name, is_folder in found:
        if is_folder:
            yield from _local_images(join(folder, name))


def _is_meant(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, an image by its ending, or a link that leads to one or to nothing."""
    if is_hidden(entry.name):
        return False
    if entry.is_dir(follow_symlinks=False):  # a linked one may lead back here
        return True
    whole = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry))
    return entry.name.lower().endswith(SUFFIXES) and whole


def _images(files: Any, path: str, folder: str) -> Iterator[tuple[str, str | None]]:
    with _named(folder):
        entries = sorted(files.ls(path, detail=True), key=lambda entry: entry["name"])
        files.invalidate_cache(path)  # which would keep every listing of a large tree
    inside = []
    for entry in entries:
        name = entry["name"].rstrip("/").rsplit("/", 1)[-1]
        if is_hidden(name) or entry["name"].strip("/") == path.strip("/"):  # object stores may list a folder in itself
            continue
        if entry["type"] == "directory":
            if not entry.get("islink"):
                inside.append((entry["name"], name))
        elif name.lower().endswith(SUFFIXES):
            yield join(folder, name), _etag(entry)
    del entries
    for inner, name in inside:
        yield from _images(files, inner, join(folder, name))


def _etag(info: dict[str, Any]) -> str | None:
    etag = info.get("ETag") or info.get("etag")
    return etag.removeprefix("W/").strip('"') if etag else None


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Turn what a file system raises into a DataError that names the place."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise DataError(
            f"Expected a place that can be read and written at {place}, found none ({reason(error)}); check its name "
            "and your rights."
        ) from None


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0]
