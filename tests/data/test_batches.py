"""Batches: an epoch is a permutation, ranks are slices of one batch, indices are all the state there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchyard.data.batches import EvalBatches, TextSource, TrainBatches
from switchyard.errors import UserError

sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 400), st.integers(0, 2**40))


def build(batch_size, world, seq_length, extra, rank=0):
    """Batches over tokens that are their own positions, with at least one batch of them."""
    stream = np.arange((batch_size * world + 1) * (seq_length + 1) + extra, dtype=np.uint16)
    return stream, lambda seed, rank=0, world=world, size=batch_size: TrainBatches(
        stream, size, seq_length, seed, rank, world
    )


@settings(max_examples=60)
@given(sizes)
def test_an_epoch_shows_each_window_once_and_windows_do_not_overlap(size):
    batch_size, world, seq_length, extra, seed = size
    stream, make = build(batch_size, world, seq_length, extra)
    batches = make(seed, world=1)
    for epoch in (0, 1):
        first = epoch * batches.batches_per_epoch
        seen = [batches.at(first + index) for index in range(batches.batches_per_epoch)]
        starts = np.concatenate([batch.tokens[:, 0] for batch in seen])
        assert len(set(starts)) == len(starts) == batches.batches_per_epoch * batch_size
        assert len(set((starts - starts.min()) % (seq_length + 1))) == 1  # all lie on one grid
        windows = len(TextSource(stream, seq_length))
        assert windows - len(starts) < batch_size  # less than a batch is left over
        for batch in seen:
            np.testing.assert_array_equal(batch.labels, batch.tokens + 1)
            assert batch.tokens.shape == (batch_size, seq_length) and batch.tokens.dtype == np.int32
            assert batch.labels.dtype == np.int32 and batch.valid.dtype == np.float32 and batch.valid.all()
            np.testing.assert_array_equal(batch.tokens, batch.tokens[:, :1] + np.arange(seq_length))


@settings(max_examples=60)
@given(sizes, st.integers(0, 50))
def test_ranks_joined_are_the_batch_of_one_process(size, index):
    batch_size, world, seq_length, extra, seed = size
    _, make = build(batch_size, world, seq_length, extra)
    whole = make(seed, world=1, size=batch_size * world)
    ranks = [make(seed, rank) for rank in range(world)]
    assert {rank.batches_per_epoch for rank in ranks} == {whole.batches_per_epoch}
    for field in range(3):
        joined = np.concatenate([rank.at(index)[field] for rank in ranks])
        np.testing.assert_array_equal(joined, whole.at(index)[field])


@settings(max_examples=60)
@given(sizes, st.lists(st.integers(0, 60), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_index_alone(size, indices):
    batch_size, world, seq_length, extra, seed = size
    _, make = build(batch_size, world, seq_length, extra)
    used = make(seed)
    for index in indices:
        np.testing.assert_array_equal(used.at(index).tokens, make(seed).at(index).tokens)


def test_epochs_and_seeds_differ_in_order_and_offset():
    stream = np.arange(2000, dtype=np.uint16)
    batches = TrainBatches(stream, 4, 16, seed=1)
    epochs = [
        np.concatenate([batches.at(epoch * batches.batches_per_epoch + i).tokens[:, 0] for i in range(28)])
        for epoch in range(6)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({int(epoch[0]) % 17 for epoch in epochs}) > 1
    assert not np.array_equal(batches.at(0).tokens, TrainBatches(stream, 4, 16, seed=2).at(0).tokens)


def test_every_token_can_be_reached():
    batches = TrainBatches(np.arange(40, dtype=np.uint8), 1, 4, seed=0)
    seen = {token for index in range(400) for token in batches.at(index).labels[0].tolist()}
    assert seen == set(range(1, 40))


def test_the_first_batch_is_known():
    """Pins the shuffle: a change of it would break the resume of old runs."""
    batches = TrainBatches(np.arange(100, dtype=np.uint8), 2, 4, seed=1)
    assert batches.at(0).tokens.tolist() == [[68, 69, 70, 71], [48, 49, 50, 51]]
    assert batches.at(25).tokens.tolist() == [[12, 13, 14, 15], [77, 78, 79, 80]]


@settings(max_examples=100)
@given(st.integers(2, 200), st.integers(1, 5), st.integers(1, 12))
def test_evaluation_predicts_every_token_but_the_first_once(length, batch_size, seq_length):
    stream = np.arange(length, dtype=np.uint16)
    batches = EvalBatches(stream, batch_size, seq_length)
    for _ in range(2):  # fresh each time
        seen = list(batches)
        assert len(seen) == len(batches)
        assert {batch.tokens.shape for batch in seen} == {(batch_size, seq_length)}
        labels = np.concatenate([batch.labels[batch.valid == 1] for batch in seen])
        tokens = np.concatenate([batch.tokens[batch.valid == 1] for batch in seen])
        np.testing.assert_array_equal(labels, stream[1:])
        np.testing.assert_array_equal(tokens, stream[:-1])
        assert seen[-1].valid.any()
        padding = np.concatenate([batch.tokens[batch.valid == 0] for batch in seen])
        assert not padding.any()


@pytest.mark.parametrize(
    "length, batch_size, seq_length, words",
    [
        (0, 1, 8, ["model.seq_length: 8", "only 0 tokens", "needs 9", "more text"]),
        (1, 1, 8, ["model.seq_length: 8", "only 1 tokens", "more text"]),
        (8, 1, 8, ["model.seq_length: 8", "only 8 tokens", "needs 9", "at most 7"]),
        (20, 3, 8, ["data.batch_size: 3", "only 1 blocks of 9 tokens", "lower data.batch_size"]),
    ],
)
def test_too_little_training_text_is_refused(length, batch_size, seq_length, words):
    with pytest.raises(UserError) as caught:
        TrainBatches(np.zeros(length, np.uint8), batch_size, seq_length, 1)
    for word in words:
        assert word in str(caught.value)


def test_the_length_that_an_error_proposes_works():
    assert TrainBatches(np.arange(8, dtype=np.uint8), 1, 7, 1).at(0).tokens.tolist() == [list(range(7))]


@pytest.mark.parametrize("length", [0, 1])
def test_too_little_validation_text_is_refused(length):
    with pytest.raises(UserError, match=rf"data\.val_fraction: leaves {length} validation tokens"):
        EvalBatches(np.zeros(length, np.uint8), 1, 8)


def test_indices_outside_are_refused():
    with pytest.raises(IndexError):
        TrainBatches(np.zeros(100, np.uint8), 1, 8, 1).at(-1)
    with pytest.raises(IndexError):
        EvalBatches(np.zeros(10, np.uint8), 1, 9).at(1)


def _starts(batches, indices) -> list[int]:
    """First tokens of the sequences of some batches: a stream of distinct tokens names its windows by them."""
    return [int(token) for index in indices for token in batches.at(index).tokens[:, 0]]


@pytest.mark.parametrize(("before", "after"), [(4, 8), (4, 6), (8, 4), (3, 5), (5, 1)])
def test_another_batch_size_goes_on_with_what_the_epoch_has_left(before, after):
    """Of 40 windows some were read in batches of the old size: no window comes twice, only a last part stays out."""
    stream = np.arange(40 * 5 + 4, dtype=np.uint16)
    old, new = TrainBatches(stream, before, 4, seed=3), TrainBatches(stream, after, 4, seed=3)
    done = 3
    new.start_at(done, *old.course.after(done))
    rest = (40 - done * before) // after
    seen = _starts(old, range(done)) + _starts(new, range(done, done + rest))
    assert len(set(seen)) == len(seen) > 40 - after
    assert {*seen} <= {*_starts(TrainBatches(stream, 1, 4, seed=3), range(40))}  # the windows of the same epoch
    assert new.course.at(done + rest) == (1, 0)  # and then the next epoch as a whole


def test_windows_that_filled_no_batch_are_read_by_smaller_ones():
    stream = np.arange(10 * 5 + 4, dtype=np.uint16)
    old, new = TrainBatches(stream, 4, 4, seed=3), TrainBatches(stream, 2, 4, seed=3)
    new.start_at(2, *old.course.after(2))  # 8 of 10 were read
    seen = _starts(old, range(2)) + _starts(new, range(2, 3))
    assert len(set(seen)) == 10 and new.course.at(3) == (1, 0)


@pytest.mark.parametrize("world", [1, 2])
def test_beginning_anywhere_gives_the_same_batches(world):
    """Every place of three epochs, whose last batches leave windows over."""
    stream = np.arange(23 * 5 + 4, dtype=np.uint16)
    for rank in range(world):
        whole, later = (TrainBatches(stream, 4 // world, 4, 1, rank, world) for _ in range(2))
        for index in range(15):
            later.start_at(index, *whole.course.after(index))
            for ahead in range(index, 16):
                np.testing.assert_array_equal(later.at(ahead).tokens, whole.at(ahead).tokens)
        with pytest.raises(IndexError, match="counted from 14"):
            later.at(13)
