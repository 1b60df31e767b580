"""Selects the validation part of a text: the last part of each file for few files, full files for many.

Either way the split follows from the sorted names and from the bytes, and is the same on every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from switchyard.data.document import Document

MANY_FILES = 100  # from here on whole files are held out
TOLERANCE = 0.5  # of the fraction: a split by hash that is further off gives way to the last part of each file


@dataclass(frozen=True)
class Split:
    """Holds documents to learn from, documents held out, and the rule in words."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    rule: str

    @property
    def share(self) -> float:
        """Returns the bytes of the validation documents divided by the bytes of all."""
        held_out, kept = (sum(len(one.raw) for one in side) for side in (self.validation, self.train))
        return held_out / max(held_out + kept, 1)


def split(documents: Sequence[Document], fraction: float) -> Split:
    """Holds out `fraction` of the bytes of documents that are sorted by name.

    From MANY_FILES documents on, those whose name hashes below the fraction validate, so a file keeps its side when
    others come and go. Fewer documents, or sizes so uneven that the share would be off by more than TOLERANCE of the
    fraction, are each divided in two: the last part validates.
    """
    if len(documents) == 1:
        text = documents[0].text()  # between two characters, as nanoGPT does
        head, tail = _halves(documents[0], len(text[: int(len(text) * (1 - fraction))].encode("utf-8")))
        return Split((head,), (tail,), "its last part")
    if len(documents) >= MANY_FILES:
        by_hash = split_by_hash(documents, fraction)
        if abs(by_hash.share - fraction) <= TOLERANCE * fraction:
            return by_hash
    return split_each(documents, fraction)


def split_each(documents: Sequence[Document], fraction: float) -> Split:
    """Cuts every document between two characters so that the parts held out are `fraction` of the bytes up to there."""
    train, validation, seen, held_out = [], [], 0, 0
    total = sum(len(document.raw) for document in documents)
    for document in documents:
        seen += len(document.raw)
        wanted = min(max(round(fraction * seen), seen == total), total - 1)  # neither side stays empty
        place = max(min(len(document.raw), len(document.raw) - (wanted - held_out)), 0)
        while 0 < place < len(document.raw) and document.raw[place] & 0xC0 == 0x80:  # in the middle of a character
            place -= 1
        head, tail = _halves(document, place)
        held_out += len(tail.raw)
        train.append(head)
        validation.append(tail)
    return Split(_filled(train), _filled(validation), "the last part of each file")


def split_by_hash(documents: Sequence[Document], fraction: float) -> Split:
    """Holds out the documents whose name hashes below `fraction`, of two or more; neither side is left empty."""
    held_out = [hash_fraction(document.name) < fraction for document in documents]
    if all(held_out):
        held_out[0] = False
    if not any(held_out):
        held_out[-1] = True
    train = tuple(document for document, out in zip(documents, held_out, strict=True) if not out)
    validation = tuple(document for document, out in zip(documents, held_out, strict=True) if out)
    return Split(train, validation, "files by a hash of their paths")


def hash_fraction(name: str) -> float:
    """Returns a number in [0, 1) drawn from the sha256 of the name: the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _halves(document: Document, place: int) -> tuple[Document, Document]:
    return replace(document, raw=document.raw[:place]), replace(document, raw=document.raw[place:])


def _filled(documents: list[Document]) -> tuple[Document, ...]:
    return tuple(document for document in documents if document.raw)
