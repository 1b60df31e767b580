"""Trains a dense student by the outputs of a mixture of experts (Switch Transformer, arXiv 2101.03961, section 4.2).

`python -m switchyard.interop.distill --teacher RUN --student CONFIG` makes a run whose weights outside the experts are
those of the teacher, and trains it with train.distill; `train.py --resume` goes on with it like any other run.
"""

import sys
from pathlib import Path

import numpy as np

from switchyard import cli, streams
from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.adapters import merged
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config
from switchyard.errors import UserError, shortened
from switchyard.interop.new_run import fresh_optimizer, new_state, new_weights, write_run
from switchyard.training.initial import with_tokenizer

MOST_NAMES = 6  # of parameters, in a line


def with_teacher(config: Config, teacher: str, soft_weight: float, temperature: float) -> Config:
    """Returns the configuration of a student with its teacher (UserError: a weight or a temperature out of range)."""
    asked = {"teacher": teacher, "soft_weight": soft_weight, "temperature": temperature}
    tree = config.model_dump()
    return configuration.build(tree | {"train": tree["train"] | {"distill": asked}}, inherited=True)


def make_student(held: Checkpoint, config: Config, run: Path) -> tuple[Config, list[str]]:
    """Writes the run folder of a student, which has the weights of the teacher that fit it by name and shape.

    Args:
        held: a checkpoint of the teacher.
        config: of the student.
        run: the folder to make.

    Returns:
        The configuration that was written, and the names of the parameters that begin anew.

    Raises:
        UserError: the run exists, or the student is no decoder.
    """
    if run.exists():
        remedy = "choose another name, or continue with train.py --resume"
        raise UserError(f"train.name: {config.train.name}; the run '{run}' already exists; {remedy}")
    if held.config.model.type != "decoder" or config.model.type != "decoder":
        raise UserError(f"model.type: {config.model.type}; teacher and student must be decoders")
    config = with_tokenizer(config, held, run)
    new, trained = new_weights(config, held)
    _, known = merged(held.config, held.weights)
    fits = {name for name, value in new.items() if name in known and known[name].shape == value.shape}
    weights: dict[str, np.ndarray] = {name: known[name] if name in fits else value for name, value in new.items()}
    optimizer = fresh_optimizer({name: weights[name] for name in trained}, config)
    write_run(run, config, held.tokenizer_json, weights, optimizer, new_state(held, config))
    return config, [name for name in weights if name not in fits]


def main(arguments: list[str]) -> None:
    """Runs `python -m switchyard.interop.distill`; see its --help."""
    parser = cli.create_parser(
        "python -m switchyard.interop.distill", "Trains a dense student by the outputs of a mixture of experts."
    )
    parser.add_argument("--teacher", required=True, metavar="RUN", help="a run folder, or one checkpoint in it")
    parser.add_argument("--student", required=True, metavar="CONFIG", help="the configuration of the student")
    parser.add_argument(
        "--soft-weight",
        type=cli.finite,
        default=0.25,
        metavar="W",
        help="weight of the teacher's probabilities; the next token has 1 - W (default 0.25)",
    )
    parser.add_argument("--temperature", type=cli.finite, default=1.0, metavar="T", help="of the soft loss (default 1)")
    chosen = parser.parse_intermixed_args(arguments)
    streams.survive()
    from switchyard.device import prepare_environment

    prepare_environment()
    config = configuration.load(chosen.student, chosen.overrides)
    place = checkpoint.resolve(chosen.teacher)
    config = with_teacher(config, str(place), chosen.soft_weight, chosen.temperature)
    from switchyard.training.loop import train

    held = checkpoint.read(place, with_optimizer=False)
    config, new = make_student(held, config, Path(config.train.output_dir) / config.train.name)
    some = ", ".join(new[:MOST_NAMES]) + (f" and {len(new) - MOST_NAMES} more" if len(new) > MOST_NAMES else "")
    print(f"distill: teacher '{held.path}'; begins anew: {shortened(some, 400) if new else 'nothing'}", flush=True)
    train(config, resume=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
