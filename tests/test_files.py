"""pytest tests/test_files.py"""

import threading

import pytest

from ddad import files
from ddad.files import atomic_folder


def write(folder, text):
    with atomic_folder(folder) as temporary:
        (temporary / "text").write_text(text)


def test_a_folder_is_there_at_every_moment_it_is_replaced(tmp_path):
    folder, done, seen = tmp_path / "model", threading.Event(), []

    def look():
        while not done.is_set():
            try:
                seen.append((folder / "text").read_text())
            except FileNotFoundError:
                seen.append("missing")

    write(folder, "0")
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(200):
            write(folder, str(number))
    finally:
        done.set()
        watcher.join()
    assert len(set(seen)) > 1
    assert "missing" not in seen
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("number", [1 << 20, None], ids=["the file system cannot", "the system has no such call"])
def test_replaced_where_folders_cannot_be_swapped(tmp_path, monkeypatch, number):
    if number is None:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *arguments, **options: object())
    else:
        monkeypatch.setattr(files, "_RENAME_EXCHANGE", number)  # refused as a flag nobody knows
    for text in ("old", "new"):
        write(tmp_path / "model", text)
    assert (tmp_path / "model" / "text").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_link_leads_to_the_new_folder(tmp_path):
    write(tmp_path / "real", "old")
    (tmp_path / "model").symlink_to(tmp_path / "real")
    write(tmp_path / "model", "new")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "real" / "text").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "real"]


def test_after_an_error_the_folder_is_as_it_was(tmp_path):
    write(tmp_path / "model", "old")
    with pytest.raises(TypeError):
        write(tmp_path / "model", 3)  # after the folder was begun
    assert (tmp_path / "model" / "text").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
