"""State of an unfinished run: atomic to write, exact to resume, no pickle.

A checkpoint is a folder `step-<n>` of safetensors files and one `state.json`. It is written under a temporary name,
flushed to disk and renamed, so that a process killed at any moment leaves either the whole checkpoint or the one
before. The same "write, then rename" serves every file and folder this package saves.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddad.errors import ModelError

TEMPORARY_PREFIX = ".unfinished-"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name once the block has ended without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        _flush(temporary)
        if path.exists():
            replaced = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=path.parent))
            path.rename(replaced / path.name)
            temporary.rename(path)
            shutil.rmtree(replaced)
        else:
            temporary.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(temporary)
    temporary.replace(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointStore:
    """The checkpoints of one run; keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Store groups of named tensors and a JSON-serialisable state as they are after `step` steps."""
        with atomic_folder(self.folder / f"step-{step:09d}") as folder:
            for group, values in tensors.items():
                # Views that share memory cannot be stored; clones are cheap beside a step.
                save_file({name: value.detach().cpu().contiguous() for name, value in values.items()},
                          folder / f"{group}.safetensors")
            write_json(folder / "state.json", {"step": step, **state})
        for old in self._finished()[: -self.keep]:
            shutil.rmtree(old)

    def load_latest(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Tensors by group and state of the newest checkpoint, or None where there is none.

        Raises:
            ModelError: the newest checkpoint is damaged.
        """
        for leftover in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(leftover)
        finished = self._finished()
        if not finished:
            return None
        newest = finished[-1]
        try:
            state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
            tensors = {file.stem: load_file(file) for file in sorted(newest.glob("*.safetensors"))}
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(
                f"Expected a complete checkpoint in {newest}, found a damaged one ({error}); "
                "delete that folder and run the same command again."
            ) from None
        return tensors, state

    def _finished(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
