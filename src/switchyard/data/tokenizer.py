"""Converts text to token ids and back: bytes, characters, or a `tokenizer.json` of the `tokenizers` library.

Documents are joined by one separator token. It stands for one NUL byte, which text does not hold, in every tokenizer:
bits per byte of different tokenizers then have the same denominator. A byte model needs no 257th token for it.
"""

import hashlib
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from switchyard.config import Config, DataConfig
from switchyard.config.reader import parse_json
from switchyard.config.seq2seq import END, PAD, SPECIALS
from switchyard.data import lossless
from switchyard.data.corpus import Corpus
from switchyard.data.document import Document
from switchyard.data.utf8 import decoded
from switchyard.errors import UserError
from switchyard.files import UnfitError, read_regular

END_OF_TEXT = "<|endoftext|>"
SEPARATORS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # in foreign files, the first that exists
BYTES = 256  # values of a byte
LONGEST = 256 << 20  # bytes of a tokenizer.json
Ids = Sequence[int] | np.ndarray
# kind of a tokenizer around another one -> what reads it: (parsed JSON, name for messages); see data.sentinels
WRAPPED: dict[str, Callable[[dict[str, Any], str], "Tokenizer"]] = {}


class Tokenizer(ABC):
    """Defines what the program needs from a tokenizer. Ids are 0 .. vocab_size - 1."""

    kind: str
    vocab_size: int
    separator: int | None  # the token between two documents; None = documents follow each other without a mark
    unknown: int | None = None  # the token that stands for text outside the vocabulary; None = such text is refused

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns the ids [T] int32 of a text, the separator's never among them.

        Raises:
            UserError: a character that the vocabulary lacks, named with its position; text that becomes the separator.
        """

    @abstractmethod
    def decode(self, ids: Ids) -> str:
        """Returns the text of ids; bytes that are not a character become U+FFFD."""

    @abstractmethod
    def byte_length(self, ids: Ids) -> int:
        """Returns the number of UTF-8 bytes that the ids stand for; a separator is one byte."""

    @abstractmethod
    def to_json(self) -> str:
        """Returns the tokenizer as JSON, for checkpoints and exports; `Tokenizer.from_json` reads it."""

    def encode_with_special(self, text: str) -> np.ndarray:
        """Returns the ids [T] int32 of a text in which spelled special tokens are those tokens, as of a template."""
        return self.encode(text)

    def special_in(self, text: str) -> str | None:
        """Returns a special token that a text spells; None where there is none."""
        return None

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token by its text; None where there is no such token."""
        return None

    @property
    def special_ids(self) -> frozenset[int]:
        """Returns the ids of special tokens, which no text becomes."""
        return frozenset()

    @property
    def of_text(self) -> "Tokenizer":
        """Returns the tokenizer of text: this one, or the one that this one is around, see WRAPPED."""
        return self

    @property
    def fingerprint(self) -> str:
        """Returns the sha256 of what the tokenizer does: equal fingerprints give equal ids."""
        canonical = json.dumps(json.loads(self.to_json()), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @staticmethod
    def from_json(text: str, name: str = "tokenizer.json") -> "Tokenizer":
        """Returns the tokenizer that `to_json` wrote, or any `tokenizer.json` of the `tokenizers` library.

        Raises:
            UserError: not such a file; `name` says which in the message.
        """
        try:
            tree = parse_json(text)
        except ValueError:
            tree = {}
        if isinstance(tree, dict):
            if tree.get("kind") == "byte":
                return ByteTokenizer()
            if tree.get("kind") in list(WRAPPED) and isinstance(tree.get("tokenizer"), dict):
                return WRAPPED[tree["kind"]](tree, name)
            if tree.get("kind") == "char" and _is_alphabet(tree):
                return CharTokenizer(tree["characters"], separated=tree.get("separated") is True)
            if "model" in tree:
                return LibraryTokenizer(text, name)
        raise UserError(f"tokenizer '{name}': not a tokenizer.json; give byte, char, or a file that `tokenizers` wrote")

    def encode_documents(self, documents: Iterable[Document]) -> np.ndarray:
        """Returns one stream [T] of all documents with separators between them, in the smallest unsigned integer type.

        Empty documents leave no trace.

        Raises:
            UserError: undecodable bytes (file and offset) or a character outside the vocabulary.
        """
        dtype = smallest_dtype(self.vocab_size)
        mark = np.array([] if self.separator is None else [self.separator], dtype)
        pieces: list[np.ndarray] = []
        for ids in self.encode_each(documents):
            if len(ids):
                pieces += [ids.astype(dtype, copy=False), mark]
        return np.concatenate(pieces[:-1]) if pieces else np.zeros(0, dtype)

    def encode_each(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """Yields the ids of each document."""
        for document in documents:
            text = document.text()
            try:
                yield self.encode(text)
            except UserError as error:
                raise UserError(f"{document.key}: '{document.name}': {error}") from None


class ByteTokenizer(Tokenizer):
    """Maps each byte to the id of the same value: 256 ids. NUL is the separator."""

    kind = "byte"
    vocab_size = 256
    separator = 0

    def encode(self, text: str) -> np.ndarray:
        """Implements Tokenizer.encode."""
        _refuse_nul(text)
        raw = text.encode("utf-8", "surrogateescape")  # command-line arguments may carry raw bytes so
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Implements Tokenizer.decode."""
        return bytes(np.asarray(ids, np.uint8)).decode("utf-8", "replace")

    def byte_length(self, ids: Ids) -> int:
        """Implements Tokenizer.byte_length."""
        return len(ids)

    def to_json(self) -> str:
        """Implements Tokenizer.to_json."""
        return json.dumps({"kind": self.kind})

    def encode_each(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        for document in documents:
            yield np.frombuffer(document.raw, np.uint8)


class CharTokenizer(Tokenizer):
    """Maps each character to its position in the sorted vocabulary (as nanoGPT's shakespeare_char).

    `separated` says that documents were joined: then NUL is in the vocabulary and is the separator.
    """

    kind = "char"

    def __init__(self, characters: str, separated: bool = False):
        self.characters = characters
        self.separated = separated
        self.vocab_size = len(characters)
        self.separator = characters.index("\0") if separated else None
        self._id_of = np.full(sys.maxunicode + 1, -1, np.int32)
        self._id_of[_code_points(characters)] = np.arange(self.vocab_size)
        self._bytes = np.array([len(character.encode("utf-8", "surrogatepass")) for character in characters], np.int64)

    @classmethod
    def of(cls, documents: Sequence[Document], separated: bool) -> "CharTokenizer":
        """Returns the tokenizer of the sorted set of characters of the documents."""
        found: set[str] = {"\0"} if separated else set()
        for document in documents:
            found.update(document.text())
        return cls("".join(sorted(found)), separated)

    def encode(self, text: str) -> np.ndarray:
        """Implements Tokenizer.encode."""
        if self.separated:
            _refuse_nul(text)
        ids = self._id_of[_code_points(text)]
        wrong = np.flatnonzero(ids < 0)
        if len(wrong):
            place = int(wrong[0])
            raise UserError(
                f"text: character {_show(text[place])} at position {place} is not in the vocabulary of "
                f"{self.vocab_size} characters; remove it, or train with text that has it"
            )
        return ids

    def decode(self, ids: Ids) -> str:
        """Implements Tokenizer.decode."""
        return "".join(self.characters[int(i)] for i in ids)

    def byte_length(self, ids: Ids) -> int:
        """Implements Tokenizer.byte_length."""
        return int(self._bytes[np.asarray(ids, np.int64)].sum())

    def to_json(self) -> str:
        """Implements Tokenizer.to_json."""
        return json.dumps({"kind": self.kind, "characters": self.characters, "separated": self.separated})


class LibraryTokenizer(Tokenizer):
    """Wraps a `tokenizer.json` of the `tokenizers` library; truncation, padding and dropout of merges are off."""

    kind = "tokenizer.json"
    _BATCH_SIZE = 4_000_000  # bytes handed to the library at a time: it holds about 100 bytes a token meanwhile

    def __init__(self, text: str, name: str = "tokenizer.json"):
        import tokenizers

        try:
            self._library = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"tokenizer '{name}': the tokenizers library refuses it: {' '.join(str(error).split())}"
            ) from None
        self._library.no_truncation()
        self._library.no_padding()
        if getattr(self._library.model, "dropout", None):
            self._library.model.dropout = None  # merges left out at random would give other ids at every reading
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not self.vocab_size:
            raise UserError(f"tokenizer '{name}': its vocabulary is empty; train it first")
        mark = next((token for token in SEPARATORS if token in vocabulary), None)
        self.separator = vocabulary.get(mark)
        if any(
            token.content == mark and not token.special for token in self._library.get_added_tokens_decoder().values()
        ):
            self._library.add_special_tokens([mark])  # one that is not special would be found in texts that spell it
        self._library.encode_special_tokens = True  # texts that spell special tokens keep their characters
        tree = json.loads(self.to_json())
        self.unknown = vocabulary.get(lossless.unknown_token(tree))
        self._reserved = lossless.reserved_ids(tree, vocabulary, self.separator)
        self._may_drop = lossless.may_drop(tree, tokenizers.pre_tokenizers.ByteLevel.alphabet())
        self._bytes = self._token_bytes(vocabulary)

    def encode(self, text: str) -> np.ndarray:
        """Implements Tokenizer.encode."""
        _require_utf8(text)
        return next(self._encode_batch([text]))

    def encode_with_special(self, text: str) -> np.ndarray:
        """Implements Tokenizer.encode_with_special."""
        _require_utf8(text)
        self._library.encode_special_tokens = False
        try:
            return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self._library.encode_special_tokens = True

    def special_in(self, text: str) -> str | None:
        """Implements Tokenizer.special_in."""
        special = (token.content for token in self._library.get_added_tokens_decoder().values() if token.special)
        return next((token for token in special if token in text), None)

    def token_id(self, token: str) -> int | None:
        """Implements Tokenizer.token_id."""
        return self._library.token_to_id(token)

    @property
    def special_ids(self) -> frozenset[int]:
        """Implements Tokenizer.special_ids."""
        tokens = self._library.get_added_tokens_decoder()
        return frozenset(index for index, token in tokens.items() if token.special)

    def decode_with_special(self, ids: Ids) -> str:
        """Returns the text of ids in which special tokens are spelled."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode(self, ids: Ids) -> str:
        """Implements Tokenizer.decode."""
        return self._library.decode([int(i) for i in ids], skip_special_tokens=True)

    def byte_length(self, ids: Ids) -> int:
        """Implements Tokenizer.byte_length."""
        if self._bytes is not None:
            return int(self._bytes[np.asarray(ids, np.int64)].sum())
        separators = 0 if self.separator is None else int((np.asarray(ids) == self.separator).sum())
        return len(self.decode(ids).encode("utf-8")) + separators

    def to_json(self) -> str:
        """Implements Tokenizer.to_json."""
        return self._library.to_str()

    def _token_bytes(self, vocabulary: dict[str, int]) -> np.ndarray | None:
        """Returns the bytes of each id [V] of a byte-level tokenizer (one letter of a token = one byte); None for other
        kinds.
        """
        if '"ByteLevel"' not in json.dumps(json.loads(self.to_json()).get("decoder")):
            return None
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, index in vocabulary.items():
            sizes[index] = len(token)
        for index, token in self._library.get_added_tokens_decoder().items():
            sizes[index] = 0 if token.special else len(token.content.encode("utf-8"))
        if self.separator is not None:
            sizes[self.separator] = 1
        return sizes

    def encode_each(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        batch: list[Document] = []
        size = 0
        for document in documents:
            if size + len(document.raw) > self._BATCH_SIZE and batch:
                yield from self._encode_together(batch)
                batch, size = [], 0
            batch.append(document)
            size += len(document.raw)
        yield from self._encode_together(batch)

    def _encode_together(self, documents: list[Document]) -> Iterator[np.ndarray]:
        """Yields the ids of documents that are one batch, or of one that is longer than that."""
        texts = [document.text() for document in documents]
        try:
            if sum(len(document.raw) for document in documents) > self._BATCH_SIZE:
                yield np.concatenate([ids for part in self._parts(texts[0]) for ids in self._encode_batch(part)])
            else:
                yield from self._encode_batch(texts)
        except UserError:
            list(super().encode_each(documents))  # one by one: names the document and the place in it
            raise

    def _encode_batch(self, texts: list[str]) -> Iterator[np.ndarray]:
        try:
            encodings = self._library.encode_batch(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception, at unknown text too
            for text in texts:
                lossless.refuse_lost(self._library, text)
            raise UserError(f"text: the tokenizers library refuses it: {' '.join(str(error).split())}") from None
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, np.int32)
            if self._may_drop:
                lossless.refuse_lost(self._library, text)
            lossless.refuse_reserved(text, ids, encoding, self._reserved)
            yield ids

    def _parts(self, text: str) -> Iterator[list[str]]:
        """Yields a long text as lists of pieces, split after lone line ends where that does not change the ids."""
        try:  # a line end must separate what goes before from what follows
            apart = [*self.encode("a\n"), *self.encode("b")] == list(self.encode("a\nb"))
        except UserError:  # a vocabulary without these letters
            apart = False
        if not apart:
            yield [text]
            return
        lone_end = re.compile(r"(?<=\S)\n(?=\S)")
        part, start = [], 0
        while start < len(text):
            found = lone_end.search(text, start + self._BATCH_SIZE // 8)
            stop = found.end() if found else len(text)
            part.append(text[start:stop])
            start = stop
            if len(part) == 8:
                yield part
                part = []
        yield part


def load_tokenizer(data: DataConfig, corpus: Corpus) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names; `char` builds its vocabulary from train and validation text
    together.

    Raises:
        UserError: no such file, not a tokenizer.json, or undecodable text for `char`.
    """
    if data.tokenizer == "byte":
        return ByteTokenizer()
    if data.tokenizer == "char":
        separated = max(len(corpus.train), len(corpus.validation)) > 1
        return CharTokenizer.of(corpus.train + corpus.validation, separated)
    return read_tokenizer(data.tokenizer)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of text in a file (UserError if there is none)."""
    try:
        raw = read_regular(Path(path).expanduser(), LONGEST)
    except (OSError, UnfitError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"data.tokenizer: '{path}'; {reason}; give byte, char or the path of a tokenizer.json"
        ) from None
    return Tokenizer.from_json(decoded(raw, f"data.tokenizer: '{path}'"), str(path)).of_text


def expected_vocabulary(config: Config) -> int:
    """Returns the entries of a configuration's vocabulary; of text 256 where only the corpus, which is not read, could
    tell."""
    name = config.data.tokenizer
    tokenizer = None if name in ("byte", "char") else read_tokenizer(name)
    entries = BYTES if tokenizer is None else tokenizer.vocab_size
    if config.model.type != "seq2seq" or (tokenizer is not None and sentinels_of(tokenizer)):
        return entries
    return entries + SPECIALS + config.seq2seq.sentinels


def sentinels_of(tokenizer: Tokenizer) -> int:
    """Returns the sentinels <extra_id_0>, ... of a tokenizer with the special tokens of T5; 0 where it has others.

    These are padding 0, the end 1, and sentinels whose ids fall.
    """
    special, first = tokenizer.special_ids, tokenizer.token_id("<extra_id_0>")
    if first is None or not {PAD, END} <= special:
        return 0
    count = 0
    while first - count in special and tokenizer.token_id(f"<extra_id_{count}>") == first - count:
        count += 1
    return count


def reconcile(tokenizer: Tokenizer, of_checkpoint: str) -> Tokenizer:
    """Returns the checkpoint's tokenizer, if the data's tokenizer gives the same ids.

    A char vocabulary is drawn from text, so text with fewer characters than the checkpoint knows is in order.

    Raises:
        UserError: another vocabulary; names both sizes and fingerprints.
    """
    known = Tokenizer.from_json(of_checkpoint, "of the checkpoint")
    if known.fingerprint == tokenizer.fingerprint:
        return known
    extra = ""
    if isinstance(known, CharTokenizer) and isinstance(tokenizer, CharTokenizer):
        unknown = sorted(set(tokenizer.characters) - set(known.characters))
        if not unknown:
            return known
        extra = f", which lacks {_show(unknown[0])}"
    raise UserError(
        f"data.tokenizer: {_label(tokenizer)}, but the checkpoint was trained with {_label(known)}{extra}; "
        "use the checkpoint's tokenizer and text, or train again"
    )


def unknown_note(tokenizer: Tokenizer, *streams: np.ndarray) -> str:
    """Says how many ids of streams [T] stand for text that the vocabulary lacks; "" where there is none."""
    if tokenizer.unknown is None:
        return ""
    count = sum(int((stream == tokenizer.unknown).sum()) for stream in streams)
    return f"; {count:,} tokens stand for text outside the vocabulary" if count else ""


def smallest_dtype(vocab_size: int) -> Any:
    """Returns the unsigned integer type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def _refuse_nul(text: str) -> None:
    """Refuses a NUL in a text, because its id is the separator's."""
    place = text.find("\0")
    if place >= 0:
        raise UserError(f"text: NUL at position {place} is reserved as the separator of documents; remove it")


def _require_utf8(text: str) -> None:
    """Refuses lone surrogates, in which command-line arguments may carry raw bytes (UserError)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text: not UTF-8 at position {error.start}; correct the encoding") from None


def _label(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.kind} vocabulary of {tokenizer.vocab_size} ({tokenizer.fingerprint[:8]})"


def _show(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _code_points(text: str) -> np.ndarray:
    """Returns the Unicode code points [T] uint32; sorted characters give sorted code points."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _is_alphabet(tree: dict[str, Any]) -> bool:
    """Returns whether `characters` are distinct and sorted, with the separator among them where `separated` asks for
    it.
    """
    characters, separated = tree.get("characters"), tree.get("separated") is True
    if not (isinstance(characters, str) and list(characters) == sorted(set(characters))):
        return False
    return len(characters) > 0 and (not separated or "\0" in characters)
