"""The command line that makes prepared folders, from end to end."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from switchyard import config
from switchyard.data import load_data, mindrecord, prepare
from switchyard.errors import UserError
from switchyard.files import sha256_of


@pytest.fixture
def folder(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(12):
        (texts / f"{index:02}.py").write_text(f"def grüße_{index}(x):\n    return x * {index}\n\n\n" * 8)
    return texts


def run(*arguments, cwd):
    command = [sys.executable, "-m", "switchyard.data.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_folder_to_blocks_from_end_to_end(folder, tmp_path):
    tmp_path = tmp_path / "My Prójects (1), +"
    tmp_path.mkdir()
    asked = ("--vocab-size", 280, "--seq-length", 16, "--format", "mindrecord")
    done = run("--input", folder, "--out", "blocks", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "12 files" in done.stdout and "data.path=blocks" in done.stdout
    assert "writing" in done.stdout and "%|" not in done.stdout + done.stderr  # plain lines, no bar
    out = tmp_path / "blocks"
    assert [path.name for path in tmp_path.iterdir()] == ["blocks"]  # nothing left over
    manifest, tokenizer = mindrecord.read_manifest(out)
    assert (manifest.vocab_size, tokenizer.vocab_size, manifest.seq_length) == (280, 280, 16)
    for split in (manifest.train, manifest.validation):
        with open(out / split.file, "rb") as handle:
            assert sha256_of(handle) == split.sha256
    data = load_data(config.build({}, [f"data.path={out}", "model.seq_length=16", "data.batch_size=2"]))
    assert data.description.startswith("MindRecord") and "\n" not in data.description
    texts = [path.read_text() for path in sorted(folder.iterdir())]
    train = mindrecord.read_stream(out, manifest, manifest.train)
    pieces = np.split(train, np.flatnonzero(train == tokenizer.separator))
    held_out = mindrecord.read_stream(out, manifest, manifest.validation)
    others = np.split(held_out, np.flatnonzero(held_out == tokenizer.separator))
    assert [tokenizer.decode(one) + tokenizer.decode(other) for one, other in zip(pieces, others)] == texts


def test_reused_tokenizer_gives_the_same_blocks(folder, tmp_path):
    first = prepare.prepare(str(folder), tmp_path / "first", 300, 16, 0.2, None)
    again = prepare.prepare(str(folder), tmp_path / "again", 0, 16, 0.2, str(first / "tokenizer.json"))
    ours, theirs = mindrecord.read_manifest(first)[0], mindrecord.read_manifest(again)[0]
    assert ours.tokenizer_fingerprint == theirs.tokenizer_fingerprint
    for name in ("train", "validation"):
        one = mindrecord.read_stream(first, ours, getattr(ours, name))
        np.testing.assert_array_equal(one, mindrecord.read_stream(again, theirs, getattr(theirs, name)))


def test_text_read_with_the_trained_tokenizer_equals_the_records(folder, tmp_path):
    out = prepare.prepare(str(folder), tmp_path / "blocks", 300, 16, 0.2, None)
    size = ["model.seq_length=16", "data.batch_size=2", "data.val_fraction=0.2"]
    records = load_data(config.build({}, [f"data.path={out}", *size]))
    text = load_data(config.build({}, [f"data.path={folder}", f"data.tokenizer={out / 'tokenizer.json'}", *size]))
    assert records.validation_bytes == text.validation_bytes
    for one, other in zip(records.validation(), text.validation(), strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)


def test_trained_vocabulary_compresses_and_reads_any_text(folder, tmp_path):
    out = prepare.prepare(str(folder), tmp_path / "blocks", 300, 16, 0.2, None)
    _, tokenizer = mindrecord.read_manifest(out)
    text = (folder / "00.py").read_text()
    assert len(tokenizer.encode(text)) < len(text.encode()) / 2
    assert tokenizer.decode(tokenizer.encode("日本語 ✓")) == "日本語 ✓"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"source": "missing"}, ["data.path", "missing"]),
        ({"out": "texts"}, ["--out", "texts", "exists"]),
        ({"vocab_size": 256}, ["--vocab-size: 256", "at least 257"]),
        ({"seq_length": 0}, ["--seq-length: 0"]),
        ({"seq_length": 99999}, ["model.seq_length: 99999", "more text"]),
        ({"val_fraction": 1.0}, ["--val-fraction: 1.0"]),
        ({"tokenizer": "missing.json"}, ["data.tokenizer", "missing.json"]),
    ],
)
def test_refused_before_anything_is_written(folder, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    sound = {"source": "texts", "out": "o", "vocab_size": 300, "seq_length": 16, "val_fraction": 0.1, "tokenizer": None}
    arguments = {**sound, **change}
    arguments["out"] = Path(arguments["out"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        prepare.prepare(**arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_undecodable_file_is_named(folder, tmp_path):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"'latin\.txt' is not UTF-8: byte 0xe9 at offset 3"):
        prepare.prepare(str(folder), tmp_path / "o", 300, 16, 0.1, None)


def test_prepared_folder_is_not_prepared_again(folder, tmp_path):
    out = prepare.prepare(str(folder), tmp_path / "blocks", 300, 16, 0.2, None)
    with pytest.raises(UserError, match="is already prepared"):
        prepare.prepare(str(out), tmp_path / "more", 300, 16, 0.2, None)


def test_failure_while_writing_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mindrecord, "write_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(str(folder), tmp_path / "o", 300, 16, 0.1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_command_line_errors_are_one_line(tmp_path):
    done = run("--input", "missing", "--out", "o", "--format", "mindrecord", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.path: 'missing'") and done.stderr.count("\n") == 1


def test_help_is_quick_and_imports_no_mindspore(tmp_path):
    started = time.perf_counter()
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and "--vocab-size" in done.stdout
    assert time.perf_counter() - started < 3  # a third of a second on an idle laptop
    check = "import sys, switchyard.data.prepare; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
