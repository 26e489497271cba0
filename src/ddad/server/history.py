"""What an inspection server remembers: inspections with their pictures, under a size limit; the oldest go first.

A folder holds `history.sqlite`, one row an inspection, and the pictures beside it. Pictures are written before their
row and removed after it, and all inspections of a request come in one transaction. So a process killed at any moment
leaves pictures without a row at worst, and the next start removes them. Where power fails, the latest inspections may
be lost, or be without pictures.
"""

import fcntl
import json
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from ddad.errors import DataError
from ddad.files import remove_leftovers, write_bytes

SCHEMA_VERSION = 1
ROW_BYTES = 1000
"""What a row counts for besides its regions and pictures, with its share of the indexes."""
KEPT_SHARE = 0.95
"""Of the size limit, once it was exceeded: room for a while."""
MAX_NAME_LENGTH = 255

_ID = re.compile(r"[0-9a-f]{32}")
_PICTURE = re.compile(r"[0-9a-f]{32}-.+\.(png|jpg)")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The outcome for one photograph."""

    id: str = ""
    """32 hex digits, given by `History.add`."""
    time: datetime
    """In UTC."""
    request_id: str
    file: str
    """Name as the client gave it, cut to 255 characters: to be shown, never to be used as a path."""
    model: str
    version: str
    anomaly_score: float
    p_value: float
    is_anomalous: bool
    threshold: float
    false_alarms: float
    height: int
    """Of the photograph, in pixels."""
    width: int
    regions: list[dict[str, Any]]
    photo: dict[str, float]
    """`ddad.prediction.PhotoStatistics` by name."""
    pictures: tuple[str, ...] = ()
    """Kinds of picture that `History.picture` has, such as "photo" or "heatmap"."""


_COLUMNS = tuple(field.name for field in fields(Inspection))
_INSERT = (
    f"INSERT INTO inspections (bytes, {', '.join(_COLUMNS)}) "
    f"VALUES (:bytes, {', '.join(f':{column}' for column in _COLUMNS)})"
)
# `number` is the order, since a clock can be set back. Each index has it as its last column, as SQLite does it.
_SCHEMA = f"""
BEGIN;
CREATE TABLE inspections (
    number INTEGER PRIMARY KEY,
    bytes INTEGER NOT NULL,
    id TEXT NOT NULL UNIQUE,
    time TEXT NOT NULL,
    request_id TEXT NOT NULL,
    file TEXT NOT NULL,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    anomaly_score REAL NOT NULL,
    p_value REAL NOT NULL,
    is_anomalous INTEGER NOT NULL,
    threshold REAL NOT NULL,
    false_alarms REAL NOT NULL,
    height INTEGER NOT NULL,
    width INTEGER NOT NULL,
    regions TEXT NOT NULL,
    photo TEXT NOT NULL,
    pictures TEXT NOT NULL
);
CREATE INDEX by_verdict ON inspections (is_anomalous);
CREATE INDEX by_model ON inspections (model);
CREATE INDEX by_model_and_verdict ON inspections (model, is_anomalous);
CREATE TABLE size (bytes INTEGER NOT NULL);
INSERT INTO size VALUES (0);
CREATE TRIGGER added AFTER INSERT ON inspections BEGIN UPDATE size SET bytes = bytes + NEW.bytes; END;
CREATE TRIGGER removed AFTER DELETE ON inspections BEGIN UPDATE size SET bytes = bytes - OLD.bytes; END;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class History:
    """Inspections, and settings that outlive the server. All methods may be called from any thread.

    Args:
        folder: made if missing; one process at a time can have it open.
        max_bytes: pictures and rows together. Beyond it the oldest inspections are removed, never the newest one.

    Raises:
        DataError: the folder cannot be written, another process has it open, or its database is damaged or of another
            version. Any method raises it where the database can no longer be read or written.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._pictures = folder / "pictures"
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        with ExitStack() as resources:
            try:
                self._pictures.mkdir(parents=True, exist_ok=True)
                # The system drops the lock when the process ends, however it ends.
                fcntl.flock(resources.enter_context((folder / "lock").open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"Expected a history that no other server keeps, found another process working on {folder}; "
                    "stop it or choose another --history."
                ) from None
            except OSError as error:
                raise DataError(
                    f"Expected a folder for the history, found that {folder} cannot be written ({error.strerror}); "
                    "choose another --history."
                ) from None
            with self._explained():
                self._database = resources.enter_context(
                    closing(sqlite3.connect(folder / "history.sqlite", check_same_thread=False))
                )
                self._prepare()
            with self._transaction():
                self._remove_oldest()
            self._remove_strays()
            self._resources = resources.pop_all()

    def close(self) -> None:
        """Let another process open the folder."""
        with self._lock:
            self._resources.close()

    def add(self, inspections: Sequence[tuple[Inspection, Mapping[str, bytes]]]) -> list[Inspection]:
        """Keep all inspections of one request, or none of them.

        inspections: each with its pictures by kind, PNG or JPEG; its `id` and `pictures` are filled in here. Returns
        them as stored, in the same order.

        Raises:
            DataError: a picture in another format, or no place on the disk.
        """
        rows: list[dict[str, Any]] = []
        files: dict[Path, bytes] = {}
        for inspection, pictures in inspections:
            row = vars(inspection) | {
                "id": uuid4().hex,
                "time": inspection.time.astimezone(UTC).isoformat(),
                "file": inspection.file[:MAX_NAME_LENGTH].encode(errors="replace").decode(),  # no lone surrogates
                "regions": json.dumps(inspection.regions, allow_nan=False),
                "photo": json.dumps(inspection.photo, allow_nan=False),
                "pictures": json.dumps({kind: _ending(content) for kind, content in pictures.items()}),
            }
            row["bytes"] = ROW_BYTES + len(row["regions"]) + sum(map(len, pictures.values()))
            rows.append(row)
            files |= {path: pictures[kind] for kind, path in self._paths(row).items()}
        try:
            for path, content in files.items():
                write_bytes(path, content, flush=False)
            with self._transaction() as database:
                database.executemany(_INSERT, rows)
                removed = self._remove_oldest()
        except Exception:
            _remove(files)
            raise
        _remove(removed)
        return [self._inspection(row) for row in rows]

    def get(self, id: str) -> Inspection | None:
        """The inspection of this id; None where there is none, or none any more."""
        row = self._row(id)
        return self._inspection(row) if row else None

    def picture(self, id: str, kind: str) -> bytes | None:
        """A picture, PNG or JPEG, of the inspection of this id; None where there is none, or none any more."""
        row = self._row(id)
        path = self._paths(row).get(kind) if row else None
        try:
            return path.read_bytes() if path else None
        except FileNotFoundError:
            return None

    def latest(
        self, count: int, *, is_anomalous: bool | None = None, model: str | None = None, before: str | None = None
    ) -> list[Inspection]:
        """At most `count` inspections, the last added first; with `before`, an id, those added before that one."""
        if before is not None and not _ID.fullmatch(before):
            return []
        where, values = _where(is_anomalous, model, before)
        rows = self._rows(f"SELECT * FROM inspections {where} ORDER BY number DESC LIMIT ?", *values, count)
        return [self._inspection(row) for row in rows]

    def count(self, *, is_anomalous: bool | None = None, model: str | None = None) -> int:
        """How many inspections are there."""
        where, values = _where(is_anomalous, model)
        return self._rows(f"SELECT COUNT(*) AS count FROM inspections {where}", *values)[0]["count"]

    def setting(self, name: str) -> Any | None:
        """A value kept by `keep_setting`; None if there is none."""
        rows = self._rows("SELECT value FROM settings WHERE name = ?", name)
        return json.loads(rows[0]["value"]) if rows else None

    def keep_setting(self, name: str, value: Any) -> None:
        """Keep a value that JSON can hold; it replaces an earlier one of this name."""
        self._rows("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, json.dumps(value, allow_nan=False))

    def _prepare(self) -> None:
        database = self._database
        database.row_factory = sqlite3.Row
        version = database.execute("PRAGMA user_version").fetchone()["user_version"]
        is_new = version == 0 and not database.execute("SELECT 1 FROM sqlite_master").fetchone()
        if not is_new and version != SCHEMA_VERSION:
            raise DataError(
                f"Expected a history of version {SCHEMA_VERSION} in {self._folder}, found version {version}; "
                "move it away or choose another --history."
            )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        if is_new:
            database.executescript(_SCHEMA)
        found = database.execute("PRAGMA quick_check(1)").fetchone()["quick_check"]
        if found != "ok":
            raise sqlite3.DatabaseError(found.splitlines()[-1])

    def _remove_oldest(self) -> list[Path]:
        """Inside a transaction: remove rows until the size fits. Returns their pictures, to be removed after it."""
        total = self._database.execute("SELECT bytes FROM size").fetchone()["bytes"]
        if total <= self._max_bytes:
            return []
        paths: list[Path] = []
        last = 0
        for row in self._database.execute(
            "SELECT number, bytes, id, pictures FROM inspections "
            "WHERE number < (SELECT MAX(number) FROM inspections) ORDER BY number"
        ):
            if total < KEPT_SHARE * self._max_bytes:
                break
            total -= row["bytes"]
            last = row["number"]
            paths += self._paths(row).values()
        self._database.execute("DELETE FROM inspections WHERE number <= ?", (last,))
        return paths

    def _remove_strays(self) -> None:
        """Remove pictures without a row, and empty ones, of which only the name was written when power failed.

        The folder is a person's choice, so anything not named like a picture of ours is left alone.
        """
        rows = self._rows("SELECT id, pictures FROM inspections")
        known = {path for row in rows for path in self._paths(row).values()}
        for folder in self._pictures.glob("[0-9a-f][0-9a-f]"):
            remove_leftovers(folder)
            for path in folder.iterdir():
                if _PICTURE.fullmatch(path.name) and (path not in known or not path.stat().st_size):
                    path.unlink()

    def _row(self, id: str) -> sqlite3.Row | None:
        rows = self._rows("SELECT * FROM inspections WHERE id = ?", id) if _ID.fullmatch(id) else []
        return rows[0] if rows else None

    def _rows(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        with self._transaction() as database:
            return database.execute(statement, values).fetchall()

    def _inspection(self, row: Mapping[str, Any] | sqlite3.Row) -> Inspection:
        values = {column: row[column] for column in _COLUMNS} | {
            "time": datetime.fromisoformat(row["time"]),
            "is_anomalous": bool(row["is_anomalous"]),
            "regions": json.loads(row["regions"]),
            "photo": json.loads(row["photo"]),
            "pictures": tuple(kind for kind, path in self._paths(row).items() if path.exists()),
        }
        return Inspection(**values)

    def _paths(self, row: Mapping[str, Any] | sqlite3.Row) -> dict[str, Path]:
        """Where the pictures of a row belong, by kind."""
        start = self._pictures / row["id"][:2]
        return {kind: start / f"{row['id']}-{kind}.{ending}" for kind, ending in json.loads(row["pictures"]).items()}

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._explained(), self._database:
            yield self._database

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):  # ours, not the disk's
            raise
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"Expected a sound history in {self._folder}, found its database damaged or not writable ({error}); "
                "free space if the disk is full, else move it away or choose another --history."
            ) from error


def _where(is_anomalous: bool | None, model: str | None, before: str | None = None) -> tuple[str, list[Any]]:
    conditions = {
        "is_anomalous = ?": is_anomalous,
        "model = ?": model,
        "number < (SELECT number FROM inspections WHERE id = ?)": before,
    }
    chosen = {condition: value for condition, value in conditions.items() if value is not None}
    return ("WHERE " + " AND ".join(chosen) if chosen else ""), list(chosen.values())


def _ending(content: bytes) -> str:
    for start, ending in ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg")):
        if content.startswith(start):
            return ending
    raise DataError("Expected a PNG or JPEG picture, found other content; encode it first.")


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
