"""Reads the data that `eval.py` or `export.py` scores in full, with the tokenizer of the checkpoint."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from switchyard.config import Config
from switchyard.data import mindrecord, shards, token_folders
from switchyard.data.corpus import load_full, load_text
from switchyard.data.images import classes_of, load_all
from switchyard.data.sentinels import text_json, with_sentinels
from switchyard.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, read_tokenizer, reconcile, unknown_note
from switchyard.errors import UserError

if TYPE_CHECKING:
    from switchyard.data import Data

PATHS = frozenset({"data.path", "data.val_path"})


def load_scored(config: Config, tokenizer_json: str, overrides: Sequence[str]) -> "Data":
    """Reads what a checkpoint is to be scored on.

    Without data.path and data.val_path among the overrides this is the run's own validation set. A text, a prepared
    folder or images that they name are scored in full, with the checkpoint's tokenizer; with data.val_fraction among
    the overrides, too, the validation part of the text.

    Args:
        config: with the overrides in it.
        tokenizer_json: the checkpoint's.
        overrides: as the user gave them.

    Raises:
        UserError: as load_data; another tokenizer than the checkpoint's; a character that it does not know.
    """
    from switchyard.data import load_data

    keys = frozenset(override.partition("=")[0].strip() for override in overrides)
    if config.data.val_path is None:
        keys -= {"data.val_path"}
    if keys >= PATHS:
        raise UserError(
            f"data.val_path: '{config.data.val_path}'; evaluation reads one text; remove data.val_path or data.path"
        )
    if not keys & PATHS:
        return load_data(config, tokenizer_json)
    if not config.reads_text:
        return _images(config, tokenizer_json)
    tokenizer = Tokenizer.from_json(text_json(tokenizer_json), "of the checkpoint")
    if "data.tokenizer" in keys:
        _check_named(config.data.tokenizer, tokenizer)
    changed = {"tokenizer": tokenizer.kind}  # what is read as bytes, and what as characters, goes by the checkpoint's
    if "data.val_path" not in keys:
        changed["val_path"] = None
    config = config.model_copy(update={"data": config.data.model_copy(update=changed)})
    return _text(config, tokenizer, full="data.val_fraction" not in keys)


def _text(config: Config, tokenizer: Tokenizer, full: bool) -> "Data":
    """Returns the text of data.val_path, or else of data.path, or its validation part."""
    from switchyard.data import text_data

    path, key = config.data.path, "data.path"
    if config.data.val_path is not None:
        path, key = config.data.val_path, "data.val_path"
    if shards.locate(path):
        return _tokens(config, tokenizer, path, full, key)
    folder = mindrecord.locate(path, key)
    if folder is not None:
        stream, description = _records(folder, tokenizer, full, key)
    else:
        corpus = load_full(config.data) if full else load_text(config.data)
        stream, description = tokenizer.encode_documents(corpus.validation), corpus.description
    if len(stream) < 2:
        raise UserError(f"{key}: '{path}'; gives {len(stream)} tokens, at least 2 are needed; give more text")
    description += f"; the checkpoint's vocabulary of {tokenizer.vocab_size:,} ({tokenizer.kind})"
    description += f"{unknown_note(tokenizer, stream)}; {len(stream):,} tokens, all but the first predicted"
    if config.model.type == "seq2seq":
        tokenizer = with_sentinels(tokenizer, config.seq2seq.sentinels)
    return text_data(config, tokenizer, stream, description)


def _tokens(config: Config, tokenizer: Tokenizer, path: str, full: bool, key: str) -> "Data":
    """Returns token shards, both parts of them or the second."""
    folder = token_folders.open_folder(path, key, config.data.on_error == "skip")
    _require_same(folder.tokenizer, tokenizer, folder.place, key)
    held = token_folders.held_of([folder], shards.SPLITS if full else ("validation",), config.data.loss_mask)
    part = "evaluated in full" if full else "its validation part"
    description = f"tokens '{folder.place}' of {folder.manifest.source}, {part}; {held.answers:,} tokens predicted"
    if config.model.type == "seq2seq":
        tokenizer = with_sentinels(tokenizer, config.seq2seq.sentinels)
    return token_folders.held_data(config, tokenizer, held, description)


def _require_same(its_tokenizer: Tokenizer, tokenizer: Tokenizer, folder, key: str) -> None:
    """Refuses a prepared folder of another tokenizer than the checkpoint's (UserError)."""
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{key}: '{folder}' was prepared with another tokenizer than the checkpoint's; give the text itself, or "
            "prepare it with --tokenizer and the tokenizer.json of the run"
        )


def _records(folder, tokenizer: Tokenizer, full: bool, key: str) -> tuple[np.ndarray, str]:
    """Returns (stream [T], description) of a prepared folder: both parts with a separator between them, or the
    second."""
    manifest, its_tokenizer = mindrecord.read_manifest(folder)
    _require_same(its_tokenizer, tokenizer, folder, key)
    description = f"MindRecord '{folder}' of {manifest.source}"
    stream = mindrecord.read_stream(folder, manifest, manifest.validation)
    if not full:
        return stream, f"{description}, its validation part"
    mark = np.array([] if tokenizer.separator is None else [tokenizer.separator], stream.dtype)
    train = mindrecord.read_stream(folder, manifest, manifest.train)
    return np.concatenate((train, mark, stream)), f"{description}, evaluated in full"


def _check_named(name: str, tokenizer: Tokenizer) -> None:
    """Refuses a data.tokenizer that is not the checkpoint's (UserError)."""
    kinds = {"byte": ByteTokenizer, "char": CharTokenizer}
    if name not in kinds:
        reconcile(read_tokenizer(name), tokenizer.to_json())
    elif not isinstance(tokenizer, kinds[name]):
        raise UserError(
            f"data.tokenizer: {name}; the checkpoint was trained with another ({tokenizer.kind} vocabulary of "
            f"{tokenizer.vocab_size:,}), which is used automatically; leave the override out"
        )


def _images(config: Config, classes_json: str) -> "Data":
    """Returns the images of data.path: its t10k files where it has some, otherwise all."""
    from switchyard.data import image_data

    if config.data.val_path is not None:
        raise UserError(
            f"data.val_path: '{config.data.val_path}'; names text, but the model reads images; give data.path"
        )
    classes = classes_of(config.vision, classes_json)
    images, labels, description = load_all(config)
    return image_data(config, classes, images, classes.answers(labels), description)
