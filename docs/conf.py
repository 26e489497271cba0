"""Settings of the documentation site: python -m sphinx -W --keep-going -b html docs docs/_build

Nothing is fetched, neither when the site is built nor when it is read. Docstrings are plain text with names in
backticks; `as_rst` says so to Sphinx, which would take their bars and stars for markup.
"""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import ddad

project = "ddad"
release = version = ddad.__version__
project_copyright = "The ddad authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]  # the second is made beside _build by myst-nb
highlight_language = "text"

nb_execution_mode = "off"  # tutorial.ipynb is stored with its outputs; tests/test_guides.py runs it again
nb_execution_cache_path = str(Path(__file__).parent / "_build" / "jupyter_cache")  # made even where it stays empty
nb_merge_streams = True
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "model_config, model_post_init"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "ddad"
html_copy_source = False
html_show_sphinx = False

COLUMNS = re.compile(r"\S {3,}\S")
ARGUMENTS = re.compile(r"\w+: .*\n +\S")


def as_rst(lines: list[str]) -> list[str]:
    """A docstring in reStructuredText: `names` as code, aligned columns as they are, nothing else means anything.

    A paragraph of hanging `name: what it is` is a list of arguments.
    """
    out: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        rows = paragraph.split("\n")
        if sum(bool(COLUMNS.search(row)) for row in rows) * 2 > len(rows):
            out += ["::", "", *(f"    {row}" for row in rows), ""]
            continue
        if ARGUMENTS.match(paragraph):
            rows = ["Args:", *(f"    {row}" for row in rows)]
        text = re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", "\n".join(rows))
        parts = re.split(r"(``[^`]+``)", text)
        parts[::2] = [re.sub(r"([*|]|\b_|_\b)", r"\\\1", part) for part in parts[::2]]
        out += [*"".join(parts).split("\n"), ""]
    return out


def _docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    text = as_rst(lines)
    # napoleon takes what stands before a colon in the first line of an attribute for its type.
    lines[:] = text if what in ("module", "class", "exception", "function", "method") else ["", *text]


def _signature(app: Sphinx, what: str, name: str, obj: Any, *details: Any) -> tuple[str, str] | None:
    """Classes that only hold values list these below; a signature would say it all twice."""
    holds_values = hasattr(obj, "__dataclass_fields__") or hasattr(obj, "model_fields") or hasattr(obj, "_fields")
    return ("", "") if what == "class" and holds_values else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", _docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _signature)
