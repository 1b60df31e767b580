"""Tokenizers of T5, which have padding, the end and sentinels: their ids stay as they are."""

import json

import numpy as np
import pytest
from oracles.hf_models import FIXTURES

from switchyard.config import build
from switchyard.config.seq2seq import END, PAD
from switchyard.data import load_data
from switchyard.data.sentinels import SentinelTokenizer, with_sentinels
from switchyard.data.tokenizer import LibraryTokenizer, Tokenizer, expected_vocabulary, read_tokenizer, sentinels_of
from switchyard.errors import UserError

FILE = FIXTURES / "switch_transformers" / "tokenizer.json"  # 24 pieces, then <extra_id_3> 24 to <extra_id_0> 27
WORDS = "the cat sat on a mat and ate an old rat at noon\n"


@pytest.fixture(scope="module")
def text() -> LibraryTokenizer:
    """The tokenizer of text."""
    return read_tokenizer(FILE)


def test_ids_are_those_of_the_file(text):
    tokenizer = SentinelTokenizer(text, 4)
    assert (tokenizer.vocab_size, tokenizer.moved, tokenizer.separator) == (28, 0, END)
    assert [tokenizer.sentinel(number) for number in range(4)] == [27, 26, 25, 24]
    ids = tokenizer.encode("the <extra_id_0> sat<extra_id_3>")
    assert ids.tolist() == [*text.encode("the"), 27, *text.encode("sat"), 24]
    assert tokenizer.decode([PAD, *ids, END]) == "the<extra_id_0> sat<extra_id_3>"
    assert tokenizer.byte_length([PAD, *ids, END]) == len("the sat")
    assert tokenizer.counted(np.arange(28)).tolist() == list(range(28))


def test_spelled_padding_or_ends_are_refused_in_prompts(text):
    with pytest.raises(UserError, match="text: spells padding or the end"):
        SentinelTokenizer(text, 4).encode("the</s>")


def test_more_sentinels_than_the_tokenizer_has_are_refused(text):
    with pytest.raises(UserError, match=r"seq2seq\.sentinels: 5; at most 4, those that the tokenizer has"):
        with_sentinels(text, 5)


def test_another_order_of_special_tokens_is_not_that_of_t5():
    tree = json.loads(FILE.read_text())
    tree["added_tokens"] = [one for one in tree["added_tokens"] if one["content"] != "</s>"]
    assert sentinels_of(Tokenizer.from_json(json.dumps(tree))) == 0
    assert sentinels_of(read_tokenizer(FILE)) == 4


def config_of(path, tokenizer):
    """A configuration whose spans have a sentinel each."""
    return build(
        {
            "model": {"type": "seq2seq", "seq_length": 30},
            "seq2seq": {"sentinels": 4},
            "data": {"path": str(path), "tokenizer": str(tokenizer), "batch_size": 2},
        }
    )


def test_text_is_corrupted_with_the_ids_of_the_file(tmp_path, text):
    (tmp_path / "text.txt").write_text(WORDS * 30)
    data = load_data(config_of(tmp_path / "text.txt", FILE))
    batch, counts = data.train.at(0), data.token_counts()
    inputs, ends = batch.tokens[:, :30], (batch.labels == END).sum(1)
    assert len(counts) == data.tokenizer.vocab_size == 28
    assert counts[:3].sum() == 0 and counts[24:].sum() == 0 and counts[3:24].min() >= 0
    assert inputs.max() == 27 and ends.tolist() == [1, 1]
    restored = data.tokenizer.decode(inputs[0]) + data.tokenizer.decode(batch.labels[0])
    assert set(restored) <= set("<extra_id_0123> " + WORDS)


def test_the_tokenizer_of_a_run_names_the_tokenizer_of_its_text(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(SentinelTokenizer(text, 4).to_json())
    assert read_tokenizer(tmp_path / "tokenizer.json").fingerprint == text.fingerprint
    config = config_of("unread.txt", tmp_path / "tokenizer.json")
    assert expected_vocabulary(config) == 28
    (tmp_path / "byte.json").write_text('{"kind": "byte"}')
    assert expected_vocabulary(config_of("unread.txt", tmp_path / "byte.json")) == 256 + 2 + 4
