"""Describes the contents of an exported directory, and verifies that they are unchanged.

DIR/
    manifest.json     this file: figures, limits, parity, size and sha256 of every other file
    prefill.mindir    tokens [B, S], lengths [B] -> logits [B, V], 2 L caches [B, J, S, h]: L of keys, L of values
    decode.mindir     tokens [B], positions [B], 2 L caches [B, J, T, h], written in place -> logits [B, V]
    decode_batch.mindir  the same for many rows, where every token chooses experts: see models.decode
    decode_one.mindir    the same for one row, where few experts are heavy: see models.single_experts
    tokenizer.json    see switchyard.data.tokenizer

An encoder-decoder has no decode_batch and one graph more, and its answers begin with padding. prefill and decode take,
before the caches, what the encoder gave, and the lengths [B] of its inputs; caches are those of the decoder:

    encoder.mindir    tokens [B, S], lengths [B] -> keys and values [L, B, J, S, h] for cross-attention

Over 1 GB MindSpore writes NAME_graph.mindir and the folder NAME_variables instead of NAME.mindir; `graphs` has the
names that were written.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from switchyard.config.reader import parse_json
from switchyard.errors import UserError
from switchyard.files import (
    UnfitError,
    flush_tree,
    open_regular,
    present,
    read_regular,
    replace,
    require_text,
    sha256_of,
)

FORMAT, VERSION = "switchyard export", 3
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
ENCODER, PREFILL = "encoder", "prefill"
DECODE, DECODE_BATCH, DECODE_ONE = "decode", "decode_batch", "decode_one"
AES_GCM = "AES-GCM"
KEY_BYTES = (16, 24, 32)
LONGEST = 64 << 20  # bytes of a manifest
LONGEST_TOKENIZER = 256 << 20
OTHERS_READ = 0o044  # of a mode: the group and everybody

Count = Annotated[int, Field(ge=1, lt=2**31)]
Total = Annotated[int, Field(ge=1, lt=2**63)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=200)]


class Part(BaseModel):
    """Holds one part of the manifest. A part refuses unknown keys, and its values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class File(Part):
    """Holds the size and the checksum of one file."""

    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Figures(Part):
    """Holds the sizes of the model; num_layers: of the stack that generates."""

    vocab_size: Count
    num_layers: Count
    hidden_size: Count
    num_heads: Count
    n_kv_heads: Count
    head_size: Count
    expert_num: Count
    num_experts_chosen: Count
    moe_layers: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
    parameters: Total
    compute_dtype: Literal["float32", "float16", "bfloat16"]


class Limits(Part):
    """Holds the limits of the inputs of the graphs.

    max_length: longest prompt plus answer; of an encoder-decoder the longest of each.
    prompt_multiple: prefill's S, with padding, is a multiple of it. Axes named
    in `dynamic` may have any size, lengths up to max_length. Of a graph in `one_shape` a loaded one serves the sizes of
    its first call: for others the file is loaded again.
    """

    max_length: Count
    prompt_multiple: Annotated[int, Field(ge=1, le=2**20)]
    dynamic: tuple[str, ...]
    one_shape: tuple[str, ...] = ()


class Parity(Part):
    """Holds the comparison of the reloaded files with the training graph on validation text.

    max_abs_difference: of a logit, under `bound`. Positions compared: `prefill_positions` and `decode_positions`.
    not_reached: (layer, expert, graph) that no compared position was routed to.
    """

    max_abs_difference: float
    prefill_max_abs_difference: float
    decode_max_abs_difference: float
    bound: float
    prefill_positions: Count
    decode_positions: Annotated[int, Field(ge=0, lt=2**31)]
    not_reached: tuple[tuple[int, int, str], ...]


class Source(Part):
    """Holds the origin of the weights."""

    checkpoint: str
    step: int
    mindspore: str
    switchyard: str


class Signed(Part):
    """Holds a manifest; `sha256` covers all other fields. Files are in the directory, or in one folder of it."""

    format: str
    version: int
    encryption: Literal["AES-GCM"] | None
    files: dict[FileName, File]
    sha256: str = ""

    def digest(self) -> str:
        """Returns the sha256 over every field except `sha256`."""
        text = json.dumps(self.model_dump(mode="json", exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def signed(self: "Kind") -> "Kind":
        """Returns the same manifest with its checksum."""
        return self.model_copy(update={"sha256": self.digest()})


class Manifest(Signed):
    """Describes manifest.json of a language model."""

    format: Literal["switchyard export"] = FORMAT
    version: Literal[3] = VERSION
    graphs: dict[Literal["encoder", "prefill", "decode", "decode_batch", "decode_one"], str]
    model: Figures
    limits: Limits
    parity: Parity | None
    source: Source

    @model_validator(mode="after")
    def _graphs_are_files(self) -> "Manifest":
        """Checks that the graphs are among the files, so that only verified files are read."""
        for graph in {PREFILL, DECODE} | set(self.graphs):
            if self.graphs.get(graph) not in (f"{graph}.mindir", f"{graph}_graph.mindir"):
                raise ValueError(f"graphs: {graph}")
        if not set(self.graphs.values()) <= set(self.files):
            raise ValueError("files: a graph is missing")
        return self


Kind = TypeVar("Kind", bound=Signed)


def read(directory: str | Path, kind: type[Kind] = Manifest) -> Kind:
    """Returns the manifest of an exported directory.

    Args:
        directory: what export.py made.
        kind: the class that the manifest must be of.

    Raises:
        UserError: no such directory, no export in it, another format version, or a manifest cut or altered.
    """
    require_text(Path(directory), "--model")
    directory = present(Path(directory))
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"--model: '{directory}' {what}; give the folder that export.py made")
    path = directory / MANIFEST
    wanted = {name: kind.model_fields[name].default for name in ("format", "version")}
    try:
        tree = parse_json(read_regular(path, LONGEST, directory))
        if not isinstance(tree, dict) or tree.get("format") != wanted["format"]:
            raise UserError(f"--model: '{directory}' is not a {wanted['format']}; give the folder that export.py made")
        if tree.get("version") != wanted["version"]:
            raise UserError(
                f"--model: '{path}' has format version {repr(tree.get('version'))[:20]}, this Switchyard reads "
                f"{wanted['version']}; export the checkpoint again"
            )
        manifest = kind(**tree)
    except FileNotFoundError:
        raise UserError(f"--model: '{directory}' holds no {MANIFEST}; give the folder that export.py made") from None
    except UnfitError as error:
        raise UserError(f"--model: '{path}' {error}; give the folder that export.py made") from None
    except OSError as error:
        raise UserError(f"--model: '{path}': {error.strerror}; make the file readable") from None
    except (ValueError, ValidationError):
        raise UserError(f"--model: '{path}' is truncated or altered; export the checkpoint again") from None
    if manifest.sha256 != manifest.digest():
        raise UserError(f"--model: '{path}' was altered: its sha256 differs; export the checkpoint again")
    return manifest


def verify(directory: str | Path, manifest: Signed) -> None:
    """Compares type, size and sha256 of every file with the manifest (UserError names the first that differs).

    A file that is no regular one, or of another size, is not read. Weights beside a graph must be in the manifest too.
    """
    directory = present(Path(directory))
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.exists():
            raise UserError(f"--model: '{path}' is missing; export the checkpoint again")
        try:
            found = fingerprint(path, directory, expected.bytes)
        except UnfitError as error:
            raise UserError(f"--model: '{path}' {error}; export the checkpoint again") from None
        except OSError as error:
            raise UserError(f"--model: '{path}': {error.strerror}; make the file readable") from None
        if found.bytes != expected.bytes:
            raise UserError(
                f"--model: '{path}' has {found.bytes} bytes instead of {expected.bytes}: it is truncated or altered; "
                "export the checkpoint again"
            )
        if found.sha256 != expected.sha256:
            raise UserError(f"--model: '{path}' was altered: its sha256 differs; export the checkpoint again")
    for path in directory.glob("*_variables/*"):
        if path.relative_to(directory).as_posix() not in manifest.files:
            raise UserError(f"--model: '{path}' is not in {MANIFEST}; export the checkpoint again")


def fingerprint(path: Path, folder: Path | None = None, size: int | None = None) -> File:
    """Returns the size and sha256 of a regular file; a file of another size than `size` is not read (UnfitError,
    OSError).
    """
    with open_regular(path, folder=folder) as file:
        found = os.fstat(file.fileno()).st_size
        return File(bytes=found, sha256=sha256_of(file) if size in (None, found) else "0" * 64)


def publish(temporary: Path, manifest: Signed, out: Path) -> None:
    """Writes the manifest into a finished directory and brings it to its place, where it replaces an earlier export.

    Whenever the process dies, a whole export is at the place: the earlier one or the new one.
    """
    (temporary / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    flush_tree(temporary)
    replace(temporary, out)


def digest_of(content: bytes) -> bytes:
    """Returns the 32 bytes of the sha256 of something."""
    return hashlib.sha256(content).digest()


def checkpoint_name(path: Path) -> str:
    """Returns a path as text that JSON can hold, whatever bytes are in the path."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()


def read_tokenizer(directory: Path) -> str:
    """Returns the text of a directory's tokenizer (UserError)."""
    path = directory / TOKENIZER
    try:
        return read_regular(path, LONGEST_TOKENIZER, directory).decode("utf-8")
    except (OSError, ValueError):
        raise UserError(f"--model: '{path}' cannot be read as text; export the checkpoint again") from None


def fingerprints(directory: Path) -> dict[str, File]:
    """Returns the fingerprint of every file below a directory except the manifest, by its path in the directory."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in paths]
    return {name: fingerprint(path) for name, path in zip(names, paths) if name != MANIFEST}


def read_key(path: str | Path, field: str = "--key-file", say: Callable[[str], None] = lambda line: None) -> bytes:
    """Reads the key in a file: 16, 24 or 32 raw bytes, as `openssl rand -out FILE 32` writes them (UserError).

    `say` receives a warning where others than the owner can read the file.
    """
    try:
        with open(Path(path).expanduser(), "rb") as file:
            key, mode = file.read(1 << 16), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise UserError(f"{field}: '{path}': {error.strerror}; give a file of 16, 24 or 32 raw bytes") from None
    if len(key) not in KEY_BYTES:
        raise UserError(
            f"{field}: '{path}' has {len(key)} bytes; AES-GCM takes 16, 24 or 32 raw bytes: openssl rand -out FILE 32"
        )
    if mode & OTHERS_READ and stat.S_ISREG(mode):
        say(f"warning: {field}: '{path}' can be read by other users (mode {stat.S_IMODE(mode):o}); chmod 600 '{path}'")
    return key


def key_of(
    directory: str | Path,
    encryption: str | None,
    key_file: str | Path | None,
    say: Callable[[str], None] = lambda line: None,
) -> bytes | None:
    """Returns the key that decrypts an export, None where the export is not encrypted (UserError: missing, or not
    needed).
    """
    if encryption is None and key_file is not None:
        raise UserError(f"--key-file: '{key_file}'; '{directory}' is not encrypted: leave it out")
    if encryption is not None and key_file is None:
        raise UserError(f"--key-file: not given; '{directory}' is encrypted: name the file with its key")
    return None if key_file is None else read_key(key_file, say=say)
