"""Writes a run folder that training starts from: a configuration, a tokenizer and one checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np

from switchyard import files
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config
from switchyard.data import Tokenizer
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.training.companions import ORIGIN, TEXTS_KEY, kept_texts
from switchyard.training.frozen import freeze
from switchyard.training.initial import first_state
from switchyard.training.loss_scale import LossScale


def check_new(out: Path) -> None:
    """Refuses a place where something stands (UserError)."""
    files.require_text(out, "--out")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: '{out}' already exists; remove it or give another folder")


def write_run(
    out: Path,
    config: Config,
    tokenizer_json: str,
    weights: dict[str, np.ndarray],
    optimizer: dict[str, np.ndarray],
    state: dict[str, Any],
) -> None:
    """Writes a run folder with one checkpoint, which appears in full or not at all.

    Args:
        out: the folder; see `check_new`.
        config: of one device.
        tokenizer_json, weights, optimizer, state: see checkpoint.store.Checkpoint.

    Raises:
        UserError: a number that is not finite, or a full disk.
    """
    place = out.absolute()
    with files.unfinished(place) as folder:
        checkpoint.save(folder, config, tokenizer_json, weights, optimizer, state)
        checkpoint.write_atomically(folder / checkpoint.CONFIG, config.to_yaml())
        checkpoint.write_atomically(folder / checkpoint.TOKENIZER, tokenizer_json)
        files.flush_tree(folder)
        files.replace(folder, place)


def fresh_optimizer(weights: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """Returns the state of an optimizer before its first step, by name.

    Args:
        weights: those that are trained.
        config: model.compute_dtype and train.init_loss_scale are read.
    """
    moments = {
        f"{moment}.{name}": np.zeros_like(value) for moment in ("moment1", "moment2") for name, value in weights.items()
    }
    corrections = {name: np.zeros((), np.float32) for name in ("correction1", "correction2")}
    return moments | corrections | LossScale(config).state()


def new_weights(config: Config, held: Checkpoint) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the weights that a new model of a configuration begins with, and the names of those that are trained."""
    model = create_model(config, Tokenizer.from_json(held.tokenizer_json, "of the checkpoint").vocab_size)
    freeze(model, config)
    weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    return weights, [parameter.name for parameter in model.trainable_params()]


def new_state(held: Checkpoint, config: Config) -> dict[str, Any]:
    """Returns the state of a run at step 0 whose model was made of another model; the chat template is kept."""
    state = first_state(held)
    state.pop(ORIGIN, None)  # the files of another model
    texts = kept_texts(held.state)
    place = {"data_index": 0, "data_epoch": 0, "data_window": 0, "tokens": 0, "train_seed": config.train.seed}
    return state | place | ({TEXTS_KEY: texts} if texts else {})
