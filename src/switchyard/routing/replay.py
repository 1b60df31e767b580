"""Choices of experts as a file: what one run chose, another can be made to choose.

A record is a safetensors file and, beside it, a manifest of the same name with `.json` behind:

    experts [R, A, M, N, K] int16   the choices of R steps (or batches of an evaluation), A micro-batches, M conditional
                                    layers, N tokens, K experts; -1 is unset; E, no expert, for a padded token
    steps   [R] int64               which steps they are of, from 0 (or which batches)
    tokens  [R] int64               CRC-32 of each step's token ids

    manifest: format_version, file, sha256, bytes, and what the choices are of (see `subject`)

While they are replayed (`moe.replay`), gates are computed anew from the live probabilities of the replayed experts, so
their gradient flows and none is zero because the live router would not have chosen it. Steps that the record does not
hold, and tokens with an unset entry, are the router's own.
"""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from switchyard.config import Config
from switchyard.errors import UserError

FORMAT_VERSION = 1
UNSET = -1
FREE = ("compute_dtype", "dropout", "init_method_std", "norm_eps")  # keys of the model that a replay may change


def subject(config: Config, kind: str) -> dict[str, Any]:
    """What choices belong to: of a "training" or an "evaluation", of which layers, experts, batches and model.

    `model` is a fingerprint of the section `model` without the keys in FREE. Router, weights, device and precision may
    differ: they are what a replay compares.
    """
    model = {key: value for key, value in config.model.model_dump().items() if key not in FREE}
    return {
        "kind": kind,
        "layers": list(config.moe_layers),
        "experts": config.moe.expert_num,
        "choices": config.moe.choices,
        "micro_batches": config.train.gradient_accumulation_steps if kind == "training" else 1,
        "batch": [config.data.batch_size, config.model.seq_length],
        "model": hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16],
    }


def manifest_of(path: str | Path) -> Path:
    """Where the manifest of a record stands."""
    return Path(f"{path}.json")


def checksum(tokens: np.ndarray) -> int:
    """CRC-32 of token ids."""
    return zlib.crc32(np.ascontiguousarray(tokens, np.int32).tobytes())


class Recorder:
    """Collects choices, and writes them whole each time it is asked to.

    Args:
        path: the record; its folder must exist.
        config: of the run.
        kind: "training" or "evaluation".
        start: a run that is resumed after so many steps keeps those of the file that came before.

    Raises:
        UserError: the folder does not exist, a new run would overwrite a file, or a resumed one goes on in a file that
            is damaged or another's.
    """

    def __init__(self, path: str, config: Config, kind: str, start: int = 0):
        self.path, self.subject = Path(path), subject(config, kind)
        self.rows: dict[int, tuple[int, np.ndarray]] = {}
        if not self.path.parent.is_dir():
            raise UserError(f"moe.record: {path}; the folder '{self.path.parent}' does not exist: make it")
        if not self.path.exists():
            return
        if not start:
            raise UserError(f"moe.record: {path}; the file exists: choose another name, or remove it")
        held = read(path, self.subject, "moe.record")
        for step, tokens, experts in zip(held["steps"], held["tokens"], held["experts"]):
            if step < start:
                self.rows[int(step)] = (int(tokens), experts)

    def add(self, step: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        """The choices [A, M, N, K] of a step, made for tokens [A, B, S]; A may be missing where it is 1."""
        self.rows[step] = (checksum(tokens), experts.astype(np.int16).reshape(-1, *experts.shape[-3:]))

    def save(self) -> None:
        """Writes file and manifest, each whole or not at all."""
        if not self.rows:
            return
        steps = sorted(self.rows)
        tokens, experts = zip(*(self.rows[step] for step in steps))
        arrays = {
            "experts": np.stack(experts),
            "steps": np.array(steps, np.int64),
            "tokens": np.array(tokens, np.int64),
        }
        data = save(arrays)
        manifest = {"format_version": FORMAT_VERSION, "file": self.path.name, "bytes": len(data)}
        manifest |= {"sha256": hashlib.sha256(data).hexdigest(), **self.subject}
        _write(self.path, data)
        _write(manifest_of(self.path), json.dumps(manifest, indent=1).encode())


class Replayer:
    """Hands out recorded choices.

    Args:
        path: the record.
        config: of the run that is to choose so.
        kind: "training" or "evaluation".

    Raises:
        UserError: the file is missing, damaged, or of another model, batch shape or kind.
    """

    def __init__(self, path: str, config: Config, kind: str):
        self.path = path
        held = read(path, subject(config, kind), "moe.replay")
        self.experts, self.tokens = held["experts"], held["tokens"]
        self.places = {int(step): place for place, step in enumerate(held["steps"])}

    def at(self, step: int, tokens: np.ndarray) -> np.ndarray:
        """The choices of a step whose tokens are [A, B, S]: [A, M, N, K] int32, UNSET where the record has none.

        Raises:
            UserError: the recorded step read other tokens.
        """
        place = self.places.get(step)
        if place is None:
            return np.full(self.experts.shape[1:], UNSET, np.int32)
        if self.tokens[place] != checksum(tokens):
            raise UserError(
                f"moe.replay: {self.path}; step {step} was recorded on other tokens: keep data and train.seed"
            )
        return self.experts[place].astype(np.int32)


def read(path: str | Path, wanted: dict[str, Any], key: str) -> dict[str, np.ndarray]:
    """The arrays of a record that is whole and of the wanted subject (UserError, which names `key`)."""
    try:
        data, manifest = Path(path).read_bytes(), json.loads(manifest_of(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{key}: {path}; '{error.filename}': {error.strerror}; record it with moe.record") from None
    except ValueError:
        raise UserError(f"{key}: {path}; '{manifest_of(path)}' is no manifest; record it anew") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{key}: {path}; '{manifest_of(path)}' has another format than {FORMAT_VERSION}; record it anew"
        )
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise UserError(f"{key}: {path}; damaged: its sha256 is not that of the manifest; record it anew")
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise UserError(f"{key}: {path}; recorded with {name} {manifest.get(name)}, this run has {value}")
    try:
        return load(data)
    except SafetensorError as error:
        raise UserError(f"{key}: {path}; no safetensors file: {error}") from None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)
