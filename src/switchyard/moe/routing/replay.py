"""Choices of experts as a file: what one run chose, another can be made to choose.

A record is one safetensors file, whose metadata hold a manifest under the key "switchyard":

    experts [R, A, M, N, K] int16   the choices of R steps (or batches of an evaluation), A micro-batches, M conditional
                                    layers, N tokens, K experts; -1 is unset; E, no expert, for a padded token
    steps   [R] int64               which steps they are of, from 0 (or which batches)
    tokens  [R] int64               CRC-32 of each step's token ids

    manifest: format_version, sha256 of the arrays, the run (name and folder), and what the choices are of (see
              `subject`)

A record of version 1 has its manifest in a second file, of the same name with `.json` behind; it can be read.

While they are replayed (`moe.replay`), gates are computed anew from the live probabilities of the replayed experts, so
their gradient flows and none is zero because the live router would not have chosen it. Steps that the record does not
hold, and tokens with an unset entry, are the router's own.
"""

import contextlib
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
from switchyard.file_errors import writing

FORMAT_VERSION, TWO_FILES_VERSION = 2, 1
KEY = "switchyard"  # of the manifest in a file's metadata
UNSET = -1
FREE = ("compute_dtype", "dropout", "init_method_std", "norm_eps")  # keys of the model that a replay may change


def subject(config: Config, kind: str) -> dict[str, Any]:
    """Returns what choices belong to: of a "training" or an "evaluation", of which layers, experts, batches and model.

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
    """Returns where the manifest of a record of version 1 stands."""
    return Path(f"{path}.json")


def checksum(tokens: np.ndarray) -> int:
    """Returns the CRC-32 of token ids."""
    return zlib.crc32(np.ascontiguousarray(tokens, np.int32).tobytes())


def run_of(config: Config) -> dict[str, str]:
    """Returns which run a record belongs to."""
    folder = Path(config.train.output_dir) / config.train.name
    return {"name": config.train.name, "folder": str(folder.absolute())}


class Recorder:
    """Collects choices, and writes them whole each time it is asked to.

    Args:
        path: the record; its folder must exist.
        config: of the run.
        kind: "training" or "evaluation".
        start: a run that is resumed after so many steps keeps those of the file that came before.
        resume: whether the run goes on, be it from its beginning: it takes up what it has recorded itself.

    Raises:
        UserError: the folder does not exist, a new run would overwrite a file, or a resumed one goes on in a file that
            is damaged or another's.
    """

    def __init__(self, path: str, config: Config, kind: str, start: int = 0, resume: bool = False):
        self.path, self.subject, self.run = Path(path), subject(config, kind), run_of(config)
        self.rows: dict[int, tuple[int, np.ndarray]] = {}
        if not self.path.parent.is_dir():
            raise UserError(f"moe.record: {path}; the folder '{self.path.parent}' does not exist: make it")
        if not self.path.exists():
            return
        if not (start or resume):
            raise UserError(f"moe.record: {path}; the file exists: choose another name, or remove it")
        held, manifest = read_whole(path, self.subject, "moe.record")
        self._check_own(manifest, start)
        for step, tokens, experts in zip(held["steps"], held["tokens"], held["experts"]):
            if step < start:
                self.rows[int(step)] = (int(tokens), experts)

    def _check_own(self, manifest: dict[str, Any], start: int) -> None:
        """Refuses the record of another run (UserError); a run whose folder was moved is the same."""
        run = manifest.get("run")
        run = run if isinstance(run, dict) and run.keys() == self.run.keys() else None
        if run is None and start:  # of version 1, which does not say
            return
        moved = run is not None and run["name"] == self.run["name"] and not Path(run["folder"]).exists()
        if run != self.run and not moved:
            whose = f"run '{run['folder']}'" if run else "a run that it does not name"
            raise UserError(f"moe.record: {self.path}; was recorded by {whose}: choose another name, or remove it")

    def add(self, step: int, tokens: np.ndarray, experts: np.ndarray) -> None:
        """Keeps the choices [A, M, N, K] of a step, made for tokens [A, B, S]; A may be missing where it is 1."""
        self.rows[step] = (checksum(tokens), experts.astype(np.int16).reshape(-1, *experts.shape[-3:]))

    def save(self) -> None:
        """Writes the file, whole or not at all (UserError: it cannot be written)."""
        if not self.rows:
            return
        steps = sorted(self.rows)
        tokens, experts = zip(*(self.rows[step] for step in steps))
        arrays = {
            "experts": np.stack(experts),
            "steps": np.array(steps, np.int64),
            "tokens": np.array(tokens, np.int64),
        }
        manifest = {"format_version": FORMAT_VERSION, "sha256": digest(arrays), "run": self.run, **self.subject}
        _write(self.path, save(arrays, {KEY: json.dumps(manifest)}))
        manifest_of(self.path).unlink(missing_ok=True)  # of version 1, which this file replaces


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
        """Returns the choices of a step whose tokens are [A, B, S]: [A, M, N, K] int32, UNSET where there are none.

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


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Returns the sha256 of arrays by name, with types and shapes."""
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def read(path: str | Path, wanted: dict[str, Any], key: str) -> dict[str, np.ndarray]:
    """Returns the arrays of a record that is whole and of the wanted subject (UserError, which names `key`)."""
    return read_whole(path, wanted, key)[0]


def read_whole(path: str | Path, wanted: dict[str, Any], key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns (arrays, manifest) of a record, see `read`."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path}; '{path}': {error.strerror}; record it with moe.record") from None
    try:
        arrays, manifest = load(data), _manifest_in(data)
    except (SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"{key}: {path}; damaged, or no safetensors file: {error}; record it anew") from None
    version = FORMAT_VERSION
    if manifest is None:
        version, manifest = TWO_FILES_VERSION, _manifest_beside(path, key)
    if not isinstance(manifest, dict) or manifest.get("format_version") != version:
        raise UserError(f"{key}: {path}; has another format than {FORMAT_VERSION}; record it anew")
    found = digest(arrays) if version == FORMAT_VERSION else hashlib.sha256(data).hexdigest()
    if found != manifest.get("sha256"):
        raise UserError(f"{key}: {path}; damaged: its sha256 is not that of the manifest; record it anew")
    for name, value in wanted.items():
        if manifest.get(name) != value:
            raise UserError(f"{key}: {path}; recorded with {name} {manifest.get(name)}, this run has {value}")
    return arrays, manifest


def _manifest_in(data: bytes) -> Any:
    """Returns the manifest in the metadata of a safetensors file, None where it has none (ValueError: no JSON)."""
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(KEY)
    return None if text is None else json.loads(text)


def _manifest_beside(path: str | Path, key: str) -> Any:
    """Returns the manifest of a record of version 1 (UserError)."""
    try:
        return json.loads(manifest_of(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{key}: {path}; holds no manifest: no record of Switchyard; record it with moe.record"
        ) from None
    except ValueError:
        raise UserError(f"{key}: {path}; '{manifest_of(path)}' is no manifest; record it anew") from None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
