"""Finds text that a tokenizer of the `tokenizers` library would silently lose, and its position.

Where a file names no unknown token, its BPE model leaves out characters that the vocabulary lacks, and other models
raise an exception. A text that spells a special token may get that token's id.
"""

import json
from typing import Any

import numpy as np

from switchyard.errors import UserError

BYTES = 256
REMEDY = "remove it, or use a tokenizer that covers all bytes"


def may_drop(tree: dict[str, Any], byte_letters: list[str]) -> bool:
    """Tells whether a tokenizer.json has a BPE model that drops what its vocabulary lacks.

    Args:
        tree: the file.
        byte_letters: the letters that stand for the bytes in byte-level tokenizers.
    """
    model = tree["model"]
    vocabulary = model.get("vocab", {})
    if model.get("type", "BPE") != "BPE" or model.get("unk_token") in vocabulary:
        return False
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(BYTES)):
        return False
    unmarked = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
    by_bytes = '"ByteLevel"' in json.dumps([tree.get("normalizer"), tree.get("pre_tokenizer")], allow_nan=False)
    return not (unmarked and by_bytes and all(letter in vocabulary for letter in byte_letters))


def unknown_token(tree: dict[str, Any]) -> str | None:
    """Returns the token that stands for text outside the vocabulary, None where there is none."""
    model = tree["model"]
    if model.get("type") == "Unigram":
        index = model.get("unk_id")
        return None if index is None else model["vocab"][index][0]
    token = model.get("unk_token")
    return token if token in model.get("vocab", {}) else None


def reserved_ids(tree: dict[str, Any], vocabulary: dict[str, int], separator: int | None) -> dict[int, str]:
    """Returns id -> token for the tokens that text must not become: the separator and special tokens, without the
    unknown token.
    """
    reserved = {token["id"]: token["content"] for token in tree.get("added_tokens", []) if token["special"]}
    reserved.pop(vocabulary.get(unknown_token(tree)), None)
    if separator is not None:
        reserved[separator] = next(token for token, index in vocabulary.items() if index == separator)
    return reserved


def refuse_reserved(text: str, ids: np.ndarray, encoding: Any, reserved: dict[int, str]) -> None:
    """Raises a UserError where the ids [T] of a text, which an Encoding of the library holds, have a reserved one."""
    found = np.flatnonzero(np.isin(ids, list(reserved)))
    if not len(found):
        return
    start, stop = encoding.offsets[int(found[0])]
    raise UserError(
        f"text: {text[start:stop]!r} at position {start} is encoded as the special token "
        f"{reserved[int(ids[found[0]])]!r} of the tokenizer, which is not allowed for text; remove it, or "
        "use another tokenizer"
    )


def refuse_lost(library: Any, text: str) -> None:
    """Raises a UserError that names the first character of a text that the model of a tokenizer cannot represent."""
    normalized = library.normalizer.normalize_str(text) if library.normalizer else text
    pieces = [(normalized, (0, len(normalized)))]
    if library.pre_tokenizer:
        pieces = library.pre_tokenizer.pre_tokenize_str(normalized)
    known: set[str] = set()
    for piece, (start, stop) in pieces:
        if piece not in known and not _represents(library.model, piece):
            place = _first_lost(library, normalized[start:stop])
            _refuse(text, normalized, start + place)
        known.add(piece)


def _represents(model: Any, piece: str) -> bool:
    """Tells whether the tokens of a piece cover it: what is dropped makes their last offset fall short."""
    try:
        tokens = model.tokenize(piece)
    except Exception:  # the library raises bare Exception
        return False
    return not piece or (bool(tokens) and tokens[-1].offsets[1] >= len(piece.encode("utf-8")))


def _first_lost(library: Any, span: str) -> int:
    """Returns the position of the first character of a span that is lost when it is encoded alone; 0 where only the
    full span is lost.
    """
    for place, character in enumerate(span):
        letters = character
        if library.pre_tokenizer:
            letters = "".join(piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(character))
        if not _represents(library.model, letters):
            return place
    return 0


def _refuse(text: str, normalized: str, place: int) -> None:
    character = normalized[place]
    place = place if text == normalized else text.find(character)
    where = f" at position {place}" if place >= 0 else ""
    raise UserError(
        f"text: character {character!r} (U+{ord(character):04X}){where} is not in the tokenizer's vocabulary, "
        f"which has no token for unknown text; {REMEDY}"
    )
