"""Tokenizers of models with more entries than tokens: filled up for us, emptied for an export."""

import json

import numpy as np
import pytest
import tokenizers

from switchyard.data import Tokenizer
from switchyard.errors import UserError
from switchyard.interop.huggingface.tokenizer_files import filled, letter_of_byte, library_json

TEXT = "the cat sat on the mat, the cat ate the rat\n" * 20


def _byte_level() -> str:
    """A tokenizer as Qwen has it: byte-level merges, then special tokens behind the vocabulary."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made.to_str()


def test_a_tokenizer_is_filled_up_and_emptied_again():
    text = _byte_level()
    before = Tokenizer.from_json(text)
    size = before.vocab_size
    after = Tokenizer.from_json(filled(text, size, 320, "x"))
    assert after.vocab_size == 320 > size > 256 and after.separator == before.separator == size - 3
    for sentence in (TEXT, "Grüße 😀 <|im_start|>", "<|switchyard_unused_300|>"):
        np.testing.assert_array_equal(after.encode(sentence), before.encode(sentence))
        assert after.decode(after.encode(sentence)) == sentence
        assert after.byte_length(after.encode(sentence)) == len(sentence.encode())
    assert after.decode([300, 319]) == ""
    emptied = Tokenizer.from_json(library_json(after.to_json()))
    assert emptied.fingerprint == before.fingerprint


def test_ids_without_a_token_are_refused():
    tree = json.loads(_byte_level())
    tree["model"]["vocab"]["far"] = 290  # no token has the ids before it
    with pytest.raises(UserError, match=r"^tokenizer 'x': has ids without a token, so it cannot be filled up to 320"):
        filled(json.dumps(tree), 291, 320, "x")


def test_letters_of_bytes_are_those_of_the_library():
    made = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):
        assert made.pre_tokenize_str(chr(byte))[0][0] == letter_of_byte(byte)
    assert sorted(map(letter_of_byte, range(256))) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
