"""Checkpoints: directories that appear whole or not at all, and are verified before they are read.

RUN/checkpoints/step-00000100/
    manifest.json           format version, step, sha256 and size of every other file
    config.yaml             the resolved configuration
    tokenizer.json          the tokenizer
    weights.safetensors     the model
    optimizer.safetensors   moments, loss scale, counters
    state.json              step, position in the data, seed, noise rule, best validation loss
RUN/checkpoints/best.json   names the checkpoint of the lowest validation loss

A checkpoint is written into a temporary directory beside its place, every file is flushed to the disk, and the
directory is renamed: the moment of the rename is the moment the checkpoint exists. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save_file

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError

FORMAT_VERSION = 1
MANIFEST, CONFIG, TOKENIZER, STATE = "manifest.json", "config.yaml", "tokenizer.json", "state.json"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
FILES = (CONFIG, TOKENIZER, WEIGHTS, OPTIMIZER, STATE)
FOLDER, BEST = "checkpoints", "best.json"
NAME = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"


class DamagedError(UserError):
    """A checkpoint with a file that is missing, cut or altered."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds.

    Attributes:
        path: the directory.
        config: the configuration that it was trained with.
        tokenizer_json: see `Tokenizer.from_json`.
        weights: name -> float array.
        optimizer: name -> array, {} where it was not asked for.
        state: step, data_index (micro-batches read), train_seed, noise_rule, best_loss, seconds.
    """

    path: Path
    config: Config
    tokenizer_json: str
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were taken."""
        return self.state["step"]


def name_of(step: int) -> str:
    """The directory name of a step."""
    return f"step-{step:08d}"


def listed(run: str | Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; damaged ones too."""
    folder = Path(run) / FOLDER
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: a run folder's newest, or the checkpoint directory itself (UserError)."""
    path = Path(path)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"checkpoint '{path}': {what}; give a run folder such as runs/NAME, or one checkpoint in it")
    if NAME.fullmatch(path.resolve().name) or (path / MANIFEST).exists():
        return path
    found = listed(path)
    if not found:
        raise UserError(f"checkpoint '{path}': holds none; train first, or give a run folder such as runs/NAME")
    return found[-1]


def best(run: str | Path) -> tuple[Path, float] | None:
    """The checkpoint of the lowest validation loss, and that loss; None where no evaluation was made."""
    folder = Path(run) / FOLDER
    try:
        entry = json.loads((folder / BEST).read_text(encoding="utf-8"))
        path, loss = folder / entry["checkpoint"], float(entry["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (path, loss) if NAME.fullmatch(path.name) and path.is_dir() else None


def save(
    run: str | Path,
    config: Config,
    tokenizer_json: str,
    weights: dict[str, np.ndarray],
    optimizer: dict[str, np.ndarray],
    state: dict[str, Any],
) -> Path:
    """Writes a checkpoint of `state["step"]`, then drops those that `train.keep_checkpoints` no longer keeps.

    Args:
        run: the run folder; one process writes it.
        config, tokenizer_json, weights, optimizer, state: see Checkpoint.

    Returns:
        The directory. If the process dies before this returns, either it is there whole or not at all.
    """
    folder = Path(run) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{TEMPORARY}*"):
        _remove(stale)
    place = folder / name_of(state["step"])
    temporary = folder / f"{TEMPORARY}{place.name}-{os.getpid()}"
    temporary.mkdir()
    (temporary / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    (temporary / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
    save_file(weights, temporary / WEIGHTS)
    save_file(optimizer, temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = {name: _fingerprint(temporary / name) for name in FILES}
    manifest = {"format": "switchyard checkpoint", "version": FORMAT_VERSION, "step": state["step"], "files": files}
    manifest["sha256"] = _digest_of(manifest)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (*FILES, MANIFEST):
        _flush(temporary / name)
    _flush(temporary)
    aside = _set_aside(place) if place.exists() else None  # a damaged one that a resumed run has reached again
    os.replace(temporary, place)
    _flush(folder)
    if aside is not None:
        _remove(aside)
    _drop_old(run, config.train.keep_checkpoints)
    return place


def mark_best(run: str | Path, step: int, loss: float) -> None:
    """Names the checkpoint of `step`, which exists, as the best: it is kept until another is named."""
    text = json.dumps({"checkpoint": name_of(step), "loss": loss})
    write_whole(Path(run) / FOLDER / BEST, text)


def read(path: str | Path, with_optimizer: bool = True) -> Checkpoint:
    """Reads one checkpoint and verifies every file that it reads.

    Args:
        path: see `resolve`.
        with_optimizer: False leaves the optimizer's file, two thirds of the bytes, alone.

    Raises:
        DamagedError: a file is missing, cut or altered; names the checkpoint before it.
        UserError: no checkpoint, or one of another format.
    """
    path = resolve(path)
    files = _read_manifest(path)
    contents = {}
    for name in FILES:
        if name == OPTIMIZER and not with_optimizer:
            continue
        contents[name] = _verified(path, name, files[name])
    try:
        weights = load_arrays(contents[WEIGHTS])
        optimizer = load_arrays(contents[OPTIMIZER]) if with_optimizer else {}
    except SafetensorError as error:
        raise DamagedError(_damage(path, f"not safetensors ({error})")) from None
    state = json.loads(contents[STATE])
    config = configuration.load(path / CONFIG)
    return Checkpoint(path, config, contents[TOKENIZER].decode(), weights, optimizer, state)


def load_weights(model, weights: dict[str, np.ndarray]) -> None:
    """Sets the parameters of a model, strictly by name and shape (UserError)."""
    set_parameters({parameter.name: parameter for parameter in model.get_parameters()}, weights, "weight")


def set_parameters(parameters: dict[str, Parameter], arrays: dict[str, np.ndarray], what: str) -> None:
    """Writes arrays into parameters of the same names, shapes and types.

    Raises:
        UserError: a name is missing or unknown, or a shape or type differs.
    """
    for name in sorted(parameters.keys() ^ arrays.keys()):
        problem = "missing in the checkpoint" if name in parameters else "unknown to this configuration"
        raise UserError(f"{what} '{name}': {problem}; use the configuration of the checkpoint")
    for name, parameter in parameters.items():
        array = arrays[name]
        if tuple(array.shape) != tuple(parameter.shape):
            raise UserError(
                f"{what} '{name}': shape {tuple(array.shape)} in the checkpoint, {tuple(parameter.shape)} by this "
                "configuration; use the configuration of the checkpoint"
            )
    for name, parameter in parameters.items():
        parameter.set_data(Tensor(arrays[name], parameter.dtype))


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole, new or old, whenever the process dies."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _read_manifest(path: Path) -> dict[str, dict]:
    """name -> {sha256, bytes} of a checkpoint's files (UserError)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, digest = manifest["version"], manifest.pop("sha256")
        if version != FORMAT_VERSION:
            raise UserError(
                f"checkpoint '{path}': format version {version}; this version of Switchyard reads {FORMAT_VERSION}"
            )
        if digest != _digest_of(manifest) or set(manifest["files"]) != set(FILES):
            raise ValueError
        return manifest["files"]
    except FileNotFoundError:
        raise DamagedError(_damage(path, f"{MANIFEST} is missing")) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedError(_damage(path, f"{MANIFEST} is cut or altered")) from None


def _verified(path: Path, name: str, expected: dict) -> bytes:
    """The bytes of one file, if they are those that were written (UserError)."""
    try:
        content = (path / name).read_bytes()
    except FileNotFoundError:
        raise DamagedError(_damage(path, f"{name} is missing")) from None
    if len(content) != expected["bytes"]:
        raise DamagedError(_damage(path, f"{name} has {len(content)} bytes instead of {expected['bytes']}: it was cut"))
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise DamagedError(_damage(path, f"{name} was altered: its sha256 is not the one of {MANIFEST}"))
    return content


def _damage(path: Path, what: str) -> str:
    """One line about a damaged checkpoint, with the way out."""
    place = path.resolve()
    before = [other for other in listed(place.parent.parent) if other.name < place.name]
    remedy = (
        f"use the previous checkpoint '{path.with_name(before[-1].name)}'"
        if before
        else "there is none before it: train again"
    )
    return f"checkpoint '{path}': {what}; {remedy}"


def _drop_old(run: str | Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints and the best."""
    kept_best = best(run)
    for path in listed(run)[:-keep]:
        if kept_best is None or path != kept_best[0]:
            _remove(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Renames a checkpoint so that it is one no more; removing its files is then not seen half done."""
    aside = path.with_name(f"{TEMPORARY}old-{path.name}")
    if aside.exists():
        _remove(aside)
    os.replace(path, aside)
    return aside


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _digest_of(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Asks the system to have a file or directory on the disk before it goes on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
