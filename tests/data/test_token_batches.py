"""Training from token shards: order, mixtures, resumption, bad shards."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchyard import config
from switchyard.data import load_data, prepare_tokens, shards
from switchyard.data.batches import IGNORED
from switchyard.data.prepare_tokens import Plan
from switchyard.data.shards import ShardStream
from switchyard.data.token_batches import PATTERN, TokenBatches, TokenCorpus, pattern_of
from switchyard.errors import UserError


def prepared(tmp_path, name, texts, **plan):
    """A folder of small shards of one document a text; the last text validates."""
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:-1]))
    (tmp_path / f"{name}-v.jsonl").write_text(json.dumps({"text": texts[-1]}) + "\n")
    plan = {"tokenizer": "byte", "val_path": str(tmp_path / f"{name}-v.jsonl"), "shard_tokens": 40, **plan}
    return prepare_tokens.prepare_tokens(Plan(str(tmp_path / f"{name}.jsonl"), **plan), tmp_path / name, 2, 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("switchyard.data.inputs.UNIT", 60)  # so that a small text has several shards
    return prepared(tmp_path, "corpus", [f"document {number}" for number in range(30)])


def built(folder, *overrides):
    path = [] if folder is None else [f"data.path={folder}"]
    return config.build({}, [*path, "model.seq_length=7", "data.batch_size=4", *overrides])


def tokens_of(folder):
    manifest = shards.read_manifest(folder)[0]
    return np.concatenate([np.load(folder / shard.file) for shard in manifest.train])[:-1]


def corpus(array, tmp_path, name="c", **more):
    np.save(tmp_path / f"{name}.npy", array.astype(np.uint16))
    return TokenCorpus(name, ShardStream([(tmp_path / f"{name}.npy", len(array))], "uint16"), **more)


def test_slices_of_shards_are_those_of_the_joined_array(folder):
    tokens, manifest = tokens_of(folder), shards.read_manifest(folder)[0]
    assert len(manifest.train) > 3
    stream = ShardStream([(folder / shard.file, shard.tokens) for shard in manifest.train], "uint16", 1)
    assert len(stream) == len(tokens)
    for start in range(0, len(tokens), 7):
        for count in (0, 1, 50, 1000):
            np.testing.assert_array_equal(stream[start : start + count], tokens[start : start + count])
    np.testing.assert_array_equal(np.concatenate(list(stream.pieces(33))), tokens)


def test_an_epoch_reads_every_window_once(tmp_path):
    data = TokenBatches([corpus(np.arange(330), tmp_path)], 4, 7, seed=1)
    assert data.windows == [40]
    epochs = [np.concatenate([data.at(10 * epoch + i).tokens[:, 0] for i in range(10)]) for epoch in range(2)]
    for starts in epochs:
        assert np.diff(np.sort(starts)).tolist() == [8] * 39
    assert epochs[0].tolist() != epochs[1].tolist()
    np.testing.assert_array_equal(data.at(3).labels, data.at(3).tokens + 1)


def test_ranks_join_to_the_batch_of_one_process(folder):
    whole = load_data(built(folder)).train
    for world in (2, 4):
        ranks = [load_data(built(folder), rank=rank, world=world).train for rank in range(world)]
        for index in (0, 3, 1000):
            np.testing.assert_array_equal(
                np.concatenate([rank.at(index).tokens for rank in ranks]), whole.at(index).tokens
            )


def test_resumed_with_other_sizes_the_same_windows_follow(folder):
    one = load_data(built(folder)).train
    rows = np.concatenate([one.at(index).labels for index in range(12)])
    other = load_data(built(folder, "data.batch_size=6"), rank=1, world=2).train
    other.start_at(100, *one.course.after(6))  # 24 windows are read
    np.testing.assert_array_equal(other.at(100).labels, rows[24 + 3 : 24 + 6])
    np.testing.assert_array_equal(other.at(103).labels, rows[24 + 18 + 3 : 24 + 24])


def test_a_course_after_changed_data_draws_anew(folder):
    one = load_data(built(folder)).train
    before = one.at(0).tokens.tolist()
    one.start_at(5, 1, 0)
    assert one.at(5).tokens.tolist() != before


def test_reading_touches_the_windows_of_this_rank_only(folder, monkeypatch):
    data = load_data(built(folder), rank=1, world=2).train
    read = []
    real = ShardStream.read
    monkeypatch.setattr(ShardStream, "read", lambda self, start, count: read.append(count) or real(self, start, count))
    data.at(10**9)
    assert read == [8, 8]


def test_text_and_prepared_text_score_the_same(tmp_path, folder):
    data = load_data(built(folder))
    assert data.validation_tokens == len("document 29") - 1 == data.validation_bytes
    (batch,) = data.validation()
    assert data.tokenizer.decode(batch.labels[batch.valid > 0]) == "ocument 29"
    np.testing.assert_array_equal(data.token_counts(), np.bincount(tokens_of(folder), minlength=256))


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_the_pattern_has_the_shares_of_the_weights(weights, seed):
    exact = np.array(weights) / sum(weights) * PATTERN
    if exact.min() < 1:
        return
    counts = np.bincount(pattern_of(weights, seed), minlength=len(weights))
    assert counts.sum() == PATTERN and np.abs(counts - exact).max() < 1


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(40, 200), min_size=2, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_a_mixture_reads_each_corpus_by_its_own_epochs(tmp_path_factory, sizes, seed, data):
    folder = tmp_path_factory.mktemp("mixture")
    weights = [data.draw(st.floats(0.5, 4)) for _ in sizes]
    arrays = [np.arange(size) + 1000 * number for number, size in enumerate(sizes)]
    corpora = [corpus(array, folder, f"c{n}", weight=w) for n, (array, w) in enumerate(zip(arrays, weights))]
    train = TokenBatches(corpora, 8, 3, seed)
    first = np.concatenate([train.at(index).tokens[:, 0] for index in range(60)])
    chosen = first // 1000
    counts = train.counts(60)
    assert [counts[f"c{number}"] for number in range(len(sizes))] == np.bincount(chosen, minlength=len(sizes)).tolist()
    for number, windows in enumerate(train.windows):
        starts = first[chosen == number] % 1000
        for epoch in range(len(starts) // windows):  # each whole epoch reads each window once
            part = np.sort(starts[epoch * windows : (epoch + 1) * windows])
            assert (np.diff(part) == 4).all()


def test_mixture_of_folders_from_the_configuration(tmp_path, folder):
    other = prepared(tmp_path, "other", [f"UPPER {number}" for number in range(30)])
    mixture = f"data.mixture=[{{path: {folder}, weight: 3}}, {{path: {other}, weight: 1, epochs: 9}}]"
    data = load_data(built(None, mixture, "train.steps=20"))
    assert "75 % of the windows" in data.description and "25 % of the windows" in data.description
    upper = sum("P" in data.tokenizer.decode(row) for i in range(50) for row in data.train.at(i).tokens)
    assert 30 < upper < 70 and sum(data.train.counts(50).values()) == 200
    text = data.tokenizer.decode(np.concatenate([batch.labels[batch.valid > 0] for batch in data.validation()]))
    assert text == "ocument 29\0UPPER 29"
    with pytest.raises(UserError, match=r"data.mixture\[1\].epochs: 9; train.steps reads 'other' [\d.]+ times"):
        load_data(built(None, mixture, "train.steps=2000"))
    held = load_data(built(None, mixture, "train.steps=20", f"data.val_path={other}"))
    assert held.validation_tokens == len(tokens_of(other)) + 1 + len("UPPER 29") - 1


def test_without_weights_corpora_count_by_their_windows_and_epochs(tmp_path):
    corpora = [corpus(np.arange(400), tmp_path, "a"), corpus(np.arange(400), tmp_path, "b", epochs=3.0)]
    assert TokenBatches(corpora, 1, 3, 0).shares == {"a": 0.25, "b": 0.75}


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.mixture=[{path: missing}]"], "data.mixture[0].path: 'missing' holds no token shards"),
        (
            ["data.mixture=[{path: FOLDER}, {path: CHARS}]"],
            "data.mixture[1].path: 'CHARS' was prepared with another tok",
        ),
        (
            ["data.mixture=[{path: FOLDER, weight: 1e6}, {path: FOLDER, weight: 1}]"],
            "data.mixture[1].weight: its share",
        ),
        (["data.path=FOLDER", "model.seq_length=9999"], "model.seq_length: 9999; the training text 'corpus' has only"),
    ],
)
def test_bad_mixtures_are_one_line(tmp_path, folder, overrides, words):
    chars = prepared(tmp_path, "chars", ["one", "two"], tokenizer="char")
    names = {"FOLDER": str(folder), "CHARS": str(chars)}
    for name, value in names.items():
        overrides, words = [one.replace(name, value) for one in overrides], words.replace(name, value)
    with pytest.raises(UserError) as caught:
        load_data(built(None, *overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["data.loss_mask=true", "data.on_error=skip"])
def test_keys_of_shards_are_refused_for_text(tmp_path, override):
    (tmp_path / "a.txt").write_text("text " * 40)
    with pytest.raises(UserError, match=rf"{override.replace('=', ': ')}; data.path names no token shards"):
        load_data(built(tmp_path / "a.txt", override))


def test_a_mixture_and_a_path_contradict(folder):
    with pytest.raises(UserError, match=r"data.path: .*; data.mixture names the corpora"):
        built(folder, f"data.mixture=[{{path: {folder}}}]")


def test_a_truncated_shard_stops_the_run_or_is_left_out(folder):
    whole = load_data(built(folder))
    shard = shards.read_manifest(folder)[0].train[1]
    raw = (folder / shard.file).read_bytes()
    (folder / shard.file).write_bytes(raw[:-2])
    with pytest.raises(
        UserError, match=rf"'{shard.file}' has {len(raw) - 2:,} bytes, not {len(raw):,}.*data.on_error=skip"
    ):
        load_data(built(folder))
    data = load_data(built(folder, "data.on_error=skip"))
    assert "1 bad shards left out" in data.description
    assert data.fingerprint["train"]["bytes"] == whole.fingerprint["train"]["bytes"] - shard.bytes
    data.train.at(0)


def test_a_shard_that_shrinks_during_the_run_is_one_line(folder):
    data = load_data(built(folder))
    shard = shards.read_manifest(folder)[0].train[0]
    (folder / shard.file).write_bytes((folder / shard.file).read_bytes()[:130])
    with pytest.raises(UserError, match=rf"data.path: '.*{shard.file}': token [\d,]+: ends at byte [\d,]+; copy"):
        for index in range(40):
            data.train.at(index)


def test_answers_alone_are_labels(tmp_path):
    record = {"prompt": "ask? ", "response": "yes"}
    (tmp_path / "a.jsonl").write_text((json.dumps(record) + "\n") * 20)
    plan = Plan(str(tmp_path / "a.jsonl"), val_path=str(tmp_path / "v.jsonl"), tokenizer="byte", text_field=None)
    (tmp_path / "v.jsonl").write_text((json.dumps(record) + "\n") * 2)
    out = prepare_tokens.prepare_tokens(plan, tmp_path / "o", 4, 1)
    data = load_data(built(out, "model.seq_length=20", "data.loss_mask=true"))
    labels = data.train.at(0).labels
    kept = labels[labels != IGNORED]
    assert set(data.tokenizer.decode(kept)) == set("yes\0") and 0 < len(kept) < labels.size
    (batch,) = data.validation()
    learned = (batch.valid > 0) & (batch.labels != IGNORED)
    assert data.tokenizer.decode(batch.labels[learned]) == "yes\0yes"
    assert data.validation_tokens == learned.sum()
    everything = load_data(built(out, "model.seq_length=20"))
    assert "prompts are learned too" in everything.description and (everything.train.at(0).labels >= 0).all()
    with pytest.raises(UserError, match=r"data.loss_mask: true; '.*' holds no instruction data"):
        load_data(built(prepared(tmp_path, "plain", ["one text", "two"]), "data.loss_mask=true"))
