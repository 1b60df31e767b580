"""Reads one file, a folder, a glob or the standard library as two lists of documents.

Documents stay raw bytes until a tokenizer asks for characters, so that the byte tokenizer never decodes.
"""

import glob
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from switchyard.config import DataConfig
from switchyard.data import split
from switchyard.data.document import Document
from switchyard.data.split import Split
from switchyard.data.utf8 import is_binary, is_utf8, text_bytes
from switchyard.errors import UserError

INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages", "__pycache__"})  # below stdlib, not part of it
BINARY_PROBE = 8192  # bytes of a library source that are searched for a NUL


@dataclass(frozen=True)
class Corpus:
    """Holds documents to learn from and documents held out; `description` is one line for logs."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    description: str


class Found(NamedTuple):
    """Holds the documents of a path, sorted by name, their files, and their description."""

    documents: list[Document]
    files: list[Path]
    description: str


def load_text(data: DataConfig) -> Corpus:
    """Reads the text that `data.path` names and holds out a part of it, or reads `data.val_path` for that.

    The part is `data.val_fraction`, see switchyard.data.split. Of the standard library whole files validate.

    Raises:
        UserError: nothing there, nothing readable, empty text, bytes that are not UTF-8, or a validation text that is
            part of the training text.
    """
    found = _find(data)
    if data.val_path is not None:
        return _with_validation(found, data)
    divide = split.split_by_hash if data.path is None else split.split
    parts = divide(found.documents, data.val_fraction)
    counts = f"{len(parts.train):,} train / {len(parts.validation):,} validation, " if "hash" in parts.rule else ""
    share = f"validation {100 * parts.share:.3g} % of it ({parts.rule})"  # close to data.val_fraction
    return Corpus(parts.train, parts.validation, f"{found.description}, {counts}{share}")


def load_full(data: DataConfig) -> Corpus:
    """Reads the text of `data.val_path`, or else of `data.path`, and holds out all of it (UserError as load_text)."""
    found = _find(data) if data.val_path is None else read_documents(data.val_path, "data.val_path")
    return Corpus((), tuple(found.documents), f"{found.description}, evaluated in full")


def read_documents(path: str, key: str = "data.path") -> Found:
    """Reads all documents of a file, folder or glob; `key` begins messages (UserError as in load_text)."""
    place = os.path.expanduser(path)
    if os.path.isfile(place):
        document = _text_document(_read(Path(place), path, key))
        if not document.raw:
            raise UserError(f"{key}: '{path}'; the file is empty; name a file with text")
        return Found([document], [Path(place)], f"'{path}': {_size(len(document.raw))}")
    root, paths = (Path(place), files_below(Path(place))) if os.path.isdir(place) else matches(path, key)
    read = [(_read(file, file.relative_to(root).as_posix(), key), file) for file in paths]
    kept = [(_text_document(document), file) for document, file in read if not is_binary(document.raw)]
    kept = sorted(kept, key=lambda pair: pair[0].name)
    if not any(document.raw for document, _ in kept):
        raise UserError(f"{key}: '{path}' contains no text file with content; give UTF-8 text files")
    documents = [document for document, _ in kept]
    skipped = len(read) - len(kept)
    note = f", {skipped:,} binary skipped" if skipped else ""
    return Found(documents, [file for _, file in kept], _counted(f"'{path}'", documents) + note)


def _find(data: DataConfig) -> Found:
    """Returns the documents of data.path."""
    return _standard_library(data) if data.path is None else read_documents(data.path)


def _with_validation(found: Found, data: DataConfig) -> Corpus:
    """Returns all documents of data.path for training and all of data.val_path for validation."""
    held_out = read_documents(data.val_path, "data.val_path")
    known = {_identity(file) for file in found.files}
    for document, file in zip(held_out.documents, held_out.files, strict=True):
        if _identity(file) in known:
            raise UserError(
                f"data.val_path: '{data.val_path}'; '{document.name}' is also training text of data.path; give other "
                "text, or remove data.val_path to hold out a part of data.path"
            )
    parts = Split(tuple(found.documents), tuple(held_out.documents), "data.val_path")
    description = f"{found.description}; validation {held_out.description}, {100 * parts.share:.3g} % of both"
    return Corpus(parts.train, parts.validation, description)


def _standard_library(data: DataConfig) -> Found:
    """Returns the modules of the running Python as they are; for a tokenizer of characters, without those that are not
    UTF-8.
    """
    root, paths = library_modules()
    documents = [_read(path, path.relative_to(root).as_posix(), "data.path") for path in paths]
    documents = [document for document in documents if b"\0" not in document.raw[:BINARY_PROBE]]
    documents.sort(key=lambda document: document.name)
    skipped = 0
    if data.tokenizer != "byte":
        decodable = [document for document in documents if is_utf8(document.raw)]
        skipped = len(documents) - len(decodable)
        documents = decodable
    if len(documents) < 2:
        raise UserError(f"data.path: null; this Python has no library sources below '{root}'; name a text file instead")
    note = f", {skipped} not UTF-8 skipped" if skipped else ""
    return Found(documents, paths, _counted("standard library", documents) + note)


def library_modules() -> tuple[Path, list[Path]]:
    """Returns the folder of the running Python's library, and its modules: neither installed packages nor other
    files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return root, [path for path in files_below(root, skip=INSTALLED_PACKAGES) if path.suffix == ".py"]


def _text_document(document: Document) -> Document:
    """Returns the document without a byte-order mark, checked to be UTF-8 whatever the tokenizer reads."""
    checked = Document(document.name, text_bytes(document.raw, f"{document.key}: '{document.name}'"), document.key)
    checked.text()
    return checked


def files_below(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """Returns all files below a folder, without hidden ones and without the folders named in `skip`."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def matches(pattern: str, key: str) -> tuple[Path, list[Path]]:
    """Returns (folder before the first wildcard, files that match); UserError if there are none."""
    expanded = os.path.expanduser(pattern)
    paths = [Path(match) for match in set(glob.glob(expanded, recursive=True)) if os.path.isfile(match)]
    if not paths:
        kind = "no file matches; correct the glob" if glob.has_magic(pattern) else "no such file or folder"
        other = "leave data.path null for the standard library" if key == "data.path" else "leave it null"
        remedy = "give text, JSON lines or Parquet" if key.startswith("--") else f"or {other}"
        raise UserError(f"{key}: '{pattern}'; {kind}, {remedy}")
    fixed = []
    for part in Path(expanded).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed), paths


def _read(path: Path, name: str, key: str) -> Document:
    """Returns the content of one file; UserError if the system refuses."""
    try:
        return Document(name, path.read_bytes(), key)
    except OSError as error:
        raise UserError(f"{key}: '{path}'; {error.strerror or error}; make the file readable") from None


def _identity(file: Path) -> tuple[int, int]:
    """Returns a key that is equal for one file under several names."""
    found = file.stat()
    return found.st_dev, found.st_ino


def _counted(what: str, documents: list[Document]) -> str:
    return f"{what}: {len(documents):,} files, {_size(sum(len(document.raw) for document in documents))}"


def _size(count: int) -> str:
    """Returns bytes in readable units, powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
