"""The server: as a real `ddad serve` process on a free loopback port, and in the process of the test."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from fastapi.testclient import TestClient

from ddad.server.api import MOST_FILES
from ddad.server.app import create_app
from ddad.server.guard import GuardSettings
from ddad.server.station import Station, StationSettings

HERE = "http://127.0.0.1"


class Server:
    def __init__(self, models, history, *options, **environment):
        command = [sys.executable, "-m", "ddad.cli", "serve", *map(str, models), "--port=0", f"--history={history}"]
        self._log = Path(history).with_suffix(".log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        said = self.process.stdout.readline()
        assert said.startswith("Serving "), self._log.read_text()
        self.address = said.split("http://")[1].split(". ")[0]
        self.url = f"http://{self.address}"

    def stop(self, with_signal=signal.SIGTERM):
        """Exit code and what was logged."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        code = self.process.wait(60)
        self.process.stdout.close()
        return code, self._log.read_text()


@contextmanager
def serving(*arguments, **environment):
    server = Server(*arguments, **environment)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def in_process(models, history, *, guard=None, max_files=MOST_FILES, **settings):
    """A client of the whole application; its `station` is at hand."""
    station = Station(models, StationSettings(history=history, **settings))
    client = TestClient(create_app(station, guard or GuardSettings(rate=1e6), max_files), base_url=HERE)
    client.station = station
    with client:
        yield client
