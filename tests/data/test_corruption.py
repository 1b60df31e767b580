"""Span corruption: what is taken out comes back, lengths are those of T5, batches are functions of their index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchyard.config import DataConfig, build
from switchyard.config.seq2seq import END, PAD, SPECIALS, Seq2SeqConfig
from switchyard.data import corruption
from switchyard.data.corruption import CorruptedBatches, CorruptedEvalBatches, corrupt, noise_mask
from switchyard.data.given import load_scored
from switchyard.data.sentinels import SentinelTokenizer
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from switchyard.errors import UserError

TOKENIZER = SentinelTokenizer(ByteTokenizer(), 100)  # 358 entries
FIRST = 1000  # id of <extra_id_0>; text has lower ids
shares = st.sampled_from([(0.15, 3.0), (0.5, 1.0), (0.3, 8.0), (0.9, 2.0)])


def own(density: float, span: float) -> Seq2SeqConfig:
    return Seq2SeqConfig(noise_density=density, mean_noise_span_length=span)


def config_of(seq_length=16, batch=2, seed=1, **seq2seq):
    return build(
        {
            "model": {"type": "seq2seq", "seq_length": seq_length},
            "seq2seq": seq2seq,
            "data": {"batch_size": batch},
            "train": {"seed": seed},
        }
    )


def joined(inputs, targets) -> list[int]:
    """Puts the spans of a target into the places of their sentinels, by a literal loop."""
    spans, sentinel = {}, None
    for token in targets[:-1].tolist():
        if token > FIRST - 200:
            sentinel, spans[token] = token, []
        else:
            spans[sentinel].append(token)
    found = []
    for token in inputs[:-1].tolist():
        found += spans[token] if token > FIRST - 200 else [token]
    return found


def test_a_sentence_with_two_spans():
    text, mask = np.arange(10, 20), np.array([0, 1, 0, 0, 0, 0, 0, 1, 1, 1], bool)
    inputs, targets = corruption.replace_runs(text, mask, FIRST), corruption.replace_runs(text, ~mask, FIRST)
    assert inputs.tolist() == [10, FIRST, 12, 13, 14, 15, 16, FIRST - 1, END]
    assert targets.tolist() == [FIRST, 11, FIRST - 1, 17, 18, 19, END]


@given(st.integers(2, 300), shares, st.integers(0, 2**32))
def test_the_spans_in_the_places_of_their_sentinels_are_the_text(length, share, seed):
    settings, text = own(*share), np.arange(SPECIALS, SPECIALS + length)
    inputs, targets = corrupt(text, np.random.default_rng(seed), settings, FIRST)
    assert joined(inputs, targets) == text.tolist()
    assert inputs[-1] == targets[-1] == END
    assert (len(inputs), len(targets)) == settings.corrupted(length)


@given(st.integers(2, 300), shares, st.integers(0, 2**32))
def test_a_mask_has_the_spans_that_were_asked_for(length, share, seed):
    mask = noise_mask(np.random.default_rng(seed), length, own(*share))
    noise, spans = own(*share).spans(length)
    assert mask.sum() == noise and not mask[0]
    assert (np.diff(mask.astype(int)) == 1).sum() == spans  # each begins behind a token that stays


def test_all_ways_to_divide_a_length_are_as_probable():
    rng, found = np.random.default_rng(0), {}
    for _ in range(3000):
        key = tuple(corruption.segments(rng, 5, 3).tolist())
        found[key] = found.get(key, 0) + 1
    assert set(found) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert min(found.values()) > 400  # of 500 each


@pytest.mark.parametrize(("inputs", "window", "targets"), [(512, 568, 114), (256, 284, 58), (128, 141, 29)])
def test_lengths_are_those_of_t5(inputs, window, targets):
    config = config_of(inputs)
    assert (config.window, config.target_length) == (window, targets)


@given(st.integers(3, 700), shares)
def test_a_window_fills_the_input_and_a_longer_one_does_not_fit(inputs, share):
    settings = own(*share)
    window = settings.window(inputs)
    assert window == 2 or settings.corrupted(window)[0] <= inputs
    assert settings.corrupted(window + 1)[0] > inputs or settings.noise_density == 0.5


def test_a_batch_is_a_pure_function_of_seed_and_index_and_ranks_share_it():
    config, stream = config_of(batch=4), np.random.default_rng(0).integers(0, 200, 400)
    batches = CorruptedBatches(stream, config, TOKENIZER)
    far = batches.batches_per_epoch + 1  # of the second epoch
    again = CorruptedBatches(stream, config, TOKENIZER)
    for index in (far, 0, 2):
        for one, other in zip(batches.at(index), again.at(index)):
            np.testing.assert_array_equal(one, other)
    ranks = [CorruptedBatches(stream, config, TOKENIZER, rank, 2) for rank in range(2)]
    for field in range(3):
        halves = np.concatenate([rank.at(far)[field] for rank in ranks])
        np.testing.assert_array_equal(halves, batches.at(far)[field])
    other_seed = CorruptedBatches(stream, config_of(batch=4, seed=2), TOKENIZER)
    assert not np.array_equal(other_seed.at(0).tokens, batches.at(0).tokens)


def test_a_batch_holds_the_input_then_what_the_decoder_has_read_before_each_label():
    config, stream = config_of(), np.random.default_rng(0).integers(0, 200, 300)
    batch = CorruptedBatches(stream, config, TOKENIZER).at(0)
    length = config.model.seq_length
    assert batch.tokens.shape == (2, length + config.target_length) and batch.labels.shape == batch.valid.shape
    assert batch.tokens[:, length].tolist() == [PAD, PAD]
    np.testing.assert_array_equal(batch.tokens[:, length + 1 :], batch.labels[:, :-1])
    assert (batch.tokens[:, :length] != PAD).all() and batch.valid.all()  # windows of T5's length fill both


def test_validation_reads_every_token_once_and_is_always_corrupted_alike():
    config, stream = config_of(), np.random.default_rng(0).integers(0, 200, 95)
    batches = CorruptedEvalBatches(stream, config, TOKENIZER)
    length, found = config.model.seq_length, []
    for batch in batches:
        for inputs, labels, valid in zip(batch.tokens[:, :length], batch.labels, batch.valid):
            if valid.any():
                found += joined_ids(inputs[inputs != PAD], labels[valid > 0], 357)
    assert found == (stream + SPECIALS).tolist()
    other = CorruptedEvalBatches(stream, config_of(seed=5), TOKENIZER)
    np.testing.assert_array_equal(other.at(0).tokens, batches.at(0).tokens)
    with pytest.raises(IndexError):
        batches.at(len(batches))


def test_a_checkpoint_is_scored_on_a_whole_text_with_its_own_sentinels(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc" * 50)
    config = config_of().model_copy(update={"data": DataConfig(path=str(path), batch_size=2)})
    tokenizer = SentinelTokenizer(ByteTokenizer(), config.seq2seq.sentinels)
    data = load_scored(config, tokenizer.to_json(), [f"data.path={path}"])
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    inputs = sum((batch.tokens[:, :16] != PAD).sum() for batch in data.validation())
    assert inputs > 100 and data.validation_tokens == sum(batch.valid.sum() for batch in data.validation())


def joined_ids(inputs, targets, first):
    """`joined` where <extra_id_0> has the id `first`."""
    move = FIRST - first
    lifted = [np.where(ids > first - 100, ids + move, ids) for ids in (inputs, targets)]
    return joined(*lifted)


@pytest.mark.parametrize("text", [ByteTokenizer(), CharTokenizer("\0abc", separated=True)])
def test_sentinels_stand_behind_the_vocabulary_and_in_prompts(text):
    tokenizer = SentinelTokenizer(text, 3)
    ids = tokenizer.encode("ab<extra_id_0>c<extra_id_2>")
    assert ids[[2, 4]].tolist() == [tokenizer.vocab_size - 1, tokenizer.vocab_size - 3]
    assert tokenizer.decode([PAD, *ids, END]) == "ab<extra_id_0>c<extra_id_2>"
    assert tokenizer.byte_length([PAD, *ids, END]) == 3
    assert tokenizer.separator == END
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint and again.encode("abc").tolist() == [*text.encode("abc") + 2]


def test_a_number_of_sentinels_that_is_none_is_refused():
    with pytest.raises(UserError, match="count: 0"):
        Tokenizer.from_json('{"kind": "sentinels", "count": 0, "tokenizer": {"kind": "byte"}}')


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"seq_length": 2}}, "model.seq_length: 2; at least 3"),
        ({"seq2seq": {"sentinels": 2}}, "seq2seq.sentinels: 2; at least 3, the spans"),
        ({"seq2seq": {"relative_attention_max_distance": 16}}, "max_distance: 16; must be above half"),
        ({"model": {"n_kv_heads": 2}}, "model.n_kv_heads: 2; must be null"),
        ({"moe": {"expert_num": 4, "record": "f"}}, "moe.record: f; is for model.type 'decoder'"),
        ({"moe": {"expert_num": 4, "layers": [8]}}, "moe.layers: 8; at most the last layer of the decoder \\(7\\)"),
        ({"parallel": {"pipeline_stage": 2, "micro_batch_num": 2}}, "pipeline_stage: 2; must be 1 unless"),
        ({"moe": {"expert_num": 4, "granularity": "slice"}}, "moe.granularity: slice"),
    ],
)
def test_what_an_encoder_decoder_does_not_have_is_refused_by_name(changes, message):
    tree = {"model": {"type": "seq2seq"}}
    for section, keys in changes.items():
        tree[section] = tree.get(section, {}) | keys
    with pytest.raises(UserError, match=message):
        build(tree)


def test_conditional_layers_are_counted_in_each_stack():
    tree = {"model": {"type": "seq2seq", "num_layers": 3}, "moe": {"expert_num": 4, "layers": 2}}
    config = build(tree | {"seq2seq": {"num_decoder_layers": 4}})
    assert config.moe_layers == (1, 4, 6)
    assert [stack.moe_layers for stack in config.stacks] == [(1,), (1, 3)]
    assert [stack.rows for stack in config.stacks] == [12 * 64, 12 * config.target_length]
