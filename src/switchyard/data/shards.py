"""Reads and writes a folder of token shards: .npy files of one type that NumPy and other trainers read too.

    DIR/train-00000.npy        [T] uint16 where the vocabulary fits, otherwise int32; documents end with the separator
    DIR/train-00000.mask.npy   [T] uint8, of instruction data: 1 = a token to learn, 0 = a token of a prompt
    DIR/validation-00000.npy   the same
    DIR/tokenizer.json
    DIR/manifest.json          the index: tokens, documents, bytes and sha256 of each shard; written last

The shards of a split are one stream, whatever the length of a sequence. They are read by `pread`: a shard that another
process truncates is an error of one line, where a memory map would end the process, and the pages that were read do not
count as memory of the process.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from switchyard.data.tokenizer import Tokenizer
from switchyard.errors import UserError
from switchyard.file_errors import check_room, writing
from switchyard.files import UnfitError, read_regular
from switchyard.json_text import to_json

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
FORMAT = "switchyard-tokens-1"
SPLITS = ("train", "validation")
LONGEST = 256 << 20  # bytes of manifest and tokenizer
HEADER = 128  # bytes before the tokens of a .npy file of one axis
MOST_OPEN = 64  # files
PREPARE = "python -m switchyard.data.prepare"
Count = Annotated[int, Field(ge=0, lt=2**62)]


class Shard(BaseModel):
    """Describes one shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.npy$")]  # in the folder itself
    tokens: Annotated[int, Field(ge=1, lt=2**62)]
    documents: Count  # that end in the shard
    bytes: Count  # of UTF-8 text, a separator is one byte
    answers: Count  # tokens to learn
    sha256: str
    mask_sha256: str | None = None

    @property
    def mask(self) -> str:
        """Returns the name of the file of the mask."""
        return self.file.removesuffix(".npy") + ".mask.npy"


class TokenManifest(BaseModel):
    """Describes a folder of token shards."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["switchyard-tokens-1"] = FORMAT
    source: str
    vocab_size: Annotated[int, Field(ge=1, lt=2**31)]
    dtype: Literal["uint16", "int32"]
    separator: int | None
    masked: bool  # instruction data
    tokenizer_fingerprint: str
    skipped: Count = 0  # parts of the input that could not be read
    train: list[Shard]
    validation: list[Shard]


def token_type(vocab_size: int) -> np.dtype:
    """Returns the type of the ids of a vocabulary: uint16 up to 65,536 ids, otherwise int32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)


def locate(path: str | None) -> Path | None:
    """Returns the folder of token shards that a path names; None for anything else."""
    if path is None:
        return None
    place = Path(os.path.expanduser(path))
    if not os.path.isfile(place / MANIFEST):
        return None
    try:
        head = read_regular(place / MANIFEST, LONGEST, place)
    except (OSError, UnfitError):
        return None
    return place if FORMAT.encode() in head else None


def read_manifest(folder: Path, key: str = "data.path", skip: bool = False) -> tuple[TokenManifest, Tokenizer, int]:
    """Returns the manifest, the tokenizer, and how many bad shards were left out.

    The size of each shard is compared, not its checksum: no shard is read at the start of a run.

    Args:
        folder: of `locate`.
        key: begins messages.
        skip: leave out a shard that is missing or has another size; it ends the run otherwise.

    Raises:
        UserError: a file is missing, truncated or altered.
    """
    try:
        manifest = TokenManifest.model_validate_json(read_regular(folder / MANIFEST, LONGEST, folder))
        text = read_regular(folder / TOKENIZER, LONGEST, folder).decode("utf-8")
    except ValidationError as error:
        where = ".".join(str(step) for step in error.errors()[0]["loc"]) or "JSON"
        raise UserError(f"{key}: '{folder / MANIFEST}': damaged at '{where}'; create the folder again") from None
    except (OSError, UnfitError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: '{folder}': {error}; create the folder again with {PREPARE}") from None
    tokenizer = Tokenizer.from_json(text, str(folder / TOKENIZER))
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint or tokenizer.vocab_size != manifest.vocab_size:
        raise UserError(f"{key}: '{folder / TOKENIZER}': is not the tokenizer that wrote the shards; restore it")
    bad: dict[str, str] = {}
    for shard in (*manifest.train, *manifest.validation):
        if reason := _fault(folder, manifest, shard):
            bad[shard.file] = reason
    if bad and not skip:
        name, reason = next(iter(bad.items()))
        more = f" ({len(bad):,} shards are bad)" if len(bad) > 1 else ""
        raise UserError(
            f"{key}: '{folder / name}': {reason}{more}; copy it again, create the folder again, or set "
            "data.on_error=skip to leave it out"
        )
    kept = {name: [shard for shard in getattr(manifest, name) if shard.file not in bad] for name in SPLITS}
    return manifest.model_copy(update=kept), tokenizer, len(bad)


def _fault(folder: Path, manifest: TokenManifest, shard: Shard) -> str | None:
    """Returns why a shard cannot be used, judged by the sizes of its files."""
    files = [(shard.file, np.dtype(manifest.dtype).itemsize)] + [(shard.mask, 1)] * manifest.masked
    for name, width in files:
        try:
            size = os.stat(folder / name).st_size
        except OSError:
            return f"'{name}' is missing"
        if size != HEADER + shard.tokens * width:
            return f"'{name}' has {size:,} bytes, not {HEADER + shard.tokens * width:,}"
    return None


class ShardWriter:
    """Collects the tokens of one split and writes them as shards.

    Args:
        folder: exists.
        split: train or validation.
        dtype: of the ids.
        masked: whether masks are written too.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, masked: bool):
        self._folder, self._split, self._dtype, self._masked = folder, split, dtype, masked
        self._clear()

    def _clear(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self.tokens = self._documents = self._bytes = 0

    def add(self, ids: np.ndarray, mask: np.ndarray | None, documents: int, size: int) -> None:
        """Appends ids [T], of instruction data with a mask [T] uint8."""
        self._pieces.append(ids.astype(self._dtype, copy=False))
        if self._masked:
            self._masks.append(mask)
        self.tokens += len(ids)
        self._documents += documents
        self._bytes += size

    def close_shard(self, number: int) -> Shard | None:
        """Writes what was added as one shard, flushed to the disk; None where nothing was added."""
        if not self.tokens:
            return None
        name = f"{self._split}-{number:05}.npy"
        digest = _write_array(self._folder / name, self._pieces, self._dtype)
        answers, mask_digest = self.tokens, None
        if self._masked:
            mask_digest = _write_array(self._folder / f"{name[:-4]}.mask.npy", self._masks, np.dtype(np.uint8))
            answers = sum(int(mask.sum()) for mask in self._masks)
        shard = Shard(
            file=name,
            tokens=self.tokens,
            documents=self._documents,
            bytes=self._bytes,
            answers=answers,
            sha256=digest,
            mask_sha256=mask_digest,
        )
        self._clear()
        return shard


def _write_array(file: Path, pieces: Sequence[np.ndarray], dtype: np.dtype) -> str:
    """Writes pieces as one .npy file of HEADER bytes and the values, and returns the sha256 of the file."""
    count = sum(map(len, pieces))
    check_room(file, HEADER + count * dtype.itemsize)
    digest = hashlib.sha256()
    with writing(file), open(file, "wb") as handle:
        for block in (_header(count, dtype), *pieces):
            digest.update(block)
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
    return digest.hexdigest()


def _header(count: int, dtype: np.dtype) -> bytes:
    """Returns the first HEADER bytes of a .npy file of version 1.0."""
    text = f"{{'descr': '{dtype.newbyteorder('<').str}', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


def write_manifest(folder: Path, manifest: TokenManifest) -> None:
    """Writes the index of a folder; the last file of it."""
    with writing(folder / MANIFEST):
        (folder / MANIFEST).write_text(to_json(manifest.model_dump(), indent=1) + "\n", encoding="utf-8")


class ShardStream:
    """Reads the tokens of shards as one array [T] that stays on the disk: `len`, and slices, which are arrays.

    Args:
        parts: (file, values in it), in their order; None in place of a file stands for ones.
        dtype: of the values.
        drop_last: values at the end to leave out, the separator behind the last document.
    """

    def __init__(self, parts: Sequence[tuple[Path | None, int]], dtype: str, drop_last: int = 0):
        self._files = [file for file, _ in parts]
        self._starts = np.cumsum([0, *(count for _, count in parts)], dtype=np.int64)  # [shards + 1]
        self._length = max(int(self._starts[-1]) - drop_last, 0)
        self.dtype = np.dtype(dtype)
        self._open: OrderedDict[int, Any] = OrderedDict()  # number of the shard -> file

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, step = wanted.indices(self._length)
        if step != 1:
            raise ValueError(f"step {step}; shards are read in order")
        return self.read(start, max(stop - start, 0))

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns values [count] from `start` on (UserError: a shard cannot be read)."""
        out = np.empty(count, self.dtype)
        done, number = 0, int(np.searchsorted(self._starts, start, "right")) - 1
        while done < count:
            place = start + done - int(self._starts[number])
            take = min(count - done, int(self._starts[number + 1] - self._starts[number]) - place)
            self._fill(out[done : done + take], number, place)
            done, number = done + take, number + 1
        return out

    def pieces(self, size: int = 1 << 20) -> Iterator[np.ndarray]:
        """Yields all values in order, `size` at a time."""
        for start in range(0, self._length, size):
            yield self[start : start + size]

    def _fill(self, out: np.ndarray, number: int, place: int) -> None:
        """Reads values of one shard from a place on."""
        if self._files[number] is None:
            out[:] = 1
            return
        view, offset = memoryview(out).cast("B"), HEADER + place * self.dtype.itemsize
        try:
            read = 0
            while read < len(view):
                got = os.preadv(self._handle(number).fileno(), [view[read:]], offset + read)
                if not got:
                    raise OSError(None, f"ends at byte {offset + read:,}")
                read += got
        except (OSError, UnfitError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"data.path: '{self._files[number]}': token {place:,}: {reason}; copy the shard again"
            ) from None

    def _handle(self, number: int) -> Any:
        """Returns the open file of a shard, whose header is right; closes the file that was used least recently."""
        if number not in self._open:
            file = open(self._files[number], "rb")  # noqa: SIM115 (closed below, or with the stream)
            count = int(self._starts[number + 1] - self._starts[number])
            if file.read(HEADER) != _header(count, self.dtype):
                file.close()
                raise UnfitError("its header is damaged")
            self._open[number] = file
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]
