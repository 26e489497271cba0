"""A bulk job: what is to be scored and how, written down once, so that every worker and every later run does the same.

OUT/shard-<number>.parquet            results of one shard each; a shard is finished when its file is there
OUT/_job/job.json                     manifest, model and everything that decides a result
OUT/_job/listing-<id>/part-*.parquet  the manifest as it was read
OUT/_job/log/<time>-<id>.jsonl        what took how long, one line a shard; nothing of that is in the results
OUT/_heatmaps/shard-<number>.npz      anomaly maps, where asked for

Whoever reads OUT as one Parquet table sees results only: readers pass over names that begin with an underscore.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from ddad.bulk import places
from ddad.bulk.tables import read_manifest, write_listing
from ddad.errors import ConfigError, DataError

FORMAT_VERSION = 1
JOB = "_job/job.json"
LOG = "_job/log"
MAPS = "_heatmaps"
_SHARD = re.compile(r"shard-(\d{8})\.parquet")


@dataclass(frozen=True)
class Job:
    """What decides the results, whoever computes them."""

    manifest: str
    manifest_state: str | None
    """What tells the manifest from a later one of this name; None for a folder."""
    base: str
    """The folder that relative URIs refer to."""
    listing: str
    """The folder with the manifest as it was read, inside of `out`."""
    images: int
    model: str
    """SHA-256 of the model's `detector.json`, or `family.json`."""
    shard_size: int
    batch_size: int
    threads: int
    """Of a worker: another number adds floats in another order, and moves scores in the seventh digit."""
    device: str
    """`cpu` or `cuda`: they round differently."""
    backend: str | None
    precision: str | None
    fast: bool
    heatmaps: bool
    created: str
    format_version: int = FORMAT_VERSION

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def rows(self, shard: int) -> int:
        """Number of photographs in a shard."""
        return min(self.shard_size, self.images - shard * self.shard_size)


def open_job(out: str, manifest: str, asked: dict[str, Any]) -> Job:
    """The job in `out`: the one that is there, or a new one after reading the manifest.

    Args:
        out: the place for results.
        manifest: a place; an absolute one.
        asked: all other fields of `Job` that the caller decides.

    Raises:
        ConfigError: there is another job, or there are tables of something else.
        DataError: the manifest or `out` cannot be used.
    """
    # Looked for before the job, since others may make that, and results in it, at this moment.
    strangers = [name for name in places.names(out) if name.endswith(".parquet")]
    while (job := read_job(out)) is None:
        if strangers:
            raise ConfigError(
                f"Expected a new or empty folder, or that of a job, found other tables in {out}, as {strangers[0]}; "
                "choose another --out."
            )
        identity = os.urandom(4).hex()
        listing = f"_job/listing-{identity}"
        state = places.state(manifest) if places.exists(manifest) else None
        base, rows = read_manifest(manifest)
        count = write_listing(places.join(out, listing), rows, asked["shard_size"])
        if count == 0:
            raise DataError(f"Expected photographs in {manifest}, found none; name another folder or manifest.")
        job = Job(
            manifest=manifest,
            manifest_state=state,
            base=base,
            listing=listing,
            images=count,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            **asked,
        )
        # Of several that begin at once, as in a Slurm array, the first one's listing counts.
        places.create(places.join(out, JOB), json.dumps(asdict(job), indent=2).encode())
    _check_same(job, out, manifest, asked)
    return job


def read_job(out: str) -> Job | None:
    """The job in `out`, or None where there is none; raises ConfigError for one of another version."""
    place = places.join(out, JOB)
    if not places.exists(place):
        return None
    try:
        values = json.loads(places.read(place))
        if values["format_version"] != FORMAT_VERSION or values.keys() != {field.name for field in fields(Job)}:
            raise ValueError
        return Job(**values)
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"Expected a job of this version of ddad in {place}, found another one; choose another --out."
        ) from None


def _check_same(job: Job, out: str, manifest: str, asked: dict[str, Any]) -> None:
    changes = [
        f"{name} ({getattr(job, name)} before, {value} now)"
        for name, value in {"manifest": manifest, **asked}.items()
        if getattr(job, name) != value
    ]
    if not changes and job.manifest_state is not None:
        now = places.state(manifest) if places.exists(manifest) else None
        # A manifest that is gone is not another one: the job has its listing.
        if now not in (None, job.manifest_state):
            changes.append("the content of the manifest")
    if changes:
        raise ConfigError(
            f"Expected the job that was begun in {out}, found changes in {', '.join(changes)}; repeat the first "
            "command, or choose another --out."
        )


def finished(out: str) -> set[int]:
    """Numbers of the shards whose results are there."""
    return {int(match[1]) for name in places.names(out) if (match := _SHARD.fullmatch(name))}


def results_place(out: str, shard: int) -> str:
    """The Parquet file of a shard's results."""
    return places.join(out, f"shard-{shard:08d}.parquet")


def maps_place(out: str, shard: int) -> str:
    """The .npz file of a shard's anomaly maps."""
    return places.join(out, f"{MAPS}/shard-{shard:08d}.npz")
