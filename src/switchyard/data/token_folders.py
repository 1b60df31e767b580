"""Reads folders of token shards, one or a mixture, as the data of a run."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from switchyard.config import Config
from switchyard.data import fingerprint, mindrecord, shards
from switchyard.data.batches import EvalBatches
from switchyard.data.borders import within_documents
from switchyard.data.corpus import load_full
from switchyard.data.corruption import Corruption
from switchyard.data.sentinels import text_json, with_sentinels
from switchyard.data.shards import ShardStream, TokenManifest
from switchyard.data.token_batches import TokenBatches, TokenCorpus
from switchyard.data.tokenizer import Tokenizer, read_tokenizer, reconcile
from switchyard.errors import UserError

if TYPE_CHECKING:
    from switchyard.data import Data


class Folder(NamedTuple):
    """Holds a folder of token shards that is found whole."""

    place: Path
    manifest: TokenManifest
    tokenizer: Tokenizer
    left_out: int  # bad shards

    def files(self, split: str) -> list[tuple[str, shards.Shard]]:
        """Returns (name, shard) of each shard of a split."""
        return [(f"{self.place.name}/{shard.file}", shard) for shard in getattr(self.manifest, split)]

    def parts(self, split: str, mask: bool = False) -> list[tuple[Path | None, int]]:
        """Returns what a ShardStream reads of a split."""
        found: list[tuple[Path | None, int]] = []
        for shard in getattr(self.manifest, split):
            file = self.place / (shard.mask if mask else shard.file)
            found.append((None if mask and not self.manifest.masked else file, shard.tokens))
        return found


class Held(NamedTuple):
    """Holds a validation set: tokens [T], a mask [T] or None, predictions to score, and the bytes of all."""

    stream: Any
    mask: Any
    answers: int
    bytes: int
    borders: int  # of the predictions, those of the first token of a document


def open_folder(path: str, key: str, skip: bool = False) -> Folder:
    """Returns the folder that a key names (UserError: no token shards there, or bad ones)."""
    place = shards.locate(path)
    if place is None:
        raise UserError(f"{key}: '{path}' holds no token shards; create the folder with {shards.PREPARE}")
    return Folder(place, *shards.read_manifest(place, key, skip))


def is_tokens(config: Config) -> bool:
    """Returns whether a configuration names token shards to train on."""
    return bool(config.data.mixture) or shards.locate(config.data.path) is not None


def refuse_keys_of_shards(config: Config) -> None:
    """Refuses what only token shards have, where other data are read (UserError)."""
    for key, value, idle in (("loss_mask", "true", False), ("on_error", "skip", "stop")):
        if getattr(config.data, key) != idle:
            raise UserError(
                f"data.{key}: {value}; data.path names no token shards, which alone have it; prepare them with "
                f"{shards.PREPARE}, or leave the key out"
            )


def load_tokens(config: Config, tokenizer_json: str | None, rank: int, world: int, seen: Callable) -> "Data":
    """Returns the data of token shards; arguments and errors as of load_data."""
    named = [(f"data.mixture[{number}].path", entry.path) for number, entry in enumerate(config.data.mixture)]
    named = named or [("data.path", config.data.path)]
    skip = config.data.on_error == "skip"
    folders = [open_folder(path, key, skip) for key, path in named]
    if config.data.loss_mask and not any(folder.manifest.masked for folder in folders):
        raise UserError(
            f"data.loss_mask: true; '{folders[0].place}' holds no instruction data; prepare it with --instructions, or "
            "set the key to false"
        )
    tokenizer = _one_tokenizer(config, folders, named, text_json(tokenizer_json))
    held, held_files, words = _validation(config, folders, tokenizer, skip)
    marks = fingerprint.of_shards(
        {"train": [pair for folder in folders for pair in folder.files("train")], "validation": held_files}
    )
    if not held_files:
        marks["validation"]["sha256"] = words[1]
    seen(marks)
    vocabulary, collate = tokenizer, None
    if config.model.type == "seq2seq":
        vocabulary = with_sentinels(tokenizer, config.seq2seq.sentinels, tokenizer_json)
        collate = Corruption(config, vocabulary.vocab_size)
    corpora = _corpora(config, folders)
    size = config.data.batch_size // world
    train = TokenBatches(corpora, size, config.window - 1, config.train.seed, rank, world, collate)
    train.require_epochs(config.train.steps * config.micro_batches * config.data.batch_size)
    description = _describe(folders, train, config.data.loss_mask) + (f"; {words[0]}" if words[0] else "")
    description += f"; vocabulary {vocabulary.vocab_size:,} ({vocabulary.kind})"
    count = lambda: _count(corpora, tokenizer.vocab_size)  # noqa: E731
    return held_data(config, vocabulary, held, description, train=train, token_counts=count, fingerprint=marks)


def held_data(config: Config, tokenizer: Tokenizer, held: Held, description: str, **more: Any) -> "Data":
    """Returns the Data of a validation set; `more`: other fields of it."""
    from switchyard.data import Data, corrupted_data, counts_behind

    if config.model.type == "seq2seq":
        if count := more.get("token_counts"):
            more["token_counts"] = counts_behind(count, config)
        return corrupted_data(config, tokenizer, held.stream, description, more.pop("train", None), **more)
    size, length = config.data.batch_size, config.model.seq_length
    EvalBatches(held.stream, size, length)  # too little text is said now, not after training
    return Data(
        tokenizer=tokenizer,
        train=within_documents(config, tokenizer, more.pop("train", None)),
        validation=lambda: within_documents(config, tokenizer, EvalBatches(held.stream, size, length, held.mask)),
        validation_tokens=max(held.answers - (held.borders if config.data.document_mask else 0), 1),
        validation_bytes=held.bytes,
        description=description,
        **more,
    )


def _one_tokenizer(config: Config, folders: list[Folder], named: list, tokenizer_json: str | None) -> Tokenizer:
    """Returns the tokenizer of all folders (UserError: they differ, or are not that of the checkpoint)."""
    tokenizer = folders[0].tokenizer
    for (key, path), folder in zip(named, folders):
        if folder.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{key}: '{path}' was prepared with another tokenizer than '{named[0][1]}'; prepare it with "
                f"--tokenizer {folders[0].place / shards.TOKENIZER}"
            )
    if config.data.tokenizer not in ("byte", "char"):  # those two words are not checked: the folder's own rules
        reconcile(read_tokenizer(config.data.tokenizer), tokenizer.to_json())
    return tokenizer if tokenizer_json is None else reconcile(tokenizer, tokenizer_json)


def _validation(config: Config, folders: list[Folder], tokenizer: Tokenizer, skip: bool):
    """Returns (Held, files of it, (description, sha256 of a text)): data.val_path, or the folders' validation parts."""
    path = config.data.val_path
    if path is None:
        return (
            held_of(folders, ("validation",), config.data.loss_mask),
            [one for part in folders for one in part.files("validation")],
            ("", ""),
        )
    if mindrecord.locate(path, "data.val_path"):
        raise UserError(f"data.val_path: '{path}' is a MindRecord folder; give text or token shards")
    if shards.locate(path):
        folder = open_folder(path, "data.val_path", skip)
        if folder.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"data.val_path: '{path}' was prepared with another tokenizer; prepare it with that one")
        files = folder.files("train") + folder.files("validation")
        return (
            held_of([folder], shards.SPLITS, config.data.loss_mask),
            files,
            (f"validation: all of '{folder.place}'", ""),
        )
    corpus = load_full(config.data)
    stream = tokenizer.encode_documents(corpus.validation)
    digest = fingerprint.of_corpus(corpus)["validation"]["sha256"]
    borders = 0 if tokenizer.separator is None else int((stream[:-1] == tokenizer.separator).sum())
    held = Held(stream, None, len(stream) - 1, tokenizer.byte_length(stream[1:]), borders)
    return held, [], (f"validation: {corpus.description}", digest)


def held_of(folders: list[Folder], splits: tuple[str, ...], masked: bool) -> Held:
    """Returns splits of folders, one after the other, as one validation set that stays on the disk.

    `masked` scores the answers of instruction data alone.
    """
    manifest = folders[0].manifest
    chosen = [shard for folder in folders for split in splits for shard in getattr(folder.manifest, split)]
    marks = int(manifest.separator is not None)
    parts = [part for folder in folders for split in splits for part in folder.parts(split)]
    stream = ShardStream(parts, manifest.dtype, marks)
    mask, answers = None, len(stream) - 1
    if masked and any(folder.manifest.masked for folder in folders):
        parts = [part for folder in folders for split in splits for part in folder.parts(split, mask=True)]
        mask = ShardStream(parts, "uint8", marks)
        answers = sum(shard.answers for shard in chosen) - marks  # the last separator is not predicted
        answers -= int(mask[0:1].sum()) if len(mask) else 0  # nothing comes before the first token
    size = sum(shard.bytes for shard in chosen) - marks
    if len(stream):
        size -= folders[0].tokenizer.byte_length(stream[0:1])
    scored = [folder for folder in folders if mask is None or not folder.manifest.masked]  # a prompt is masked
    ends = [sum(one.documents for split in splits for one in getattr(each.manifest, split)) for each in scored]
    borders = sum(ends) - int(bool(scored) and scored[-1] is folders[-1])
    return Held(stream, mask, max(answers, 1), max(size, 1), max(borders, 0) * marks)


def _corpora(config: Config, folders: list[Folder]) -> list[TokenCorpus]:
    """Returns the training parts of folders."""
    entries = config.data.mixture or [None]
    names = [folder.place.name for folder in folders]
    made = []
    for number, (entry, folder) in enumerate(zip(entries, folders)):
        marks = int(folder.manifest.separator is not None)
        mask = None
        if folder.manifest.masked and config.data.loss_mask:
            mask = ShardStream(folder.parts("train", mask=True), "uint8", marks)
        name = names[number] if names.count(names[number]) == 1 else f"{names[number]}[{number}]"
        stream = ShardStream(folder.parts("train"), folder.manifest.dtype, marks)
        weights = {} if entry is None else {"weight": entry.weight, "epochs": entry.epochs}
        made.append(TokenCorpus(name, stream, mask, **weights))
    return made


def _describe(folders: list[Folder], train: TokenBatches, masked: bool) -> str:
    """Says in one line what is read."""
    words = []
    for folder, share in zip(folders, train.shares.values()):
        manifest = folder.manifest
        count = sum(shard.tokens for shard in manifest.train)
        line = f"tokens '{folder.place}' of {manifest.source}: {count:,} in {len(manifest.train):,} shards"
        line += f", {100 * share:.3g} % of the windows" if len(folders) > 1 else ""
        if manifest.masked:
            line += ", answers alone are learned" if masked else ", prompts are learned too (data.loss_mask is false)"
        line += f", {folder.left_out:,} bad shards left out" if folder.left_out else ""
        words.append(line)
    return "; ".join(words)


def _count(corpora: list[TokenCorpus], vocab_size: int) -> np.ndarray:
    """Returns how often each id occurs: [V] int64; reads all tokens."""
    from switchyard.data import count_tokens

    return count_tokens((piece for corpus in corpora for piece in corpus.stream.pieces()), vocab_size)
