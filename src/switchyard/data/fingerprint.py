"""Fingerprints the data of a run for the checkpoint, so that a resumed run detects other data.

    kind          text, tokens, MindRecord or images
    train         {count, bytes, sha256}: of the documents, shards, blocks or images in order; validation is the same
    files         [[name, bytes, first digits of sha256], ...], to say which one differs; [] for large collections

Names say what differs but do not count: a text that was moved is the same text.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from switchyard.data.corpus import Corpus
from switchyard.data.document import Document
from switchyard.data.mindrecord import Manifest

MOST_FILES = 2000  # that are listed one by one
DIGITS = 12  # of a file's sha256


def of_corpus(corpus: Corpus) -> dict[str, Any]:
    """Returns the fingerprint of text; each byte is hashed once, those of a file's validation part twice."""
    splits = {"train": corpus.train, "validation": corpus.validation}
    hashes = {name: [hashlib.sha256(document.raw) for document in part] for name, part in splits.items()}
    found: dict[str, Any] = {"kind": "text"}
    for name, documents in splits.items():
        size = sum(len(document.raw) for document in documents)
        found[name] = {
            "count": len(documents),
            "bytes": size,
            "sha256": _joined(made.hexdigest() for made in hashes[name]),
        }
    every = [pair for name, part in splits.items() for pair in zip(part, hashes[name])]
    return found | {"files": _listed(every) if len(every) <= MOST_FILES else []}


def _listed(documents: Iterable[tuple[Document, Any]]) -> list[list]:
    """Returns the files by name, each with the digest of the whole file, wherever it was divided to train and validate.

    Args:
        documents: (document, hash object of its bytes), those for training first.
    """
    sizes: dict[str, int] = {}
    digests: dict[str, Any] = {}
    for document, made in documents:
        name = document.name
        sizes[name] = sizes.get(name, 0) + len(document.raw)
        if name in digests:
            digests[name].update(document.raw)  # the part that validates, behind the part that trains
        else:
            digests[name] = made.copy()
    return [[name, size, digests[name].hexdigest()[:DIGITS]] for name, size in sizes.items()]


def of_records(manifest: Manifest) -> dict[str, Any]:
    """Returns the fingerprint of a prepared folder, computed from the manifest without reading a block."""
    found: dict[str, Any] = {"kind": "MindRecord", "files": []}
    for name in ("train", "validation"):
        split = getattr(manifest, name)
        found[name] = {"count": split.blocks, "bytes": split.size, "sha256": split.sha256}
        found["files"].append([split.file, split.size, split.sha256[:DIGITS]])
    return found


def of_shards(parts: dict[str, list[tuple[str, Any]]]) -> dict[str, Any]:
    """Returns the fingerprint of token shards, computed from their manifests without reading a token.

    Args:
        parts: train and validation -> (name, shards.Shard) of each shard in order.
    """
    found: dict[str, Any] = {"kind": "tokens", "files": []}
    for name, listed in parts.items():
        digests = [one for _, shard in listed for one in (shard.sha256, shard.mask_sha256) if one]
        size = sum(shard.bytes for _, shard in listed)
        found[name] = {"count": len(listed), "bytes": size, "sha256": _joined(digests)}
        found["files"] += [[file, shard.bytes, shard.sha256[:DIGITS]] for file, shard in listed]
    return found if len(found["files"]) <= MOST_FILES else found | {"files": []}


def of_images(train: tuple[np.ndarray, ...], validation: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """Returns the fingerprint of (images, labels) for training and for validation."""
    found: dict[str, Any] = {"kind": "images", "files": []}
    for name, arrays in (("train", train), ("validation", validation)):
        digests = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays]
        size = sum(array.nbytes for array in arrays)
        found[name] = {"count": len(arrays[0]), "bytes": size, "sha256": _joined(digests)}
    return found


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describes how two fingerprints differ; None where the run reads the same data."""
    if before["kind"] != now["kind"]:
        return f"{now['kind']} instead of {before['kind']}"
    splits = [name for name in ("train", "validation") if before[name]["sha256"] != now[name]["sha256"]]
    if not splits:
        return None
    return _of_files(before["files"], now["files"]) or "; ".join(_of_split(name, before, now) for name in splits)


def _of_files(before: list[list], now: list[list]) -> str | None:
    """Returns the first files that differ, and how many more do; None where they are not listed or only their roles
    changed.
    """
    if len(before) == len(now) == 1:
        before = [[now[0][0], *before[0][1:]]]  # one file under another name
    old, new = ({name: rest for name, *rest in files} for files in (before, now))
    if not (old and new):
        return None
    words = [f"'{name}' is missing" for name in old if name not in new]
    words += [f"'{name}' is new" for name in new if name not in old]
    changed = []
    for name, (size, digest) in new.items():
        if old.get(name, [size, digest]) != [size, digest]:
            what = f"has {size:,} bytes instead of {old[name][0]:,}" if size != old[name][0] else "has other content"
            changed.append(f"'{name}' {what}")
    words = changed + words
    further = f" and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + further or None


def _of_split(name: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    old, new = before[name], now[name]
    units = {"text": "documents", "MindRecord": "blocks", "tokens": "shards", "images": "images"}[now["kind"]]
    if (old["count"], old["bytes"]) == (new["count"], new["bytes"]):
        return f"the {new['count']:,} {units} for {name} have other content"
    return (
        f"{new['count']:,} {units} of {new['bytes']:,} bytes for {name} instead of {old['count']:,} of "
        f"{old['bytes']:,} bytes"
    )


def _joined(digests: Iterable[str]) -> str:
    """Returns one digest of several, in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
