"""Text files to documents: what is read, what is skipped, which side a file falls on, and what is refused."""

import sysconfig
import time
from pathlib import Path

import pytest

from switchyard.config import DataConfig
from switchyard.data.corpus import load_text
from switchyard.data.split import hash_fraction
from switchyard.errors import UserError


def names(documents):
    return [document.name for document in documents]


def test_standard_library_is_every_source_file_outside_installed_packages():
    started = time.perf_counter()
    corpus = load_text(DataConfig())
    assert time.perf_counter() - started < 10  # a tenth of that on an idle laptop
    root = Path(sysconfig.get_path("stdlib"))
    expected = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not {"site-packages", "dist-packages", "__pycache__"} & set(path.relative_to(root).parts)
    ]
    visible = [name for name in expected if not any(part.startswith(".") for part in name.split("/"))]
    assert sorted(names(corpus.train) + names(corpus.validation)) == sorted(visible)
    assert names(corpus.train) == sorted(names(corpus.train))
    assert corpus.description.startswith("standard library: ") and "\n" not in corpus.description
    assert f"{len(visible):,} files" in corpus.description


def test_split_follows_the_hash_of_the_path_only():
    corpus = load_text(DataConfig(val_fraction=0.2))
    assert all(hash_fraction(name) < 0.2 for name in names(corpus.validation))
    assert all(hash_fraction(name) >= 0.2 for name in names(corpus.train))
    total = len(corpus.train) + len(corpus.validation)
    assert 0.15 < len(corpus.validation) / total < 0.25
    smaller = load_text(DataConfig(val_fraction=0.1))
    assert set(names(smaller.validation)) < set(names(corpus.validation))  # a file keeps its side


def test_hash_fraction_is_the_same_on_every_machine():
    assert hash_fraction("os.py") == int("d9d7c69c64b6", 16) / 2**48


def test_standard_library_without_undecodable_files_for_characters():
    raw, decoded = load_text(DataConfig()), load_text(DataConfig(tokenizer="char"))
    dropped = set(names(raw.train + raw.validation)) - set(names(decoded.train + decoded.validation))
    for document in decoded.train + decoded.validation:
        document.text()
    assert f"{len(dropped)} not UTF-8 skipped" in decoded.description or not dropped


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("text", ["abcdefghij" * 7, "äöü€😀x" * 9, "a\r\nb\r\n"])
def test_one_file_is_cut_where_nanogpt_cuts(tmp_path, text, fraction):
    file = tmp_path / "input.txt"
    file.write_bytes(text.encode())
    corpus = load_text(DataConfig(path=str(file), val_fraction=fraction))
    cut = int(len(text) * (1 - fraction))
    assert corpus.train[0].text() == text[:cut]
    assert corpus.validation[0].text() == text[cut:]


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
def test_bytes_that_are_no_text_are_refused(tmp_path, tokenizer):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9" * 10)
    for path in (file, tmp_path):
        with pytest.raises(UserError, match=r"latin\.txt' is not UTF-8: byte 0xe9 at offset 3; convert"):
            load_text(DataConfig(path=str(path), tokenizer=tokenizer))


def test_folder_skips_hidden_and_binary_files(tmp_path):
    for name in ("a.txt", "sub/b.md", "sub/deep/c", ".hidden", ".git/config", "picture.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89\0\0" if name == "picture.bin" else name.encode())
    corpus = load_text(DataConfig(path=str(tmp_path)))
    assert sorted({*names(corpus.train), *names(corpus.validation)}) == ["a.txt", "sub/b.md", "sub/deep/c"]
    assert "3 files, " in corpus.description and "1 binary skipped" in corpus.description


def test_glob_takes_its_matches_and_a_file_keeps_its_side(tmp_path):
    for index in range(400):
        folder = tmp_path / f"part{index % 4}"
        folder.mkdir(exist_ok=True)
        (folder / f"{index}.txt").write_text(f"text {index}")
        (folder / f"{index}.log").write_text("noise")
    whole = load_text(DataConfig(path=str(tmp_path / "**" / "*.txt"), val_fraction=0.3))
    assert len(whole.train) + len(whole.validation) == 400
    other = load_text(DataConfig(path=str(tmp_path / "part[01]" / "*.txt"), val_fraction=0.3))
    assert set(names(other.validation)) <= set(names(whole.validation))
    assert len(other.train) + len(other.validation) == 200


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_a_split_is_empty(tmp_path, fraction):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("text")
    corpus = load_text(DataConfig(path=str(tmp_path), val_fraction=fraction))
    sizes = [sum(len(document.raw) for document in side) for side in (corpus.train, corpus.validation)]
    assert sorted(sizes) == [1, 11]


def test_folder_of_one_file_is_split_inside_it(tmp_path):
    (tmp_path / "only.txt").write_text("0123456789")
    corpus = load_text(DataConfig(path=str(tmp_path), val_fraction=0.3))
    assert (corpus.train[0].raw, corpus.validation[0].raw) == (b"0123456", b"789")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "input.txt").write_text("0123456789")
    assert load_text(DataConfig(path="~/input.txt")).train
    assert load_text(DataConfig(path="~/inp*.txt")).train


@pytest.mark.parametrize(
    "path, tokenizer, words",
    [
        ("missing.txt", "byte", ["data.path", "missing.txt", "no such file"]),
        ("", "byte", ["data.path", "no such file"]),
        ("x" * 5000, "byte", ["data.path", "no such file"]),
        ("*.none", "byte", ["data.path", "*.none", "no file matches"]),
        ("empty.txt", "byte", ["data.path", "empty.txt", "empty"]),
        ("hollow", "byte", ["data.path", "hollow", "no text file"]),
        ("latin.txt", "char", ["data.path", "latin.txt", "UTF-8", "0xe9", "offset 3", "convert"]),
    ],
)
def test_refused_in_one_line(tmp_path, monkeypatch, path, tokenizer, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("hollow").mkdir()
    Path("hollow/nothing.txt").touch()
    Path("latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load_text(DataConfig(path=path, tokenizer=tokenizer))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
