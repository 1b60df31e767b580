"""Text in: one file, a folder, a glob or the standard library becomes two lists of documents.

Documents stay raw bytes until a tokenizer asks for characters, so that the byte tokenizer never decodes.
"""

import glob
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from switchyard.config import DataConfig
from switchyard.errors import UserError

INSTALLED_PACKAGES = frozenset({"site-packages", "dist-packages", "__pycache__"})  # below stdlib, not part of it
BINARY_PROBE = 8192  # bytes searched for a NUL, which text does not hold


@dataclass(frozen=True)
class Document:
    """One text: `name` for messages (the path as the user would find it), `raw` its bytes."""

    name: str
    raw: bytes

    def text(self) -> str:
        """The characters, with the file's own line ends.

        Raises:
            UserError: the bytes are not UTF-8; names the file and the offset of the first bad byte.
        """
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"data.path: '{self.name}' is not UTF-8: byte 0x{self.raw[error.start]:02x} at offset {error.start}; "
                "convert the file to UTF-8 or leave it out"
            ) from None


@dataclass(frozen=True)
class Corpus:
    """Documents to learn from and documents held out; `description` is one line for logs."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    description: str


def load_text(data: DataConfig) -> Corpus:
    """Reads the text that `data.path` names and splits it by `data.val_fraction`.

    One file: its last part validates, cut at `int(characters * (1 - val_fraction))` as nanoGPT does. Many files: those
    whose relative path hashes (sha256) below the fraction validate, so a file keeps its side when others come and go.

    Raises:
        UserError: nothing there, nothing readable, empty text, or bytes that are not UTF-8.
    """
    if data.path is None:
        return _standard_library(data)
    path = os.path.expanduser(data.path)
    if os.path.isfile(path):
        return _one_file(_read(Path(path), data.path), data)
    if os.path.isdir(path):
        root, paths = Path(path), _files_below(Path(path))
    else:
        root, paths = _matches(data.path)
    documents = _text_documents(root, paths)
    for document in documents:
        document.text()  # a folder of text means UTF-8, whatever the tokenizer reads
    if not any(document.raw for document in documents):
        raise UserError(f"data.path: '{data.path}' holds no text file with anything in it; name UTF-8 text files")
    binary = len(paths) - len(documents)
    note = f", {binary:,} binary skipped" if binary else ""
    if len(documents) == 1:
        return _one_file(documents[0], data)
    train, validation = _split_by_hash(documents, data.val_fraction)
    return Corpus(train, validation, _describe(f"'{data.path}'", train, validation) + note)


def _standard_library(data: DataConfig) -> Corpus:
    """The running Python's own modules; for a tokenizer of characters without the few files that are not UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in _files_below(root, skip=INSTALLED_PACKAGES) if path.suffix == ".py"]
    documents = _text_documents(root, paths)
    skipped = 0
    if data.tokenizer != "byte":
        decodable = [document for document in documents if _is_utf8(document.raw)]
        skipped = len(documents) - len(decodable)
        documents = decodable
    if len(documents) < 2:
        raise UserError(f"data.path: null; this Python has no library sources below '{root}'; name a text file instead")
    train, validation = _split_by_hash(documents, data.val_fraction)
    note = f", {skipped} not UTF-8 skipped" if skipped else ""
    return Corpus(train, validation, _describe("standard library", train, validation) + note)


def _one_file(document: Document, data: DataConfig) -> Corpus:
    """Head and tail of one text, cut between two characters."""
    if not document.raw:
        raise UserError(f"data.path: '{document.name}'; the file is empty; name a file with text")
    raw, text = document.raw, document.text()
    cut = len(text[: int(len(text) * (1 - data.val_fraction))].encode("utf-8"))
    description = f"'{document.name}': {_size(len(raw))}, the last {data.val_fraction:.3g} of it validation"
    return Corpus((Document(document.name, raw[:cut]),), (Document(document.name, raw[cut:]),), description)


def _split_by_hash(documents: list[Document], fraction: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """(train, validation) of two or more documents; neither side is left empty."""
    held_out = [hash_fraction(document.name) < fraction for document in documents]
    if all(held_out):
        held_out[0] = False
    if not any(held_out):
        held_out[-1] = True
    train = tuple(document for document, out in zip(documents, held_out, strict=True) if not out)
    return train, tuple(document for document, out in zip(documents, held_out, strict=True) if out)


def hash_fraction(name: str) -> float:
    """A number in [0, 1) drawn from the sha256 of the name: the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _text_documents(root: Path, paths: list[Path]) -> list[Document]:
    """The files that are not binary, named by their path below `root`, sorted by that name."""
    documents = (_read(path, path.relative_to(root).as_posix()) for path in paths)
    kept = [document for document in documents if b"\0" not in document.raw[:BINARY_PROBE]]
    return sorted(kept, key=lambda document: document.name)


def _files_below(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """All files below a folder, without hidden ones and without the folders named in `skip`."""
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _matches(pattern: str) -> tuple[Path, list[Path]]:
    """(folder before the first wildcard, files that match); UserError if there are none."""
    expanded = os.path.expanduser(pattern)
    paths = [Path(match) for match in set(glob.glob(expanded, recursive=True)) if os.path.isfile(match)]
    if not paths:
        kind = "no file matches; correct the glob" if glob.has_magic(pattern) else "no such file or folder"
        raise UserError(f"data.path: '{pattern}'; {kind}, or leave data.path null for the standard library")
    fixed = []
    for part in Path(expanded).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed), paths


def _read(path: Path, name: str) -> Document:
    """One file whole; UserError if the system refuses."""
    try:
        return Document(name, path.read_bytes())
    except OSError as error:
        raise UserError(f"data.path: '{path}'; {error.strerror or error}; make the file readable") from None


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _describe(what: str, train: tuple[Document, ...], validation: tuple[Document, ...]) -> str:
    size = sum(len(document.raw) for document in train + validation)
    files = len(train) + len(validation)
    return f"{what}: {files:,} files, {_size(size)}, {len(train):,} train / {len(validation):,} validation"


def _size(count: int) -> str:
    """Bytes as people read them: powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
