"""Tokenizer files of every kind of model: a text comes back as it was, or is refused in one line."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from switchyard.data import bpe as trainer
from switchyard.data.bpe import train_bpe
from switchyard.data.document import Document
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, unknown_note
from switchyard.errors import UserError

SAMPLE = "abc abd aab\n" * 20
MARK = "<|endoftext|>"


def library(model, pre_tokenizer=None, decoder=None, special=(MARK,), normalizer=None):
    """A tokenizer file of a model."""
    made = Library(model)
    made.normalizer = normalizer or made.normalizer
    made.pre_tokenizer = pre_tokenizer or made.pre_tokenizer
    made.decoder = decoder or made.decoder
    made.add_special_tokens(list(special))
    return LibraryTokenizer(made.to_str())


def bpe(letters="ab c", **more):
    vocabulary = {token: index for index, token in enumerate([*letters, "ab"])}
    return models.BPE(vocab=vocabulary, merges=[("a", "b")], **more)


BYTES = {f"<0x{byte:02X}>": 10 + byte for byte in range(256)}
FEW_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS = {
    "byte": ByteTokenizer(),
    "char": CharTokenizer("\0 abc", separated=True),
    "bpe of all bytes": train_bpe([Document("x", SAMPLE.encode())], 270),
    "bpe of letters": library(bpe(), decoder=decoders.Fuse()),
    "bpe of some bytes": library(bpe("abcĠÃ©"), FEW_BYTES, decoders.ByteLevel()),
    "bpe of words": library(bpe(), pre_tokenizers.Split(" ", "isolated"), decoders.Fuse()),
    "bpe with byte fallback": library(
        models.BPE(vocab={"a": 0, "b": 1, "ab": 2, **BYTES}, merges=[("a", "b")], byte_fallback=True),
        decoder=decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    ),
    "bpe whose unknown token is the separator": library(bpe(["a", "b", MARK], unk_token=MARK), decoder=decoders.Fuse()),
    "word level": library(
        models.WordLevel({"a": 0, " ": 1, "ab": 2}), pre_tokenizers.Split(" ", "isolated"), decoders.Fuse()
    ),
    "unigram": library(models.Unigram([("a", -1.0), ("b", -1.0), ("ab", -1.5)]), decoder=decoders.Fuse()),
}
TEXTS = st.text(st.sampled_from("aab  cé世\n<|end"), max_size=12) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=8
)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@example(text=f"ab{MARK}a")
@example(text="abzab")
@example(text="\0")
def test_a_text_comes_back_or_is_refused_in_one_line(kind, text):
    tokenizer = KINDS[kind]
    try:
        ids = tokenizer.encode(text)
    except UserError as error:
        assert "\n" not in str(error).replace(repr(text), "") and str(error).startswith("text: ")
        assert kind not in ("bpe of all bytes", "bpe with byte fallback")
        return
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator is None or tokenizer.separator not in ids


@pytest.mark.parametrize(
    "kind, text, character, place",
    [
        ("bpe of letters", "ab zab", "z", 3),
        ("bpe of some bytes", "ab é ab世", "世", 7),
        ("bpe of some bytes", "abc è", "è", 4),  # its first byte is known, its second is not
        ("bpe of words", "ab ab xab", "x", 6),
        ("unigram", "abab世", "世", 4),
        ("char", "abz", "z", 2),
    ],
)
def test_the_first_character_without_a_token_is_named_with_its_place(kind, text, character, place):
    tokenizer = KINDS[kind]
    said = rf"text: character '{character}' \(U\+{ord(character):04X}\) at position {place} is not in the"
    with pytest.raises(UserError, match="^" + said):
        tokenizer.encode(text)
    with pytest.raises(UserError, match=r"^data\.path: 'second\.txt': " + said):
        tokenizer.encode_documents([Document("first.txt", b"ab"), Document("second.txt", text.encode())])


def test_models_that_raise_are_refused_in_one_line():
    for model in (models.WordLevel({"a": 0}), models.WordPiece({"a": 0})):
        with pytest.raises(
            UserError, match=r"^text: character 'b' \(U\+0062\) at position 2 .*no token for unknown"
        ) as caught:
            library(model, pre_tokenizers.Whitespace()).encode("a b")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("add", ["add_special_tokens", "add_tokens"])
@pytest.mark.parametrize("mark", [MARK, "</s>", "<eos>"])
def test_a_separator_that_a_text_spells_stays_text(add, mark):
    """Whether the file calls it special or not; between documents it stands as before."""
    made = Library.from_str(KINDS["bpe of all bytes"].to_json().replace(MARK, "<unused>"))
    getattr(made, add)([mark])
    tokenizer = LibraryTokenizer(made.to_str())
    text = f"a {mark} b{mark}"
    for ids in (tokenizer.encode(text), tokenizer.encode_documents([Document("x", text.encode())])):
        assert tokenizer.separator == made.token_to_id(mark) and tokenizer.separator not in ids
        assert tokenizer.decode(ids) == text and tokenizer.byte_length(ids) == len(text)
    stream = tokenizer.encode_documents([Document("x", text.encode()), Document("y", b"c")])
    assert (stream == tokenizer.separator).sum() == 1


def test_other_special_tokens_stay_text_as_well():
    tokenizer = library(bpe("ab c<pd>"), special=(MARK, "<pad>"), decoder=decoders.Fuse())
    assert tokenizer.decode(tokenizer.encode("ab<pad>c")) == "ab<pad>c"


def test_a_vocabulary_that_holds_the_separator_as_a_word_refuses_it():
    words = models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]")
    tokenizer = library(words, pre_tokenizers.WhitespaceSplit(), special=())
    assert tokenizer.separator == 2
    with pytest.raises(UserError, match=r"^text: '</s>' at position 2 is encoded as the special token '</s>'"):
        tokenizer.encode("a </s> a")


def test_what_would_become_a_separator_for_want_of_an_unknown_token_is_refused():
    with pytest.raises(UserError, match=r"^text: 'z' at position 2 is encoded as the special token '<\|endoftext\|>'"):
        KINDS["bpe whose unknown token is the separator"].encode("abz")


def test_text_outside_a_vocabulary_with_an_unknown_token_is_counted():
    words = models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = library(words, pre_tokenizers.WhitespaceSplit(), special=("[UNK]",))
    ids = tokenizer.encode("a b c a")
    assert ids.tolist() == [0, 1, 1, 0]
    assert unknown_note(tokenizer, ids, ids) == "; 4 tokens stand for text outside the vocabulary"
    assert unknown_note(tokenizer, tokenizer.encode("a")) == "" == unknown_note(KINDS["byte"], ids)


def test_what_a_normalizer_changes_is_not_taken_for_lost():
    tokenizer = library(bpe(), normalizer=normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()]))
    assert tokenizer.encode(" AB ").tolist() == tokenizer.encode("ab").tolist()
    with pytest.raises(UserError, match=r"character 'z'"):
        tokenizer.encode(" ABZ")


@pytest.mark.parametrize("letters", ["ACGT", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"])
def test_bpe_training_time_is_linear_in_a_run_of_letters(letters):
    """150,000 letters on one line took four seconds, and four times as long for every doubling."""
    text = "".join(random.Random(1).choices(letters, k=150_000))
    started = time.process_time()
    tokenizer = train_bpe([Document("line", text.encode())], 600)
    assert time.process_time() - started < 3
    assert tokenizer.decode(tokenizer.encode(text)) == text
    np.testing.assert_array_equal(LibraryTokenizer(tokenizer.to_json()).encode(text), tokenizer.encode(text))


def test_ordinary_text_gives_the_vocabulary_that_it_gave_without_the_limit(monkeypatch):
    text = "".join(Path(path).read_text() for path in (trainer.__file__, random.__file__, st.__file__))
    text += "x" * 250 + "\n" + "#" * 200 + "\n" + " " * 200 + "世界" * 100 + "\n"
    limited = train_bpe([Document("x", text.encode())], 1000)
    monkeypatch.setattr(trainer, "LONGEST_RUN", 100_000)
    free = train_bpe([Document("x", text.encode())], 1000)
    assert limited._library.get_vocab() == free._library.get_vocab()
    np.testing.assert_array_equal(limited.encode(text), free.encode(text))
