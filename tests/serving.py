"""A real `ddad serve` process on a free loopback port."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


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
