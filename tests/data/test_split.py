"""Which part of a text validates: by size where files are few, by hash where they are many, or a text of its own."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchyard import config
from switchyard.config import DataConfig
from switchyard.data import load_data, mindrecord, prepare
from switchyard.data.corpus import load_text
from switchyard.data.document import Document
from switchyard.data.split import MANY_FILES, split, split_by_hash, split_each
from switchyard.errors import UserError


def write(folder, **texts):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def size(documents):
    return sum(len(document.raw) for document in documents)


def raws(documents):
    return [(document.name, document.raw) for document in documents]


def test_three_files_are_cut_by_size(tmp_path):
    """By hand: a tenth of 20, 40 and 140 bytes is 2, 4 and 14."""
    folder = write(tmp_path / "texts", a="0123456789" * 2, b="0123456789" * 4, c="0123456789" * 14)
    corpus = load_text(DataConfig(path=str(folder), val_fraction=0.1))
    assert raws(corpus.validation) == [("a.txt", b"89"), ("b.txt", b"6789"), ("c.txt", b"67890123456789")]
    assert [len(document.raw) for document in corpus.train] == [18, 36, 126]
    assert corpus.description == f"'{folder}': 3 files, 200 bytes, validation 10 % of it (the last part of each file)"


@given(
    texts=st.lists(st.text(st.sampled_from("aé世😀\n"), max_size=300), min_size=2, max_size=30),
    fraction=st.floats(0.01, 0.9),
)
def test_the_share_is_exact_up_to_a_character_and_nothing_is_lost(texts, fraction):
    documents = [Document(f"{index:02}", text.encode()) for index, text in enumerate(texts)]
    total = size(documents)
    if total < 200:
        return
    parts = split_each(documents, fraction)
    assert abs(size(parts.validation) - fraction * total) <= 4
    joined = {}
    for document in parts.train + parts.validation:
        document.text()  # no character is cut in two
        joined[document.name] = joined.get(document.name, b"") + document.raw
    assert joined == {document.name: document.raw for document in documents if document.raw}


def test_the_split_does_not_depend_on_the_order_in_which_files_were_made(tmp_path):
    texts = {f"n{index}": "text " * (index + 1) for index in range(9)}
    shuffled = list(texts.items())
    random.Random(1).shuffle(shuffled)
    one, other = write(tmp_path / "one", **texts), write(tmp_path / "other", **dict(shuffled))
    one, other = (load_text(DataConfig(path=str(folder))) for folder in (one, other))
    assert raws(one.train) == raws(other.train) and raws(one.validation) == raws(other.validation)


def test_many_files_of_like_size_go_by_hash_and_uneven_ones_by_size():
    even = [Document(f"{index:04}", b"text" * (90 + index % 20)) for index in range(600)]
    assert split(even, 0.1) == split_by_hash(even, 0.1)
    assert 0.05 < split(even, 0.1).share < 0.15
    uneven = [*even, Document("whole", b"x" * 10_000_000)]
    assert abs(split_by_hash(uneven, 0.1).share - 0.1) > 0.05
    assert split(uneven, 0.1).share == pytest.approx(0.1, abs=1e-6)
    assert split(even[: MANY_FILES - 1], 0.1).rule == "the last part of each file"


def test_the_standard_library_keeps_its_split_whatever_its_share_is():
    """That of the quickstart, 1.5 % where 2 % are asked for, to which published figures belong."""
    corpus = load_text(DataConfig(val_fraction=0.02))
    everything = sorted(corpus.train + corpus.validation, key=lambda document: document.name)
    parts = split_by_hash(everything, 0.02)
    assert (corpus.train, corpus.validation) == (parts.train, parts.validation)
    assert re.search(r"validation \d\.\d+ % of it \(files by a hash of their paths\)$", corpus.description)


def test_shares_are_said_for_one_file_too(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    data = load_data(config.build({}, [f"data.path={tmp_path / 'a.txt'}", "model.seq_length=4", "data.batch_size=2"]))
    assert "100 bytes, validation 10 % of it (its last part)" in data.description


@pytest.mark.parametrize("name", ["val.txt", "val", "val/*.txt"])
def test_a_validation_text_is_read_whole_and_so_is_the_training_text(tmp_path, name):
    write(tmp_path, train="training text " * 20, val="other words")
    write(tmp_path / "val", a="other ", b="words")
    corpus = load_text(DataConfig(path=str(tmp_path / "train.txt"), val_path=str(tmp_path / name)))
    assert b"".join(document.raw for document in corpus.train) == b"training text " * 20
    assert b"".join(document.raw for document in corpus.validation) == b"other words"
    assert "3.78 % of both" in corpus.description  # 11 of 291 bytes


def test_a_validation_text_is_what_data_and_records_validate_on(tmp_path):
    write(tmp_path, train="training text " * 20, val="tenth word")
    overrides = [f"data.path={tmp_path / 'train.txt'}", "model.seq_length=4", "data.batch_size=2"]
    data = load_data(config.build({}, [*overrides, f"data.val_path={tmp_path / 'val.txt'}"]))
    assert data.validation_tokens == 9
    (batch, other) = data.validation()
    assert bytes([*batch.labels[batch.valid > 0], *other.labels[other.valid > 0]]) == b"enth word"
    out = tmp_path / "blocks"
    paths = ["--input", str(tmp_path / "train.txt"), "--val-path", str(tmp_path / "val.txt"), "--out", str(out)]
    assert prepare.main([*paths, "--seq-length", "4", "--tokenizer", "byte", "--format", "mindrecord"]) == 0
    manifest, _ = mindrecord.read_manifest(out)
    assert mindrecord.read_stream(out, manifest, manifest.validation).tobytes() == b"tenth word"
    assert (manifest.train.tokens, manifest.validation.tokens) == (280, 10)
    overrides[0] = f"data.path={out}"
    with pytest.raises(UserError, match=r"data\.val_path: .* already has a validation part"):
        load_data(config.build({}, [*overrides, f"data.val_path={tmp_path / 'val.txt'}"]))
    with pytest.raises(UserError, match=r"--val-path: .* is already prepared"):
        prepare.prepare(str(tmp_path / "train.txt"), tmp_path / "o", 300, 4, 0.1, "byte", str(out))
    with pytest.raises(UserError, match=r"data\.val_path: .* is a prepared MindRecord folder; give the text"):
        load_data(config.build({}, [f"data.path={tmp_path / 'val.txt'}", f"data.val_path={out}"]))


@pytest.mark.parametrize(
    "val_path, words",
    [
        ("train.txt", "is also training text of data.path"),
        ("link.txt", "is also training text of data.path"),
        ("*.txt", "is also training text of data.path"),
        ("empty", r"empty\.txt'; the file is empty"),
        ("hollow", "contains no text file with content"),
        ("none", "no such file or folder, or leave it null"),
        ("latin", "is not UTF-8: byte 0xe9 at offset 3"),
    ],
)
def test_validation_texts_that_cannot_be(tmp_path, val_path, words):
    write(tmp_path, train="training text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "train.txt")
    write(tmp_path / "hollow", empty="")
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    named = {"empty": "hollow/empty.txt", "latin": "latin.md"}.get(val_path, val_path)
    with pytest.raises(UserError, match=r"^data\.val_path: .*" + words) as caught:
        load_text(DataConfig(path=str(tmp_path / "train.txt"), val_path=str(tmp_path / named)))
    assert "\n" not in str(caught.value)


def test_images_take_no_validation_text():
    with pytest.raises(UserError, match=r"data\.val_path: 'a'; names text, but the model reads images"):
        load_data(config.build({"model": {"type": "vision"}}, ["data.val_path=a"]))
