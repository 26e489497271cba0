"""`ddad serve` as a process: what it refuses, how it ends. pytest tests/test_serve.py"""

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from PIL import Image

from tiny import photo, train_model, write_photos

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import httpx
import psutil
from typer.testing import CliRunner

from ddad.cli import app
from ddad.errors import DDADError
from ddad.server.history import History
from serving import Server, serving

TOKEN = "a token of twenty-six chars"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = tmp_path_factory.mktemp("serve")
    return train_model(write_photos(place / "good", range(40)), place / "tile")


def png(seed=100):
    buffer = io.BytesIO()
    Image.fromarray(photo(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def refused(*arguments):
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert isinstance(result.exception, DDADError)
    return str(result.exception)


def test_mistakes_end_in_a_sentence(model, tmp_path, monkeypatch):
    history = ("--history", tmp_path / "history")
    assert refused(tmp_path / "none", *history, "--port", 0).startswith("Expected a model folder with a detector.json")
    assert refused(model, *history, "--host", "0.0.0.0", "--port", 0) == (
        "Expected a token for an address that others can reach, found none for 0.0.0.0; give --token-file or set "
        "DDAD_TOKEN, or listen on 127.0.0.1."
    )
    assert refused(model, *history, "--token-file", tmp_path / "none").startswith("Expected a token in ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused(model, *history, "--port", taken.getsockname()[1])
    assert said.startswith("Expected a free address, found that 127.0.0.1:")
    monkeypatch.setenv("DDAD_TOKEN", "short")
    assert refused(model, *history, "--port", 0).startswith("Expected a token of at least 16 characters, found 5; make")


WITHOUT = """
import sys
sys.modules["prometheus_client"] = None
sys.argv = ["ddad", "serve", "model"]
from ddad.cli import main
main()
"""


def test_without_the_extra(tmp_path):
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (
        1,
        "Error: Expected the package prometheus_client for ddad serve, found none; pip install 'ddad[serve]'.\n",
    )


@pytest.mark.slow
def test_a_token_from_a_file(model, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    with serving([model], tmp_path / "history", "--token-file", str(tmp_path / "token")) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        code, log = server.stop()
    assert code == 0
    assert TOKEN not in log
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["status"] for line in lines if line["message"] == "request"] == [401, 200]
    assert all(len(line["request_id"]) == 32 for line in lines if line["message"] == "request")


@pytest.mark.parametrize("ending", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_was_begun_is_finished(model, tmp_path, ending):
    answers = []

    def ask(server):
        with httpx.Client(timeout=60) as client:
            while True:
                try:
                    answer = client.post(f"{server.url}/v1/inspect", files=[("file", ("a.png", png()))] * 4)
                except httpx.TransportError:
                    return
                answers.append(answer)

    with serving([model], tmp_path / "history", "--rate", "100000") as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        threads = [threading.Thread(target=ask, args=[server]) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(2)
        code, _ = server.stop(ending)
        for thread in threads:
            thread.join()
    assert code == 0
    assert children
    psutil.wait_procs(children, 10)
    assert not any(child.is_running() for child in children)
    assert answers
    assert {answer.status_code for answer in answers} == {200}
    ids = [result["inspection"]["id"] for answer in answers for result in answer.json()["results"]]
    history = History(tmp_path / "history", 1 << 30)
    kept = [one.id for one in history.latest(100_000)]
    history.close()
    assert sorted(kept) == sorted(ids)  # none lost, none doubled


def test_a_kill_leaves_a_sound_history_and_no_processes(model, tmp_path):
    server = Server([model], tmp_path / "history")
    children = psutil.Process(server.process.pid).children(recursive=True)
    found = httpx.post(f"{server.url}/v1/inspect", files={"file": ("a.png", png())}).json()["results"][0]["inspection"]
    server.stop(signal.SIGKILL)
    psutil.wait_procs(children, 10)
    assert not any(child.is_running() for child in children)
    history = History(tmp_path / "history", 1 << 30)
    (kept,) = history.latest(10)
    assert (kept.id, kept.anomaly_score) == (found["id"], found["anomaly_score"])
    for kind in found["pictures"]:
        Image.open(io.BytesIO(history.picture(kept.id, kind))).load()
    history.close()


@pytest.fixture(scope="module")
def narrow(model, tmp_path_factory):
    history = tmp_path_factory.mktemp("narrow") / "history"
    with serving([model], history, "--max-batch", "1", "--max-request", "100kB") as server:
        yield server


def test_a_client_that_goes_away_cancels_its_work(narrow):
    gone = 40
    for _ in range(gone):
        host, port = narrow.address.split(":")
        with socket.create_connection((host, int(port))) as connection:
            content = png()
            head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
            body = head + content + b"\r\n--x--\r\n"
            connection.sendall(
                b"POST /v1/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
    answer = httpx.post(f"{narrow.url}/v1/inspect", files={"file": ("a.png", png())}, timeout=60)
    assert answer.status_code == 200
    text = httpx.get(f"{narrow.url}/metrics").text
    inspected = float(text.split("ddad_batch_size_sum ")[1].split()[0])
    assert inspected < gone  # most were given up while they waited
    assert 'status="499"' in text


def test_a_body_that_is_too_long_is_cut_off(narrow):
    host, port = narrow.address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/inspect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        connection.sendall(f"{len(head):x}\r\n".encode() + head + b"\r\n")
        try:
            while sent < 100_000_000:
                connection.sendall(b"10000\r\n" + b"0" * 0x10000 + b"\r\n")
                sent += 0x10000
        except OSError:
            pass
    assert sent < 50_000_000
    assert httpx.get(f"{narrow.url}/v2/health/ready").status_code == 200
