"""Tables of a benchmark's results, with the paper's figures beside ours: results.md, results.csv, results.html.

They are made from nothing but the files below OUT (see `benchmark`), so that they can be made again at any time.
"""

import csv
import io
import json
import math
import statistics
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ddad.config import PRESETS
from ddad.files import write_text

METRICS = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
TITLES = {"mvtec-ad": "MVTec AD", "visa": "VisA", "mtd": "Magnetic Tile Defects", "folder": "Own data"}


def shipped(name: str) -> dict[str, Any]:
    """One of the package's TOML files."""
    return tomllib.loads(files("ddad").joinpath(name).read_text(encoding="utf-8"))


def paper_figures(dataset: str) -> dict[str, dict[str, float]]:
    """What the paper reports, in per cent: metrics by category, and under "mean"; empty for other data sets."""
    group = shipped("paper.toml").get(dataset, {})
    return {**group["categories"], "mean": group["mean"]} if group else {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def duration(seconds: float) -> str:
    """For people: 45 s, 30 min, 2.5 h, 3 days."""
    for length, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f}".removesuffix(".0") + f" {unit}"
    return f"{math.ceil(seconds)} s"


@dataclass(frozen=True)
class Cell:
    """One metric in per cent: ours with the spread over seeds, and the paper's; None where there is none."""

    ours: float | None
    spread: float | None
    paper: float | None

    @property
    def text(self) -> str:
        return _percent(self.ours) + ("" if self.spread is None else f" ± {self.spread:.1f}")

    @property
    def paper_text(self) -> str:
        return _percent(self.paper)


@dataclass(frozen=True)
class Row:
    """One category, or the mean of all."""

    name: str
    cells: tuple[Cell, ...]
    """One for each of `METRICS`."""
    seeds: str
    """How many seeds, and why others failed."""
    page: str | None = None
    """The report of one seed, relative to the tables."""


@dataclass(frozen=True)
class Table:
    """One variant: a preset with one setting for all categories, or with the authors' for each."""

    variant: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def write_tables(out: Path) -> str:
    """Write the three files from all results below `out`; returns the Markdown.

    Raises:
        DataError: they cannot be written.
    """
    asked = {path.parent: read_json(path) for path in out.glob("*/benchmark.json")}
    presets = list(PRESETS)
    # One setting for all categories is the headline.
    ordered = sorted(asked, key=lambda v: (asked[v]["published"], presets.index(asked[v]["settings"]["preset"])))
    tables = [make_table(variant, asked[variant]) for variant in ordered]
    text = "\n".join(map(_markdown, tables))
    write_text(out / "results.md", text)
    write_text(out / "results.csv", _csv(tables))
    environment = Environment(
        loader=PackageLoader("ddad"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("benchmark.html").render(tables=tables, metrics=list(METRICS.values()))
    write_text(out / "results.html", page)
    return text


def make_table(variant: Path, asked: Mapping[str, Any]) -> Table:
    """The table of one variant's folder; `asked` is its benchmark.json."""
    dataset, preset = asked["dataset"], asked["settings"]["preset"]
    results = [read_json(path) for path in variant.glob("*/seed-*/result.json")]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in sorted(filter(None, results), key=lambda result: (result["category"], result["seed"])):
        found[result["category"]].append(result)
    paper = paper_figures(dataset)
    categories = sorted(found, key=[*paper, *sorted(found.keys() - paper.keys())].index)
    kind = "the authors' settings for each category" if asked["published"] else "one setting for all categories"
    return Table(
        variant=variant.name,
        title=f"{TITLES[dataset]}, preset {preset}, {kind}",
        rows=(*(_row(variant, name, found[name], paper.get(name, {})) for name in categories), _mean(found, paper)),
        notes=tuple(_notes(asked, [result for name in categories for result in found[name] if "metrics" in result])),
    )


def _row(variant: Path, category: str, results: Sequence[dict[str, Any]], paper: Mapping[str, float]) -> Row:
    cells = []
    for metric in METRICS:
        values = list(_by_seed(results, metric).values())
        cells.append(Cell(_mean_of(values), _spread_of(values), paper.get(metric)))
    done = [result["seed"] for result in results if "metrics" in result]
    failed: dict[str, list[str]] = defaultdict(list)
    for result in results:
        if "error" in result:
            failed[result["error"]].append(str(result["seed"]))
    errors = [f"seed {' and '.join(seeds)} failed: {error}" for error, seeds in failed.items()]
    page = f"{variant.name}/{category}/seed-{done[0]}/report.html" if done else None
    return Row(category, tuple(cells), "; ".join([str(len(done)), *errors]), page)


def _mean(found: Mapping[str, Sequence[dict[str, Any]]], paper: Mapping[str, Mapping[str, float]]) -> Row:
    """Mean over categories, with the spread of that mean over seeds; the paper's mean is over the same categories."""
    measured = {category for category, results in found.items() if any("metrics" in result for result in results)}
    cells = []
    for metric in METRICS:
        by_category = [values for name in sorted(measured) if (values := _by_seed(found[name], metric))]
        complete = set.intersection(*map(set, by_category)) if by_category else set()
        by_seed = [statistics.fmean(values[seed] for values in by_category) for seed in sorted(complete)]
        theirs = [paper[name][metric] for name in sorted(measured) if metric in paper.get(name, {})]
        published = _mean_of(theirs) if len(theirs) == len(measured) else None
        if published is not None and measured == paper.keys() - {"mean"}:
            published = paper["mean"][metric]  # as printed, before the figures of the categories were rounded
        ours = _mean_of([statistics.fmean(values.values()) for values in by_category])
        cells.append(Cell(ours, _spread_of(by_seed), published))
    failed = len(found) - len(measured)
    return Row(f"mean of {len(measured)}" + (f" ({failed} failed)" if failed else ""), tuple(cells), "")


def _by_seed(results: Sequence[dict[str, Any]], metric: str) -> dict[int, float]:
    """The metric in per cent by seed, without those that have none."""
    values = {result["seed"]: result.get("metrics", {}).get(metric) for result in results}
    return {seed: 100 * value for seed, value in values.items() if value is not None}


def _mean_of(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _spread_of(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _notes(asked: Mapping[str, Any], done: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know to compare the columns; `done` are the results without an error."""
    settings, budget, scoring = asked["settings"], asked["budget"], asked["settings"]["scoring"]
    length = "as many epochs as published"
    if budget["steps"]:
        length = f"{budget['steps']} training steps"
    elif budget["seconds"]:
        length = f"{duration(budget['seconds'])} for each training"
    choice = "" if asked["published"] else "; no test label takes part in any choice"
    notes = [
        f"In per cent: mean ± standard deviation over seeds, of the last weights{choice}. AUPRO is up to 30 % false "
        "positive pixels; all is measured at the model's resolution.",
        f"Image size {settings['image_size']}, {length}.",
    ]
    if paper_figures(asked["dataset"]):
        source, theirs = shipped("paper.toml")["source"], PRESETS["paper"]["scoring"]["features"]
        notes.append(f"Paper: {source}, with settings of its own for each category; – where it gives no figure.")
        if scoring["features"] != theirs:
            notes.append(f"Features: {scoring['features']} here, {theirs.split('.')[0]} in the paper.")
    if asked["dataset"] == "mtd":
        notes.append("The data come without a split: the paper's test images may be others than ours.")
    if asked["published"]:
        notes.append(
            "These rows use the authors' w, v and adaptation settings"
            + (f", but not their number of epochs ({length})." if any(budget.values()) else " and numbers of epochs.")
            + f" Source: {shipped('presets.toml')['source']}."
        )
    if scoring["fusion"] == "batch-max":
        notes.append("As published, a score of this preset depends on the test images inspected with it.")
    for result in done:
        missing = result["test_images"] - sum(result["counts"].values())
        if missing:
            notes.append(
                f"{result['category']}, seed {result['seed']}: {missing} of {result['test_images']} test images could "
                "not be read and are left out."
            )
    if done:
        versions = {f"ddad {result['versions']['ddad']}, torch {result['versions']['torch']}" for result in done}
        machines = {", ".join(f"{name} {value}" for name, value in result["machine"].items()) for result in done}
        dates = sorted({result["date"][:10] for result in done})
        notes.append(f"Measured with {'; '.join(sorted(versions))} on {'; '.join(sorted(machines))}; {_range(dates)}.")
    return notes


def _range(ordered: Sequence[str]) -> str:
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _markdown(table: Table) -> str:
    columns = ["category", *(f"{name}{part}" for name in METRICS.values() for part in ("", ", paper")), "seeds"]
    lines = [f"## {table.title}", "", _markdown_line(columns), _markdown_line(["---"] * len(columns))]
    for row in table.rows:
        figures = [text for cell in row.cells for text in (cell.text, cell.paper_text)]
        lines.append(_markdown_line([row.name, *figures, row.seeds]))
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes), ""])


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _csv(tables: Sequence[Table]) -> str:
    """In fractions, like metrics.json: `<metric>`, `<metric>_spread`, `<metric>_paper`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["variant", "category", *(f"{name}{part}" for name in METRICS for part in ("", "_spread", "_paper")), "seeds"]
    )
    for table in tables:
        for row in table.rows:
            values = [value for cell in row.cells for value in (cell.ours, cell.spread, cell.paper)]
            figures = ["" if value is None else f"{value / 100:.4f}" for value in values]
            writer.writerow([table.variant, row.name, *figures, row.seeds])
    return text.getvalue()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
