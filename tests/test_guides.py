"""The guides do what they say, the site builds, the tutorial runs. pytest tests/test_guides.py (-m "not slow": less)"""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import nbformat
import numpy as np
import pytest
import torch
import torchvision
from nbclient import NotebookClient
from PIL import Image

import ddad
from ddad.config import make_settings
from ddad.data.demo import DEMO_DEFECTS, render_part, write_demo_dataset
from ddad.fit import fit
from snippets import (
    DOCUMENTS,
    GUIDES,
    ROOT,
    UsageError,
    blocks,
    commands,
    ddad_arguments,
    imports,
    parse,
    resolve,
    run,
    smaller,
)
from test_authors import Published

DOCS = ROOT / "docs"
INDEX = DOCS / "index.md"
NOTEBOOK = DOCS / "tutorial.ipynb"
LANGUAGES = {"sh", "python", "text", "json"}  # run line by line; run as one program; to look at
QUICK = "add-a-dataset"  # run in the fast suite; the others take a minute each

by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
by_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What a reader of any guide has: a folder in MVTec layout, more good photographs, and new ones."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def take_photographs(folder):
    write_demo_dataset(folder / "photos", train=240, good=10, defective=10, size=40)
    for name, kinds in {
        "more_good": [None] * 20,
        "new_light": [None] * 30,
        "new": [None] * 5 + list(DEMO_DEFECTS),
    }.items():
        (folder / name).mkdir()
        for number, kind in enumerate(kinds):
            image, _ = render_part(np.random.default_rng([*name.encode(), number]), kind, size=40)
            Image.fromarray(image).save(folder / name / f"{number:03d}.png")


def prepare(guide, folder):
    """And what single guides ask for."""
    if guide != QUICK:
        take_photographs(folder)
    if guide in ("how-to-read-a-heatmap", "export-and-deploy", "score-an-archive"):
        settings = make_settings("xs", image_size=32, false_alarms=0.05, adaptation={"epochs": 0})
        fit(folder / "photos", folder / "model", settings, steps=2)
    if guide == "reproduce-the-paper":
        write_demo_dataset(folder / "mvtec" / "leather", train=12, good=2, defective=5, size=40)
        torch.save(Published(32, 2, 0.3).state_dict(), folder / "2000")
        torch.save(torchvision.models.resnet18().state_dict(), folder / "feat8")


# -- What can be said without running anything ------------------------------------------------------------------------


@by_name
def test_every_command_of_a_document_has_these_options(document):
    for block in blocks(document):
        for line in commands(block) if block.language in ("", "sh") else ():
            if arguments := ddad_arguments(line):
                parse(arguments)


@pytest.mark.parametrize(
    "arguments", ["train photos", "check photos --no-such", "fly", "check photos --false-alarms 2"]
)
def test_a_command_that_does_not_exist_is_noticed(arguments):
    with pytest.raises(UsageError):
        parse(arguments.split())


def test_commands_are_made_smaller():
    asked = smaller("ddad train photos --out m --time-budget 60m --false-alarms 1%  # an hour")
    assert re.sub(" +", " ", asked) == "ddad train photos --out m --false-alarms 1% --steps 2 --image-size 32"
    assert smaller("ddad check photos") == "ddad check photos"


@by_guide
def test_python_of_a_guide_compiles_and_imports_what_exists(guide):
    for block in blocks(guide):
        for module, name in imports(block.text) if block.language == "python" else ():
            resolve(f"{module}.{name}" if name else module)


@by_guide
def test_every_block_of_a_guide_has_a_known_language(guide):
    found = blocks(guide)
    assert {block.language for block in found} <= LANGUAGES
    assert any(block.language in ("sh", "python") for block in found)


def test_every_page_is_in_the_toctree():
    listed = [
        path.relative_to(DOCS).with_suffix("").as_posix()
        for index in (INDEX, DOCS / "api" / "index.md")
        for line in re.findall(r"^[\w/*\[\]-]+$", index.read_text(encoding="utf-8"), re.MULTILINE)
        for path in [*index.parent.glob(f"{line}.md"), *index.parent.glob(f"{line}.ipynb")]
    ]
    pages = [path.relative_to(DOCS).with_suffix("").as_posix() for path in (*DOCUMENTS[1:], NOTEBOOK)]
    assert sorted(listed) == sorted(set(pages) - {"index"})


def test_every_public_name_is_in_the_reference():
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    homes = dict(re.findall(r"`ddad\.(\w+) <ddad\.([\w.]+)>`", index))
    assert homes.keys() == set(ddad.__all__)
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"automodule:: (\S+)", pages))
    for name, home in homes.items():
        assert resolve(f"ddad.{home}").__name__ == name
        assert f"ddad.{home}".rpartition(".")[0] in documented


# -- Running them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide",
    [pytest.param(guide, marks=() if guide.stem == QUICK else pytest.mark.slow, id=guide.stem) for guide in GUIDES],
)
def test_a_guide_does_what_it_says(guide, folder):
    prepare(guide.stem, folder)
    run(guide, folder)


@pytest.mark.parametrize("text", ["```sh\nddad check nowhere\n```", "```python\nraise AssertionError('no')\n```"])
def test_a_guide_that_is_wrong_is_noticed(text, folder):
    (folder / "wrong.md").write_text(text)
    with pytest.raises(AssertionError, match=r"no"):
        run(folder / "wrong.md", folder)


@pytest.mark.slow
def test_the_heatmap_pictures_can_be_drawn(folder):
    prepare("how-to-read-a-heatmap", folder)
    subprocess.run([sys.executable, DOCS / "heatmap_pictures.py", "model", "."], check=True)
    drawn = {path.name for path in folder.glob("*.jpg")}
    assert drawn == {path.name for path in (DOCS / "guides").glob("*.jpg")}


# -- The notebook -----------------------------------------------------------------------------------------------------


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_notebook_is_stored_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [output.output_type for output in outputs(notebook)]
    assert "error" not in kinds
    assert all(output.get("name") != "stderr" for output in outputs(notebook))
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs(notebook)) >= 3
    pictures = ("image/jpeg", "image/png")
    text = json.dumps(
        [
            [output.get("text"), {k: v for k, v in output.get("data", {}).items() if k not in pictures}]
            for output in outputs(notebook)
        ]
    )
    assert not re.search(r"(?:^|[\s\"'(])/(?!>)\w+/", text), "an absolute path"
    assert "arning" not in text
    assert NOTEBOOK.stat().st_size < 800_000  # base64 of 600 kB of pictures


@pytest.mark.slow
def test_the_notebook_runs(folder):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]


# -- The site ---------------------------------------------------------------------------------------------------------


class Loads(HTMLParser):
    """What a page loads by itself: scripts, styles, fonts, pictures; not where its links lead."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        names = {"script": "src", "link": "href", "img": "src", "iframe": "src"}
        if tag in names:
            self.found.append(dict(attributes).get(names[tag]) or "")


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    """With -W; from a copy without what an earlier build left."""
    source = shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("_build"))
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    shutil.copytree(ROOT / "src" / "ddad", tmp_path / "src" / "ddad", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", str(source), str(tmp_path / "site")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCUMENTS)
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        elsewhere = [address for address in loads.found if re.match(r"(?:https?:)?//", address)]
        assert not elsewhere, page
    reference = (tmp_path / "site" / "api" / "method.html").read_text(encoding="utf-8")
    assert 'id="ddad.sampling.condition"' in reference
