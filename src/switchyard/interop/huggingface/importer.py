"""Imports a folder of Hugging Face as a run folder: config.yaml, tokenizer.json and one checkpoint of step 0.

train.py, eval.py and export.py read the folder like that of a run; the checkpoint has no state of an optimizer.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchyard.checkpoint.manifest import CONFIG, FOLDER, TOKENIZER, write_text
from switchyard.checkpoint.store import name_of
from switchyard.checkpoint.tensors import Box
from switchyard.checkpoint.writer import assemble, write_shards
from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError, shortened
from switchyard.file_errors import check_room, writing
from switchyard.files import replace, unfinished
from switchyard.interop.huggingface.families import family_of
from switchyard.interop.huggingface.family import Family
from switchyard.interop.huggingface.folder import Folder
from switchyard.interop.huggingface.origin import KEY, origin_of
from switchyard.interop.huggingface.pieces import Importing, bytes_of
from switchyard.interop.huggingface.rules import Parameter
from switchyard.interop.huggingface.settings import Keys
from switchyard.interop.huggingface.tokenizer_files import tokenizer_of

FIRST = {"step": 0, "seconds": 0.0, "tokens": 0, "data_index": 0, "data_epoch": 0, "data_window": 0}  # of a state
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Model:
    """Holds a model of Hugging Face as it will be imported, all checked and nothing written.

    Args:
        path: the folder.
        name: train.name of the configuration.
        tokenizer: a tokenizer.json in the place of the folder's.

    Attributes:
        folder: see Folder.
        family: of the model.
        config: of ours.
        parameters: of ours.
        tokenizer_json: of the checkpoint; None where the folder has none.
        lines: what the user is told.

    Raises:
        UserError: what cannot be imported, by name.
    """

    def __init__(self, path: str | Path, name: str = "imported", tokenizer: str | Path | None = None):
        self.folder = Folder(path)
        tree = self.folder.config
        if tree.get("quantization_config") is not None:
            raise UserError("config.json: quantization_config; quantised checkpoints are not read: take the original")
        self.family: Family = family_of(tree.get("model_type"))
        self.config, self.lines = self.family.read(tree, name)
        vocab_size = Keys(tree, {}).need("vocab_size", int)
        self.folder.open_tensors()
        self.parameters: list[Parameter] = list(self.family.parameters(self.config, vocab_size))
        self._check_tensors()
        self.tokenizer_json = tokenizer_of(self.folder, vocab_size, tokenizer)
        if self.tokenizer_json is not None:
            self.config, self.tokenizer_json = self.family.with_tokenizer(self.config, self.tokenizer_json)

    def _check_tensors(self) -> None:
        """Refuses tensors that are missing, unexpected, of another shape or type (UserError)."""
        expected = {source.name: source.shape for parameter in self.parameters for source in parameter.sources}
        copies = {name: one.sources[0].shape for one in self.parameters for name in one.copies}
        expected |= {name: shape for name, shape in copies.items() if name in self.folder.tensors}
        for name, shape in expected.items():
            if name not in self.folder.tensors:
                raise UserError(f"--model: tensor '{name}' is missing; {self.family.model_type} needs it: {shape}")
            found = self.folder.tensors[name][1].shape
            if found != shape:
                raise UserError(f"--model: tensor '{name}': shape {found}; config.json makes it {shape}")
            self.folder.dtype(name)
        for name in sorted(self.folder.tensors.keys() - expected.keys()):
            reason = self.family.left_out(name, self.folder.config)
            if reason is None:
                raise UserError(f"--model: unexpected tensor '{shortened(name)}': {self.family.model_type} has none")
            self.lines.append(f"'{name}' {reason}: left out")


def import_model(
    path: str | Path,
    out: str | Path,
    tokenizer: str | Path | None = None,
    say: Callable[[str], None] = print,
    bar: Any = None,
) -> Config:
    """Writes a folder of Hugging Face as a run folder.

    Memory: the largest tensor of the model in its type, and pieces of 1 MiB.

    Args:
        path: the folder.
        out: the run folder to make, which appears in full or not at all.
        tokenizer: a tokenizer.json in the place of the folder's.
        say: receives lines about what is done.
        bar: a tqdm bar, which counts the bytes written.

    Returns:
        The configuration of the run.

    Raises:
        UserError: `out` exists, or what cannot be imported, by name. Nothing is written then.

    Examples:
        >>> from switchyard.interop.huggingface.importer import import_model
        >>> config = import_model("models/mixtral", "runs/mixtral")  # doctest: +SKIP
        >>> config.moe.expert_num  # doctest: +SKIP
        8
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: '{out}' already exists; remove it or give another folder")
    name = out.absolute().name
    model = Model(path, name if NAME.fullmatch(name) else "imported", tokenizer)
    if model.tokenizer_json is None:
        raise UserError(
            f"--model: '{model.folder.path}': tokenizer.json is missing; save a fast tokenizer there, or name a file "
            "with --tokenizer"
        )
    for line in model.lines:
        say(line)
    say(f"model: {model.family.model_type}, {sum(math.prod(one.shape) for one in model.parameters):,} parameters")
    config = _placed(model.config, out)
    with writing(out), unfinished(out.absolute()) as folder:
        _write(folder, model, config, bar)
        replace(folder, out.absolute())
    return config


def _write(folder: Path, model: Model, config: Config, bar: Any) -> None:
    """Writes a run folder with one checkpoint: the weights, and an optimizer that has not begun."""

    def nothing(name: str, box: Box):
        raise KeyError(name)

    importing, checkpoint = Importing(model.folder, model.parameters), folder / FOLDER / name_of(0)
    if bar is not None:
        bar.reset(bytes_of(importing.entries))
    check_room(folder / CONFIG, bytes_of(importing.entries))
    checkpoint.mkdir(parents=True)
    entries, read = {"weights": importing.entries, "optimizer": {}}, {"weights": importing.read, "optimizer": nothing}
    advance = (lambda count: None) if bar is None else bar.update
    write_shards(checkpoint, ParallelDims(), config.model.num_layers, 0, entries, read, advance)
    state = FIRST | {KEY: origin_of(model.folder, model.family)}
    assemble(checkpoint, config, model.tokenizer_json, state, ParallelDims(), wait=0)
    write_text(folder / CONFIG, config.to_yaml())
    write_text(folder / TOKENIZER, model.tokenizer_json)


def _placed(config: Config, out: Path) -> Config:
    """Returns the configuration with the run folder and the tokenizer that will stand at `out`."""
    train = config.train.model_copy(update={"output_dir": str(out.parent)})
    data = config.data.model_copy(update={"tokenizer": str(out / TOKENIZER)})
    return config.model_copy(update={"train": train, "data": data})
