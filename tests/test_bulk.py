"""Archives in shards: the same bytes whoever computes them, and a row for every file. pytest tests/test_bulk.py"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dask.dataframe
import numpy as np
import pandas
import psutil
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from crew_work import still_running, until
from ddad.bulk.frames import empty_frame, predict_batches
from ddad.bulk.job import LOG, MAPS, open_job, read_job
from ddad.bulk.places import join
from ddad.bulk.run import estimate, job_options, score_manifest
from ddad.bulk.scoring import ShardScorer
from ddad.bulk.tables import FRAME, RESULTS, Entry, read_manifest
from ddad.detector import RECORD, Detector, check_files
from ddad.errors import ConfigError, DataError, ModelError
from ddad.prediction import photo_statistics
from hostile import png_bomb
from test_distributed import PRIVATE, needs_private_network
from tiny import photo, train_model, write_photos

OPTIONS = {"shard_size": 8, "batch_size": 3, "heatmaps": True}
NOT_READ = "expected a readable file, found none"


def write_archive(folder):
    """A manifest of 27 rows, four shards. Returns each uri with words of the error it must give, or None."""
    write_photos(folder / "photos", range(500, 514))
    defect = photo(600)
    defect[8:16, 8:20] = (255, 0, 0)
    Image.fromarray(defect).save(folder / "defect.png")
    Image.fromarray(np.tile(photo(601), (3, 4, 1))).save(folder / "large.jpg")
    deep = photo(602)[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(folder / "nan.tif")
    whole = (folder / "photos" / "500.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("This is no photograph.\n")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(png_bomb(12_000))
    os.mkfifo(folder / "pipe.png")
    rows = [
        *((f"photos/{number}.png", None) for number in range(500, 506)),
        (f"{folder}/photos/506.png", None),
        (f"file://{folder}/photos/507.png", None),
        ("photos/500.png", None),  # twice is twice
        ("truncated.png", "expected a whole PNG, JPEG, BMP, TIFF or WebP image, but it cannot be decoded"),
        ("text.png", "the content is none of these"),
        ("empty.png", "the file is empty"),
        ("missing.png", f"{NOT_READ} (No such file or directory)"),
        ("photos", "expected a readable file, found a folder or a device"),
        ("pipe.png", "expected a readable file, found a folder or a device"),
        ("nowhere://bucket/a.png", "found nowhere://bucket/a.png (Protocol not known: nowhere)"),
        ("nan.tif", "expected values from 0 to 1, but found nan"),
        ("bomb.png", "but found 12000 x 12000"),
        ("deep.png", None),
        ("defect.png", None),
        ("large.jpg", None),
        *((f"photos/{number}.png", None) for number in range(508, 514)),
    ]
    lines = [f"{uri},{'e' + str(number) if number % 2 else ''}" for number, (uri, _) in enumerate(rows)]
    (folder / "manifest.csv").write_text("\n".join(["uri,etag", *lines]) + "\n")
    return rows


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A model, an archive, and its results by a worker of this process: the yardstick."""
    folder = tmp_path_factory.mktemp("bulk")
    train_model(write_photos(folder / "good", range(12)), folder / "model")
    (folder / "archive").mkdir()
    said = write_archive(folder / "archive")
    made = SimpleNamespace(
        model=folder / "model",
        archive=folder / "archive",
        manifest=f"{folder}/archive/manifest.csv",
        said=said,
        out=folder / "out",
    )
    threads = torch.get_num_threads()
    worker = in_this_process(made, made.out, readers=1)
    made.reports = [worker(shard) for shard in range(4)]
    made.detector = Detector.from_pretrained(made.model, "cpu")
    yield made
    torch.set_num_threads(threads)


def in_this_process(setup, out, readers):
    job = open_job(str(out), setup.manifest, job_options(setup.model, "cpu", **OPTIONS))
    return ShardScorer(str(out), job, setup.model, readers, "cpu")


def score(setup, out, **options):
    return score_manifest(setup.model, setup.manifest, out, device="cpu", **OPTIONS, **options)


def contents(out):
    """Every file of results by name, as bytes."""
    files = [*out.glob("*.parquet"), *(out / MAPS).iterdir()]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def times(out):
    return {file.name: file.stat().st_mtime_ns for file in out.glob("*.parquet")}


def rows_in(out):
    return pyarrow.dataset.dataset(str(out), format="parquet").to_table().to_pylist()


# what a row says


def test_every_row_of_the_manifest_has_a_row(setup):
    rows = rows_in(setup.out)
    assert [row["row"] for row in rows] == list(range(27))
    assert [row["uri"] for row in rows] == [uri for uri, _ in setup.said]
    assert [row["etag"] for row in rows] == [f"e{number}" if number % 2 else None for number in range(27)]
    assert {row["model"] for row in rows} == {check_files(setup.model)}
    assert {row["category"] for row in rows} == {None}
    # read without its listing, as anybody else would
    assert pyarrow.dataset.dataset(sorted(map(str, setup.out.glob("*.parquet")))).count_rows() == 27
    assert all(pyarrow.parquet.read_schema(file) == RESULTS for file in setup.out.glob("*.parquet"))


def test_a_bad_file_is_a_row_with_its_reason(setup):
    rows = rows_in(setup.out)
    for row, (uri, words) in zip(rows, setup.said, strict=True):
        assert (row["error"] is None) == (words is None), row
        if words is not None:
            assert words in row["error"]
            assert uri in row["error"]
            assert "\n" not in row["error"]
            nothing = [row[name] for name in ("anomaly_score", "p_value", "is_anomalous", "threshold", "photo")]
            assert (nothing, row["regions"]) == ([None] * 5, [])
        file = setup.archive / uri.removeprefix("file://")
        content = file.read_bytes() if file.is_file() else None
        assert row["sha256"] == (hashlib.sha256(content).hexdigest() if content is not None else None)


def batches(setup):
    """Rows with their files, as they went through the networks together."""
    rows = rows_in(setup.out)
    for shard in range(0, 27, 8):
        for first in range(shard, min(shard + 8, 27), 3):
            batch = [row for row in rows[first : min(first + 3, shard + 8)] if row["error"] is None]
            yield batch, [setup.archive / row["uri"].removeprefix("file://") for row in batch]


def test_a_row_says_what_predict_says(setup):
    flagged = seen = 0
    for rows, files in batches(setup):
        for row, expected in zip(rows, setup.detector.predict(files, batch_size=3), strict=True):
            for name in ("anomaly_score", "p_value", "is_anomalous", "threshold"):
                assert row[name] == getattr(expected, name), (name, row)
            regions = [(tuple(region["box"]), region["area"], region["peak"]) for region in row["regions"]]
            assert regions == [(region.box, region.area, region.peak) for region in expected.regions]
            assert row["photo"] == photo_statistics(expected.image)._asdict()
            flagged += expected.is_anomalous
            seen += 1
        for row, file in zip(rows[:1], files[:1], strict=True):  # alone, rounding moves the seventh digit
            assert row["anomaly_score"] == pytest.approx(setup.detector.predict(file).anomaly_score, rel=1e-5)
    assert seen == 18
    assert 0 < flagged < 18


def test_maps_are_those_of_predict_in_half_precision(setup):
    numbers, maps = [], []
    for shard in range(4):
        with np.load(setup.out / MAPS / f"shard-{shard:08d}.npz", allow_pickle=False) as loaded:
            numbers.append(loaded["row"].tolist())
            maps += [*loaded["anomaly_map"]]
    assert [number for shard in numbers for number in shard] == [
        number for number, (_, words) in enumerate(setup.said) if words is None
    ]
    assert numbers[1] == [8]  # seven of its eight cannot be read
    expected = [one.anomaly_map for _, files in batches(setup) for one in setup.detector.predict(files, batch_size=3)]
    assert np.array_equal(maps, np.stack(expected).astype(np.float16))


def test_what_a_worker_reports(setup):
    first, second, *_ = setup.reports
    assert (first.shard, first.images, first.errors) == (0, 8, 0)
    assert (second.shard, second.images, second.errors) == (1, 8, 7)
    assert first.bytes_read == sum((setup.archive / "photos" / f"{n}.png").stat().st_size for n in range(500, 508))
    assert first.bytes_written == sum(
        file.stat().st_size for file in (setup.out / "shard-00000000.parquet", setup.out / MAPS / "shard-00000000.npz")
    )
    flagged = sum(bool(row["is_anomalous"]) for row in rows_in(setup.out))
    assert sum(report.flagged for report in setup.reports) == flagged


# who computes them does not matter


@pytest.fixture(scope="module")
def resumed(setup, tmp_path_factory):
    """One shard by this process, the others by another one, with other numbers of threads that read."""
    out = tmp_path_factory.mktemp("resumed")
    in_this_process(setup, out, readers=3)(2)
    before = times(out)
    said, seen = [], []
    report = score(setup, out, workers=1, on_stage=said.append, on_progress=seen.append)
    return SimpleNamespace(out=out, before=before, said=said, seen=seen, report=report)


def test_another_process_and_another_run_write_the_same_bytes(setup, resumed):
    assert contents(resumed.out) == contents(setup.out)
    assert len(contents(setup.out)) == 8


def test_finished_shards_are_not_touched(resumed):
    assert resumed.before.items() <= times(resumed.out).items()
    assert "8 of 27 are scored already" in resumed.said[0]
    assert (resumed.report.images, resumed.report.scored, resumed.report.given_up) == (27, 19, ())


def test_progress(setup, resumed):
    assert [one.done for one in resumed.seen] == sorted({one.done for one in resumed.seen})
    assert resumed.seen[-1].done == resumed.seen[-1].images == 27
    assert resumed.seen[0].seconds_left is None  # one shard is start-up
    assert resumed.seen[-1].seconds_left == 0
    assert all(one.seconds_left > 0 for one in resumed.seen[1:-1])
    errors = sum(report.errors for report in setup.reports if report.shard != 2)
    assert resumed.seen[-1].errors == resumed.report.errors == errors


def test_times_are_in_the_log_and_nothing_but_results_beside_them(resumed):
    (log,) = (resumed.out / LOG).iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["shard"] for line in lines) == [0, 1, 3]
    assert all(line["seconds"] > 0 and line["worker"] for line in lines)
    shards = [f"shard-{shard:08d}" for shard in range(4)]
    shown = sorted(path.name for path in resumed.out.iterdir() if path.name[0] != "_")
    assert shown == [f"{one}.parquet" for one in shards]
    assert sorted(path.name for path in (resumed.out / MAPS).iterdir()) == [f"{one}.npz" for one in shards]


def test_the_same_command_again_starts_no_worker(setup, resumed):
    before = times(resumed.out)
    report = score(setup, resumed.out, workers=2, on_progress=lambda one: pytest.fail("nothing was left"))
    assert (report.images, report.scored) == (27, 0)
    assert times(resumed.out) == before


def test_another_job_into_the_same_place(setup, tmp_path):
    refused = r"^Expected the job that was begun in .*/out, found changes in {}; repeat the first command, or choose"
    with pytest.raises(ConfigError, match=refused.format(r"shard_size \(8 before, 9 now\)")):
        score_manifest(setup.model, setup.manifest, setup.out, device="cpu", **{**OPTIONS, "shard_size": 9})
    shutil.copytree(setup.model, tmp_path / "other")
    record = json.loads((tmp_path / "other" / RECORD).read_text())
    (tmp_path / "other" / RECORD).write_text(json.dumps(record))  # other bytes
    with pytest.raises(ConfigError, match=refused.format(r"model \([0-9a-f]{64} before, [0-9a-f]{64} now\)")):
        score_manifest(tmp_path / "other", setup.manifest, setup.out, device="cpu", **OPTIONS)
    # changed after the job was opened, as by a training that ends in the middle of it
    with pytest.raises(ModelError) as caught:
        ShardScorer(str(setup.out), read_job(str(setup.out)), tmp_path / "other", 1, "cpu")
    assert str(caught.value) == (
        f"Expected the model that the job in {setup.out} began with, found another one at {tmp_path}/other."
    )
    manifest = Path(setup.manifest)
    content, state = manifest.read_text(), manifest.stat()
    try:
        manifest.write_text(content + "photos/500.png,\n")
        with pytest.raises(ConfigError, match=refused.format("the content of the manifest")):
            score(setup, setup.out)
    finally:
        manifest.write_text(content)
        os.utime(manifest, ns=(state.st_atime_ns, state.st_mtime_ns))


def test_a_model_that_is_damaged(setup, tmp_path):
    shutil.copytree(setup.model, tmp_path / "model")
    with (tmp_path / "model" / "statistics.safetensors").open("ab") as file:
        file.write(b"1")
    with pytest.raises(ModelError, match=r"found that statistics\.safetensors differs; copy the model again\.$"):
        score_manifest(tmp_path / "model", setup.manifest, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written(setup, tmp_path):
    worker = in_this_process(setup, tmp_path / "out", readers=1)
    (tmp_path / "out" / "shard-00000003.parquet").mkdir()
    with pytest.raises(DataError, match=r"^Expected a place to write .*/shard-00000003\.parquet, found that it cannot"):
        worker(3)
    assert not times(tmp_path / "out").keys() - {"shard-00000003.parquet"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "spark"}, r"^Expected an engine among local, ray, found 'spark'\.$"),
        ({"slice_of": (3, 2)}, r"^Expected a slice from 1/n to n/n, found 3/2\.$"),
        ({"slice_of": (0, 2)}, r"^Expected a slice from 1/n to n/n, found 0/2\.$"),
        ({"batch_size": 0}, r"^Expected batch_size to be at least 1, found 0\.$"),
    ],
)
def test_options_that_cannot_work(setup, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        score_manifest(setup.model, setup.manifest, tmp_path, device="cpu", **options)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(setup, tmp_path):
    before = sorted(setup.archive.rglob("*"))
    expected = estimate(setup.model, setup.manifest, workers=3, device="cpu", **OPTIONS)
    assert (expected.images, expected.sample, expected.shards, expected.workers) == (27, 27, 4, 3)
    assert expected.errors == 9
    assert expected.bytes_read == pytest.approx(sum(report.bytes_read for report in setup.reports) / 27)
    assert expected.hours == pytest.approx(expected.worker_hours / 2)  # four shards, three workers: two rounds
    assert sorted(setup.archive.rglob("*")) == before


def test_an_archive_of_bad_files_only(setup, tmp_path):
    (tmp_path / "m.csv").write_text("uri\n" + "".join(f"{number}.png\n" for number in range(5)))
    job = open_job(f"{tmp_path}/out", f"{tmp_path}/m.csv", job_options(setup.model, "cpu", heatmaps=True))
    assert ShardScorer(f"{tmp_path}/out", job, setup.model, 2, "cpu")(0).errors == 5
    assert all(NOT_READ in row["error"] for row in rows_in(tmp_path / "out"))
    with np.load(tmp_path / "out" / MAPS / "shard-00000000.npz") as maps:
        assert len(maps["row"]) == len(maps["anomaly_map"]) == 0


def test_results_are_a_manifest(setup):
    """So that those of one model are scored again by another."""
    base, rows = read_manifest(str(setup.out))
    assert base == str(setup.out)
    listed = [Entry(number, *row) for number, row in enumerate(rows)]
    assert listed == [Entry(row["row"], row["uri"], row["etag"]) for row in rows_in(setup.out)]


# killed, shared out, spread: all of it with real processes


SCORE = """
import sys
from ddad.bulk.run import score_manifest
model, manifest, out, options = sys.argv[1:]
score_manifest(model, manifest, out, on_stage=print, **eval(options))
"""


def command(setup, out, **options):
    """A process that scores, as `ddad score` does."""
    options = {"device": "cpu", **OPTIONS, **options}
    return [sys.executable, "-c", SCORE, str(setup.model), setup.manifest, str(out), repr(options)]


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "readers"), [(1, 8), (2, 1), (4, 2)])
def test_any_number_of_workers_writes_the_same_bytes(setup, tmp_path, workers, readers):
    assert score(setup, tmp_path, workers=workers, readers=readers).scored == 27
    assert contents(tmp_path) == contents(setup.out)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_stopped(setup, tmp_path, how):
    """Its workers end and say nothing, what is finished stays, and the same command goes on."""
    driver = subprocess.Popen(
        command(setup, tmp_path, workers=2), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until(lambda: times(tmp_path), 180)
    workers = [process.pid for process in psutil.Process(driver.pid).children()]
    if how == signal.SIGINT:  # Ctrl-C goes to all of them
        os.killpg(driver.pid, how)
    else:
        driver.send_signal(how)
    _, errors = driver.communicate()
    until(lambda: not still_running(workers))
    assert errors.count("Traceback") == (1 if how == signal.SIGINT else 0), errors  # the driver's own
    before = times(tmp_path)
    assert score(setup, tmp_path, workers=2).scored == 27 - sum(3 if "00003" in name else 8 for name in before)
    assert before.items() <= times(tmp_path).items()
    assert contents(tmp_path) == contents(setup.out)


@pytest.mark.slow
def test_a_worker_that_is_killed(setup, tmp_path):
    """Between two shards or within one: its shard is given to another."""
    said, killed = [], []

    def kill(progress):
        if not killed:
            (worker,) = (one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline()))
            killed.append(worker.pid)
            worker.kill()

    report = score(setup, tmp_path, workers=1, on_progress=kill, on_stage=said.append)
    assert (report.scored, report.given_up) == (27, ())
    (sentence,) = said[1:]
    assert re.fullmatch(
        rf"Shard \d lost its worker \(process {killed[0]} ended by signal SIGKILL\)\.",
        sentence,
    )
    assert contents(tmp_path) == contents(setup.out)
    (log,) = (tmp_path / LOG).iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [sorted(line)[:2] for line in lines if "lost" in line] == [["lost", "shard"]]


@pytest.mark.slow
def test_slices_side_by_side(setup, tmp_path):
    """As a Slurm array begins them: at once, into a folder that is not there yet."""
    out = tmp_path / "out"
    slices = [subprocess.Popen(command(setup, out, workers=1, slice_of=(part, 3))) for part in (1, 2, 3)]
    assert [one.wait() for one in slices] == [0, 0, 0]
    assert contents(out) == contents(setup.out)
    assert len(list((out / LOG).iterdir())) == 3


@pytest.mark.slow
def test_what_stops_a_worker_stops_the_run_in_one_sentence(setup, tmp_path):
    out = tmp_path / "out"
    job = open_job(str(out), setup.manifest, job_options(setup.model, "cpu", **OPTIONS))
    shutil.rmtree(out / job.listing)
    with pytest.raises(DataError, match=r"^Expected the listing of this job in .*; begin again with another --out\.$"):
        score(setup, out, workers=2)


@pytest.mark.slow
@needs_private_network
def test_ray_writes_the_same_bytes(setup, tmp_path):
    done = subprocess.run([*PRIVATE, *command(setup, tmp_path, engine="ray", workers=2)], check=False)
    assert done.returncode == 0
    assert contents(tmp_path) == contents(setup.out)


ACTORS = """
import json, sys
import crew_work
from ddad.bulk.crew import Lost, drive
from ddad.cluster import Actors, connect

def results(*what):
    losses = []
    with Actors(crew_work.squares, (sys.argv[1], *what), most=2) as crew:
        ended = list(drive(crew, range(5), lambda task, reason: losses.append(task)))
    return [sorted((task, None if isinstance(one, Lost) else one) for task, one in ended), sorted(losses)]

connect()
said = [results((0, "dies"), (2, "dies once"))]
for kind in ("sentence", "trace"):
    try:
        results((1, kind))
    except Exception as error:
        said.append([isinstance(error, BrokenPipeError), type(error).__name__, str(error)])
print(json.dumps(said))
"""


@pytest.mark.slow
@needs_private_network
def test_a_crew_of_actors_keeps_the_rules_of_processes(tmp_path):
    """Those of tests/test_crew.py: each task once, a deadly one given up, errors raised in the driver."""
    command = [*PRIVATE, sys.executable, "-c", ACTORS, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("[["))  # Ray speaks, too
    (results, losses), sentence, trace = json.loads(line)
    assert results == [[0, None], [1, 1], [2, 4], [3, 9], [4, 16]]
    assert losses == [0, 0, 0, 0, 0, 2]
    assert sentence == [False, "DataError", "Expected a number, found none; count again."]
    assert trace[0]
    assert "in square" in trace[2]


@pytest.mark.slow
@needs_private_network
def test_an_actor_that_is_killed(setup, tmp_path):
    driver = subprocess.Popen(
        [*PRIVATE, *command(setup, tmp_path, engine="ray", workers=1)], stdout=subprocess.PIPE, text=True
    )
    until(lambda: times(tmp_path), 240)
    (log,) = (tmp_path / LOG).iterdir()
    until(lambda: log.read_text().endswith("\n"))
    os.kill(int(json.loads(log.read_text().splitlines()[0])["worker"].rsplit(":", 1)[1]), signal.SIGKILL)
    printed, _ = driver.communicate()
    assert driver.returncode == 0
    assert "lost its worker (" in printed
    assert contents(tmp_path) == contents(setup.out)


@pytest.mark.slow
@needs_private_network
def test_a_cluster_that_is_not_there(setup, tmp_path):
    missing = command(setup, tmp_path, engine="ray", address="127.0.0.1:6999")
    done = subprocess.run([*PRIVATE, *missing], capture_output=True, text=True, check=False, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ddad.errors.ConfigError: Expected a Ray cluster at 127.0.0.1:6999, found none that answers ("
    )
    assert not times(tmp_path)


NODES = """
import sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster
from ddad.bulk.run import score_manifest

model, manifest, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)

def take_away():
    while not list(Path(out).glob("*.parquet")):
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    print("taken away", flush=True)

threading.Thread(target=take_away, daemon=True).start()
options = {"shard_size": 8, "batch_size": 3, "heatmaps": True}
report = score_manifest(model, manifest, out, engine="ray", workers=2, address=cluster.address, **options)
print(report.scored, report.given_up)
"""


@pytest.mark.slow
@needs_private_network
def test_a_machine_that_is_taken_away(setup, tmp_path):
    """One of two machines of a cluster; the job goes on with the other."""
    command = [*PRIVATE, sys.executable, "-c", NODES, setup.model, setup.manifest, tmp_path]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of this test " * 3}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | token, stdout=subprocess.PIPE, text=True, check=True
    )
    said = done.stdout.splitlines()
    assert "taken away" in said
    assert f"{len(setup.said)} ()" in said
    assert contents(tmp_path) == contents(setup.out)


# in Dask and Spark


def frames_of(setup, count):
    rows = rows_in(setup.out)[:count]
    frame = pandas.DataFrame({"uri": [join(str(setup.archive), row["uri"]) for row in rows]}, index=range(7, 7 + count))
    return rows, frame


def test_data_frames(setup):
    rows, frame = frames_of(setup, 14)
    first, second = predict_batches([frame[:5], frame[5:]], setup.model, batch_size=3)
    found = pandas.concat([first, second])
    assert list(found.columns) == FRAME.names
    assert list(found.index) == list(frame.index)
    assert list(found["uri"]) == list(frame["uri"])
    for name in ("sha256", "is_anomalous", "model"):
        assert list(found[name].replace({np.nan: None})) == [row[name] for row in rows]
    assert [isinstance(error, str) for error in found["error"]] == [row["error"] is not None for row in rows]
    scores = np.array([row["anomaly_score"] for row in rows], float)  # NaN where there is none
    np.testing.assert_allclose(found["anomaly_score"], scores, rtol=1e-5)
    assert np.isnan(scores).sum() == 5
    assert list(empty_frame().columns) == FRAME.names
    with pytest.raises(DataError, match=r"^Expected a column uri, found path; rename the one that holds the paths\.$"):
        next(predict_batches([frame.rename(columns={"uri": "path"})], setup.model))


def test_dask(setup):
    _, frame = frames_of(setup, 6)
    expected = next(predict_batches([frame], setup.model))
    split = dask.dataframe.from_pandas(frame, npartitions=2)
    scored = split.map_partitions(lambda one: next(predict_batches([one], setup.model)), meta=empty_frame())
    found = scored.compute(scheduler="synchronous")
    assert list(found["sha256"]) == list(expected["sha256"])
    np.testing.assert_allclose(found["anomaly_score"], expected["anomaly_score"], rtol=1e-5)


SPARK = """
import json, sys
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema
from ddad.bulk.frames import predict_batches
from ddad.bulk.tables import FRAME

model, *uris = sys.argv[1:]
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
frame = spark.createDataFrame([(uri,) for uri in uris], ["uri"]).repartition(2)
scores = frame.mapInPandas(lambda frames: predict_batches(frames, model), schema=from_arrow_schema(FRAME))
print(json.dumps([[row.uri, row.anomaly_score, row.error] for row in scores.collect()]))
"""


@pytest.mark.slow
@needs_private_network
def test_spark(setup):
    pytest.importorskip("pyspark", reason="pyspark is not installed")
    if not shutil.which("java"):
        pytest.skip("Spark needs Java")
    _, frame = frames_of(setup, 6)
    uris = [*frame["uri"], f"{setup.archive}/missing.png"]
    command = [*PRIVATE, sys.executable, "-c", SPARK, str(setup.model), *uris]
    environment = os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = {uri: (score, error) for uri, score, error in json.loads(done.stdout.strip().splitlines()[-1])}
    expected = next(predict_batches([frame], setup.model))
    assert found.keys() == set(uris)
    assert NOT_READ in found[uris[-1]][1]
    for uri, score in zip(frame["uri"], expected["anomaly_score"], strict=True):
        assert found[uri][0] == pytest.approx(score, rel=1e-5)
