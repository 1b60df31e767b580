"""Adds to a tokenizer what an encoder-decoder needs: padding, an end, and the sentinels of span corruption.

Ids: padding 0, end 1, then those of the text, then the sentinels, the last id is <extra_id_0>: the order of T5. A
tokenizer of T5 has all of them already, and keeps its ids.
"""

import json
import re
from typing import Any

import numpy as np

from switchyard.config.seq2seq import END, PAD, SPECIALS
from switchyard.data.tokenizer import WRAPPED, Ids, Tokenizer, reconcile, sentinels_of
from switchyard.errors import UserError
from switchyard.json_text import to_json

SENTINEL = re.compile(r"<extra_id_(\d+)>")


class SentinelTokenizer(Tokenizer):
    """Gives the ids of a tokenizer moved behind padding and end, and `count` sentinels <extra_id_0>, ... behind them.

    A tokenizer with the special tokens of T5, see `tokenizer.sentinels_of`, keeps its ids, and nothing is added.

    Attributes:
        text: the tokenizer of text.
        count: sentinels that are used.
        moved: what is added to the ids of text.
        first: id of <extra_id_0>; the next sentinel has the id before it.

    `encode` reads sentinels that a prompt spells; `decode` spells them, and leaves out padding and end.

    Examples:
        >>> from switchyard.data.tokenizer import ByteTokenizer
        >>> tokenizer = SentinelTokenizer(ByteTokenizer(), 2)
        >>> tokenizer.encode("a<extra_id_0>b").tolist()
        [99, 259, 100]
        >>> tokenizer.decode([259, 100, 258, 1])
        '<extra_id_0>b<extra_id_1>'
    """

    def __init__(self, text: Tokenizer, count: int):
        own = sentinels_of(text)
        if own and count > own:
            raise UserError(f"seq2seq.sentinels: {count}; at most {own}, those that the tokenizer has")
        self.text, self.count, self.kind, self.separator = text, count, text.kind, END
        self.moved = 0 if own else SPECIALS
        self.vocab_size = text.vocab_size if own else SPECIALS + text.vocab_size + count
        self.first = text.token_id("<extra_id_0>") if own else self.vocab_size - 1
        self.unknown = None if text.unknown is None else text.unknown + self.moved
        self._sentinels = range(self.first - (own or count) + 1, self.first + 1)
        self._special = np.array(sorted({PAD, END, *self._sentinels} | text.special_ids if own else ()), np.int64)

    @classmethod
    def from_tree(cls, tree: dict[str, Any], name: str) -> "SentinelTokenizer":
        """Returns the tokenizer that `to_json` wrote, of its parsed JSON (UserError: it is not that)."""
        count = tree.get("count")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"tokenizer '{name}': count: {count!r}; must be the number of sentinels, at least 1")
        return cls(Tokenizer.from_json(to_json(tree.get("tokenizer")), name), count)

    def encode(self, text: str) -> np.ndarray:
        """Implements Tokenizer.encode; a sentinel that the vocabulary lacks is text."""
        if not self.moved:
            return self._encode_kept(text)
        pieces, done = [], 0
        for match in SENTINEL.finditer(text):
            if int(match[1]) < self.count:
                pieces += [self._encode_text(text[done : match.start()]), [self.sentinel(int(match[1]))]]
                done = match.end()
        return np.concatenate([*pieces, self._encode_text(text[done:])]).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Implements Tokenizer.decode."""
        if not self.moved:
            ids = np.asarray(ids, np.int64)
            return self.text.decode_with_special(ids[self._is_text(ids) | np.isin(ids, list(self._sentinels))])
        found, piece = [], []
        for token in np.asarray(ids, np.int64).tolist():
            if SPECIALS <= token < self.vocab_size - self.count:
                piece.append(token - SPECIALS)
            elif token >= SPECIALS:
                found += [self.text.decode(piece), f"<extra_id_{self.vocab_size - 1 - token}>"]
                piece = []
        return "".join([*found, self.text.decode(piece)])

    def byte_length(self, ids: Ids) -> int:
        """Implements Tokenizer.byte_length; padding, ends and sentinels stand for no text."""
        ids = np.asarray(ids, np.int64)
        return self.text.byte_length(ids[self._is_text(ids)] - self.moved)

    def to_json(self) -> str:
        """Implements Tokenizer.to_json."""
        return wrapped(self.text.to_json(), self.count)

    def sentinel(self, number: int) -> int:
        """Returns the id of <extra_id_NUMBER>."""
        return self.first - number

    def counted(self, counts: np.ndarray) -> np.ndarray:
        """Returns how often each id occurs, [V], of the counts of the ids of text."""
        return np.pad(counts, (self.moved, self.vocab_size - self.moved - len(counts)))

    @property
    def of_text(self) -> Tokenizer:
        """Implements Tokenizer.of_text."""
        return self.text

    def _is_text(self, ids: np.ndarray) -> np.ndarray:
        """Returns which ids stand for text."""
        if self.moved:
            return (ids >= SPECIALS) & (ids < self.vocab_size - self.count)
        return ~np.isin(ids, self._special)

    def _encode_kept(self, text: str) -> np.ndarray:
        """Returns the ids of a text with sentinels as the tokenizer itself gives them (UserError: padding, an end)."""
        ids = self.text.encode_with_special(text)
        if np.isin(ids, (PAD, END)).any():
            raise UserError("text: spells padding or the end, special tokens of the tokenizer; leave them out")
        return ids

    def _encode_text(self, text: str) -> np.ndarray:
        return self.text.encode(text) + SPECIALS if text else np.zeros(0, np.int32)


WRAPPED["sentinels"] = SentinelTokenizer.from_tree


def text_json(tokenizer_json: str | None) -> str | None:
    """Returns the JSON of the tokenizer within a checkpoint's SentinelTokenizer; None of none."""
    if tokenizer_json is None:
        return None
    known = Tokenizer.from_json(tokenizer_json, "of the checkpoint")
    return known.text.to_json() if isinstance(known, SentinelTokenizer) else tokenizer_json


def wrapped(text: str, count: int) -> str:
    """Returns the JSON of the SentinelTokenizer around the tokenizer of a JSON, of which nothing is written anew."""
    return to_json({"kind": "sentinels", "count": count, "tokenizer": json.loads(text)}, ensure_ascii=False)


def with_sentinels(tokenizer: Tokenizer, count: int, tokenizer_json: str | None = None) -> SentinelTokenizer:
    """Returns a tokenizer of text with `count` sentinels.

    Args:
        tokenizer: of the text.
        count: seq2seq.sentinels.
        tokenizer_json: of a checkpoint, whose tokenizer must be the same.

    Raises:
        UserError: the checkpoint has another one.
    """
    found = SentinelTokenizer(tokenizer, count)
    return found if tokenizer_json is None else reconcile(found, tokenizer_json)
