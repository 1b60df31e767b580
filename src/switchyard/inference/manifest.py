"""What stands in an exported directory, and whether it still is what was written.

DIR/
    manifest.json     this file: figures, limits, parity, size and sha256 of every other file
    prefill.mindir    tokens [B, S], lengths [B] -> logits [B, V], keys and values [L, B, J, S, h]
    decode.mindir     tokens [B], positions [B], keys and values [L, B, J, T, h] -> logits [B, V], keys, values
    tokenizer.json    see switchyard.data.tokenizer

Over 1 GB MindSpore writes NAME_graph.mindir and the folder NAME_variables instead of NAME.mindir; `graphs` has the
names that were written.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from switchyard.errors import UserError

FORMAT, VERSION = "switchyard export", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
PREFILL, DECODE = "prefill", "decode"
AES_GCM = "AES-GCM"
KEY_BYTES = (16, 24, 32)

Count = Annotated[int, Field(ge=1)]


class Part(BaseModel):
    """A part of the manifest: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class File(Part):
    """One file: its size and checksum."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Figures(Part):
    """The model in numbers."""

    vocab_size: Count
    num_layers: Count
    hidden_size: Count
    num_heads: Count
    n_kv_heads: Count
    head_size: Count
    expert_num: Count
    num_experts_chosen: Count
    moe_layers: tuple[int, ...]
    parameters: Count
    compute_dtype: Literal["float32", "float16", "bfloat16"]


class Limits(Part):
    """What the graphs take.

    max_length: longest prompt plus answer. prompt_multiple: prefill's S, with padding, is a multiple of it. Axes named
    in `dynamic` may have any size, lengths up to max_length.
    """

    max_length: Count
    prompt_multiple: Count
    dynamic: tuple[str, ...]


class Parity(Part):
    """How the reloaded files compared with the training graph on validation text.

    max_abs_difference: of a logit, under `bound`. Positions compared: `prefill_positions` and `decode_positions`.
    not_reached: (layer, expert, graph) that no compared position was routed to.
    """

    max_abs_difference: float
    prefill_max_abs_difference: float
    decode_max_abs_difference: float
    bound: float
    prefill_positions: Count
    decode_positions: Annotated[int, Field(ge=0)]
    not_reached: tuple[tuple[int, int, str], ...]


class Source(Part):
    """Where the weights come from."""

    checkpoint: str
    step: int
    mindspore: str
    switchyard: str


class Signed(Part):
    """A manifest; `sha256` is that of all its other fields."""

    format: str
    version: int
    encryption: Literal["AES-GCM"] | None
    files: dict[str, File]
    sha256: str = ""

    def digest(self) -> str:
        """sha256 over every field but itself."""
        text = json.dumps(self.model_dump(mode="json", exclude={"sha256"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def signed(self: "Kind") -> "Kind":
        """The same with its checksum."""
        return self.model_copy(update={"sha256": self.digest()})


class Manifest(Signed):
    """manifest.json of a language model."""

    format: Literal["switchyard export"] = FORMAT
    version: Literal[1] = VERSION
    graphs: dict[Literal["prefill", "decode"], str]
    model: Figures
    limits: Limits
    parity: Parity | None
    source: Source


Kind = TypeVar("Kind", bound=Signed)


def read(directory: str | Path, kind: type[Kind] = Manifest) -> Kind:
    """The manifest of an exported directory.

    Args:
        directory: what export.py made.
        kind: the class that the manifest must be of.

    Raises:
        UserError: no such directory, no export in it, another format version, or a manifest cut or altered.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise UserError(f"--model: '{directory}' {what}; give the folder that export.py made")
    path = directory / MANIFEST
    wanted = {name: kind.model_fields[name].default for name in ("format", "version")}
    try:
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict) or tree.get("format") != wanted["format"]:
            raise UserError(f"--model: '{directory}' is no {wanted['format']}; give the folder that export.py made")
        if tree.get("version") != wanted["version"]:
            raise UserError(
                f"--model: '{path}' has format version {tree.get('version')}, this Switchyard reads "
                f"{wanted['version']}; export the checkpoint again"
            )
        manifest = kind(**tree)
    except FileNotFoundError:
        raise UserError(f"--model: '{directory}' holds no {MANIFEST}; give the folder that export.py made") from None
    except (ValueError, ValidationError):
        raise UserError(f"--model: '{path}' was cut or altered; export the checkpoint again") from None
    if manifest.sha256 != manifest.digest():
        raise UserError(f"--model: '{path}' was altered: its sha256 is another; export the checkpoint again")
    return manifest


def verify(directory: str | Path, manifest: Signed) -> None:
    """Compares size and sha256 of every file with the manifest (UserError names the first that differs)."""
    for name, expected in manifest.files.items():
        path = Path(directory) / name
        if not path.is_file():
            raise UserError(f"--model: '{path}' is missing; export the checkpoint again")
        found = fingerprint(path)
        if found.bytes != expected.bytes:
            raise UserError(
                f"--model: '{path}' has {found.bytes} bytes instead of {expected.bytes}: it was cut or altered; "
                "export the checkpoint again"
            )
        if found.sha256 != expected.sha256:
            raise UserError(f"--model: '{path}' was altered: its sha256 is another; export the checkpoint again")


def fingerprint(path: Path) -> File:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return File(bytes=path.stat().st_size, sha256=digest.hexdigest())


def fingerprints(directory: Path) -> dict[str, File]:
    """Every file under a directory but the manifest, by its path in it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in paths]
    return {name: fingerprint(path) for name, path in zip(names, paths) if name != MANIFEST}


def read_key(path: str | Path, field: str = "--key-file") -> bytes:
    """The key in a file: 16, 24 or 32 raw bytes, as `openssl rand -out FILE 32` writes them (UserError)."""
    try:
        with open(Path(path).expanduser(), "rb") as file:
            key = file.read(1 << 16)
    except OSError as error:
        raise UserError(f"{field}: '{path}': {error.strerror}; give a file of 16, 24 or 32 raw bytes") from None
    if len(key) not in KEY_BYTES:
        raise UserError(
            f"{field}: '{path}' has {len(key)} bytes; AES-GCM takes 16, 24 or 32 raw bytes: openssl rand -out FILE 32"
        )
    return key


def key_of(directory: str | Path, encryption: str | None, key_file: str | Path | None) -> bytes | None:
    """The key that opens an export, None where it needs none (UserError: one is missing, or given for nothing)."""
    if encryption is None and key_file is not None:
        raise UserError(f"--key-file: '{key_file}'; '{directory}' is not encrypted: leave it out")
    if encryption is not None and key_file is None:
        raise UserError(f"--key-file: not given; '{directory}' is encrypted: name the file with its key")
    return None if key_file is None else read_key(key_file)
