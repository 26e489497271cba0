"""A real `ddad serve` process on a free loopback port."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager


class Server:
    def __init__(self, models, history, *options, **environment):
        command = [
            sys.executable,
            "-m",
            "ddad.cli",
            "serve",
            *map(str, models),
            "--port",
            "0",
            "--history",
            str(history),
        ]
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.said = self.process.stdout.readline()
        assert self.said.startswith("Serving "), self.process.stderr.read()
        self.address = self.said.split("http://")[1].split(". ")[0]
        self.url = f"http://{self.address}"

    def stop(self, with_signal=signal.SIGTERM):
        """Exit code and what was logged."""
        if self.process.poll() is None:
            self.process.send_signal(with_signal)
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, log


@contextmanager
def serving(*arguments, **environment):
    server = Server(*arguments, **environment)
    try:
        yield server
    finally:
        server.stop()
