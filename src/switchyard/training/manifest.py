"""The manifest of a checkpoint: its files with their sha256, and where in which tensor every slice belongs.

Version 1 is a checkpoint of one device, whose two tensor files hold whole tensors. Version 2 is one of several:

    degrees     how the run was cut: data_parallel, expert_parallel, ...
    tensors     {weights | optimizer: {name: {dtype, shape}}}, shapes of whole tensors
    files       {file: {sha256, bytes}}, those with tensors also {slices: {name: {offsets, shape}}}
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.files import writing
from switchyard.parallel.placement import Degrees
from switchyard.training.tensors import Entry

FORMAT, WHOLE_VERSION, CUT_VERSION = "switchyard checkpoint", 1, 2
MANIFEST, CONFIG, TOKENIZER, STATE = "manifest.json", "config.yaml", "tokenizer.json", "state.json"
KINDS = ("weights", "optimizer")
TEXTS = (CONFIG, TOKENIZER, STATE)
FOLDER = "checkpoints"
NAME = re.compile(r"step-(\d{8,})")


class DamagedError(UserError):
    """A checkpoint with a file that is missing, cut or altered."""


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
    write_text(manifest.path / MANIFEST, json.dumps(content, indent=1))


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of a checkpoint's directory (DamagedError; UserError: of another version)."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
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
    except FileNotFoundError:
        raise DamagedError(damage(path, f"{MANIFEST} is missing")) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(damage(path, f"{MANIFEST} is cut or altered")) from None


def _tensors(content: dict) -> dict[str, dict[str, Entry]]:
    return {
        kind: {name: Entry(fields["dtype"], tuple(fields["shape"])) for name, fields in content[kind].items()}
        for kind in KINDS
    }


def verify(manifest: Manifest, name: str) -> None:
    """Refuses a file that is not the one that was written (DamagedError); holds a block of it at a time."""
    path, expected = manifest.path, manifest.files[name]
    try:
        found = fingerprint(path / name)
    except FileNotFoundError:
        raise DamagedError(damage(path, f"{name} is missing")) from None
    if found["bytes"] != expected["bytes"]:
        what = f"{name} has {found['bytes']} bytes instead of {expected['bytes']}: it was cut"
        raise DamagedError(damage(path, what))
    if found["sha256"] != expected["sha256"]:
        raise DamagedError(damage(path, f"{name} was altered: its sha256 is not the one of {MANIFEST}"))


def read_texts(manifest: Manifest) -> tuple[Config, str, dict[str, Any]]:
    """(configuration, tokenizer, state), see training.checkpoint.Checkpoint (DamagedError)."""
    for name in TEXTS:
        verify(manifest, name)
    state = json.loads((manifest.path / STATE).read_text(encoding="utf-8"))
    tokenizer = (manifest.path / TOKENIZER).read_text(encoding="utf-8")
    return configuration.load(manifest.path / CONFIG), tokenizer, state


def damage(path: Path, what: str) -> str:
    """One line about a damaged checkpoint, with the way out."""
    place = path.resolve()
    before = [other for other in listed(place.parent.parent) if other.name < place.name]
    remedy = (
        f"use the previous checkpoint '{path.with_name(before[-1].name)}'"
        if before
        else "there is none before it: train again"
    )
    return f"checkpoint '{path}': {what}; {remedy}"


def fingerprint(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of a file."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def write_text(path: Path, text: str) -> None:
    """Writes a small file and has it on the disk (UserError)."""
    with writing(path):
        path.write_text(text, encoding="utf-8")
        flush(path)


def flush(path: Path) -> None:
    """Asks the system to have a file or directory on the disk before it goes on."""
    with writing(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
