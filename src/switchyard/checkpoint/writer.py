"""Writes checkpoints of several ranks: each rank its shards and a note about them, one rank the manifest.

All write into one temporary directory. A rank's files come first, its note last, so a note stands for files that are
whole; when the notes of all ranks are there, they become the manifest and the directory is renamed.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from switchyard.checkpoint.layout import full_shape_of, is_writer, shard_of
from switchyard.checkpoint.manifest import (
    CONFIG,
    KINDS,
    STATE,
    TEXTS,
    TOKENIZER,
    Manifest,
    file_of,
    fingerprint,
    write_manifest,
    write_text,
)
from switchyard.checkpoint.reader import joined
from switchyard.checkpoint.tensors import Box, Entry, full_box, size_of, type_of, within, write_file
from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.files import TEMPORARY, flush, remove, replace
from switchyard.json_text import to_json

NOTE = ".rank-{rank:05d}.json"
POLL = 0.1  # seconds between two looks for notes

Read = Callable[[str, Box], np.ndarray]  # (tensor, part of the full tensor) -> that part


def write_shards(
    folder: Path,
    degrees: ParallelDims,
    layers: int,
    rank: int,
    entries: Mapping[str, Mapping[str, Entry]],
    read: Mapping[str, Read],
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes what a rank has to write of a checkpoint, piece by piece, then its note.

    Args:
        folder: the temporary directory.
        degrees, layers: how the checkpoint is sharded; model.num_layers.
        rank: whose shards; one that holds nothing but copies writes its note only.
        entries: kind -> name -> type and shape of full tensors.
        read: kind -> where parts come from.
        advance: told the bytes of each piece.
    """
    files, known, devices = {}, {}, degrees.devices
    for kind in KINDS:
        boxes = {name: shard_of(name, entry.shape, degrees, rank, layers) for name, entry in entries[kind].items()}
        boxes = {name: box for name, box in boxes.items() if box is not None}
        known[kind] = {name: [entries[kind][name].dtype, list(entries[kind][name].shape)] for name in boxes}
        shapes = {name: entry.shape for name, entry in entries[kind].items()}
        mine = {name: box for name, box in boxes.items() if is_writer(name, shapes[name], degrees, rank, layers)}
        if not mine and devices > 1:
            continue
        file = file_of(kind, rank, devices)
        parts = {name: Entry(entries[kind][name].dtype, size_of(box)) for name, box in mine.items()}

        def read_shard(name: str, box: Box, source=read[kind], mine=mine) -> np.ndarray:
            shifted = (slice(a.start + b.start, a.stop + b.start) for a, b in zip(box, mine[name]))
            return source(name, tuple(shifted))  # of the full tensor

        files[file] = write_file(folder / file, parts, read_shard, advance)
        if devices > 1:
            files[file]["slices"] = {
                name: {"offsets": [part.start for part in box], "shape": list(size_of(box))}
                for name, box in sorted(mine.items())
            }
    note = {"rank": rank, "degrees": asdict(degrees), "tensors": known, "files": files}
    write_atomically(folder / NOTE.format(rank=rank), to_json(note))


def from_arrays(
    arrays: Mapping[str, np.ndarray],
    degrees: ParallelDims,
    rank: int,
    layers: int,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, Entry], Read]:
    """Returns (types and shapes of full tensors, reader of their parts) of a rank's arrays.

    Args:
        arrays: name -> the rank's shard, or the full tensor.
        shapes: name of a parameter -> full shape; what is not named is told from the shard.

    Raises:
        UserError: an array is neither the shard nor the full tensor.
    """
    shapes, entries, origins = shapes or {}, {}, {}
    for name, array in arrays.items():
        parameter = name.partition(".")[2]  # of a moment
        shape = shapes.get(name) or shapes.get(parameter) or full_shape_of(name, array.shape, degrees)
        box = shard_of(name, tuple(shape), degrees, rank, layers)
        if box is None:  # of another pipeline stage
            continue
        if array.shape == size_of(box):
            origins[name] = box
        elif array.shape == tuple(shape):
            origins[name] = full_box(array.shape)
        else:
            raise UserError(
                f"shard of '{name}': {array.shape}; rank {rank} of {degrees.devices} holds {size_of(box)} of {shape}"
            )
        entries[name] = Entry(type_of(array), tuple(shape))

    def read(name: str, box: Box) -> np.ndarray:
        return arrays[name][within(box, origins[name])]

    return entries, read


def assemble(
    folder: Path, config: Config, tokenizer_json: str, state: dict, degrees: ParallelDims, wait: float
) -> None:
    """Makes a checkpoint of the files in a temporary directory: texts, manifest, everything on the disk.

    Raises:
        UserError: the notes of some ranks did not come within `wait` seconds, are of other degrees, or their shards do
            not make up every tensor.
    """
    notes, tensors = _notes(folder, degrees, wait), {kind: {} for kind in KINDS}
    files: dict[str, dict] = {}
    for note in notes:
        if note["degrees"] != asdict(degrees):
            raise UserError(
                f"unexpected shards of rank {note['rank']}: sharded by {note['degrees']}, not {asdict(degrees)}"
            )
        for kind, entries in note["tensors"].items():
            for name, (dtype, shape) in entries.items():
                entry = Entry(dtype, tuple(shape))
                if tensors[kind].setdefault(name, entry) != entry:
                    raise UserError(f"unexpected shard of '{name}' of rank {note['rank']}: of {dtype} {shape}")
        files |= note["files"]
    if degrees.devices > 1:
        for kind in KINDS:
            joined(kind, tensors[kind], files, degrees.devices)
    texts = {CONFIG: config.to_yaml(), TOKENIZER: tokenizer_json, STATE: to_json(state, indent=1)}
    for name in TEXTS:
        write_text(folder / name, texts[name])
    for note in notes:
        (folder / NOTE.format(rank=note["rank"])).unlink()
    files = {name: fingerprint(folder / name) for name in TEXTS} | files
    write_manifest(Manifest(folder, state["step"], files, degrees, tensors if degrees.devices > 1 else None))
    flush(folder)


def _notes(folder: Path, degrees: ParallelDims, wait: float) -> list[dict]:
    """Waits for the notes of all ranks and returns them in order (UserError names the missing ranks)."""
    end = time.monotonic() + wait
    while True:
        missing = absent(folder, degrees)
        if not missing:
            paths = [folder / NOTE.format(rank=rank) for rank in range(degrees.devices)]
            return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if time.monotonic() > end:
            some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise UserError(
                f"missing shards of ranks {some} after {wait:g} s: the checkpoint was not written; see their logs"
            )
        time.sleep(POLL)


def absent(folder: Path, degrees: ParallelDims) -> list[int]:
    """Returns the ranks whose notes are not in a temporary directory."""
    return [rank for rank in range(degrees.devices) if not (folder / NOTE.format(rank=rank)).exists()]


def publish(folder: Path, place: Path) -> None:
    """Renames a finished temporary directory: this is the moment at which the checkpoint exists."""
    with writing(place):
        replace(folder, place)  # a damaged one may be there, which a resumed run has reached again


def set_aside(path: Path) -> Path:
    """Renames a checkpoint so that it is one no more; removing its files is then not seen half done."""
    aside = path.with_name(f"{TEMPORARY}old-{path.name}")
    if os.path.lexists(aside):
        remove(aside)
    os.replace(path, aside)
    return aside


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that it is complete, new or old, whenever the process dies."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with writing(path):
            temporary.write_text(text, encoding="utf-8")
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        remove(temporary)
