"""Reshards a checkpoint for other degrees, piece by piece: `python -m switchyard.checkpoint convert`."""

from pathlib import Path

from switchyard import config as configuration
from switchyard.checkpoint.layout import keep_groups
from switchyard.checkpoint.manifest import KINDS, read_manifest, read_texts
from switchyard.checkpoint.reader import Tensors
from switchyard.checkpoint.writer import assemble, publish, write_shards
from switchyard.config import Config
from switchyard.config.reader import UnreadableError, parse_yaml
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError, represented
from switchyard.files import unfinished


def convert(path: Path, to: str, out: Path, bar=None) -> tuple[Config, Config]:
    """Writes the checkpoint `path`, of whatever layout, as one of other degrees; values are copied bit for bit.

    Memory: a few pieces of 1 MiB and the names of all shards, whatever the size of the tensors.

    Args:
        path: the checkpoint's directory.
        to: the new section `parallel` as YAML, such as '{data_parallel: 8, expert_parallel: 4}'; '{}' is one device.
        out: the new directory, which appears in full or not at all.
        bar: a tqdm bar, which counts the bytes written.

    Returns:
        The configurations before and after.

    Raises:
        DamagedError: a file is missing, truncated or altered; a shard is missing, doubled or foreign; a number is not
            finite.
        UserError: `out` exists; degrees that do not fit each other or the model.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: '{out}' already exists; remove it or give another folder")
    manifest = read_manifest(path)
    old, tokenizer_json, state = read_texts(manifest)
    new = keep_groups(old, configuration.build(old.model_dump() | {"parallel": _section(to)}, inherited=True))
    degrees, layers = ParallelDims.of(new.parallel), new.model.num_layers
    sources = {kind: Tensors(manifest, kind) for kind in KINDS}
    entries = {kind: source.entries for kind, source in sources.items()}
    if bar is not None:
        bar.reset(sum(entry.bytes for part in entries.values() for entry in part.values()))
    advance = (lambda count: None) if bar is None else bar.update
    with unfinished(out.absolute()) as folder:
        read = {kind: source.read_finite for kind, source in sources.items()}
        for rank in range(degrees.devices):
            write_shards(folder, degrees, layers, rank, entries, read, advance)
        assemble(folder, new, tokenizer_json, state, degrees, wait=0)
        publish(folder, out.absolute())
    return old, new


def _section(text: str) -> dict:
    """Returns the section `parallel` that --to gives (UserError)."""
    try:
        section, reason = parse_yaml(text), "no section of keys"
    except UnreadableError as error:
        section, reason = None, error.reason
    if not isinstance(section, dict):
        example = "'{data_parallel: 8, expert_parallel: 4}'"
        raise UserError(f"--to: {represented(text)}; give degrees as YAML, such as {example} ({reason})")
    return section
