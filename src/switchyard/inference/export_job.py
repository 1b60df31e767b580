"""Exports a checkpoint by the processes of a job: a model whose experts are more than one device holds.

Each process reads its experts and all other weights, whatever layout the checkpoint was written in, and writes the
graphs of its rank, see `inference.sharded`. The comparison with the training graph is made by all of them together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mindspore import nn

from switchyard import files
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.adapters import merged
from switchyard.checkpoint.manifest import read_manifest, read_texts
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config, notes_of_checkpoint
from switchyard.data import Data, load_scored
from switchyard.device import set_context, target_of
from switchyard.distributed.collectives import ProcessMesh
from switchyard.distributed.expert_shard import ExpertShard, keep_shards
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes, init_process_group, is_first, is_scheduler, world_size
from switchyard.errors import UserError
from switchyard.inference import manifest as manifests
from switchyard.inference.export import (
    check_free,
    compared,
    expected_of,
    inference_config,
    key_to_write,
    longest,
    place_of,
    source_of,
    write_compared,
)
from switchyard.inference.parity import Reference
from switchyard.inference.sharded import RankManifest, ShardedManifest, folder_of
from switchyard.models import create_model
from switchyard.models.generation import chooses_tokens
from switchyard.training.companions import kept_texts
from switchyard.training.evaluate_keys import degrees_of_export


def export_in_job(
    path: str | Path,
    out: str | Path,
    overrides: list[str] | tuple[str, ...],
    key_file: str | Path | None = None,
    say: Callable[[str], None] = print,
    trust_code: bool = False,
) -> ShardedManifest | None:
    """Does `export.export` on all processes of a job; arguments and errors as there. All see the folder `out`.

    Returns:
        The manifest of the whole, the same on every process; None in the scheduler, which does no work.
    """
    say = say if is_first() else lambda line: None
    place = checkpoint.resolve(path)
    trained, _, _ = read_texts(read_manifest(place))
    config = degrees_of_export(trained, overrides, world_size(), target_of, trust_code, say)
    for line in notes_of_checkpoint(config, overrides, exports=True):
        say(line)
    key = key_to_write(config, key_file, say)
    out = place_of(out) if is_first() else Path(out).resolve()
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    processes = init_process_group(config)
    if is_scheduler():
        return None
    held = checkpoint.read(place, False, ParallelDims.of(config.parallel), processes.rank)
    say(f"checkpoint: {held.path}, by {processes.size} processes")
    config, weights = merged(config, held.weights)
    data, config = load_scored(config, held.tokenizer_json, overrides), inference_config(config)
    expected = expected_of_job(config, weights, data, processes)
    decoder, shard = sharded_model(config, weights, data.tokenizer.vocab_size, processes)
    with shared_folder(out, processes) as temporary:
        texts = {manifests.TOKENIZER: data.tokenizer.to_json(), **kept_texts(held.state)}
        found = write_rank(config, decoder, shard, temporary, texts, key, expected, held, processes)
        whole = join_ranks(temporary, out, found, processes)
    report(out, whole, say)
    return whole


def expected_of_job(config: Config, weights: dict, data: Data, processes: Processes) -> Reference:
    """Runs the training graph with sharded experts: every process reads all windows, and all get the same logits."""
    length, mesh = longest(config), ProcessMesh(processes)
    model = create_model(config, data.tokenizer.vocab_size, length, drawn=mesh.draws_full, mesh=mesh)
    mesh.place(model)
    checkpoint.load_weights(model, weights)
    return expected_of(config, model, data.validation(), length)


def sharded_model(config: Config, weights: dict, vocab_size: int, processes: Processes) -> tuple[nn.Cell, ExpertShard]:
    """Returns a model that holds this process's experts, and which of them those are.

    Raises:
        UserError: a router or experts by which processes cannot share the experts of generation.
    """
    model = create_model(config, vocab_size, longest(config), drawn=False)
    conditional = [layer.feed_forward for layer in model.layers if layer.conditional]
    if not chooses_tokens(model) or not all(one.eval_dispatcher.has_blocks for one in conditional):
        raise UserError(
            f"moe.router: {config.moe.router}; its experts are not chosen by tokens, or are of another kind, and "
            "processes cannot share them: export by one process"
        )
    keep_shards(model.get_parameters(), processes)
    checkpoint.load_weights(model, weights)
    return model.set_train(False), ExpertShard(config.moe.expert_num, processes)


@contextmanager
def shared_folder(out: Path, processes: Processes) -> Iterator[Path]:
    """Gives all processes one unfinished folder, which the first process makes and removes."""
    if not processes.is_first:
        yield Path(processes.of_first(""))
        return
    with files.unfinished(out) as folder:
        yield Path(processes.of_first(str(folder)))


def write_rank(
    config: Config,
    decoder: nn.Cell,
    shard: ExpertShard,
    temporary: Path,
    texts: dict[str, str],
    key: bytes | None,
    expected: Reference,
    held: Checkpoint,
    processes: Processes,
) -> RankManifest:
    """Writes the folder of this process's rank, and compares; see `export.write_compared`."""
    folder = temporary / folder_of(processes.rank)
    folder.mkdir()
    numbers = {"rank": processes.rank, "ranks": processes.size}
    source = source_of(held.path, held.step)
    more = {"kind": RankManifest, "shard": shard, **numbers}
    found = write_compared(config, decoder, folder, texts, key, expected, source, **more)
    (folder / manifests.MANIFEST).write_text(found.model_dump_json(indent=1), encoding="utf-8")
    files.flush_tree(folder)
    return found


def join_ranks(temporary: Path, out: Path, found: RankManifest, processes: Processes) -> ShardedManifest:
    """Makes one export of what the ranks have written; the first process brings it to its place."""
    processes.barrier()  # all have written
    names = [f"{folder_of(rank)}/{manifests.MANIFEST}" for rank in range(processes.size)]
    fields = {name: getattr(found, name) for name in ("encryption", "model", "parity", "source")}
    listed = {name: manifests.fingerprint(temporary / name) for name in names}
    whole = ShardedManifest(files=listed, ranks=processes.size, **fields).signed()
    processes.barrier()  # all have read
    if processes.is_first:
        check_free(out)
        manifests.publish(temporary, whole, out)
    processes.barrier()
    return whole


def report(out: Path, whole: ShardedManifest, say: Callable[[str], None]) -> None:
    """Says what was written and how it compared."""
    say(compared(whole.parity))
    say(f"export: '{out}', the parts of {whole.ranks} ranks; a launch script runs them: --infer {out}")
