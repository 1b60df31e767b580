"""Takes a tokenizer.json over, and gives one back, of whatever tokenizer a checkpoint has.

A model of Hugging Face often has more entries than its tokenizer has tokens. A model of ours has as many as its
tokenizer, so tokens that no text becomes fill the tokenizer up; an export takes them out again.
"""

import json
from pathlib import Path
from typing import Any

from switchyard.config.seq2seq import END, SPECIALS
from switchyard.data.sentinels import SentinelTokenizer
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer, LibraryTokenizer, Tokenizer, read_tokenizer
from switchyard.errors import UserError
from switchyard.interop.huggingface.folder import TOKENIZER, Folder

FILLING = "<|switchyard_unused_{}|>"
ENDS = ("<pad>", "</s>")  # the tokens PAD and END of T5
_TEXTS = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
_END = {"SpecialToken": {"id": ENDS[END], "type_id": 0}}
ADDS_END = {
    "type": "TemplateProcessing",
    "single": [_TEXTS[0], _END],
    "pair": [_TEXTS[0], _END, _TEXTS[1], _END],
    "special_tokens": {ENDS[END]: {"id": ENDS[END], "ids": [END], "tokens": [ENDS[END]]}},
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def tokenizer_of(folder: Folder, vocab_size: int, given: str | Path | None = None) -> str | None:
    """Returns the JSON of a tokenizer with `vocab_size` entries; None where there is none.

    Args:
        folder: whose tokenizer.json is read.
        vocab_size: entries of the model.
        given: a tokenizer.json in the place of the folder's.

    Raises:
        UserError: no tokenizer of the tokenizers library, or one with more entries than the model.
    """
    if given is not None:
        text, where = read_tokenizer(given).to_json(), str(given)
    else:
        text, where = folder.text(TOKENIZER), str(folder.path / TOKENIZER)
    if text is None:
        return None
    tokenizer = Tokenizer.from_json(text, where)
    if tokenizer.vocab_size == vocab_size:
        return text
    if tokenizer.vocab_size > vocab_size or not isinstance(tokenizer, LibraryTokenizer):
        raise UserError(
            f"tokenizer '{where}': {tokenizer.vocab_size} entries, the model has {vocab_size}; take the model's own "
            "tokenizer"
        )
    return filled(text, tokenizer.vocab_size, vocab_size, where)


def filled(text: str, count: int, wanted: int, where: str) -> str:
    """Returns a tokenizer.json of `count` entries with tokens that no text becomes, up to `wanted` (UserError)."""
    tree = json.loads(text)
    extra = [{"id": number, "content": FILLING.format(number), **FLAGS} for number in range(count, wanted)]
    tree["added_tokens"] = [*(tree.get("added_tokens") or []), *extra]
    made = json.dumps(tree, ensure_ascii=False, allow_nan=False, indent=2)
    if Tokenizer.from_json(made, where).vocab_size != wanted:
        raise UserError(f"tokenizer '{where}': has ids without a token, so it cannot be filled up to {wanted}")
    return made


def emptied(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer.json without the tokens that `filled` adds."""
    tokens = tree.get("added_tokens") or []
    return tree | {"added_tokens": [one for one in tokens if one["content"] != FILLING.format(one["id"])]}


def library_json(text: str) -> str:
    """Returns the tokenizer of a checkpoint as a tokenizer.json of the tokenizers library."""
    tokenizer = Tokenizer.from_json(text, "of the checkpoint")
    if isinstance(tokenizer, SentinelTokenizer):
        inner = library_json(json.dumps(json.loads(text)["tokenizer"], ensure_ascii=False, allow_nan=False, indent=2))
        return moved(inner, tokenizer.count) if tokenizer.moved else inner
    if isinstance(tokenizer, LibraryTokenizer):
        if FILLING.partition("{")[0] not in text:
            return text
        return json.dumps(emptied(json.loads(text)), ensure_ascii=False, allow_nan=False, indent=2)
    import tokenizers

    if isinstance(tokenizer, ByteTokenizer):
        letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        vocabulary = {letter_of_byte(byte): byte for byte in range(256)}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        made.pre_tokenizer, made.decoder = letters, tokenizers.decoders.ByteLevel()
    elif isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: index for index, character in enumerate(tokenizer.characters)}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        made.decoder = tokenizers.decoders.Fuse()
    return made.to_str(pretty=True)


def moved(text: str, count: int) -> str:
    """Returns a tokenizer.json with padding 0 and the end 1 before its ids and `count` sentinels behind them.

    As in T5 an end is added to a text. A further post-processor, which would name other ids, is left out.

    Raises:
        UserError: a token that has the name of one that is added.
    """
    size, tree = Tokenizer.from_json(text).vocab_size, json.loads(text)
    model, added = tree["model"], tree.get("added_tokens") or []
    taken = set(model["vocab"] if isinstance(model["vocab"], dict) else (entry[0] for entry in model["vocab"]))
    sentinels = {size + SPECIALS + count - 1 - number: f"<extra_id_{number}>" for number in range(count)}
    own = dict(enumerate(ENDS)) | dict(sorted(sentinels.items()))
    for name in own.values():
        if name in taken | {token["content"] for token in added}:
            raise UserError(f"tokenizer: has a token {name!r} of its own, so it cannot be written with the ids of T5")
    if isinstance(model["vocab"], dict):
        before = {name: index for index, name in enumerate(ENDS)}
        model["vocab"] = before | {token: index + SPECIALS for token, index in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [*([name, 0.0] for name in ENDS), *model["vocab"]]
        model["unk_id"] = None if model.get("unk_id") is None else model["unk_id"] + SPECIALS
    made = [{"id": index, "content": name, **FLAGS} for index, name in own.items()]
    added = [token | {"id": token["id"] + SPECIALS} for token in added]
    tree |= {"added_tokens": [*made[:SPECIALS], *added, *made[SPECIALS:]], "post_processor": ADDS_END}
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, indent=2)


def letter_of_byte(byte: int) -> str:
    """Returns the letter that a byte-level tokenizer has for a byte: itself where it prints, else one above 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printed:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printed].index(byte))
