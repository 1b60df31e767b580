"""Reads text, token shards, MindRecord or images; gives a tokenizer and resumable batches. `load_data` is the entry."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from switchyard.config import Config
from switchyard.data import fingerprint, mindrecord, shards, token_folders
from switchyard.data.batches import Batch, EvalBatches, TrainBatches
from switchyard.data.borders import within_documents
from switchyard.data.corpus import Corpus, load_text
from switchyard.data.corruption import CorruptedBatches, CorruptedEvalBatches, require_window, targets_of
from switchyard.data.given import load_scored
from switchyard.data.images import Classes, ImageBatch, ImageBatches, ImageEvalBatches, classes_of, load_split
from switchyard.data.sentinels import SentinelTokenizer, text_json, with_sentinels
from switchyard.data.stream_decoder import StreamDecoder
from switchyard.data.token_batches import TokenBatches
from switchyard.data.tokenizer import Tokenizer, load_tokenizer, read_tokenizer, reconcile, unknown_note
from switchyard.errors import UserError

__all__ = [
    "Batch",
    "Classes",
    "Corpus",
    "Data",
    "EvalBatches",
    "ImageBatch",
    "ImageBatches",
    "ImageEvalBatches",
    "StreamDecoder",
    "Tokenizer",
    "TrainBatches",
    "load_data",
    "load_scored",
    "load_text",
    "load_tokenizer",
]


@dataclass(frozen=True)
class Data:
    """Holds what training and evaluation read.

    Attributes:
        tokenizer: text to ids and back; of images, their classes.
        train: micro-batches by index; None where a checkpoint is scored on data that it was given.
        validation: gives fresh batches over the whole validation set.
        validation_tokens: predictions of one pass: all tokens but the first.
        token_counts: counts how often each id occurs in the training split, [V] int64; None where nothing has ids.
        validation_bytes: UTF-8 bytes that those tokens stand for; bits per byte = loss * tokens / bytes / ln 2.
        description: one line for logs.
        fingerprint: of what is read, see data.fingerprint.
    """

    tokenizer: Tokenizer | Classes
    train: TrainBatches | TokenBatches | ImageBatches | None
    validation: Callable[[], EvalBatches | ImageEvalBatches]
    validation_tokens: int
    validation_bytes: int
    description: str
    token_counts: Callable[[], np.ndarray] | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)


Seen = Callable[[dict[str, Any]], object]  # is told the fingerprint of the data


def load_data(
    config: Config,
    tokenizer_json: str | None = None,
    rank: int = 0,
    world: int = 1,
    seen: Seen = lambda marks: None,
    taken_over: bool = False,
) -> Data:
    """Reads the data that a configuration names.

    Args:
        config: sections data, model.seq_length and train.seed are read.
        tokenizer_json: the tokenizer of a checkpoint, when one is continued or evaluated.
        rank, world: the shard of each micro-batch of data.batch_size sequences; validation is not sharded.
        seen: is told the fingerprint before text becomes tokens, and may refuse it.
        taken_over: whether text becomes tokens by `tokenizer_json`, whatever data.tokenizer says, see training.initial.

    Raises:
        UserError: missing, empty, undecodable or too short text; another vocabulary than the checkpoint's; a character
            that a tokenizer which is taken over does not know.
    """
    if config.data.batch_size % world:
        raise UserError(f"data.batch_size: {config.data.batch_size}; must be a multiple of the {world} processes")
    if not config.reads_text:
        return _load_images(config, tokenizer_json, rank, world, seen)
    if token_folders.is_tokens(config):
        return token_folders.load_tokens(config, tokenizer_json, rank, world, seen)
    token_folders.refuse_keys_of_shards(config)
    folder = mindrecord.locate(config.data.path)
    given = text_json(tokenizer_json)
    found = _read_records(config, given, seen) if folder else _read_text(config, given, seen, taken_over)
    tokenizer, source, stream, count, description, marks = found
    if config.model.type == "seq2seq":
        tokenizer = with_sentinels(tokenizer, config.seq2seq.sentinels, tokenizer_json)
        count = counts_behind(count, tokenizer)
        if isinstance(source, np.ndarray):
            require_window(config, len(source), "the training text")
        train = CorruptedBatches(source, config, tokenizer, rank, world)
    else:
        batch_size, seq_length = config.data.batch_size // world, config.model.seq_length
        train = TrainBatches(source, batch_size, seq_length, config.train.seed, rank, world)
    description += f"; vocabulary {tokenizer.vocab_size:,} ({tokenizer.kind})"
    return text_data(config, tokenizer, stream, description, train=train, token_counts=count, fingerprint=marks)


def text_data(
    config: Config,
    tokenizer: Tokenizer,
    stream: np.ndarray,
    description: str,
    train: TrainBatches | None = None,
    **more,
) -> Data:
    """Returns the Data of a validation stream [T] (UserError: too few tokens); `more`: other fields of it."""
    if config.model.type == "seq2seq":
        return corrupted_data(config, tokenizer, stream, description, train, **more)
    batch_size, seq_length = config.data.batch_size, config.model.seq_length
    EvalBatches(stream, batch_size, seq_length)  # too little text is said now, not after training
    borders = 0
    if config.data.document_mask:
        borders = int((stream[:-1] == tokenizer.separator).sum())
    return Data(
        tokenizer=tokenizer,
        train=within_documents(config, tokenizer, train),
        validation=lambda: within_documents(config, tokenizer, EvalBatches(stream, batch_size, seq_length)),
        validation_tokens=max(len(stream) - 1 - borders, 1),
        validation_bytes=tokenizer.byte_length(stream[1:]),
        description=description,
        **more,
    )


def corrupted_data(config: Config, tokenizer: Tokenizer, stream: np.ndarray, description: str, train, **more) -> Data:
    """Returns the Data of a validation stream whose spans are corrupted; predictions and bytes are those of targets."""
    batches = CorruptedEvalBatches(stream, config, tokenizer)
    targets = [0, 0]
    for labels in targets_of(batches):
        targets = [targets[0] + len(labels), targets[1] + tokenizer.byte_length(labels)]
    return Data(
        tokenizer=tokenizer,
        train=train,
        validation=lambda: CorruptedEvalBatches(stream, config, tokenizer),
        validation_tokens=targets[0],
        validation_bytes=max(targets[1], 1),
        description=f"{description}; windows of {config.window} become {batches.lengths}",
        **more,
    )


def counts_behind(count: Callable[[], np.ndarray], tokenizer: SentinelTokenizer) -> Callable[[], np.ndarray]:
    """Returns what counts the ids of text in a vocabulary with sentinels, which text itself does not have."""
    return lambda: tokenizer.counted(count())


def image_data(
    config: Config, classes: Classes, images: np.ndarray, answers: np.ndarray, description: str, train=None, **more
) -> Data:
    """Returns the Data of validation images [N, C, H, W] and answers [N, T]; a prediction counts as one token of one
    byte.
    """
    return Data(
        tokenizer=classes,
        train=train,
        validation=lambda: ImageEvalBatches(images, answers, config.data.batch_size),
        validation_tokens=answers.size,
        validation_bytes=answers.size,
        description=f"{description}; tasks: {', '.join(config.vision.tasks)}",
        **more,
    )


def _load_images(config: Config, classes_json: str | None, rank: int, world: int, seen: Seen) -> Data:
    """Returns the Data of images."""
    if config.data.val_path is not None:
        raise UserError(
            f"data.val_path: '{config.data.val_path}'; names text, but the model reads images; leave it "
            "null: t10k-* files in data.path are the validation images"
        )
    classes = classes_of(config.vision, classes_json)
    split = load_split(config)
    marks = fingerprint.of_images(split.train, split.validation)
    seen(marks)
    images, labels = split.validation
    known, batch_size = classes.answers(split.train[1]), config.data.batch_size // world
    train = ImageBatches(split.train[0], known, batch_size, config.train.seed, rank, world)
    return image_data(
        config, classes, images, classes.answers(labels), split.description, train=train, fingerprint=marks
    )


def _read_text(
    config: Config, tokenizer_json: str | None, seen: Seen, taken_over: bool
) -> tuple[Tokenizer, np.ndarray, np.ndarray, Callable, str, dict[str, Any]]:
    """Returns (tokenizer, training stream [T], validation stream [T], what counts ids, description, fingerprint) of
    text.
    """
    val_path = config.data.val_path
    if mindrecord.locate(val_path, "data.val_path") is not None:
        raise UserError(f"data.val_path: '{val_path}'; is a prepared MindRecord folder; give the text itself")
    if shards.locate(val_path):
        raise UserError(f"data.val_path: '{val_path}' holds token shards, data.path does not; prepare data.path, too")
    corpus = load_text(config.data)
    marks = fingerprint.of_corpus(corpus)
    seen(marks)
    named = config.data.tokenizer
    gone = named not in ("byte", "char") and not os.path.exists(os.path.expanduser(named))
    if tokenizer_json is not None and (taken_over or gone):  # its file has gone; the copy serves
        tokenizer = Tokenizer.from_json(tokenizer_json, "of the checkpoint")
    else:
        tokenizer = load_tokenizer(config.data, corpus)
        if tokenizer_json is not None:
            tokenizer = reconcile(tokenizer, tokenizer_json)
    train, validation = tokenizer.encode_documents(corpus.train), tokenizer.encode_documents(corpus.validation)
    description = corpus.description + unknown_note(tokenizer, train, validation)
    return tokenizer, train, validation, lambda: count_tokens([train], tokenizer.vocab_size), description, marks


def count_tokens(pieces: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """Returns how often each id occurs in arrays of ids: [V] int64."""
    counts = np.zeros(vocab_size, np.int64)
    for piece in pieces:
        counts += np.bincount(piece.reshape(-1), minlength=vocab_size)
    return counts


def _read_records(
    config: Config, tokenizer_json: str | None, seen: Seen
) -> tuple[Tokenizer, mindrecord.RecordSource, np.ndarray, Callable, str, dict[str, Any]]:
    """Returns (tokenizer, training source, validation stream [T], what counts ids, description, fingerprint) of a
    folder.
    """
    folder = mindrecord.locate(config.data.path)
    manifest, tokenizer = mindrecord.read_manifest(folder)
    if config.data.val_path is not None:
        raise UserError(
            f"data.val_path: '{config.data.val_path}'; '{folder}' already has a validation part; leave it null, or "
            "prepare the text with --val-path"
        )
    marks = fingerprint.of_records(manifest)
    seen(marks)
    if config.window != manifest.seq_length + 1:
        remedy = "prepare the text with"
        if config.model.type == "decoder":
            remedy = f"set model.seq_length={manifest.seq_length} or {remedy}"
        raise UserError(
            f"model.seq_length: {config.model.seq_length}; '{folder}' holds blocks for {manifest.seq_length}; "
            f"{remedy} --seq-length {config.window - 1}"
        )
    if config.data.tokenizer not in ("byte", "char"):  # those two words are not checked: the folder's own rules
        reconcile(read_tokenizer(config.data.tokenizer), tokenizer.to_json())
    if tokenizer_json is not None:
        tokenizer = reconcile(tokenizer, tokenizer_json)
    width = manifest.seq_length + 1
    source = mindrecord.RecordSource(folder / manifest.train.file, manifest.train.tokens // width)
    stream = mindrecord.read_stream(folder, manifest, manifest.validation)
    description = f"MindRecord '{folder}' of {manifest.source}"
    return tokenizer, source, stream, lambda: count_tokens(source.pieces(), manifest.vocab_size), description, marks
