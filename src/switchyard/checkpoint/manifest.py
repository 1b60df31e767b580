"""Reads and writes the manifest of a checkpoint: its files with their sha256, and the place of every shard.

Version 1 is a checkpoint of one device, whose two tensor files hold full tensors. Version 2 is one of several:

    degrees     how the run was sharded: data_parallel, expert_parallel, ...
    tensors     {weights | optimizer: {name: {dtype, shape}}}, shapes of full tensors
    files       {file: {sha256, bytes}}, those with tensors also {slices: {name: {offsets, shape}}}
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from switchyard import config as configuration
from switchyard.checkpoint.tensors import TYPES, Entry, fits_memory
from switchyard.config import Config
from switchyard.config.reader import parse_json
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.files import UnfitError, flush, open_regular, read_regular, sha256_of
from switchyard.json_text import to_json

FORMAT, FULL_VERSION, SHARDED_VERSION = "switchyard checkpoint", 1, 2
MANIFEST, CONFIG, TOKENIZER, STATE = "manifest.json", "config.yaml", "tokenizer.json", "state.json"
KINDS = ("weights", "optimizer")
TEXTS = (CONFIG, TOKENIZER, STATE)
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8,})")
LONGEST = {MANIFEST: 1 << 30, CONFIG: 1 << 24, STATE: 1 << 24, TOKENIZER: 1 << 28}  # bytes of the files that are parsed
MOST_DEVICES = 1 << 20


class DamagedError(UserError):
    """Reports a checkpoint with a file that is missing, truncated, altered or unreadable, or with a number that is not
    finite.

    Its line ends with the newest good checkpoint before it, which is looked for when the line is printed.

    Attributes:
        path: of the checkpoint.
        what: is wrong with it.
    """

    def __init__(self, path: Path, what: str):
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        from switchyard.checkpoint.health import Healthy  # which reads checkpoints by what this module offers

        named = NAME.fullmatch(self.path.name)
        place = Path(os.path.abspath(self.path) if named else os.path.realpath(self.path))
        good = Healthy().newest(place.parent.parent, below=place.name)
        remedy = "no earlier checkpoint is good: train again"
        if good is not None:
            good = self.path.with_name(good.name) if named else good
            remedy = f"use the previous checkpoint '{good}', which is good"
        return f"checkpoint '{self.path}': {self.what}; {remedy}"


@dataclass(frozen=True)
class Manifest:
    """Holds the manifest of a checkpoint.

    Attributes:
        path: the directory.
        step: optimizer steps taken.
        files: see above.
        degrees: how the run was sharded.
        tensors: kind -> name -> type and shape of the full tensor; None where the files hold full tensors.
    """

    path: Path
    step: int
    files: dict[str, dict[str, Any]]
    degrees: ParallelDims
    tensors: dict[str, dict[str, Entry]] | None


def file_of(kind: str, rank: int = 0, devices: int = 1) -> str:
    """Returns the name of the file with the shards of a rank."""
    return f"{kind}.safetensors" if devices == 1 else f"{kind}-{rank:05d}-of-{devices:05d}.safetensors"


def listed(run: str | Path) -> list[Path]:
    """Returns the checkpoints of a run folder, oldest first; damaged ones too."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def write_manifest(manifest: Manifest) -> None:
    """Writes MANIFEST into the directory and has it on the disk."""
    content: dict[str, Any] = {"format": FORMAT, "version": FULL_VERSION, "step": manifest.step}
    if manifest.tensors is not None:
        tensors = {
            kind: {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in sorted(entries.items())}
            for kind, entries in manifest.tensors.items()
        }
        content |= {"version": SHARDED_VERSION, "degrees": asdict(manifest.degrees), "tensors": tensors}
    content["files"] = manifest.files
    content["sha256"] = _digest_of(content)
    write_text(manifest.path / MANIFEST, to_json(content, indent=1))


class _Strict(BaseModel):
    """Holds one part of the content: no unknown keys, no other types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Size = Annotated[int, Field(ge=0, lt=2**48)]
Degree = Annotated[int, Field(ge=1, le=MOST_DEVICES)]
Sizes = Annotated[list[Size], Field(max_length=16)]
TensorName = Annotated[str, Field(pattern=r"^[!-~]{1,500}$")]
FileName = Annotated[
    str,
    Field(pattern=r"^(config\.yaml|tokenizer\.json|state\.json|(weights|optimizer)(-\d{5,}-of-\d{5,})?\.safetensors)$"),
]


class _Place(_Strict):
    offsets: Sizes
    shape: Sizes


class _File(_Strict):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, lt=2**63)]
    slices: dict[TensorName, _Place] | None = None


class _Tensor(_Strict):
    dtype: Literal[tuple(TYPES)]
    shape: Sizes


class _Degrees(_Strict):
    data_parallel: Degree
    expert_parallel: Degree
    model_parallel: Degree
    pipeline_stage: Degree
    optimizer_shard: Annotated[int, Field(ge=0, le=3)]


class _Content(_Strict):
    """Holds the manifest except its checksum; names of files must stay inside the directory."""

    format: Literal[FORMAT]
    version: Literal[FULL_VERSION, SHARDED_VERSION]
    step: Annotated[int, Field(ge=0, lt=2**53)]
    files: dict[FileName, _File]
    degrees: _Degrees | None = None
    tensors: dict[Literal[KINDS], dict[TensorName, _Tensor]] | None = None


class _State(BaseModel):
    """Holds the state that a resumed run starts from; other keys of the file are kept unchanged."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    step: Annotated[int, Field(ge=0, lt=2**53)]
    seconds: Annotated[float, Field(ge=0)] | Size = 0.0
    data_index: Size | None = None
    data_epoch: Size | None = None
    data_window: Size | None = None
    tokens: Size | None = None
    train_seed: Annotated[int, Field(ge=0)] | None = None
    noise_rule: str | None = None
    best_loss: float | int | None = None


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a checkpoint's directory (DamagedError; UserError: of another version)."""
    with readable(path, MANIFEST):
        if not path.is_dir():
            raise DamagedError(path, "is not a folder")
        text = read_regular(path / MANIFEST, LONGEST[MANIFEST], path)
    try:
        content = parse_json(text.decode("utf-8"))
        version, digest = content["version"], content.pop("sha256")
        if version not in (FULL_VERSION, SHARDED_VERSION):
            raise UserError(
                f"checkpoint '{path}': format version {repr(version)[:20]}; this version of Switchyard reads "
                f"{FULL_VERSION} and {SHARDED_VERSION}"
            )
        if digest != _digest_of(content):
            raise ValueError
        _Content.model_validate(content)
        return _checked(path, content)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(path, f"{MANIFEST} is truncated or altered") from None


@contextlib.contextmanager
def readable(path: Path, name: str) -> Iterator[None]:
    """Turns what stands against reading a file `name` of the checkpoint `path` into a DamagedError."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(path, f"{name} is missing") from None
    except UnfitError as error:
        raise DamagedError(path, f"{name} {error}") from None
    except OSError as error:
        raise DamagedError(path, f"{name} cannot be read ({error.strerror or error})") from None


def _checked(path: Path, content: dict[str, Any]) -> Manifest:
    """Returns the manifest of content with the right types (ValueError, KeyError, TypeError: its parts contradict each
    other).
    """
    files, degrees, tensors = content["files"], ParallelDims(), None
    if content["version"] == SHARDED_VERSION:
        degrees, tensors = ParallelDims(**content["degrees"]), {}
        for kind in KINDS:
            fields = content["tensors"][kind].items()
            tensors[kind] = {name: Entry(entry["dtype"], tuple(entry["shape"])) for name, entry in fields}
        if degrees.devices > MOST_DEVICES or degrees.data_parallel % degrees.expert_parallel:
            raise ValueError("degrees")
        _check_sizes(files, tensors)
    expected = {file_of(kind) for kind in KINDS}
    if not set(TEXTS) <= set(files) or (tensors is None and set(files) != {*TEXTS, *expected}):
        raise ValueError("files")
    if NAME.fullmatch(path.name) and int(path.name.rpartition("-")[2]) != content["step"]:
        raise ValueError("step")
    return Manifest(path, content["step"], files, degrees, tensors)


def _check_sizes(files: dict[str, dict], tensors: dict[str, dict[str, Entry]]) -> None:
    """Refuses shards that their file has no room for, before any memory is taken for them (ValueError, KeyError)."""
    for name, fields in files.items():
        kind = name.partition("-")[0]
        if kind not in KINDS:
            continue
        shapes = {key: tuple(place["shape"]) for key, place in fields["slices"].items() if key in tensors[kind]}
        if sum(Entry(tensors[kind][key].dtype, shape).bytes for key, shape in shapes.items()) > fields["bytes"]:
            raise ValueError(name)
    for entries in tensors.values():
        if not all(fits_memory(entry.shape) for entry in entries.values()):
            raise ValueError("shape")


def verify(manifest: Manifest, name: str) -> None:
    """Refuses a file that is not the one that was written (DamagedError); holds a block of it at a time.

    What is no regular file, or of another size, is not read.
    """
    path, expected = manifest.path, manifest.files[name]
    with readable(path, name):
        found = fingerprint(path / name, path, expected["bytes"])
    if found["bytes"] != expected["bytes"]:
        raise DamagedError(path, f"{name} has {found['bytes']} bytes instead of {expected['bytes']}: it is truncated")
    if found["sha256"] != expected["sha256"]:
        raise DamagedError(path, f"{name} was altered: its sha256 differs from that in {MANIFEST}")


def read_texts(manifest: Manifest) -> tuple[Config, str, dict[str, Any]]:
    """Reads (configuration, tokenizer, state), see checkpoint.store.Checkpoint (DamagedError)."""
    path, texts = manifest.path, {}
    for name in TEXTS:
        verify(manifest, name)
        with readable(path, name):
            data = read_regular(path / name, LONGEST[name], path)
        try:
            texts[name] = data.decode("utf-8")
        except UnicodeDecodeError:
            raise DamagedError(path, f"{name} is not UTF-8 text") from None
    try:
        state = parse_json(texts[STATE])
        _State.model_validate(state)
        if state["step"] != manifest.step:
            raise ValueError("step")
    except ValueError:
        raise DamagedError(path, f"{STATE} does not hold the state of step {manifest.step}") from None
    return configuration.load(path / CONFIG, inherited=True), texts[TOKENIZER], state


def fingerprint(path: Path, folder: Path | None = None, size: int | None = None) -> dict[str, Any]:
    """Returns {"sha256", "bytes"} of a regular file in a folder; a file of another size than `size` is not read
    (UnfitError).
    """
    with open_regular(path, folder=folder) as file:
        found = os.fstat(file.fileno()).st_size
        return {"sha256": sha256_of(file) if size in (None, found) else "", "bytes": found}


def write_text(path: Path, text: str) -> None:
    """Writes a small file and has it on the disk (UserError)."""
    with writing(path):
        path.write_text(text, encoding="utf-8")
        flush(path)


def _digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
