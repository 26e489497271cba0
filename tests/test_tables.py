"""Manifests, listings and the places they are in. pytest tests/test_tables.py"""

import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import table_work
from ddad.bulk import places
from ddad.bulk.job import JOB, Job, finished, open_job, read_job
from ddad.bulk.tables import (
    RESULTS,
    SHARDS_A_PART,
    Entry,
    encode_maps,
    encode_results,
    read_manifest,
    read_shard,
    write_listing,
)
from ddad.errors import ConfigError, DataError

ASKED = {
    "model": "a1",
    "shard_size": 2,
    "batch_size": 4,
    "threads": 1,
    "device": "cpu",
    "backend": None,
    "precision": None,
    "fast": False,
    "heatmaps": False,
}


def rows_of(manifest):
    base, rows = read_manifest(str(manifest))
    return base, list(rows)


def refusal(manifest):
    """The sentence of the DataError."""
    with pytest.raises(DataError) as caught:
        rows_of(manifest)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_csv(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table(**columns):
    return pa.table({name: pa.array(values) for name, values in columns.items()})


ROWS = [
    ("a.png", "e1", "tile"),
    ("sub/ä b.png", None, None),
    ("/data/c.png", "e2", None),
    ("s3://bucket/d.png", None, "wood"),
    ("a.png", None, None),  # twice is twice
]
COLUMNS = dict(zip(("uri", "etag", "category"), zip(*ROWS, strict=True), strict=True))


# manifests


def test_all_kinds_of_manifests_give_the_same_rows(tmp_path):
    whole = table(**COLUMNS, other=range(5))
    pyarrow.parquet.write_table(whole, tmp_path / "m.parquet")
    pyarrow.csv.write_csv(whole, tmp_path / "m.csv")
    (tmp_path / "parts").mkdir()
    pyarrow.parquet.write_table(whole.slice(0, 2), tmp_path / "parts" / "1.parquet")
    pyarrow.parquet.write_table(whole.slice(2), tmp_path / "parts" / "2.parquet")
    (tmp_path / "parts" / "._2.parquet").write_bytes(b"left by an archive of a Mac")
    (tmp_path / "parts" / "_SUCCESS").touch()  # Spark
    for name, base in (("m.parquet", ""), ("m.csv", ""), ("parts", "/parts")):
        assert rows_of(tmp_path / name) == (f"{tmp_path}{base}", ROWS), name


def test_relative_uris_refer_to_the_folder_of_the_manifest(tmp_path):
    base, rows = rows_of(write_csv(tmp_path / "m.csv", "uri", *COLUMNS["uri"][:4]))
    assert [places.join(base, uri) for uri, _, _ in rows] == [
        f"{tmp_path}/a.png",
        f"{tmp_path}/sub/ä b.png",
        "/data/c.png",
        "s3://bucket/d.png",
    ]
    assert places.join("s3://bucket/folder/", "a.png") == "s3://bucket/folder/a.png"


def test_other_types_of_text_are_text(tmp_path):
    uris = pa.array(["a.png", "b.png"])
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()):
        pyarrow.parquet.write_table(pa.table({"uri": uris.cast(kind)}), tmp_path / "m.parquet")
        assert [uri for uri, _, _ in rows_of(tmp_path / "m.parquet")[1]] == ["a.png", "b.png"], kind


def test_csv_as_programs_write_it(tmp_path):
    """A byte order mark, quotes with commas, Windows line ends, an empty line, words that mean nothing here."""
    (tmp_path / "m.csv").write_bytes('\ufeffuri,etag\r\n"a, ""b"".png",0012\r\n\r\nNA,null\r\n'.encode())
    assert rows_of(tmp_path / "m.csv")[1] == [('a, "b".png', "0012", None), ("NA", "null", None)]


def test_other_columns_of_a_csv_do_not_matter(tmp_path):
    """Arrow guesses types from the first megabyte; a note that comes later must not end the reading."""
    lines = [f"{number:0100d}.png,{number}" for number in range(20_000)]
    write_csv(tmp_path / "m.csv", "uri,note", *lines, "last.png,dropped by Kim")
    rows = rows_of(tmp_path / "m.csv")[1]
    assert len(rows) == 20_001
    assert rows[-1] == ("last.png", None, None)


def test_the_column_uri_is_needed(tmp_path):
    pyarrow.parquet.write_table(table(path=["a.png"], etag=["1"]), tmp_path / "m.parquet")
    advice = "rename the one that holds the paths."
    assert refusal(tmp_path / "m.parquet") == (
        f"Expected a column uri in {tmp_path}/m.parquet, found path, etag; {advice}"
    )
    write_csv(tmp_path / "m.csv", "uri;etag", "a.png;1")  # what Excel writes in Germany
    assert refusal(tmp_path / "m.csv") == f"Expected a column uri in {tmp_path}/m.csv, found uri;etag; {advice}"
    (tmp_path / "empty.csv").touch()
    assert (
        refusal(tmp_path / "empty.csv") == f"Expected a column uri in {tmp_path}/empty.csv, found no column; {advice}"
    )
    write_csv(tmp_path / "m.csv", "uri,etag,etag", "a.png,1,2")
    assert (
        refusal(tmp_path / "m.csv")
        == f"Expected one column etag in {tmp_path}/m.csv, found several; rename the others."
    )


@pytest.mark.parametrize("uris", [["a.png", ""], ["a.png", None]])
def test_a_row_without_uri_is_refused(tmp_path, uris):
    pyarrow.parquet.write_table(table(uri=uris), tmp_path / "m.parquet")
    assert refusal(tmp_path / "m.parquet") == (
        f"Expected a uri in every row of {tmp_path}/m.parquet, found an empty one; remove the row."
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.parquet", b"no table at all"),
        ("m.parquet", b""),
        ("m.parquet", b"PAR1 is how they begin and end PAR1"),
        ("m.csv", b"\xff\xfeu\0r\0i\0\n\0a\0\n\0"),
        ("m.csv", b"uri\n\xe4.png\n"),
        ("m.csv", b"uri,etag\na.png,1\nb.png\n"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    sentence = refusal(tmp_path / name)
    assert sentence.startswith(f"Expected a Parquet or CSV table in {tmp_path}/{name}, found none that can be read (")
    assert sentence.endswith("); write it again.")


def test_a_damaged_page_is_refused(tmp_path):
    """The end of the file, which says where all is, may be whole while a page is not."""
    uris = [f"{number:06d}-{number * 7919 % 1000:03d}.png" for number in range(20_000)]
    pyarrow.parquet.write_table(table(uri=uris), tmp_path / "m.parquet", use_dictionary=False)
    content = bytearray((tmp_path / "m.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    (tmp_path / "m.parquet").write_bytes(content)
    assert "found none that can be read" in refusal(tmp_path / "m.parquet")


def test_what_is_no_manifest_is_refused(tmp_path):
    assert refusal(tmp_path / "none.csv") == (
        f"Expected a manifest or a folder of images at {tmp_path}/none.csv, found nothing; check its name."
    )
    (tmp_path / "list.txt").write_text("a.png\n")
    assert refusal(tmp_path / "list.txt") == (
        f"Expected a manifest that ends in .parquet or .csv, or a folder, found {tmp_path}/list.txt; rename it."
    )
    assert refusal("nowhere://bucket/m.csv") == (
        "Expected a path, or a URI of a kind that fsspec reads, found nowhere://bucket/m.csv (Protocol not known: "
        "nowhere); check its name."
    )


def test_a_kind_of_place_whose_package_is_not_installed():
    if "s3fs" in sys.modules or not _missing("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(ConfigError, match=r"^Expected the package that reads s3://bucket/m\.csv, found none \(.*s3fs"):
        read_manifest("s3://bucket/m.csv")
    with pytest.raises(ConfigError, match="s3fs"):  # a row that any other machine could read is no bad file
        places.read("s3://bucket/a.png")


def _missing(package):
    from importlib.util import find_spec

    return find_spec(package) is None


# folders


def test_a_folder_of_images(tmp_path):
    names = [
        "b.png",
        "a.JPG",
        "sub/c.tiff",
        "sub/deep/d.webp",
        "a-first/e.bmp",
        "é::[1]*.png",
        "note.txt",
        "x.png.part",
    ]
    names += [".hidden.png", ".git/f.png", "__MACOSX/._b.png", "sub/.unfinished-a1b2.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "linked.png").symlink_to("b.png")
    (tmp_path / "broken.png").symlink_to("nothing")
    (tmp_path / "sub" / "back").symlink_to(tmp_path)
    (tmp_path / "sub" / "back.png").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    base, rows = rows_of(tmp_path)
    assert base == str(tmp_path)
    files = [
        "a.JPG",
        "b.png",
        "broken.png",
        "linked.png",
        "é::[1]*.png",
        "a-first/e.bmp",
        "sub/c.tiff",
        "sub/deep/d.webp",
    ]
    assert rows == [(f"{tmp_path}/{name}", None, None) for name in files]


def test_places_with_odd_names(tmp_path):
    folder = tmp_path / "a::b [1] 100%?#*"
    folder.mkdir()
    (folder / "ü::.png").write_bytes(b"1")
    (_, [(place, _, _)]) = rows_of(folder)
    assert places.read(place) == b"1"
    assert places.names(str(folder)) == ["ü::.png"]


def test_a_name_that_is_no_utf8_is_a_row_that_cannot_be_read(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (tmp_path / "good.png").touch()
    rows = rows_of(tmp_path)[1]
    assert [uri for uri, _, _ in rows] == [f"{tmp_path}/caf\\udce9.png", f"{tmp_path}/good.png"]
    assert write_listing(f"{tmp_path}/listing", rows, 10) == 2
    with pytest.raises(DataError, match="expected a readable file, found none"):
        places.read(rows[0][0])


def test_an_empty_folder_is_no_job(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError) as caught:
        open_job(f"{tmp_path}/out", f"{tmp_path}/photos", ASKED)
    assert str(caught.value) == (
        f"Expected photographs in {tmp_path}/photos, found none; name another folder or manifest."
    )


class ObjectStore(MemoryFileSystem):
    """As they do: it keeps listings, has ETags, and lists a folder's own mark in the folder."""

    protocol = "objects"
    store, pseudo_dirs, listings = {}, [""], {}

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path)
        if path not in self.listings:
            found = super().ls(path, detail=True)
            found = [{**one, "ETag": f'"{len(one["name"])}"'} if one["type"] == "file" else one for one in found]
            self.listings[path] = [*found, {"name": f"{path}/", "size": 0, "type": "directory"}]
        return self.listings[path]

    def info(self, path, **options):
        path = self._strip_protocol(path)
        if path == "/refused":
            raise PermissionError("Forbidden")
        known = self.listings.get(self._parent(path))
        if known is not None and all(one["name"] != path for one in known):
            raise FileNotFoundError(path)
        return super().info(path)

    def invalidate_cache(self, path=None):
        path = None if path is None else self._strip_protocol(path)
        for folder in list(self.listings):
            if path is None or folder in (path, self._parent(path)):
                del self.listings[folder]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("objects://", "memory://"))


@pytest.fixture
def objects():
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    ObjectStore.listings.clear()
    store = fsspec.filesystem("objects")
    yield store
    store.store.clear()


def test_a_folder_of_an_object_store(objects):
    for name in ("b.png", "sub/a.png", ".c.png", "note.txt", "sub/deep/d.jpg"):
        objects.pipe_file(f"/photos/{name}", b"1")
    assert rows_of("objects://photos") == (
        "objects://photos",
        [
            ("objects://photos/b.png", "13", None),
            ("objects://photos/sub/a.png", "17", None),
            ("objects://photos/sub/deep/d.jpg", "22", None),
        ],
    )
    assert not objects.listings  # a large tree's would fill the memory


def test_a_place_that_nobody_may_look_at_is_not_taken_for_an_empty_one(objects):
    with pytest.raises(DataError) as caught:
        places.exists("objects://refused")
    assert str(caught.value) == (
        "Expected a place that can be read and written at objects://refused, found none (Forbidden); check its name "
        "and your rights."
    )
    assert not places.exists("objects://none")


def test_what_others_write_into_an_object_store_is_seen(objects):
    assert places.names("objects://out") == []
    objects.makedirs("/out")
    assert places.names("objects://out") == []
    MemoryFileSystem.pipe_file(objects, "/out/job.json", b"1")  # behind the listing's back
    assert places.exists("objects://out/job.json")
    assert places.names("objects://out") == ["job.json"]
    assert not places.create("objects://out/job.json", b"2")


# the listing


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 40),
    shard_size=st.integers(1, 13),
    optional=st.lists(st.one_of(st.none(), st.text(max_size=3)), min_size=1, max_size=3),
)
def test_shard_by_shard_the_listing_is_the_manifest(tmp_path_factory, count, shard_size, optional):
    folder = str(tmp_path_factory.mktemp("listing"))
    rows = [
        (f"{i}.png", optional[i % len(optional)] or None, optional[-i % len(optional)] or None) for i in range(count)
    ]
    assert write_listing(folder, iter(rows), shard_size) == count
    shards = [read_shard(folder, shard, shard_size) for shard in range(-(-count // shard_size))]
    assert [entry for shard in shards for entry in shard] == [Entry(i, *row) for i, row in enumerate(rows)]
    assert all(len(shard) == shard_size for shard in shards[:-1])


def test_a_listing_of_several_parts(tmp_path):
    """Either side of what one part holds, and every shard of the largest."""
    for count in (SHARDS_A_PART * 2 - 1, SHARDS_A_PART * 2, SHARDS_A_PART * 2 + 1):
        rows = [(f"{i}.png", None, None) for i in range(count)]
        folder = tmp_path / str(count)
        assert write_listing(str(folder), iter(rows), 2) == count
        parts = sorted(path.name for path in folder.iterdir())
        assert parts == [f"part-{i:06d}.parquet" for i in range(1 + (count > SHARDS_A_PART * 2))]
        last = -(-count // 2) - 1
        assert read_shard(str(folder), last, 2) == [Entry(i, f"{i}.png") for i in range(last * 2, count)]
    entries = [entry for shard in range(last + 1) for entry in read_shard(str(folder), shard, 2)]
    assert entries == [Entry(i, f"{i}.png") for i in range(count)]


def test_a_listing_that_is_gone(tmp_path):
    with pytest.raises(DataError) as caught:
        read_shard(f"{tmp_path}/listing", 300, 10)
    assert str(caught.value) == (
        f"Expected the listing of this job in {tmp_path}/listing/part-000001.parquet, found none that can be read (No "
        "such file or directory); begin again with another --out."
    )


def write_large(path, count):
    """A manifest of `count` rows with names that hardly repeat; a Parquet file in the row groups of its writers."""
    schema = pa.schema([("uri", pa.string()), ("etag", pa.string())])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, count, 50_000):
            uris = [f"s3://archive/{i * 2654435761 % 2**32:08x}/{i:012d}.png" for i in range(start, start + 50_000)]
            writer.write_table(table(uri=uris, etag=[uri[13:21] * 4 for uri in uris]))


@pytest.mark.parametrize(
    "counts", [(100_000, 400_000), pytest.param((500_000, 4_000_000), marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_memory_does_not_grow_with_the_manifest(tmp_path, counts):
    growths = []
    for count in counts:
        write_large(tmp_path / "m.parquet", count)
        rows, growth = run("grow", tmp_path / "m.parquet", tmp_path / f"listing-{count}")
        assert rows == count
        growths.append(growth)
    assert growths[1] < growths[0] + 20  # Arrow's own way over row groups: 33 a million


def run(*arguments):
    """The numbers that a process prints."""
    command = [sys.executable, table_work.__file__, *map(str, arguments)]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


# the job


def begin(tmp_path, **changes):
    return open_job(f"{tmp_path}/out", f"{tmp_path}/m.csv", {**ASKED, **changes})


def test_a_job_is_written_down_once(tmp_path):
    write_csv(tmp_path / "m.csv", "uri", "a.png", "b.png", "c.png")
    job = begin(tmp_path)
    assert (job.images, job.shards, [job.rows(shard) for shard in range(2)]) == (3, 2, [2, 1])
    assert job.base == str(tmp_path)
    again = begin(tmp_path)
    assert again == job == read_job(f"{tmp_path}/out")
    (tmp_path / "m.csv").unlink()  # the job has its listing
    assert begin(tmp_path) == job
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files == sorted([JOB, f"{job.listing}/part-000000.parquet"])


def test_another_job_in_the_same_place_is_refused(tmp_path):
    write_csv(tmp_path / "m.csv", "uri", "a.png")
    begin(tmp_path)
    for change, words in (
        ({"model": "b2"}, "model (a1 before, b2 now)"),
        ({"shard_size": 3, "heatmaps": True}, "shard_size (2 before, 3 now), heatmaps (False before, True now)"),
        ({"device": "cuda"}, "device (cpu before, cuda now)"),
    ):
        assert _conflict(begin, tmp_path, **change) == (
            f"Expected the job that was begun in {tmp_path}/out, found changes in {words}; repeat the first command, "
            "or choose another --out."
        )
    write_csv(tmp_path / "n.csv", "uri", "a.png")
    other = partial(open_job, f"{tmp_path}/out", f"{tmp_path}/n.csv", ASKED)
    assert f"found changes in manifest ({tmp_path}/m.csv before, {tmp_path}/n.csv now);" in _conflict(other)
    write_csv(tmp_path / "m.csv", "uri", "a.png", "b.png")
    assert "found changes in the content of the manifest;" in _conflict(begin, tmp_path)


def _conflict(function, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "no JSON", "[1]", "{}", json.dumps({"format_version": 2}), json.dumps({"format_version": 1, "images": 3})],
)
def test_a_job_that_cannot_be_read(tmp_path, content):
    (tmp_path / "out" / JOB).parent.mkdir(parents=True)
    (tmp_path / "out" / JOB).write_text(content)
    assert _conflict(read_job, f"{tmp_path}/out") == (
        f"Expected a job of this version of ddad in {tmp_path}/out/{JOB}, found another one; choose another --out."
    )


@pytest.mark.parametrize("name", ["shard-00000000.parquet", "m.parquet"])
def test_tables_of_something_else_are_no_results(tmp_path, name):
    """A shard of a job whose job.json is gone would pass for a finished one, a manifest in OUT for results."""
    write_csv(tmp_path / "m.csv", "uri", "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).touch()
    assert _conflict(begin, tmp_path) == (
        f"Expected a new or empty folder, or that of a job, found other tables in {tmp_path}/out, as {name}; choose "
        "another --out."
    )


def test_a_place_that_cannot_be_written(tmp_path):
    write_csv(tmp_path / "m.csv", "uri", "a.png")
    (tmp_path / "out").touch()
    with pytest.raises(
        DataError, match=rf"^Expected a place to write {tmp_path}/out/.*listing-.*; free space or choose"
    ):
        begin(tmp_path)


def test_of_many_that_begin_at_once_one_counts(tmp_path):
    """As in a Slurm array."""
    write_csv(tmp_path / "m.csv", "uri", *(f"{i}.png" for i in range(100)))
    with ThreadPoolExecutor(8) as pool:
        jobs = list(pool.map(lambda _: begin(tmp_path), range(24)))
    assert set(jobs) == {read_job(f"{tmp_path}/out")}


def test_only_whole_results_count_as_finished(tmp_path):
    for name in ("shard-00000001.parquet", "shard-00000012.parquet", ".unfinished-x1", "shard-00000003.parquet-1a"):
        (tmp_path / name).touch()
    (tmp_path / "shard-00000004.parquet").mkdir()
    assert finished(str(tmp_path)) == {1, 12}
    assert finished(f"{tmp_path}/none") == set()


def test_a_job_in_memory_and_its_results(objects):
    objects.pipe_file("/photos/a.png", b"1")
    job = open_job("objects://out/1", "objects://photos", ASKED)
    assert read_job("objects://out/1") == job == open_job("objects://out/1", "objects://photos", ASKED)
    assert read_shard(places.join("objects://out/1", job.listing), 0, 2) == [Entry(0, "objects://photos/a.png", "13")]
    assert isinstance(job, Job)


# places


def test_absolute_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.absolute("a/../b") == f"{tmp_path}/b"
    assert places.absolute(tmp_path / "c") == f"{tmp_path}/c"
    assert places.absolute(f"file://{tmp_path}/d/") == f"{tmp_path}/d"
    assert places.absolute("s3://bucket/folder/") == "s3://bucket/folder"


@pytest.mark.parametrize("kind", ["", "file://"])
def test_what_cannot_be_read_is_said_at_once(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(places.MAX_FILE + 1)
    started = time.monotonic()
    for name, words in (
        ("none", "expected a readable file, found none (No such file or directory)."),
        ("", "expected a readable file, found a folder or a device."),
        ("pipe", "expected a readable file, found a folder or a device."),
        ("a\0b", "expected a readable file, found none (embedded null byte)."),
        ("n" * 300, "expected a readable file, found none (File name too long)."),
        ("large", "expected at most 1,073,741,824 bytes, found 1,073,741,825; remove the file."),
    ):
        with pytest.raises(DataError) as caught:
            places.read(f"{kind}{tmp_path}/{name}")
        assert str(caught.value) == f"{tmp_path}/{name}: {words}"
    with pytest.raises(DataError, match="found nowhere://a"):
        places.read("nowhere://a")
    assert time.monotonic() - started < 0.9  # no attempt more


@pytest.mark.parametrize("root", ["memory://tests", "local://"])
def test_written_whole_and_replaced(tmp_path, root):
    root = root + str(tmp_path)
    for content in (b"", b"first", b"second"):
        places.write(f"{root}/a [1]/b.bin", content)
        assert places.read(f"{root}/a [1]/b.bin") == content
        assert places.names(f"{root}/a [1]") == ["b.bin"]
    assert places.create(f"{root}/c", b"1")
    assert not places.create(f"{root}/c", b"2")
    assert places.read(f"{root}/c") == b"1"
    assert places.state(f"{root}/a [1]") is None
    before = places.state(f"{root}/c")
    places.write(f"{root}/c", b"other")
    assert places.state(f"{root}/c") not in (None, before)


def test_a_process_that_is_killed_leaves_no_half(tmp_path):
    place = tmp_path / "file"
    for delay in (0.01, 0.02):
        writer = subprocess.Popen([sys.executable, table_work.__file__, "write_for_ever", place])
        before = place.stat().st_mtime_ns if place.exists() else None
        while not (place.exists() and place.stat().st_mtime_ns != before):
            time.sleep(0.005)
        time.sleep(delay)
        writer.kill()
        writer.wait()
        content = place.read_bytes()
        assert len(content) == table_work.SIZE
        assert len(set(content)) == 1
    assert all(path.name.startswith(".unfinished-") for path in tmp_path.iterdir() if path != place)


def test_one_of_many_processes_and_threads_creates_a_file(tmp_path):
    command = [sys.executable, table_work.__file__, "create_one", tmp_path / "a"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = [process.communicate()[0].split() for process in processes]
    (winner,) = [pid for pid, created in made if created == "1"]
    assert (tmp_path / "a").read_text() == winner
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: places.create(f"{tmp_path}/b", b"%d" % number), range(40)))
    assert created.count(True) == 1
    assert (tmp_path / "b").read_text() == str(created.index(True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


class _Handler(SimpleHTTPRequestHandler):
    """A folder, without ETags, and some answers that no folder gives."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path.startswith("/status/"):
            self.send_error(int(self.path.rsplit("/", 1)[1]))
        elif self.path == "/once" and self.server.asked.count("/once") == 1:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *arguments):
        pass


@contextmanager
def web(folder):
    """A real server on a free port of this machine: its address, and a list of what is asked of it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.asked
        finally:
            server.shutdown()
            thread.join()


def test_over_http(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(places, "_PATIENCE", (0.01, 0.01))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ä b.png").write_bytes(b"photo")
    (tmp_path / "once").write_bytes(b"second time")
    write_csv(tmp_path / "m.csv", "uri,etag", "sub/ä b.png,e1", "/elsewhere/c.png,")
    pyarrow.parquet.write_table(table(uri=["sub/ä b.png"]), tmp_path / "m.parquet")
    with web(tmp_path) as (address, asked):
        base, rows = rows_of(f"{address}/m.csv")
        assert (base, rows) == (address, [("sub/ä b.png", "e1", None), ("/elsewhere/c.png", None, None)])
        assert places.read(places.join(base, rows[0][0])) == b"photo"
        assert rows_of(f"{address}/m.parquet")[1] == [("sub/ä b.png", None, None)]
        assert refusal(f"{address}/none.csv").startswith(f"Expected a manifest or a folder of images at {address}/none")
        state = places.state(f"{address}/m.csv")
        os.utime(tmp_path / "m.csv", (1, 1))
        assert places.state(f"{address}/m.csv") not in (None, state)
        assert places.read(f"{address}/once") == b"second time"
        for status, attempts in ((404, 1), (403, 1), (410, 1), (429, 3), (500, 3)):
            with pytest.raises(
                DataError, match=rf"^{address}/status/{status}: expected a readable file, found none \("
            ):
                places.read(f"{address}/status/{status}")
            assert asked.count(f"/status/{status}") == attempts, status
    with pytest.raises(DataError, match=r"expected a readable file, found none \("):
        places.read(f"{address}/once")  # nobody is there


# results


def test_the_columns_of_results():
    assert [f"{name}: {kind}" for name, kind in zip(RESULTS.names, RESULTS.types, strict=True)] == [
        "row: int64",
        "uri: string",
        "etag: string",
        "sha256: string",
        "category: string",
        "anomaly_score: double",
        "p_value: double",
        "is_anomalous: bool",
        "threshold: double",
        "regions: list<item: struct<box: list<item: int32>, area: int64, peak: double>>",
        "photo: struct<brightness: double, focus: double, horizontal: double, vertical: double>",
        "error: string",
        "model: string",
    ]


def test_results_come_back_and_have_the_same_bytes():
    region = {"box": [1, 2, 3, 4], "area": 5, "peak": 0.1}
    photo = {"brightness": 1.0, "focus": -0.5, "horizontal": 0.5, "vertical": 0.25}
    rows = [
        {"row": 0, "uri": "a", "anomaly_score": 0.1, "is_anomalous": True, "regions": [region], "photo": photo},
        {"row": 1, "uri": "b", "error": "no"},
        {"row": 2, "uri": "c", "anomaly_score": float("inf"), "regions": []},
    ]
    content = encode_results(rows)
    assert content == encode_results(rows)
    back = pyarrow.parquet.read_table(io.BytesIO(content))
    assert back.schema == RESULTS
    assert [{name: value for name, value in row.items() if value is not None} for row in back.to_pylist()] == rows


@pytest.mark.parametrize(("rows", "values", "shape"), [([4, 7], [1, 2.5], (2, 2, 3)), ([], [], (0, 0, 0))])
def test_maps_come_back(rows, values, shape):
    content = encode_maps(rows, [np.full((2, 3), value, np.float16) for value in values])
    with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
        assert loaded["row"].tolist() == rows
        assert loaded["row"].dtype == np.int64
        assert loaded["anomaly_map"].shape == shape
        assert loaded["anomaly_map"].dtype == np.float16
        assert loaded["anomaly_map"].max(axis=(1, 2), initial=0).tolist() == values
