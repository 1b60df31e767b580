"""Tokenizers: round trips, the separator, JSON, fingerprints, streaming, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchyard.config import DataConfig
from switchyard.data.bpe import train_bpe
from switchyard.data.corpus import Corpus
from switchyard.data.document import Document
from switchyard.data.stream_decoder import StreamDecoder
from switchyard.data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    Tokenizer,
    load_tokenizer,
    reconcile,
)
from switchyard.errors import UserError

SAMPLE = "def grüße(x):\n    return f'{x} – 日本語 😀'\n\n\nclass Änderung:\n    pass\n" * 5
LETTERS = "".join(sorted(set(SAMPLE)))
BPE = train_bpe([Document("sample", SAMPLE.encode())], 320)
EVERY = [ByteTokenizer(), CharTokenizer(LETTERS), BPE]
every = pytest.mark.parametrize("tokenizer", EVERY, ids=lambda tokenizer: tokenizer.kind)
samples = st.text(st.sampled_from(LETTERS), max_size=60)


def documents(*texts):
    return tuple(Document(f"{index}.txt", text.encode()) for index, text in enumerate(texts))


@every
@given(text=samples)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_length(ids) == len(text.encode())
    assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_byte_level_tokenizers_take_any_text(text):
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_length(ids) == len(text.encode())


@every
def test_json_round_trip_keeps_ids_and_fingerprint(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert type(again) is type(tokenizer)
    assert again.fingerprint == tokenizer.fingerprint and len(again.fingerprint) == 64
    assert (again.vocab_size, again.separator) == (tokenizer.vocab_size, tokenizer.separator)
    np.testing.assert_array_equal(again.encode(SAMPLE), tokenizer.encode(SAMPLE))


def test_fingerprints_differ_between_vocabularies():
    kinds = [*EVERY, CharTokenizer("ab"), CharTokenizer("\0ab", separated=True)]
    assert len({tokenizer.fingerprint for tokenizer in kinds}) == len(kinds)


def test_char_vocabulary_is_the_sorted_set_of_all_characters():
    corpus = Corpus(documents("hello\n"), documents("wörld"), "")
    tokenizer = load_tokenizer(DataConfig(tokenizer="char"), corpus)
    assert tokenizer.characters == "".join(sorted(set("hello\nwörld")))
    assert tokenizer.encode("hello").tolist() == [tokenizer.characters.index(letter) for letter in "hello"]
    assert tokenizer.separator is None


def test_separators_stand_between_documents_and_are_one_byte():
    texts = ("grüße", "日本語", "pass")
    separated = load_tokenizer(DataConfig(tokenizer="char"), Corpus(documents(*texts), documents("x"), ""))
    for tokenizer in (ByteTokenizer(), separated, BPE):
        stream = tokenizer.encode_documents(documents("", *texts, ""))
        assert (stream == tokenizer.separator).sum() == 2
        pieces = np.split(stream, np.flatnonzero(stream == tokenizer.separator))
        pieces = [piece[piece != tokenizer.separator] for piece in pieces]
        assert [tokenizer.decode(piece) for piece in pieces] == list(texts)
        assert tokenizer.byte_length(stream) == len("\0".join(texts).encode())


def test_streams_take_the_smallest_type_and_one_document_has_no_separator():
    assert ByteTokenizer().encode_documents(documents("ab")).tolist() == [97, 98]
    assert ByteTokenizer().encode_documents(documents("ab")).dtype == np.uint8
    assert BPE.encode_documents(documents(SAMPLE)).dtype == np.uint16
    assert len(BPE.encode_documents(())) == 0


def test_long_text_in_pieces_gives_the_ids_of_the_whole(monkeypatch):
    text = SAMPLE * 20
    whole = BPE.encode(text)
    monkeypatch.setattr(LibraryTokenizer, "_BATCH_SIZE", 400)
    assert sum(len(part) for part in BPE._parts(text)) > 10
    np.testing.assert_array_equal(BPE.encode_documents(documents(text)), whole)
    many = BPE.encode_documents(documents("ab", text, "cd", text))
    mark = [BPE.separator]
    np.testing.assert_array_equal(many, [*BPE.encode("ab"), *mark, *whole, *mark, *BPE.encode("cd"), *mark, *whole])


@every
@given(data=st.data())
def test_stream_decoder_joins_to_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@every
def test_stream_decoder_never_emits_half_a_character(tokenizer):
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([index]) for index in tokenizer.encode(SAMPLE)]
    assert "".join(pieces) == SAMPLE
    assert not any("\ufffd" in piece for piece in pieces)
    assert decoder.flush() == ""


def test_half_a_character_at_the_end_becomes_a_mark():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.push("é".encode()[:1]) == ""
    assert decoder.flush() == "\ufffd"


def test_character_outside_the_vocabulary_is_named_with_its_place():
    with pytest.raises(UserError, match=r"text: character 'é' \(U\+00E9\) at position 2 .* 2 characters"):
        CharTokenizer("ab").encode("abé")
    with pytest.raises(UserError, match=r"7\.txt.*'z'"):
        CharTokenizer("ab").encode_documents((Document("7.txt", b"az"),))


def test_raw_bytes_of_a_command_line():
    assert ByteTokenizer().encode("a\udcffb").tolist() == [97, 255, 98]
    with pytest.raises(UserError, match="not UTF-8 at position 1"):
        BPE.encode("a\udcffb")
    with pytest.raises(UserError, match="position 1"):
        CharTokenizer("ab").encode("a\udcffb")


def test_truncation_and_padding_of_a_file_are_off():
    tree = json.loads(BPE.to_json())
    tree["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    assert len(Tokenizer.from_json(json.dumps(tree)).encode(SAMPLE)) == len(BPE.encode(SAMPLE))


def test_dropout_of_merges_in_a_file_is_off():
    tree = json.loads(BPE.to_json())
    tree["model"]["dropout"] = 0.9
    np.testing.assert_array_equal(Tokenizer.from_json(json.dumps(tree)).encode(SAMPLE), BPE.encode(SAMPLE))


def test_tokenizer_that_is_not_byte_level_counts_bytes_of_its_text():
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    words = Library(models.WordLevel({"grüße": 0, "[UNK]": 1, "</s>": 2, "pass": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    tokenizer = LibraryTokenizer(words.to_str())
    assert tokenizer.separator == 2
    stream = tokenizer.encode_documents(documents("grüße pass", "pass"))
    assert stream.tolist() == [0, 3, 2, 3]
    assert tokenizer.byte_length(stream) == len("grüße pass pass".encode()) + 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"kind": "char", "characters": "ba"}', '{"model": 7}', '{"model": {"type": "BPE"}}']
)
def test_file_that_is_no_tokenizer_is_refused(tmp_path, text):
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_tokenizer(DataConfig(tokenizer=str(file)), Corpus((), (), ""))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bite", "missing/tokenizer.json", "."])
def test_tokenizer_file_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=r"data\.tokenizer: .*give byte, char or the path"):
        load_tokenizer(DataConfig(tokenizer=name), Corpus((), (), ""))


def test_checkpoint_with_another_vocabulary_is_refused_with_both_sizes_and_fingerprints():
    ours = CharTokenizer(LETTERS)
    with pytest.raises(UserError) as caught:
        reconcile(ours, ByteTokenizer().to_json())
    for part in ("data.tokenizer", str(ours.vocab_size), "256", ours.fingerprint[:8], ByteTokenizer().fingerprint[:8]):
        assert part in str(caught.value)


def test_checkpoint_may_know_more_characters_than_the_text_has():
    assert reconcile(CharTokenizer("ac"), CharTokenizer("abc").to_json()).characters == "abc"
    with pytest.raises(UserError, match="lacks 'd'"):
        reconcile(CharTokenizer("ad"), CharTokenizer("abc").to_json())
