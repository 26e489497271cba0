"""State of an unfinished run: atomic to write, exact to resume, no pickle.

A checkpoint is a folder `step-<n>` of safetensors files and one `state.json`, written under a temporary name and then
renamed: a process killed at any moment leaves either the whole checkpoint or the one before.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddad.errors import ModelError
from ddad.files import atomic_folder, remove_leftovers, write_json


class CheckpointStore:
    """The checkpoints of one run; keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Store groups of named tensors and a JSON-serialisable state as they are after `step` steps."""
        with atomic_folder(self.folder / f"step-{step:09d}") as folder:
            for group, values in tensors.items():
                stored = {name: value.detach().cpu().contiguous() for name, value in values.items()}
                save_file(stored, folder / f"{group}.safetensors")
            write_json(folder / "state.json", {"step": step, **state})
        for old in self._finished()[: -self.keep]:
            shutil.rmtree(old)

    def load_latest(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None:
        """Tensors by group and state of the newest checkpoint, or None where there is none.

        Raises:
            ModelError: the newest checkpoint is damaged.
        """
        remove_leftovers(self.folder)
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

    def latest_step(self) -> int:
        """Step of the newest checkpoint, 0 where there is none."""
        finished = self._finished()
        return int(finished[-1].name.removeprefix("step-")) if finished else 0

    def clear(self) -> None:
        """Remove all checkpoints."""
        for folder in self._finished():
            shutil.rmtree(folder)

    def _finished(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
