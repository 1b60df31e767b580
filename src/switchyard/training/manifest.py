"""The manifest of a checkpoint: its files with their sha256, and where in which tensor every slice belongs.

Version 1 is a checkpoint of one device, whose two tensor files hold whole tensors. Version 2 is one of several:

    degrees     how the run was cut: data_parallel, expert_parallel, ...
    tensors     {weights | optimizer: {name: {dtype, shape}}}, shapes of whole tensors
    files       {file: {sha256, bytes}}, those with tensors also {slices: {name: {offsets, shape}}}
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.json_text import to_json
from switchyard.parallel.placement import Degrees
from switchyard.training.tensors import Entry

FORMAT, WHOLE_VERSION, CUT_VERSION = "switchyard checkpoint", 1, 2
MANIFEST, CONFIG, TOKENIZER, STATE = "manifest.json", "config.yaml", "tokenizer.json", "state.json"
KINDS = ("weights", "optimizer")
TEXTS = (CONFIG, TOKENIZER, STATE)
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8,})")


class DamagedError(UserError):
    """A checkpoint with a file that is missing, cut, altered or unreadable, or with a number that is not finite.

    Its line ends with the newest good checkpoint before it, which is looked for when the line is printed.

    Attributes:
        path: of the checkpoint.
        what: is wrong with it.
    """

    def __init__(self, path: Path, what: str):
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        from switchyard.training.health import Healthy  # which reads checkpoints by what this module offers

        named = NAME.fullmatch(self.path.name)
        place = Path(os.path.abspath(self.path) if named else os.path.realpath(self.path))
        good = Healthy().newest(place.parent.parent, below=place.name)
        remedy = "there is none before it that is good: train again"
        if good is not None:
            good = self.path.with_name(good.name) if named else good
            remedy = f"use the previous checkpoint '{good}', which is good"
        return f"checkpoint '{self.path}': {self.what}; {remedy}"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's manifest says.

    Attributes:
        path: the directory.
        step: optimizer steps taken.
        files: see above.
        degrees: how the run was cut.
        tensors: kind -> name -> type and shape of the whole tensor; None where the files hold whole tensors.
    """

    path: Path
    step: int
    files: dict[str, dict[str, Any]]
    degrees: Degrees
    tensors: dict[str, dict[str, Entry]] | None


def file_of(kind: str, rank: int = 0, devices: int = 1) -> str:
    """The name of the file with a rank's slices."""
    return f"{kind}.safetensors" if devices == 1 else f"{kind}-{rank:05d}-of-{devices:05d}.safetensors"


def listed(run: str | Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; damaged ones too."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def write_manifest(manifest: Manifest) -> None:
    """Writes MANIFEST into the directory and has it on the disk."""
    content: dict[str, Any] = {"format": FORMAT, "version": WHOLE_VERSION, "step": manifest.step}
    if manifest.tensors is not None:
        tensors = {
            kind: {name: {"dtype": entry.dtype, "shape": list(entry.shape)} for name, entry in sorted(entries.items())}
            for kind, entries in manifest.tensors.items()
        }
        content |= {"version": CUT_VERSION, "degrees": asdict(manifest.degrees), "tensors": tensors}
    content["files"] = manifest.files
    content["sha256"] = _digest_of(content)
    (manifest.path / MANIFEST).write_text(to_json(content, indent=1), encoding="utf-8")
    flush(manifest.path / MANIFEST)


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a checkpoint's directory (DamagedError; UserError: of another version)."""
    with readable(path, MANIFEST):
        if not path.is_dir():
            raise DamagedError(path, "is no folder")
        size_of_file(path / MANIFEST)
        text = (path / MANIFEST).read_bytes()
    try:
        content = json.loads(text)
        version, digest = content["version"], content.pop("sha256")
        if version not in (WHOLE_VERSION, CUT_VERSION):
            raise UserError(
                f"checkpoint '{path}': format version {version}; this version of Switchyard reads {WHOLE_VERSION} and "
                f"{CUT_VERSION}"
            )
        if digest != _digest_of(content):
            raise ValueError
        files, degrees, tensors = content["files"], Degrees(), None
        if version == CUT_VERSION:
            degrees, tensors = Degrees(**content["degrees"]), _tensors(content["tensors"])
        if not set(TEXTS) <= set(files) or (tensors is None and len(files) != len(TEXTS) + len(KINDS)):
            raise ValueError
        return Manifest(path, content["step"], files, degrees, tensors)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(path, f"{MANIFEST} is cut or altered") from None


@contextlib.contextmanager
def readable(path: Path, name: str) -> Iterator[None]:
    """Turns what the system says about a file `name` of the checkpoint `path` into a DamagedError."""
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(path, f"{name} is missing") from None
    except OSError as error:
        raise DamagedError(path, f"{name} cannot be read ({error.strerror or error})") from None


def size_of_file(path: Path) -> int:
    """Returns the bytes of a file (OSError: a directory, a pipe, a device, which nobody reads)."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is no plain file")
    return found.st_size


def _tensors(content: dict) -> dict[str, dict[str, Entry]]:
    return {
        kind: {name: Entry(fields["dtype"], tuple(fields["shape"])) for name, fields in content[kind].items()}
        for kind in KINDS
    }


def verify(manifest: Manifest, name: str) -> None:
    """Refuses a file that is not the one that was written (DamagedError); holds a block of it at a time."""
    path, expected = manifest.path, manifest.files[name]
    with readable(path, name):
        size = size_of_file(path / name)
        if size != expected["bytes"]:
            raise DamagedError(path, f"{name} has {size} bytes instead of {expected['bytes']}: it was cut")
        found = fingerprint(path / name)
    if found["sha256"] != expected["sha256"]:
        raise DamagedError(path, f"{name} was altered: its sha256 is not the one of {MANIFEST}")


def read_texts(manifest: Manifest) -> tuple[Config, str, dict[str, Any]]:
    """(configuration, tokenizer, state), see training.checkpoint.Checkpoint (DamagedError)."""
    for name in TEXTS:
        verify(manifest, name)
    with readable(manifest.path, STATE):
        state = json.loads((manifest.path / STATE).read_text(encoding="utf-8"))
    with readable(manifest.path, TOKENIZER):
        tokenizer = (manifest.path / TOKENIZER).read_text(encoding="utf-8")
    return configuration.load(manifest.path / CONFIG, inherited=True), tokenizer, state


def fingerprint(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def flush(path: Path) -> None:
    """Asks the system to have a file or directory on the disk before it goes on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
