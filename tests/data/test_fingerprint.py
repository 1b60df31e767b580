"""What a run reads, recognised: moved text is the same, anything else is said in words."""

import shutil

import numpy as np
import pytest

from switchyard.config import DataConfig
from switchyard.data.corpus import load_text
from switchyard.data.fingerprint import MOST_FILES, difference, of_corpus, of_images


def _of(path, fraction: float = 0.1) -> dict:
    return of_corpus(load_text(DataConfig(path=str(path), tokenizer="char", val_fraction=fraction)))


@pytest.fixture
def folder(tmp_path):
    """Five files, a.txt to e.txt."""
    (tmp_path / "texts").mkdir()
    for number, name in enumerate("abcde"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text {name}\n" * (number + 2))
    return tmp_path / "texts"


def test_a_file_that_was_moved_is_the_same(tmp_path):
    (tmp_path / "one.txt").write_text("some text\n" * 20)
    before = _of(tmp_path / "one.txt")
    (tmp_path / "one.txt").rename(tmp_path / "two.txt")
    assert difference(before, _of(tmp_path / "two.txt")) is None


def test_a_file_with_another_content_or_size_is_named(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("some text\n" * 20)
    before = _of(path)
    path.write_text("some text\n" * 19 + "same size\n")
    assert difference(before, _of(path)) == f"'{path}' has other content"
    path.write_text("some text\n" * 200)
    assert difference(before, _of(path)) == f"'{path}' has 2,000 bytes instead of 200"


def test_the_split_counts(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("some text\n" * 20)
    assert difference(_of(path, 0.1), _of(path, 0.2)) is not None


def test_a_folder_that_was_copied_is_the_same(folder, tmp_path):
    before = _of(folder)
    shutil.copytree(folder, tmp_path / "there")
    assert difference(before, _of(tmp_path / "there")) is None


def test_files_of_a_folder_are_named(folder):
    before = _of(folder)
    (folder / "b.txt").write_text("other")
    assert difference(before, _of(folder)) == "'b.txt' has 5 bytes instead of 21"
    (folder / "c.txt").unlink()
    (folder / "new.txt").write_text("new")
    assert difference(before, _of(folder)) == "'b.txt' has 5 bytes instead of 21, 'c.txt' is missing, 'new.txt' is new"
    (folder / "newer.txt").write_text("new")
    assert difference(before, _of(folder)).endswith(" and 1 more")


def test_of_very_many_files_the_number_is_said(folder, monkeypatch):
    assert MOST_FILES >= 1000
    monkeypatch.setattr("switchyard.data.fingerprint.MOST_FILES", 3)
    before = _of(folder)
    assert before["files"] == []
    (folder / "a.txt").write_text("text z\ntext z\n")
    assert "have other content" in difference(before, _of(folder))
    (folder / "f.txt").write_text("more")
    said = difference(before, _of(folder))
    assert " documents of " in said and " instead of " in said


def test_images_are_compared_by_content():
    images, labels = np.zeros((4, 1, 2, 2), np.float32), np.arange(4)
    before = of_images((images, labels), (images[:1], labels[:1]))
    assert difference(before, of_images((images.copy(), labels), (images[:1], labels[:1]))) is None
    other = images.copy()
    other[3, 0, 1, 1] = 1
    found = difference(before, of_images((other, labels), (images[:1], labels[:1])))
    assert found == "the 4 images for train have other content"
    found = difference(before, of_images((images, labels[::-1]), (images[:1], labels[:1])))
    assert found == "the 4 images for train have other content"
    assert difference(before | {"kind": "text"}, before) == "images instead of text"
