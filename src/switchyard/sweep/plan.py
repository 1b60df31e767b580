"""Says which runs a sweep has: the combinations of the values, their names, and which of them are finished."""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError, represented, shortened
from switchyard.training.limits import check_mesh
from switchyard.training.resume import RESULT

SEED = "train.seed"
SET_BY_SWEEP = ("train.name", "train.output_dir")
MOST_RUNS = 1000
LONGEST_NAME = 100
# keys that do not change what a run measures: a finished run stays finished where they differ
PRACTICAL = {
    "train": {
        *("name", "output_dir", "steps", "log_every", "loggers", "eval_every", "eval_batches", "checkpoint_every"),
        *("keep_checkpoints", "save_best", "replica_check_every", "sample_every"),
    },
    "context": {"device_target", "device_id", "mode", "launch_blocking"},
    "export": {"max_length", "key_file"},
}


@dataclass(frozen=True)
class Axis:
    """Holds a key of the configuration and the values that it takes.

    Attributes:
        key: section.key, as in an override.
        values: each as text, as in an override.
    """

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """Describes one run of a sweep.

    Attributes:
        name: the run folder is OUT/name.
        values: key -> value of each axis, as text.
        config: the whole configuration.
        overrides: what `train` gets besides --config.
    """

    name: str
    values: dict[str, str]
    config: Config
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Returns the run folder."""
        return Path(self.config.train.output_dir) / self.name


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Reads `section.key=VALUE,VALUE,...` of --over.

    Raises:
        UserError: no key, no value, a key or a value that stands twice, or a key that the sweep sets.

    Examples:
        >>> parse_axes(["moe.expert_num=2,8", "moe.layers=[0, 1],[1]"])[1].values
        ('[0, 1]', '[1]')
    """
    axes = [_axis(text) for text in texts]
    for axis in axes:
        if [one.key for one in axes].count(axis.key) > 1:
            raise UserError(f"--over: {shortened(axis.key)}; given twice: write all values after one '='")
    return axes


def _axis(text: str) -> Axis:
    key, equals, values = text.partition("=")
    key, values = key.strip(), tuple(split(values))
    if not (equals and "." in key and all(values)):
        raise UserError(f"--over: {represented(text)}; write section.key=VALUE,VALUE such as moe.expert_num=2,8")
    if key in SET_BY_SWEEP:
        raise UserError(f"--over: {key}; the sweep names its runs itself: use --out DIR for their folder")
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise UserError(f"--over: {key}; the value {represented(twice)} stands twice")
    return Axis(key, values)


def split(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets and quotes, and strips each part.

    Examples:
        >>> split("2, [0,1],{name: gshard, second_expert: sampling}, 'a,b'")
        ['2', '[0,1]', '{name: gshard, second_expert: sampling}', "'a,b'"]
    """
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "[{(") - (sign in "]})")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def plan(path: str | Path, axes: Sequence[Axis], overrides: Sequence[str], out: str | None) -> list[Run]:
    """Returns the runs of a sweep, the values of the last axis fastest.

    Args:
        path: the configuration, or the name of one that comes with the package.
        axes: the keys that vary.
        overrides: `section.key=value` that all runs share.
        out: the folder of the run folders; None = train.output_dir/NAME-sweep.

    Raises:
        UserError: a combination that `train` refuses, or too many; nothing has started then.
    """
    for override in overrides:
        if (key := override.partition("=")[0].strip()) in SET_BY_SWEEP:
            raise UserError(f"{key}: the sweep names its runs itself; use --out DIR for their folder")
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MOST_RUNS:
        raise UserError(f"--over: {count:,} combinations; at most {MOST_RUNS:,}")
    if out is None:
        train = configuration.load(path, overrides).train
        out = str(Path(train.output_dir) / f"{train.name}-sweep")
    combinations = itertools.product(*(axis.values for axis in axes))
    runs = [
        _run(path, {axis.key: value for axis, value in zip(axes, one)}, axes, overrides, out) for one in combinations
    ]
    if len({run.name for run in runs}) < len(runs):
        raise UserError("--over: two combinations have one name; leave one of the values out")
    return runs


def _run(path: str | Path, values: dict[str, str], axes: Sequence[Axis], overrides: Sequence[str], out: str) -> Run:
    """Returns one run (UserError: its configuration is refused)."""
    name = name_of(values, axes)
    chosen = [f"{key}={value}" for key, value in values.items()]
    given = (*overrides, *chosen, f"train.name={name}", f"train.output_dir={out}")
    try:
        config = configuration.load(path, given, devices=1)
        check_mesh(config, 1, "CPU")
    except UserError as error:
        raise UserError(f"--over: {' '.join(chosen)}: {error}") from None
    return Run(name, values, config, given)


def name_of(values: dict[str, str], axes: Sequence[Axis]) -> str:
    """Returns the name of a run: key-value of the axes with more than one value, such as expert_num-8_seed-1.

    A key that ends as another does keeps its section. What a folder's name cannot hold becomes "-", with a checksum
    behind where that may hide a difference.
    """
    varied = [axis.key for axis in axes if len(axis.values) > 1] or list(values)
    ends = [key.rpartition(".")[2] for key in varied]
    parts = []
    for key, end in zip(varied, ends):
        word = end if ends.count(end) == 1 else key
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", values[key]).strip("-.")
        if plain != values[key] or not plain:
            plain = f"{plain[:24]}-{_checksum(values[key])}".lstrip("-")
        parts.append(f"{word}-{plain}")
    name = "_".join(parts).replace("+", "")
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_checksum(name)}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def result_of(run: Run) -> dict | None:
    """Returns result.json of a finished run; None where the run has steps to make."""
    try:
        result = json.loads((run.folder / RESULT).read_text(encoding="utf-8"))
        steps = result["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if steps == run.config.train.steps else None


def check_same(run: Run) -> None:
    """Refuses a run folder that another configuration has made (UserError)."""
    path = run.folder / "config.yaml"
    if not path.is_file():
        return
    before, now = configuration.load(path, inherited=True).model_dump(), run.config.model_dump()
    for section, keys in now.items():
        for key, value in keys.items():
            old = before[section].get(key)
            if key not in PRACTICAL.get(section, ()) and old != value:
                raise UserError(
                    f"--out: '{run.folder.parent}'; its run {run.name} was trained with {section}.{key}="
                    f"{shortened(old)}, this sweep has {shortened(value)}; choose another --out"
                )
