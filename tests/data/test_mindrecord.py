"""Prepared folders: the blocks are the text, any index can be asked for, and damage is noticed."""

import json
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from switchyard import config
from switchyard.data import load_data, mindrecord
from switchyard.data.batches import TrainBatches
from switchyard.data.document import Document
from switchyard.data.prepare import prepare
from switchyard.data.tokenizer import ByteTokenizer
from switchyard.errors import UserError

SEQ_LENGTH = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "input.txt"
    file.write_text("".join(f"line {index} of grüße\n" for index in range(120)))
    return file


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    return prepare(str(text), tmp_path_factory.mktemp("out") / "blocks", 0, SEQ_LENGTH, 0.1, "byte")


@pytest.fixture
def copy(prepared, tmp_path):
    """A prepared folder to damage."""
    return shutil.copytree(prepared, tmp_path / "copy")


def load(path, *overrides, **more):
    return load_data(config.build({}, [f"data.path={path}", f"model.seq_length={SEQ_LENGTH}", *overrides]), **more)


def test_records_are_the_text(text, prepared):
    raw = text.read_bytes()
    manifest, tokenizer = mindrecord.read_manifest(prepared)
    train = mindrecord.read_stream(prepared, manifest, manifest.train)
    validation = mindrecord.read_stream(prepared, manifest, manifest.validation)
    assert train.dtype == np.uint8
    assert train.tobytes() + validation.tobytes() == raw
    assert (manifest.vocab_size, tokenizer.kind) == (256, "byte")
    assert manifest.train.blocks == -(-len(train) // (SEQ_LENGTH + 1))


def test_ids_of_all_whole_blocks_are_counted(prepared):
    """What fills the last block up is no text, and training does not read that block."""
    manifest, _ = mindrecord.read_manifest(prepared)
    whole = manifest.train.tokens // (SEQ_LENGTH + 1) * (SEQ_LENGTH + 1)
    train = mindrecord.read_stream(prepared, manifest, manifest.train)[:whole]
    np.testing.assert_array_equal(load(prepared).token_counts(), np.bincount(train, minlength=256))


def test_training_batches_are_the_blocks_of_the_text(prepared):
    manifest, _ = mindrecord.read_manifest(prepared)
    whole = manifest.train.tokens // (SEQ_LENGTH + 1)
    blocks = mindrecord.read_stream(prepared, manifest, manifest.train)[: whole * (SEQ_LENGTH + 1)]
    data = load(prepared, "data.batch_size=5")
    seen = [data.train.at(index) for index in range(data.train.batches_per_epoch)]
    rows = np.concatenate([np.concatenate((batch.tokens, batch.labels[:, -1:]), axis=1) for batch in seen])
    expected = {tuple(row) for row in blocks.reshape(whole, -1).tolist()}
    got = [tuple(row) for row in rows.tolist()]
    assert len(got) == whole // 5 * 5 and set(got) <= expected


def test_validation_of_records_equals_validation_of_text(text, prepared):
    ours, theirs = load(prepared), load(text)
    assert (ours.validation_tokens, ours.validation_bytes) == (theirs.validation_tokens, theirs.validation_bytes)
    for one, other in zip(ours.validation(), theirs.validation(), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.valid, other.valid)


def test_any_index_can_be_asked_for_in_any_order(prepared):
    straight = load(prepared, "data.batch_size=6").train
    last = straight.batches_per_epoch * 2 + 3
    run = [straight.at(index).tokens for index in range(last)]
    jumping = load(prepared, "data.batch_size=6").train
    for index in (last - 1, 0, 1, straight.batches_per_epoch - 1, straight.batches_per_epoch, 7, 7):
        np.testing.assert_array_equal(jumping.at(index).tokens, run[index])


def test_resume_streams_on_from_the_wanted_index(prepared, monkeypatch):
    """One pipeline serves all following batches; indices before the resume are not read."""
    opened = []
    stream = mindrecord.RecordSource._stream

    def spy(self, order, start):
        opened.append(start)
        return stream(self, order, start)

    monkeypatch.setattr(mindrecord.RecordSource, "_stream", spy)
    batches = load(prepared, "data.batch_size=6").train
    opened.clear()  # the validation split
    for index in range(4, 12):
        batches.at(index)
    assert opened == [4 * 6]


def test_pipelines_follow_each_other_without_a_seam(prepared, monkeypatch):
    reference = [load(prepared, "data.batch_size=6").train.at(index).tokens for index in range(6)]
    monkeypatch.setattr(mindrecord, "STREAM_BLOCKS", 10)
    batches = load(prepared, "data.batch_size=6").train
    for index, expected in enumerate(reference):
        np.testing.assert_array_equal(batches.at(index).tokens, expected)


def test_ranks_joined_are_the_batch_of_one_process(prepared):
    whole = load(prepared, "data.batch_size=6").train
    ranks = [load(prepared, "data.batch_size=6", rank=rank, world=3).train for rank in range(3)]
    for index in (0, 5, whole.batches_per_epoch + 1):
        joined = np.concatenate([rank.at(index).tokens for rank in ranks])
        np.testing.assert_array_equal(joined, whole.at(index).tokens)


def test_shuffle_of_records_is_the_shuffle_of_their_blocks(prepared):
    class Blocks:
        slack = 0

        def __len__(self):
            return 200

        def read(self, order, start, stop, offset):
            return np.repeat(order[start:stop, None], SEQ_LENGTH + 1, axis=1)

    manifest, _ = mindrecord.read_manifest(prepared)
    table = mindrecord.read_stream(prepared, manifest, manifest.train)[: 200 * (SEQ_LENGTH + 1)].reshape(200, -1)
    indices = TrainBatches(Blocks(), 4, SEQ_LENGTH, seed=3)
    records = TrainBatches(mindrecord.RecordSource(prepared / "train.mindrecord", 200), 4, SEQ_LENGTH, seed=3)
    for index in (0, 1, 60):
        np.testing.assert_array_equal(records.at(index).tokens, table[indices.at(index).tokens[:, 0]][:, :-1])


@pytest.mark.parametrize("name", ["", "train.mindrecord", "validation.mindrecord", "*.mindrecord"])
def test_folder_or_file_in_it_name_the_same_data(prepared, name):
    data = load(prepared / name)
    np.testing.assert_array_equal(data.train.at(0).tokens, load(prepared).train.at(0).tokens)


def test_text_is_no_prepared_folder(tmp_path, text):
    assert mindrecord.locate(None) is None
    assert mindrecord.locate(str(text)) is None
    (tmp_path / "manifest.json").write_text("{}")
    assert mindrecord.locate(str(tmp_path)) is None


def test_damage_is_noticed(copy):
    def refused(*words):
        with pytest.raises(UserError) as caught:
            load(copy)
        assert "\n" not in str(caught.value)
        for word in ("data.path", *words):
            assert word in str(caught.value)

    file = copy / "train.mindrecord"
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.truncate(size // 2)
    refused("train.mindrecord", f"{size // 2} bytes, not {size}")
    file.unlink()
    refused("train.mindrecord", "missing")
    (copy / "tokenizer.json").write_text('{"kind": "char", "characters": "ab"}')
    refused("tokenizer.json", "not the tokenizer")
    (copy / "tokenizer.json").unlink()
    refused("tokenizer.json")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["train"]["tokens"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused("manifest.json", "train.tokens")
    (copy / "manifest.json").write_text("{")
    refused("manifest.json")
    (copy / "manifest.json").unlink()
    refused("manifest.json", "switchyard.data.prepare")


def test_another_block_length_is_refused(prepared):
    with pytest.raises(UserError, match=r"model\.seq_length: 16; .* set model\.seq_length=8"):
        load(prepared, "model.seq_length=16")


def test_another_tokenizer_is_refused(prepared, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text('{"kind": "char", "characters": "ab"}')
    with pytest.raises(UserError, match=r"data\.tokenizer: char vocabulary of 2 .*byte vocabulary of 256"):
        load(prepared, f"data.tokenizer={other}")
    with pytest.raises(UserError, match=r"checkpoint was trained with char vocabulary of 2"):
        load(prepared, tokenizer_json=other.read_text())


def test_whole_blocks_only_are_trained_on(tmp_path):
    """The filling of the last block is not text."""
    advanced = []
    stream = ByteTokenizer().encode_documents([Document("x", b"abcdefghijk")])
    split = mindrecord.write_split(tmp_path / "x.mindrecord", stream, 3, advanced.append)
    assert (split.tokens, split.blocks, advanced) == (11, 3, [3])
    blocks = mindrecord.RecordSource(tmp_path / "x.mindrecord", 3).read(np.arange(3), 0, 3, 0)
    assert blocks.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104], [105, 106, 107, 0]]


def test_a_disk_without_room_is_said_before_a_file_begins(tmp_path, monkeypatch):
    """MindSpore's writer crashes at the limit of a file's size, and loses blocks without a word on a full disk."""
    stream, file = np.zeros(6500, np.int32), tmp_path / "train.mindrecord"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 * 1024, limits[1]))
    try:
        with pytest.raises(
            UserError, match=rf"^'{file}': needs 50,432,400 bytes, a file may have 307,200; .*ulimit -f"
        ):
            mindrecord.write_split(file, stream, 64, lambda count: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=rf"^'{file}': needs 50,432,400 bytes, the disk has 1,000; free some space"):
        mindrecord.write_split(file, stream, 64, lambda count: None)
    assert not list(tmp_path.iterdir())
