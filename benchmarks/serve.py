"""How many photographs a server takes, how long they wait, what it does when it is stopped under load.

    python benchmarks/serve.py MODEL IMAGE... [--sections latency,memory,restart] [--clients 1,8,32,128] [--json PATH]

latency   requests of one photograph from so many clients at once, each asking again when it has its answer; one server
          with batching and one without, measured in turn in one run.
memory    of the server and its decoders over --requests requests from eight clients.
restart   eight clients ask while the server gets SIGTERM and is started again, --restarts times. A request that gets no
          answer is asked again under its own id. Then every request must have one answer and one row in the history.

The clients run in a process of their own. Photographs are sent in turn.
"""

import argparse
import http.client
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

UNLIMITED = ["--rate", "1000000", "--max-queue", "100000", "--deadline", "600", "--history-size", "200MB"]
CLIENTS_OF_SOAK = 8


class Server:
    """`ddad serve` as a process of its own, on a port that stays over restarts."""

    def __init__(self, model: str, history: Path, *options: str) -> None:
        self._command = [sys.executable, "-m", "ddad.cli", "serve", model, "--history", str(history), *options]
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [*self._command, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout
        said = self.process.stdout.readline()
        if not said.startswith("Serving "):
            raise SystemExit(f"the server did not start: {said}")
        self.port = int(said.split("http://127.0.0.1:")[1].split(".")[0])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def memory_mb(self) -> float:
        """Of the process and its children, without what they share (PSS)."""
        one = psutil.Process(self.process.pid)
        return sum(part.memory_full_info().pss for part in (one, *one.children(recursive=True))) / 1e6


@contextmanager
def server(model: str, *options: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        one = Server(model, Path(folder) / "history", *options)
        try:
            yield one
        finally:
            one.stop()


HEADERS = {"Content-Type": "multipart/form-data; boundary=part"}


def body_of(content: bytes) -> bytes:
    head = b'--part\r\nContent-Disposition: form-data; name="file"; filename="part.png"\r\n\r\n'
    return head + content + b"\r\n--part--\r\n"


def ask(port: int, bodies: list[bytes], clients: int, count: int, until: Any, patient: bool, pipe: Any) -> None:
    """`clients` threads that send requests, `count` together or until the event; reports id, status, seconds, tries."""
    answers: list[tuple[str, int, float, int]] = []
    lock, sent = threading.Lock(), 0

    def client() -> None:
        nonlocal sent
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while not until.is_set():
            with lock:
                if sent >= count:
                    return
                number, sent = sent, sent + 1
            request_id, tries, status = uuid.uuid4().hex, 0, 0
            started = time.perf_counter()
            while True:
                tries += 1
                try:
                    body = bodies[number % len(bodies)]
                    connection.request("POST", "/v1/inspect", body, HEADERS | {"X-Request-ID": request_id})
                    response = connection.getresponse()
                    status = response.status
                    response.read()
                except (OSError, http.client.HTTPException):
                    connection.close()
                    if not patient:
                        raise
                    time.sleep(0.05)
                    continue
                if status == 503 and patient:
                    time.sleep(0.05)
                    continue
                break
            answers.append((request_id, status, time.perf_counter() - started, tries))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(answers)


def clients(
    port: int, bodies: list[bytes], number: int, count: int, patient: bool = False
) -> tuple[multiprocessing.Process, Any, Any]:
    """Start the clients' process; returns it with the event that ends it and the pipe with its answers."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    until = multiprocessing.Event()
    process = multiprocessing.Process(target=ask, args=(port, bodies, number, count, until, patient, sender))
    process.start()
    return process, until, receiver


def measured(port: int, bodies: list[bytes], number: int, count: int) -> list[tuple[str, int, float, int]]:
    process, _, receiver = clients(port, bodies, number, count)
    answers = receiver.recv()
    process.join()
    return answers


def latency(options: argparse.Namespace, bodies: list[bytes]) -> list[dict[str, Any]]:
    rows = []
    extra = [*UNLIMITED, *options.options]
    with server(options.model, *extra) as batched, server(options.model, *extra, "--max-batch", "1") as alone:
        for one in (batched, alone):
            measured(one.port, bodies, 2, 4)
        for number in options.clients:
            for name, one in (("batches of 8", batched), ("one by one", alone)):
                count = max(options.least, 2 * number)
                started = time.perf_counter()
                answers = measured(one.port, bodies, number, count)
                seconds = time.perf_counter() - started
                taken = sorted(1000 * answer[2] for answer in answers)
                cuts = statistics.quantiles(taken, n=100, method="inclusive")
                rows.append(
                    {
                        "clients": number,
                        "server": name,
                        "requests": count,
                        "answered": sum(answer[1] == 200 for answer in answers),
                        "per_second": count / seconds,
                        "p50_ms": cuts[49],
                        "p95_ms": cuts[94],
                        "p99_ms": cuts[98],
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def memory(options: argparse.Namespace, bodies: list[bytes]) -> list[dict[str, Any]]:
    rows, done, parts = [], 0, 10
    with server(options.model, *UNLIMITED, *options.options) as one:
        measured(one.port, bodies, CLIENTS_OF_SOAK, 100)
        while done < options.requests:
            started = time.perf_counter()
            answers = measured(one.port, bodies, CLIENTS_OF_SOAK, options.requests // parts)
            done += len(answers)
            rows.append(
                {
                    "requests": done,
                    "answered": sum(answer[1] == 200 for answer in answers),
                    "per_second": len(answers) / (time.perf_counter() - started),
                    "memory_mb": one.memory_mb(),
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def restart(options: argparse.Namespace, bodies: list[bytes]) -> list[dict[str, Any]]:
    with server(options.model, *UNLIMITED, *options.options) as one:
        process, until, receiver = clients(one.port, bodies, CLIENTS_OF_SOAK, sys.maxsize, patient=True)
        codes = []
        for _ in range(options.restarts):
            time.sleep(options.pause)
            codes.append(one.stop())
            one.start()
        time.sleep(options.pause)
        until.set()
        answers = receiver.recv()
        process.join()
        rows = Counter(row["request_id"] for row in listed(one.port))
    asked = {request_id: status for request_id, status, _, _ in answers}
    return [
        {
            "restarts": options.restarts,
            "exit_codes": sorted(set(codes)),
            "requests": len(answers),
            "answered": sum(status == 200 for status in asked.values()),
            "asked_again": sum(tries > 1 for *_, tries in answers),
            "lost": sum(rows[request_id] == 0 for request_id in asked),
            "doubled": sum(rows[request_id] > 1 for request_id in asked),
            "rows": sum(rows.values()),
        }
    ]


def listed(port: int) -> Iterator[dict[str, Any]]:
    """All inspections in the history."""
    before = ""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while True:
        connection.request("GET", f"/v1/inspections?count=200{before}")
        page = json.loads(connection.getresponse().read())
        yield from page
        if len(page) < 200:
            return
        before = f"&before={page[-1]['id']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--sections", type=lambda text: text.split(","), default=["latency", "memory", "restart"])
    parser.add_argument("--clients", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--least", type=int, default=64, help="requests of a latency measurement, at least")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--pause", type=float, default=8.0, help="seconds of load between restarts")
    parser.add_argument("--options", type=str.split, default=[], help="further options of ddad serve, in one string")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bodies = [body_of(path.read_bytes()) for path in options.images]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    machine = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, commit {commit.strip()}"
    results = {"machine": machine, "date": datetime.now(UTC).date().isoformat(), "model": options.model}
    print(f"{machine}, {results['date']}")
    for section in options.sections:
        rows = {"latency": latency, "memory": memory, "restart": restart}[section](options, bodies)
        results[section] = rows
        print(f"\n### {section}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
            print(f"| {' | '.join(cells)} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
