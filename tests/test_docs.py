"""What the documents name exists. pytest tests/test_docs.py"""

import re

import pytest

from snippets import DOCUMENTS, resolve


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_function_named_in_a_document_exists(document):
    for name in re.findall(r"`(ddad(?:\.\w+)+)`", document.read_text(encoding="utf-8")):
        resolve(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_a_document_links_to_exists(document):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_a_wrong_name_is_noticed():
    with pytest.raises(AttributeError):
        resolve("ddad.sampling.no_such_function")
