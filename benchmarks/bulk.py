"""Bulk scoring on a real Ray: throughput by actors, memory, and what is lost when actors and drivers are killed.

    python benchmarks/bulk.py MODEL PHOTOS --out FOLDER --images 5000 --trials 10

MODEL is a model folder, PHOTOS a folder of photographs, which are copied as often as needed; five of the copies are
spoiled. Everything runs in a network namespace of its own (Linux), since Ray listens on all interfaces. FOLDER gets
bulk.json, the archive and the runs; the same call goes on with the trials that are not done.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.dataset

from ddad.images import list_images

INSIDE = "DDAD_BENCHMARK_NAMESPACE"
ADDRESS = "127.0.0.1:6379"
SPOILED = (b"", b"not a photograph", b"\x89PNG\r\n\x1a\n cut", b"\xff\xd8\xff cut", b"BM cut")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--shard-size", type=int, default=50)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--throughput", action="store_true", help="measure 1, 2, 2 and 1 actors; wants an idle machine")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        enter_namespace()
    options.out.mkdir(parents=True, exist_ok=True)
    archive = write_archive(options.photos, options.out / "archive", options.images)
    command = ["score", options.model.absolute(), archive, "--shard-size", options.shard_size]
    result = Result(options.out / "bulk.json", options)
    reference = options.out / "reference"
    if "reference" not in result.values:
        result.note("reference", timed(command, reference, "--engine", "local", "--workers", 1))
    with head():
        if options.throughput:
            for number, actors in enumerate((1, 2, 2, 1)):
                place = options.out / f"actors-{actors}-{number}"
                shutil.rmtree(place, ignore_errors=True)
                measured = timed(command, place, *ray(actors))
                result.note(place.name, {**measured, **compared(place, reference, options.images)})
        shards = -(-options.images // options.shard_size)
        for number in range(options.trials):
            name = f"trial-{number}"
            if name not in result.values:
                place = options.out / name
                shutil.rmtree(place, ignore_errors=True)
                told = trial(command, place, shards, random.Random(number))
                result.note(name, {**told, **compared(place, reference, options.images)})
    print(json.dumps(result.values, indent=2))
    wrong = [name for name, values in result.values.items() if isinstance(values, dict) and values.get("differs")]
    sys.exit(f"Files differ in {', '.join(wrong)}." if wrong else 0)


def enter_namespace() -> None:
    """Start this script again where there is no network but loopback."""
    os.environ[INSIDE] = "1"
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # head and drivers share one
    script = 'ip link set lo up && exec "$0" "$@"'
    flags = "-n" if os.geteuid() == 0 else "-rn"
    os.execvp("unshare", ["unshare", flags, "sh", "-c", script, sys.executable, *sys.argv])


def write_archive(photos: Path, folder: Path, count: int) -> Path:
    """`count` files: copies of the photographs in folders of a thousand, five of them spoiled."""
    if folder.is_dir():
        return folder
    temporary = folder.with_name("archive.part")
    shutil.rmtree(temporary, ignore_errors=True)
    sources = list_images(photos)
    for number in range(count):
        source = sources[number % len(sources)]
        copy = temporary / f"{number // 1000:03d}" / f"{number:06d}{source.suffix}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    copies = list_images(temporary)
    for content, copy in zip(SPOILED, copies[count // 10 :: count // 5], strict=False):
        copy.write_bytes(content)
    temporary.rename(folder)
    return folder


class Result:
    """bulk.json, written after each part."""

    def __init__(self, path: Path, options: argparse.Namespace) -> None:
        self.path = path
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        self.values = (
            json.loads(path.read_text())
            if path.exists()
            else {
                "images": options.images,
                "shard_size": options.shard_size,
                "commit": commit.stdout.strip(),
                "machine": f"{os.cpu_count()} processors, {platform.machine()}",
                "date": datetime.date.today().isoformat(),
            }
        )

    def note(self, name: str, values: dict) -> None:
        print(name, json.dumps(values), flush=True)
        self.values[name] = values
        self.path.write_text(json.dumps(self.values, indent=2) + "\n")


def ray(actors: int) -> tuple:
    return "--engine", "ray", "--address", ADDRESS, "--workers", actors


@contextmanager
def head() -> Iterator[None]:
    """A Ray cluster of one machine, as `ray start` makes it."""
    command = (
        "start --head --port=6379 --node-ip-address=127.0.0.1 --num-cpus=2 --include-dashboard=false "
        "--disable-usage-stats --object-store-memory=200000000"
    )
    try:
        subprocess.run([Path(sys.executable).with_name("ray"), *command.split()], check=True, stdout=subprocess.DEVNULL)
        yield
    finally:
        for process in inside():
            if process.pid != os.getpid():
                process.kill()


def inside() -> list[psutil.Process]:
    """All processes of this network namespace."""
    mine = os.stat("/proc/self/ns/net").st_ino

    def is_inside(process: psutil.Process) -> bool:
        try:
            return os.stat(f"/proc/{process.pid}/ns/net").st_ino == mine
        except OSError:
            return False

    return [process for process in psutil.process_iter(["cmdline"]) if is_inside(process)]


def command_line(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def head_processes() -> list[psutil.Process]:
    """Those of the cluster that are neither actors nor drivers."""
    others = ("ray::_Actor", "ddad.cli", Path(__file__).name)
    lines = {process: command_line(process) for process in inside()}
    return [process for process, line in lines.items() if "ray" in line and not any(other in line for other in others)]


def actor_processes(doing: str = "") -> list[psutil.Process]:
    """Actors; they call themselves after their class and what they do."""
    return [process for process in inside() if command_line(process).startswith(f"ray::_Actor{doing}")]


class Memory(threading.Thread):
    """The largest resident sizes, in MB, of head (all its processes), driver and actors (each)."""

    def __init__(self, driver: int) -> None:
        super().__init__(daemon=True)
        self.driver = driver
        self.peaks = {"head": 0.0, "driver": 0.0, "worker": 0.0}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(1):
            self._note("head", sum(map(self._size, head_processes())))
            self._note("worker", max(map(self._size, actor_processes()), default=0))
            if psutil.pid_exists(self.driver):
                self._note("driver", self._size(psutil.Process(self.driver)))

    def _note(self, kind: str, size: float) -> None:
        self.peaks[kind] = round(max(self.peaks[kind], size / 1e6), 1)

    @staticmethod
    def _size(process: psutil.Process) -> float:
        try:
            return process.memory_info().rss
        except psutil.Error:
            return 0


def driver(command: list, place: Path, *more: object) -> subprocess.Popen:
    words = [sys.executable, "-m", "ddad.cli", *command, "--out", place, *more]
    return subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL)


def timed(command: list, place: Path, *more: object) -> dict:
    """Wall time, photographs a second between the first and the last shard, and memory."""
    started = time.monotonic()
    process = driver(command, place, *more)
    memory = Memory(process.pid)
    memory.start()
    if process.wait():
        raise SystemExit("The command failed.")
    seconds = time.monotonic() - started
    memory.done.set()
    shards = [line for line in log_lines(place) if "images" in line]
    ended = [datetime.datetime.fromisoformat(line["time"]).timestamp() for line in shards]
    firsts = {line["worker"]: line["images"] for line in reversed(shards)}  # their times are not known to the end
    steady = (sum(line["images"] for line in shards) - sum(firsts.values())) / (max(ended) - min(ended))
    return {"seconds": round(seconds, 1), "images_per_second": round(steady, 2), "memory_mb": memory.peaks}


def trial(command: list, place: Path, shards: int, moments: random.Random) -> dict:
    """Kill a working actor and the driver at random moments of a run with two actors, and repeat the command."""
    plan = sorted((moments.uniform(0, 0.9) * shards, what) for what in ("actor", "driver"))
    started = time.monotonic()
    process = driver(command, place, *ray(2))
    killed = []
    for moment, what in plan:
        wait_for(lambda moment=moment: len(list(place.glob("*.parquet"))) >= moment, process)
        time.sleep(moments.uniform(0, 2))
        if what == "actor":
            wait_for(lambda: actor_processes(".work"), process)
        victim = moments.choice(actor_processes(".work")).pid if what == "actor" else process.pid
        os.kill(victim, signal.SIGKILL)
        finished = len(list(place.glob("*.parquet")))
        killed.append({"what": what, "seconds": round(time.monotonic() - started, 1), "finished_shards": finished})
        if what == "driver":
            process.wait()
            process = driver(command, place, *ray(2))
    if process.wait():
        raise SystemExit("The command failed.")
    lost = sum("lost" in line for line in log_lines(place))
    return {"killed": killed, "lost_workers_seen": lost, "seconds": round(time.monotonic() - started, 1)}


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit("The command ended before it could be killed.")
        time.sleep(0.05)


def log_lines(place: Path) -> list[dict]:
    return [
        json.loads(line)
        for file in sorted((place / "_job" / "log").iterdir())
        for line in file.read_text().splitlines()
    ]


def compared(place: Path, reference: Path, images: int) -> dict:
    """Whether the results are, byte by byte, those of one process, and each photograph has one row."""
    found, expected = ({file.name: digest(file) for file in folder.glob("*.parquet")} for folder in (place, reference))
    rows = (
        pyarrow.dataset.dataset(sorted(map(str, place.glob("*.parquet")))).to_table(["row"]).column("row").to_pylist()
    )
    return {
        "files": len(found),
        "differs": sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)),
        "rows": len(rows),
        "lost": images - len(set(rows)),
        "doubled": len(rows) - len(set(rows)),
    }


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
