"""An export of several ranks: each rank has the graphs of the experts that it holds, and runs them with the others.

DIR/
    manifest.json     how many ranks, origin, comparison; size and sha256 of every rank's manifest
    rank_0/           what `inference.manifest` describes, for rank 0: its graphs hold its experts and all other weights
    rank_1/           the same for rank 1

The ranks run together, started by a launch script: all read the same tokens, and each conditional layer ends with a
sum over the ranks. A rank reads the manifest of the whole and its own folder, so a node needs no more.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from switchyard import config as configuration
from switchyard.config.reader import parse_json
from switchyard.distributed.processes import Processes, init_process_group, is_scheduler, own_rank, world_size
from switchyard.errors import UserError
from switchyard.files import present, read_regular
from switchyard.inference import manifest as manifests
from switchyard.inference.generate import Generated
from switchyard.inference.manifest import LONGEST, MANIFEST, Count, Figures, Manifest, Parity, Signed, Source
from switchyard.inference.mindir import ExportedModel, exported_model, open_model

FORMAT = "switchyard sharded export"


class RankManifest(Manifest):
    """Describes manifest.json of one rank; model.parameters counts those that the rank holds."""

    format: Literal["switchyard export of one rank"] = "switchyard export of one rank"
    rank: int
    ranks: Count


class ShardedManifest(Signed):
    """Describes manifest.json of the whole; `files` are the manifests of the ranks."""

    format: Literal["switchyard sharded export"] = FORMAT
    version: Literal[1] = 1
    ranks: Count
    model: Figures
    parity: Parity
    source: Source


def folder_of(rank: int) -> str:
    """Returns the name of the folder of a rank."""
    return f"rank_{rank}"


def is_sharded(directory: str | Path) -> bool:
    """Returns whether a directory holds an export of several ranks."""
    try:
        tree = parse_json(read_regular(present(Path(directory)) / MANIFEST, LONGEST, Path(directory)))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def open_export(
    directory: str | Path, key_file: str | Path | None = None, say=print
) -> tuple[ExportedModel, Processes] | None:
    """Opens an export of one process, or a rank's part of an export of several by one process of a job.

    Arguments and errors as of `mindir.open_model`.

    Returns:
        What runs the graphs, and the processes; None in the scheduler of a job.

    Raises:
        UserError: as `open_model`, and where the export is of another number of ranks.
    """
    if world_size() > 1:
        return _open_rank(present(Path(directory)), key_file, say)
    if is_sharded(directory):
        ranks = manifests.read(directory, ShardedManifest).ranks
        raise UserError(
            f"--model: '{directory}' is the export of {ranks} ranks; start {ranks} processes by a launch script: "
            f"--infer {directory} --devices {ranks}"
        )
    return open_model(directory, key_file, say), Processes()


def _open_rank(directory: Path, key_file: str | Path | None, say) -> tuple[ExportedModel, Processes] | None:
    """Does what `open_export` does in a process of a job."""
    whole = manifests.read(directory, ShardedManifest)
    if whole.ranks != world_size():
        raise UserError(
            f"--model: '{directory}' is the export of {whole.ranks} ranks, {world_size()} processes run: start "
            f"{whole.ranks}, or export the checkpoint again"
        )
    key = manifests.key_of(directory, whole.encryption, key_file, say)
    folder, manifest = verified(directory, whole, own_rank())
    from switchyard.device import set_context

    degrees = [f"parallel.data_parallel={whole.ranks}", f"parallel.expert_parallel={whole.ranks}"]
    config = configuration.build({"moe": {"expert_num": whole.ranks}}, degrees)
    set_context(config.context, compute_dtype=manifest.model.compute_dtype, say=say)
    processes = init_process_group(config)
    return None if is_scheduler() else (exported_model(folder, manifest, key), processes)


def verified(directory: Path, whole: ShardedManifest, rank: int) -> tuple[Path, RankManifest]:
    """Verifies the files of one rank; returns its folder and its manifest (UserError)."""
    name = f"{folder_of(rank)}/{MANIFEST}"
    if name not in whole.files:
        raise UserError(f"--model: '{directory / MANIFEST}' lists no {name}; export the checkpoint again")
    manifests.verify(directory, whole.model_copy(update={"files": {name: whole.files[name]}}))
    folder = directory / folder_of(rank)
    manifest = manifests.read(folder, RankManifest)
    if (manifest.rank, manifest.ranks) != (rank, whole.ranks):
        raise UserError(f"--model: '{folder}' is rank {manifest.rank} of {manifest.ranks}; export the checkpoint again")
    manifests.verify(folder, manifest)
    return folder, manifest


def require_alike(found: list[Generated], processes: Processes) -> None:
    """Refuses answers that differ between the ranks, which must be equal (UserError)."""
    if processes.size == 1:
        return
    texts = "\0".join(one.text for one in found).encode()
    digests = processes.gather(np.frombuffer(manifests.digest_of(texts), np.uint8))  # [ranks, 32]
    if not (digests == digests[0]).all():
        raise UserError("infer: the ranks have drawn different texts; report it with the export and the prompt")
