"""What Markdown documents tell a reader to type, and how a test does it for them."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import typer
from markdown_it import MarkdownIt

from ddad.cli import app

ROOT = Path(__file__).resolve().parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.relative_to(ROOT).parts),
]
UsageError = typer.BadParameter.__base__  # of click, which typer brings along in newer versions
ADDRESS = "127.0.0.1:8000"  # of `ddad serve` in the documents

# The one rule that makes a command smaller: these options come last, and of an option given twice the last one counts.
# Before that --time-budget goes where a command would not take it beside --steps.
SMALL_TRAINING = ["--steps", "2", "--image-size", "32"]
SMALLER = {
    "demo": ["--steps", "2"],
    "train": SMALL_TRAINING,
    "benchmark": [*SMALL_TRAINING, "--seeds", "1", "--features", "efficientnet-lite2"],  # others are downloaded
    "convert": ["--features", "resnet18"],
    "tune": ["--time-budget", "5s"],
    "distill": ["--steps", "2"],
    "adapt": ["--epochs", "1"],
    "serve": ["--port", "0"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language (which may be missing), its text, and the line it begins on."""

    language: str
    text: str
    line: int


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order; directives of the site (`{toctree}`) are none."""
    tokens = MarkdownIt().parse(document.read_text(encoding="utf-8"))
    fences = [token for token in tokens if token.type == "fence" and not token.info.startswith("{")]
    return [Block(token.info.strip(), token.content, token.map[0] + 1) for token in fences]


def commands(block: Block) -> list[str]:
    """The lines of a block that somebody types; those that end in a backslash go on."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def ddad_arguments(line: str) -> list[str] | None:
    """What follows `ddad` in a line, up to a pipe or a redirection; None where the line is something else."""
    if not re.match(r"ddad\s", line):
        return None
    words = shlex.split(line, comments=True)[1:]
    end = next((place for place, word in enumerate(words) if word in ("|", ">", "&", "&&")), len(words))
    return words[:end]


def parse(arguments: list[str]) -> None:
    """Read a `ddad` command without running it; raises `UsageError` where the command line would."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(group.make_context("ddad", [*arguments]), arguments)
    command.make_context(name, rest)


def smaller(line: str) -> str:
    """A `ddad` command as a test runs it."""
    arguments = ddad_arguments(line)
    if not arguments or arguments[0] not in SMALLER:
        return line
    if "--steps" in SMALLER[arguments[0]]:
        line = re.sub(r"--time-budget \S+", "", line)
    return f"{line.split('  #')[0]} {shlex.join(SMALLER[arguments[0]])}"


def imports(text: str) -> list[tuple[str, str | None]]:
    """Module and name of everything that Python code imports."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def resolve(name: str) -> object:
    """What a dotted name stands for."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def run(document: Path, folder: Path) -> None:
    """Do what a document says, in the working folder `folder`.

    Lines of `sh` blocks run one by one in bash, `ddad` being the installed command; `ddad serve` stays until the end,
    and its address takes the place of the usual one. `python` blocks run in this process, one after the other as one
    program. Other blocks are to look at. Raises AssertionError where a command fails.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    from serving import Server  # wants the extra [serve]

    program: dict[str, object] = {"__name__": "__main__"}
    server = None
    try:
        for block in blocks(document):
            if block.language == "python":
                exec(compile(block.text, f"{document.name}:{block.line}", "exec"), program)
            for typed in commands(block) if block.language == "sh" else ():
                line = smaller(typed).replace(ADDRESS, server.address if server else ADDRESS)
                arguments = ddad_arguments(line)
                if arguments and arguments[0] == "serve":
                    options = next(i for i, word in enumerate(arguments) if word.startswith("--"))
                    server = Server(arguments[1:options], folder / "history", *arguments[options:])
                    continue
                shell = ["bash", "-ec", line]
                done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{document.name}:{block.line}: {typed}\n{done.stdout}{done.stderr}"
    finally:
        if server:
            code, log = server.stop()
            assert code == 0, log
