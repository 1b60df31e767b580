"""Saves and reads checkpoints: directories that appear in full or not at all, and are verified before they are read.

RUN/checkpoints/step-00000100/
    manifest.json           format version, step, sha256 and size of every other file
    config.yaml             the resolved configuration
    tokenizer.json          the tokenizer
    weights.safetensors     the model
    optimizer.safetensors   moments, loss scale, counters
    state.json              step, position in the data, their fingerprint, seed, noise rule, best validation loss
RUN/checkpoints/best.json   names the checkpoint of the lowest validation loss

A run on N devices has weights-RANK-of-N.safetensors and optimizer-RANK-of-N.safetensors instead, one of each for every
rank that holds shards which no rank before it holds; the manifest says where each shard belongs (checkpoint.manifest).
Whoever reads, whatever its own layout, gets the parts that it needs:

    python -m switchyard.checkpoint convert RUN --to '{data_parallel: 8, expert_parallel: 4}' --out DIR

A checkpoint is written into a temporary directory beside its place, every file is flushed to the disk, and the
directory is renamed: the moment of the rename is the moment the checkpoint exists. Nothing is ever unpickled.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from switchyard import cli
from switchyard.checkpoint.finite import REMEDY, first_not_finite
from switchyard.checkpoint.health import Healthy
from switchyard.checkpoint.keep import kept_for_good
from switchyard.checkpoint.layout import shard_of
from switchyard.checkpoint.manifest import (
    CONFIG,
    FOLDER,
    KINDS,
    MANIFEST,
    NAME,
    STATE,
    TOKENIZER,
    DamagedError,
    file_of,
    listed,
    read_manifest,
    read_texts,
)
from switchyard.checkpoint.reader import Tensors
from switchyard.checkpoint.writer import (
    absent,
    assemble,
    from_arrays,
    publish,
    set_aside,
    write_atomically,
    write_shards,
)
from switchyard.config import Config
from switchyard.config.reader import parse_json
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import SINGLE, Processes
from switchyard.errors import UserError
from switchyard.file_errors import FileError
from switchyard.files import TEMPORARY, read_regular, remove
from switchyard.json_text import to_json

if TYPE_CHECKING:  # resharding needs no MindSpore
    from mindspore import Parameter

__all__ = ["CONFIG", "MANIFEST", "STATE", "TOKENIZER", "DamagedError", "listed", "write_atomically"]

FILES = (CONFIG, TOKENIZER, *map(file_of, KINDS), STATE)
BEST = "best.json"
LONGEST_BEST = 1 << 16  # bytes of it
ELSEWHERE = "another rank could not write its part, so there is no such checkpoint; see its log"


@dataclass(frozen=True)
class Checkpoint:
    """Holds the content of one checkpoint.

    Attributes:
        path: the directory.
        config: the configuration that it was trained with.
        tokenizer_json: see `Tokenizer.from_json`.
        weights: name -> float array.
        optimizer: name -> array, {} where it was not asked for.
        state: step, data_index (micro-batches read), data_epoch and data_window (where the next one begins, see
            data.batches.Course), corpus (see data.fingerprint), tokens (predictions made), train_seed, noise_rule,
            best_loss, seconds.
    """

    path: Path
    config: Config
    tokenizer_json: str
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Returns the number of optimizer steps taken."""
        return self.state["step"]


def name_of(step: int) -> str:
    """Returns the directory name of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Returns the step of a checkpoint directory, the inverse of `name_of`."""
    return int(NAME.fullmatch(path.name)[1])


def resolve(path: str | Path) -> Path:
    """Returns the checkpoint at `path`: the newest of a run folder, or the checkpoint directory itself (UserError)."""
    path = Path(path)
    if NAME.fullmatch(path.name) and os.path.lexists(path):  # whatever it is: who reads it says so
        return path
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"checkpoint '{path}': {what}; give a run folder such as runs/NAME, or one checkpoint in it")
    if NAME.fullmatch(Path(os.path.realpath(path)).name) or (path / MANIFEST).exists():
        return path
    found = listed(path)
    if not found:
        raise UserError(
            f"checkpoint '{path}': contains no checkpoint; train first, or give a run folder such as runs/NAME"
        )
    return found[-1]


def best(run: str | Path) -> tuple[Path, float] | None:
    """Returns the checkpoint of the lowest validation loss, and that loss; None where no evaluation was made."""
    folder = Path(run) / FOLDER
    try:
        entry = parse_json(read_regular(folder / BEST, LONGEST_BEST))
        name, loss = entry["checkpoint"], float(entry["loss"])
        known = NAME.fullmatch(name) and math.isfinite(loss) and (folder / name).is_dir()
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return (folder / name, loss) if known else None


def save(
    run: str | Path,
    config: Config,
    tokenizer_json: str,
    weights: dict[str, np.ndarray],
    optimizer: dict[str, np.ndarray],
    state: dict[str, Any],
    healthy: Healthy | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    processes: Processes = SINGLE,
) -> Path:
    """Writes a checkpoint of `state["step"]`, then drops those that the rules of `train.keep_...` no longer keep.

    Args:
        run: the run folder.
        config, tokenizer_json, state: see Checkpoint.
        weights, optimizer: name -> full tensor; of several processes, this one's shard.
        healthy: knows which checkpoints of the run are good; None reads them.
        shapes: see `save_shard`.
        processes: all of them call this; each writes its own shards, and the first makes them a checkpoint.

    Returns:
        The directory. If the process dies before this returns, either it is there in full or not at all.

    Raises:
        UserError: a tensor, of any process, holds a number that is not finite, or a file could not be written. All
            processes raise it, and there is no checkpoint of the step.
    """
    healthy, step = healthy or Healthy(), state["step"]
    name = first_not_finite({**weights, **optimizer})
    if processes.any_rank(name is not None):
        raise not_finite(run, step, name or "a shard of another rank", healthy)
    agree(processes, error_of(begin, run, step) if processes.is_first else None, step)
    degrees = ParallelDims.of(config.parallel) if processes.size > 1 else ParallelDims()
    try:
        fault = error_of(save_shard, run, config, step, processes.rank, weights, optimizer, shapes, degrees)
        agree(processes, fault, step)
        if processes.is_first:
            fault = error_of(finish, run, config, tokenizer_json, state, healthy=healthy, degrees=degrees)
        agree(processes, fault, step)
    except BaseException:
        if processes.is_first:
            clear(run, step)
        raise
    place = Path(run) / FOLDER / name_of(step)
    healthy.note(place)
    return place


def not_finite(run: str | Path, step: int, name: str, healthy: Healthy) -> UserError:
    """Returns the error that a checkpoint is not written, because tensor `name` holds a number that is not finite."""
    return UserError(
        f"checkpoint of step {step}: '{name}' holds numbers that are not finite, so it was not written; "
        f"{healthy.kept(run)}; {REMEDY}"
    )


def error_of(work: Callable, *arguments, **options) -> Exception | None:
    """Calls a function and returns its error, which all ranks must know of before one of them raises it."""
    try:
        work(*arguments, **options)
    except Exception as error:
        return error
    return None


def agree(processes: Processes, error: Exception | None, step: int) -> None:
    """Raises on all ranks where one of them has an error: its own, or FileError that another rank could not write."""
    if processes.any_rank(error is not None):
        raise error or FileError(f"checkpoint of step {step}: {ELSEWHERE}", passing=True)


def clear(run: str | Path, step: int) -> None:
    """Removes what was written of a checkpoint that failed: it would be in the way on a full disk."""
    remove(_temporary(run, step))


def absent_shards(run: str | Path, step: int, degrees: ParallelDims) -> list[int]:
    """Returns the ranks that have not written their shards of a step yet; all of them after a `clear`."""
    return absent(_temporary(run, step), degrees)


def begin(run: str | Path, step: int) -> None:
    """Makes the place in which the ranks of a run save `step`, and clears what a killed save has left.

    One rank calls it; the others wait for that before they call `save_shard`.
    """
    folder = _temporary(run, step)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f"{TEMPORARY}*"):
        remove(stale)
    folder.mkdir()


def save_shard(
    run: str | Path,
    config: Config,
    step: int,
    rank: int,
    weights: dict[str, np.ndarray],
    optimizer: dict[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    degrees: ParallelDims | None = None,
) -> None:
    """Writes a rank's shards of a checkpoint; what another rank holds too is written by the first of them only.

    Args:
        run: the run folder, which all ranks see; see `begin`.
        config: its section `parallel` says how the run is sharded.
        step: optimizer steps taken.
        rank: of this process.
        weights, optimizer: name -> the rank's shard of a tensor, or the full tensor; their numbers are finite.
        shapes: name of a parameter -> full shape, for shards that do not tell it: those of ZeRO, and full tensors
            where the rank holds a shard.
        degrees: in the place of those of `config`.

    Raises:
        UserError: an array that is neither the shard of this rank nor the full tensor.
    """
    degrees, layers = degrees or ParallelDims.of(config.parallel), config.model.num_layers
    entries, read = {}, {}
    for kind, arrays in zip(KINDS, (weights, optimizer)):
        entries[kind], read[kind] = from_arrays(arrays, degrees, rank, layers, shapes)
    write_shards(_temporary(run, step), degrees, layers, rank, entries, read)


def finish(
    run: str | Path,
    config: Config,
    tokenizer_json: str,
    state: dict[str, Any],
    wait: float | None = None,
    healthy: Healthy | None = None,
    degrees: ParallelDims | None = None,
) -> Path:
    """Makes a checkpoint of what the ranks have saved, then drops those that are no longer kept. One rank calls it.

    Args:
        run, config, tokenizer_json, state, healthy: as of `save`.
        wait: seconds within which the shards of all ranks must have come; None = train.checkpoint_wait_seconds.
        degrees: in the place of those of `config`.

    Returns:
        The directory.

    Raises:
        UserError: a shard is missing, doubled or foreign; names it. There is no checkpoint then.
    """
    healthy, folder = healthy or Healthy(), _temporary(run, state["step"])
    place = folder.with_name(name_of(state["step"]))
    wait = config.train.checkpoint_wait_seconds if wait is None else wait
    assemble(folder, config, tokenizer_json, state, degrees or ParallelDims.of(config.parallel), wait)
    publish(folder, place)
    healthy.note(place)
    _drop_old(run, config, healthy)
    return place


def _temporary(run: str | Path, step: int) -> Path:
    return Path(run) / FOLDER / f"{TEMPORARY}{name_of(step)}"


def mark_best(run: str | Path, step: int, loss: float) -> None:
    """Names the checkpoint of `step`, which exists, as the best: it is kept until another is named."""
    write_atomically(Path(run) / FOLDER / BEST, to_json({"checkpoint": name_of(step), "loss": loss}))


def read(
    path: str | Path, with_optimizer: bool = True, degrees: ParallelDims | None = None, rank: int = 0
) -> Checkpoint:
    """Reads what a rank needs of one checkpoint, whatever layout it was written in, and verifies every file it reads.

    Args:
        path: see `resolve`.
        with_optimizer: False leaves the optimizer's files, two thirds of the bytes, alone.
        degrees: how the reader is sharded; None is one device, which needs full tensors.
        rank: of the reader.

    Raises:
        DamagedError: a file is missing, truncated, altered or unreadable, a shard missing, doubled or foreign, or a
            number not finite; names the good checkpoint before it.
        UserError: no checkpoint, one of another format, or degrees that do not divide a tensor.
    """
    path, degrees = resolve(path), degrees or ParallelDims()
    manifest = read_manifest(path)
    config, tokenizer_json, state = read_texts(manifest)
    arrays: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in KINDS}
    for kind in KINDS if with_optimizer else KINDS[:1]:
        tensors = Tensors(manifest, kind)
        for name, entry in tensors.entries.items():
            box = shard_of(name, entry.shape, degrees, rank, config.model.num_layers)
            if box is not None:
                arrays[kind][name] = tensors.read_finite(name, box)
    return Checkpoint(path, config, tokenizer_json, *arrays.values(), state)


def load_weights(model, weights: dict[str, np.ndarray]) -> None:
    """Sets the parameters of a model, strictly by name and shape (UserError)."""
    set_parameters({parameter.name: parameter for parameter in model.get_parameters()}, weights, "weight")


def set_parameters(parameters: "dict[str, Parameter]", arrays: dict[str, np.ndarray], what: str) -> None:
    """Writes arrays into parameters of the same names, shapes and types.

    Raises:
        UserError: a name is missing or unknown, or a shape or type differs.
    """
    from mindspore import Tensor

    check_arrays({name: tuple(parameter.shape) for name, parameter in parameters.items()}, arrays, what)
    for name, parameter in parameters.items():
        # a shard stays known as one, or the next graph that is compiled would shard it again
        parameter.set_data(Tensor(arrays[name], parameter.dtype), slice_shape=bool(parameter.sliced))


def check_arrays(shapes: Mapping[str, tuple[int, ...]], arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Checks that arrays of a checkpoint have exactly these names and shapes.

    Raises:
        UserError: a name is missing or unknown, or a shape differs.
    """
    for name in sorted(shapes.keys() ^ arrays.keys()):
        problem = "missing in the checkpoint" if name in shapes else "unknown to this configuration"
        raise UserError(f"{what} '{name}': {problem}; use the configuration of the checkpoint")
    for name, shape in shapes.items():
        found = tuple(arrays[name].shape)
        if found != shape:
            raise UserError(
                f"{what} '{name}': shape {found} in the checkpoint, {shape} by this configuration; use the "
                "configuration of the checkpoint"
            )


def _drop_old(run: str | Path, config: Config, healthy: Healthy) -> None:
    """Removes checkpoints older than the newest train.keep_checkpoints good ones, but for the best and those that are
    kept for good; a damaged one does not count."""
    train, paths, good = config.train, listed(run), 0
    if len(paths) <= train.keep_checkpoints:
        return
    kept, best_of_all = kept_for_good(paths, train.keep_every_steps, train.keep_every_hours), best(run)
    if best_of_all is not None:
        kept.add(best_of_all[0])
    for path in reversed(paths):
        if good < train.keep_checkpoints:
            good += healthy.is_good(path)
        elif path not in kept:
            remove(set_aside(path))


def main(arguments: list[str]) -> None:
    """Runs `python -m switchyard.checkpoint`; see its --help."""
    parser = cli.Parser("python -m switchyard.checkpoint", description="Works on checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("convert", help="reshard a checkpoint for other degrees of parallelism")
    command.add_argument("checkpoint", metavar="RUN", help="a run folder, or one checkpoint in it")
    command.add_argument(
        "--to", required=True, metavar="YAML", help="degrees: '{data_parallel: 8, expert_parallel: 4}'; '{}' = 1 device"
    )
    command.add_argument("--out", required=True, metavar="DIR", help="the new checkpoint; must not exist")
    command = commands.add_parser("merge", help="merge the low-rank adapters of train.lora into the weights")
    command.add_argument("checkpoint", metavar="RUN", help="a run folder, or one checkpoint in it")
    command.add_argument("--out", required=True, metavar="DIR", help="the new checkpoint; must not exist")
    chosen = parser.parse_args(arguments)
    out = Path(chosen.out)
    if chosen.command == "merge":
        from switchyard.checkpoint.adapters import merge

        with cli.cleans_up():
            merge(resolve(chosen.checkpoint), out)
        print(f"checkpoint: '{out}' without adapters, for eval.py, export.py and train.py --init", flush=True)
        return
    from tqdm import tqdm

    from switchyard.checkpoint.reshard import convert

    show = {"unit": "B", "unit_scale": True, "desc": "writing", "disable": None, "leave": False}  # None: on a terminal
    with cli.cleans_up(), tqdm(**show) as bar:
        old, new = convert(resolve(chosen.checkpoint), chosen.to, out, bar)
    print(f"checkpoint: '{out}' for {ParallelDims.of(new.parallel).devices} device(s)", flush=True)
    if new.moe_layers and new.groups != old.groups:
        print(
            f"routing groups: {new.groups} from now on instead of {old.groups}; each group has its own capacity",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
