"""Preparing token shards: sources of every kind, bounded units, kills, bad input."""

import gzip
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

from switchyard.data import inputs, prepare, prepare_tokens, shards
from switchyard.data.inputs import find_files, units_of
from switchyard.data.prepare_tokens import Plan
from switchyard.errors import UserError


def made(source, out, skip=False, workers=1, **plan):
    plan = {"tokenizer": "byte", "val_fraction": 0.25, **plan}
    return prepare_tokens.prepare_tokens(Plan(str(source), **plan), Path(out), 4, workers, skip)


def documents(folder, split="train"):
    """All documents of a split as text; the shards are read as any other program would."""
    manifest, tokenizer, _ = shards.read_manifest(folder)
    listed = getattr(manifest, split)
    ids = np.concatenate([np.load(folder / shard.file, mmap_mode="r") for shard in listed])
    assert ids.dtype == manifest.dtype and ids[-1] == tokenizer.separator
    assert tokenizer.byte_length(ids) == sum(shard.bytes for shard in listed)
    ends = np.flatnonzero(ids == tokenizer.separator)
    assert len(ends) == sum(shard.documents for shard in listed)
    return [tokenizer.decode(piece[piece != tokenizer.separator]) for piece in np.split(ids, ends + 1)[:-1]]


def lines(*texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


def test_the_last_part_of_a_text_validates_between_two_characters(tmp_path):
    (tmp_path / "a.txt").write_text("ab\ncdé\nfgh")  # 11 bytes, of which a quarter is 3
    out = made(tmp_path / "a.txt", tmp_path / "o", val_fraction=0.25)
    assert documents(out) == ["ab\ncdé\n"]
    assert documents(out, "validation") == ["fgh"]


def test_lines_of_json_plain_and_compressed_make_one_document_each(tmp_path):
    texts = [f"text {number}" for number in range(40)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(*texts[:20]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(*texts[20:]).encode()))
    out = made(folder, tmp_path / "o")
    train, held_out = documents(out), documents(out, "validation")
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text in train]  # in their order
    assert 2 <= len(held_out) <= 20


def test_a_named_field_and_other_validation_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("one", "two", field="content"))
    (tmp_path / "b.txt").write_text("held out")
    out = made(tmp_path / "a.jsonl", tmp_path / "o", text_field="content", val_path=str(tmp_path / "b.txt"))
    assert (documents(out), documents(out, "validation")) == (["one", "two"], ["held out"])


def test_parquet_and_zstd(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    folder = tmp_path / "in"
    folder.mkdir()
    parquet.write_table(arrow.table({"n": [1, 2, 3], "text": ["one", "é", None]}), folder / "a.parquet")
    whole = zstandard.ZstdCompressor().compress(lines("four").encode())
    (folder / "b.jsonl.zst").write_bytes(whole + zstandard.ZstdCompressor().compress(lines("five").encode()))
    (tmp_path / "v.txt").write_text("held out")
    out = made(folder, tmp_path / "o", skip=True, val_path=str(tmp_path / "v.txt"))
    assert documents(out) == ["one", "é", "four", "five"]
    assert shards.read_manifest(out)[0].skipped == 1  # the row without text
    (folder / "b.jsonl.zst").write_bytes(whole[:-4])
    with pytest.raises(
        UserError, match=r"'b.jsonl.zst' behind byte [\d,]+ of its text: the compressed file ends in the"
    ):
        made(folder / "b.jsonl.zst", tmp_path / "p", val_path=str(tmp_path / "v.txt"))


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"--input: 'a.parquet'; needs the package pyarrow; pip install pyarrow"):
        made(tmp_path / "a.parquet", tmp_path / "o")


def test_units_join_to_the_text_and_end_at_lone_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "UNIT", 64)
    text = "\ufeff" + "".join(f"línea {number}\n\n" if number % 3 else f"row {number}\n" for number in range(60))
    (tmp_path / "a.txt").write_text(text)
    (file,) = find_files(str(tmp_path / "a.txt"), 0.2)
    units = list(units_of(file, 0.2, None))
    assert b"".join(unit.content for unit in units).decode() == text[1:]
    assert [unit.first for unit in units] == list(3 + np.cumsum([0, *(len(unit.content) for unit in units[:-1])]))
    assert [unit.ends for unit in units].count(True) == 2 and units[-1].ends
    sides = [unit.validates for unit in units]
    assert sides == sorted(sides) and True in sides
    assert all(len(unit.content) <= 64 for unit in units)
    inner = [unit.content for unit in units if not unit.ends]
    assert all(content.endswith(b"\n") and content[-2:-1] != b"\n" for content in inner)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 129, 192])
def test_a_text_of_any_size_ends_one_document(tmp_path, monkeypatch, size):
    monkeypatch.setattr(inputs, "UNIT", 64)
    (tmp_path / "a.txt").write_text("x" * size)
    (tmp_path / "v.txt").write_text("held out")
    out = made(tmp_path / "a.txt", tmp_path / "o", val_path=str(tmp_path / "v.txt")) if size > 4 else None
    (file,) = find_files(str(tmp_path / "a.txt"), 0.0)
    assert [unit.ends for unit in units_of(file, 0.0, None)].count(True) == 1
    assert out is None or documents(out) == ["x" * size]


def test_bpe_of_the_first_part_of_each_file_and_the_small_type(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    out = made(tmp_path / "a.txt", tmp_path / "o", tokenizer=None, vocab_size=264)
    manifest, tokenizer, _ = shards.read_manifest(out)
    assert (manifest.dtype, tokenizer.vocab_size) == ("uint16", 264)
    assert documents(out)[0].startswith("the cat sat on the mat.")
    assert sum(shard.tokens for shard in manifest.train) < 1900


def test_modules_of_the_standard_library_that_are_not_text_are_left_out(tmp_path, monkeypatch):
    """A library has a module in Latin 1, which tests encodings, one with a NUL, and what is installed beside it."""
    for name, raw in {"a.py": b"x = 1\n", "latin.py": b"# \xe9\n", "nul.py": b"\0", "note.txt": b"no module"}.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "b.py").write_text("y = 2\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    assert [file.name for file in find_files("stdlib", 0.1)] == ["a.py"]


def test_types_by_the_size_of_the_vocabulary():
    assert [str(shards.token_type(size)) for size in (256, 65_536, 65_537)] == ["uint16", "uint16", "int32"]


def test_characters_of_all_parts_are_in_the_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("abcabcabcabcé")
    out = made(tmp_path / "a.txt", tmp_path / "o", tokenizer="char", val_fraction=0.2)
    assert shards.read_manifest(out)[1].characters == "\0abcé"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("end, before", [("", "1.0"), (".gz", "0.0")])
def test_progress_does_not_call_a_compressed_file_read_before_it_is(tmp_path, monkeypatch, capsys, end, before):
    """3 MB of text, with a line of progress behind each megabyte; compressed it has half of that."""
    monkeypatch.setattr(prepare_tokens, "SECONDS", 0)
    raw = np.random.default_rng(0).bytes(1_500_000).hex("\n", 20).encode()
    (tmp_path / f"text.txt{end}").write_bytes(gzip.compress(raw) if end else raw)
    made(tmp_path / f"text.txt{end}", tmp_path / "out", tokenizer="byte")
    said = [line for line in capsys.readouterr().out.splitlines() if " files, " in line]
    assert said[0].startswith(f"0 of 1 files, {before} of ") and said[-1].startswith("1 of 1 files")


def test_processes_change_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_tokens, "SMALL", 0)
    (tmp_path / "a.jsonl").write_text(lines(*(f"text {number} " * 50 for number in range(300))))
    one = made(tmp_path / "a.jsonl", tmp_path / "one", shard_tokens=50_000)
    two = made(tmp_path / "a.jsonl", tmp_path / "two", shard_tokens=50_000, workers=2)
    assert contents(one) == contents(two)


def test_a_stop_between_any_two_units_changes_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "UNIT", 200)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.jsonl").write_text(lines(*(f"{name} {number}" for number in range(40))))
    whole = contents(made(folder, tmp_path / "whole", shard_tokens=60))
    assert len(whole) > 8
    real = prepare_tokens._Job._add
    for count in (1, 4, 3, 2):

        def dies(self, found, left=[count]):  # noqa: B006 (counts the calls)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            real(self, found)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(prepare_tokens._Job, "_add", dies)
            made(folder, tmp_path / "o", shard_tokens=60)
        assert not (tmp_path / "o").exists()
        if (tmp_path / ".o.preparing").exists():  # what a kill -9 may leave besides
            (tmp_path / ".o.preparing" / "train-00099.npy").write_bytes(b"half a shard")
            with open(tmp_path / ".o.preparing" / "progress.jsonl", "a") as file:
                file.write('{"train": {"fi')
    made(folder, tmp_path / "o", shard_tokens=60)
    assert contents(tmp_path / "o") == whole
    assert not (tmp_path / ".o.preparing").exists()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stop_while_the_last_files_are_removed_changes_no_byte(count, tmp_path, monkeypatch):
    """Before the first, between both, and behind them, where only the rename is left."""
    (tmp_path / "a.jsonl").write_text(lines(*(f"text {number}" for number in range(40))))
    whole = contents(made(tmp_path / "a.jsonl", tmp_path / "whole", shard_tokens=60))
    done, unlink = [], Path.unlink

    def dies(self, missing_ok=False):
        done.append(self.name)
        if len(done) == count:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    def renames(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare_tokens.Path, "unlink", dies)
        patched.setattr(prepare_tokens.os, "rename", renames)
        patched.setattr(prepare_tokens, "remove", lambda path: None)  # nobody tidies up after a kill
        made(tmp_path / "a.jsonl", tmp_path / "o", shard_tokens=60)
    assert contents(made(tmp_path / "a.jsonl", tmp_path / "o", shard_tokens=60)) == whole


def test_killed_in_a_subprocess_it_goes_on(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(*(f"text {number} " * 400 for number in range(1500))))  # 7 MB
    command = [sys.executable, "-m", "switchyard.data.prepare", "--input", "a.jsonl", "--tokenizer", "byte"]
    command += ["--shard-tokens", "1000000", "--workers", "2"]
    process = subprocess.Popen([*command, "--out", "o"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / ".o.preparing" / "progress.jsonl").exists():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    process.wait(timeout=10)
    done = subprocess.run([*command, "--out", "o"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert process.returncode == -signal.SIGKILL and "goes on after" in done.stdout
    whole = made(tmp_path / "a.jsonl", tmp_path / "whole", shard_tokens=1_000_000, val_fraction=0.1)
    ours = contents(tmp_path / "o")
    assert {name: raw for name, raw in ours.items() if name != "manifest.json"} == {
        name: raw for name, raw in contents(whole).items() if name != "manifest.json"
    }


def test_an_unfinished_preparation_of_other_arguments_is_not_mixed(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(lines(*(f"text {number}" for number in range(40))))

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare_tokens._Job, "manifest", dies)
        made(tmp_path / "a.jsonl", tmp_path / "o")
    with pytest.raises(UserError, match=r"unfinished preparation with other arguments"):
        made(tmp_path / "a.jsonl", tmp_path / "o", val_fraction=0.5)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    with pytest.raises(UserError, match=r"files that changed since"):
        made(tmp_path / "a.jsonl", tmp_path / "o")


def test_two_at_once_are_told_apart(tmp_path):
    (tmp_path / "a.txt").write_text("some text to read")
    with (
        prepare_tokens._work_folder(tmp_path / "o"),
        pytest.raises(UserError, match="another process is preparing it"),
    ):
        made(tmp_path / "a.txt", tmp_path / "o")


BAD_LINES = [
    ('{"text": "fine"}\n{"text": ', "line 2: not JSON"),
    ('{"text": "fine"}\n\n{"other": "x"}\n', "line 3: no text in the field 'text'"),
    ('{"text": 5}\n', "line 1: no text in the field 'text'"),
    ('{"text": "\\ud800"}\n', "line 1: a lone surrogate at position 0"),
    ('{"text": "a\\u0000b"}\n', "line 1: text: NUL at position 1"),
    (b'{"text": "caf\xe9"}\n', "line 1: not UTF-8"),
    ("[" * 100_000, "line 1: not JSON"),
]


@pytest.mark.parametrize("content, words", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path, capsys, content, words):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "v.txt").write_text("held out")
    with pytest.raises(UserError) as caught:
        made(tmp_path / "a.jsonl", tmp_path / "o", val_path=str(tmp_path / "v.txt"))
    assert str(caught.value).startswith(f"--input: 'a.jsonl' {words}") and "\n" not in str(caught.value)
    assert not (tmp_path / ".o.preparing").exists() and not (tmp_path / "o").exists()
    (tmp_path / "a.jsonl").write_bytes(raw + b"\n" + lines("good text").encode())
    out = made(tmp_path / "a.jsonl", tmp_path / "o", skip=True, val_path=str(tmp_path / "v.txt"))
    assert documents(out)[-1] == "good text" and shards.read_manifest(out)[0].skipped == 1
    assert f"skipped: 'a.jsonl' {words}" in capsys.readouterr().err


def test_a_bad_line_of_text_and_a_truncated_file_are_skipped_alone(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"first\ncaf\xe9\nlast\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines("gone").encode())[:-9])
    (folder / "c.bin").write_bytes(b"\x00\x01" * 50)  # left out of any folder, and counted
    (tmp_path / "v.txt").write_text("held out")
    with pytest.raises(UserError, match=r"--input: 'a.txt' offset 6: byte 0xe9, 3 bytes on, is not UTF-8; correct"):
        made(folder, tmp_path / "o", val_path=str(tmp_path / "v.txt"))
    out = made(folder, tmp_path / "o", skip=True, val_path=str(tmp_path / "v.txt"))
    assert documents(out) == ["first\nlast\n"]
    assert shards.read_manifest(out)[0].skipped == 3
    assert "'b.jsonl.gz' behind byte 0 of its text" in capsys.readouterr().err


def test_too_little_text_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijkl")
    with pytest.raises(UserError, match=r"for validation, 2 are needed; give --val-path"):
        made(tmp_path / "a.txt", tmp_path / "o", val_fraction=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--input", "missing"], "--input: 'missing'"),
        (["--input", "t", "--shard-tokens", "0"], "--shard-tokens: 0; at least 1"),
        (["--input", "t", "--workers", "-1"], "--workers: -1; at least 1"),
        (["--input", "t", "--instructions", "--field", "x"], "--field: 'x'; --instructions reads prompt"),
        (["--input", "t", "--format", "mindrecord", "--workers", "2"], "--workers: --format mindrecord does not read"),
    ],
)
def test_command_line_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("t").mkdir()
    Path("t/a.txt").write_text("text")
    assert prepare.main([*arguments, "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1
    assert not Path("o").exists()


INSTRUCTIONS = [
    ({"prompt": "Q: 1+1? ", "response": "2"}, ["Q: 1+1? ", "2"], [0, 1]),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        ["user: ", "hi\n", "assistant: ", "yo\n"],
        [0, 0, 0, 1],
    ),
]


@pytest.mark.parametrize("record, texts, learned", INSTRUCTIONS)
def test_answers_and_the_separator_are_learned(tmp_path, record, texts, learned):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "v.jsonl").write_text(json.dumps(record) + "\n")
    out = made(tmp_path / "a.jsonl", tmp_path / "o", text_field=None, val_path=str(tmp_path / "v.jsonl"))
    assert documents(out) == ["".join(texts)]
    (shard,) = shards.read_manifest(out)[0].train
    expected = [learn for text, learn in zip(texts, learned) for _ in text] + [1]
    assert np.load(out / shard.mask).tolist() == expected
    assert shard.answers == sum(expected)


@pytest.mark.parametrize(
    "record, words",
    [
        ({"prompt": "a"}, "no text in the field 'response'"),
        ({"prompt": "a", "response": ""}, "'response' is empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of the role assistant"),
        ([1], "is not an object with prompt and response, or messages"),
    ],
)
def test_bad_instructions_are_named(tmp_path, record, words):
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=rf"--input: 'a.jsonl' line 1: .*{words}"):
        made(tmp_path / "a.jsonl", tmp_path / "o", text_field=None)
