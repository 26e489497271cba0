"""The package is one straight line: a module imports only modules above it. pytest tests/test_layout.py"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "ddad"

ORDER = [
    "errors",
    "files",
    "streaming",
    "images",
    "prediction",
    "results",
    "runtime",
    "config",
    "conformal",
    "drift",
    "data.samples",
    "data.folder",
    "data.mvtec_ad",
    "data.visa",
    "data.mtd",
    "data.check",
    "data.synthetic",
    "data.demo",
    "unet",
    "sampling",
    "tiling",
    "hub",
    "features",
    "anomaly_map",
    "backends",
    "calibration",
    "card",
    "detector",
    "family",
    "bulk.places",
    "bulk.tables",
    "bulk.crew",
    "bulk.job",
    "bulk.scoring",
    "bulk.frames",
    "cluster",
    "metrics",
    "checkpoint",
    "distributed",
    "training",
    "tracking",
    "adaptation",
    "tuning",
    "distillation",
    "fit",
    "fit_family",
    "refit",
    "baseline",
    "evaluation",
    "report",
    "comparison",
    "ablation",
    "benchmark",
    "bulk.run",
    "export",
    "integrations.mlflow",
    "integrations.authors",
    "integrations.anomalib",
    "server.batching",
    "server.measures",
    "server.decoding",
    "server.history",
    "server.hosting",
    "server.station",
    "server.guard",
    "server.api",
    "server.protocol",
    "server.page",
    "server.app",
    "server.run",
    "cli",
]


def imports(tree: ast.AST) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ddad" and not node.level:
            inside = node.module.removeprefix("ddad").lstrip(".")
            for alias in node.names:
                candidate = f"{inside}.{alias.name}".lstrip(".")
                found.add(candidate if candidate in ORDER else inside)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("ddad.") for a in node.names if a.name.startswith("ddad.")}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add(f"relative import of {node.module}")
    return found - {""}


def violations(module: str, tree: ast.AST) -> list[str]:
    place = ORDER.index(module)
    return [name for name in sorted(imports(tree)) if name not in ORDER or ORDER.index(name) >= place]


def modules() -> list[str]:
    files = [path.relative_to(SOURCE).with_suffix("") for path in SOURCE.rglob("*.py")]
    return sorted(".".join(path.parts) for path in files if path.name != "__init__")


def test_every_module_has_its_place():
    assert sorted(ORDER) == modules()


@pytest.mark.parametrize("module", ORDER)
def test_module_imports_only_modules_above_it(module):
    path = SOURCE.joinpath(*module.split(".")).with_suffix(".py")
    assert violations(module, ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "from ddad import cli",
        "import ddad.cli",
        "from ddad.cli import app",
        "from .cli import app",
        "def f():\n    from ddad.fit import fit",
    ],
)
def test_the_check_can_fail(line):
    assert violations("errors", ast.parse(line))


LIGHT = "import sys; {}; loaded = sorted({{'torch', 'diffusers', 'timm'}} & set(sys.modules)); print(loaded)"


def loaded_by(statement: str) -> str:
    run = subprocess.run([sys.executable, "-c", LIGHT.format(statement)], capture_output=True, text=True, check=True)
    return run.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "statement",
    [
        "import ddad",
        "import ddad.cli",
        "from ddad import ConfigError, make_settings",
        "import ddad.images, ddad.conformal, ddad.drift, ddad.data.check, ddad.data.synthetic, ddad.data.demo",
        "from typer.testing import CliRunner; from ddad.cli import app; "
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0",
    ],
)
def test_light_parts_load_no_torch(statement):
    assert loaded_by(statement) == "[]"


def test_the_torch_check_can_fail():
    assert "torch" in loaded_by("from ddad import Detector")


HELP = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "ddad.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""


def test_help_is_quick():
    """`ddad --help` takes less than half a second of processor time; the best of three, since machines are shared."""
    runs = [subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.5
