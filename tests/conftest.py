"""Fixtures of several files."""

import sys

import pytest

from ddad.cli import main


@pytest.fixture
def mistake(monkeypatch, capsys):
    """What the command prints of a user's mistake, run in this process: it must be one line, and exit code 1."""

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["ddad", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err
        assert (stopped.value.code, said.count("\n")) == (1, 1), said
        return said

    return told
