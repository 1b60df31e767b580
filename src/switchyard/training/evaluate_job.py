"""Evaluates a checkpoint by the processes of a job: a model that is larger than one device, with degrees.

Each process reads the shards of the weights that its degrees give it, whatever layout the checkpoint was written in.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from mindspore import Tensor, nn

from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.manifest import read_manifest, read_texts
from switchyard.config import Config
from switchyard.data import load_scored
from switchyard.device import set_context, target_of
from switchyard.distributed.mesh import LocalMesh
from switchyard.distributed.meshes import create_mesh
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import init_process_group, is_first, is_scheduler, own_rank, world_size
from switchyard.models import create_model
from switchyard.nn.initializers import shapes_only
from switchyard.training.evaluate import Evaluation, Evaluator, create_evaluator
from switchyard.training.evaluate_keys import degrees_of_job
from switchyard.training.finite import check_evaluation


def evaluate_in_job(
    path: str | Path,
    overrides: list[str] | tuple[str, ...],
    say: Callable[[str], None] = print,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    trust_code: bool = False,
) -> Evaluation | None:
    """Does `evaluate.evaluate` on all processes of a job; arguments and errors as there.

    Returns:
        The figures of the whole set, the same on every process; None in the scheduler, which does no work.
    """
    say = say if is_first() else lambda line: None
    place = checkpoint.resolve(path)
    trained, tokenizer_json, _ = read_texts(read_manifest(place))
    config, compiled = degrees_of_job(trained, overrides, world_size(), target_of, trust_code, say)
    for line in configuration.notes_of_checkpoint(config, overrides):
        say(line)
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    processes = init_process_group(config)
    if is_scheduler():
        return None
    loaded = checkpoint.read(place, False, ParallelDims.of(config.parallel), own_rank())
    data = load_scored(config, tokenizer_json, overrides)
    say(f"checkpoint: {place}, on {processes.size} devices")
    say(f"data: {data.description}")
    mesh = create_mesh(config, processes, compiled)
    tokens_per_byte = data.validation_tokens / data.validation_bytes
    model, evaluator = create_sharded(config, data.tokenizer.vocab_size, mesh, tokens_per_byte)
    checkpoint.load_weights(model, loaded.weights)
    batches = data.validation()
    found = evaluator(batches, lambda done: on_batch(done, len(batches)))
    check_evaluation(found.to_dict(), f"'{place}'", "evaluate an earlier checkpoint, or use float32")
    return found


def create_sharded(
    config: Config, vocab_size: int, mesh: LocalMesh, tokens_per_byte: float = 1.0
) -> tuple[nn.Cell, Evaluator]:
    """Returns a model of which this device holds its shards, without weights, and what evaluates it."""
    own = mesh.config(config)
    with shapes_only() if mesh.draws_late else nullcontext():
        model = create_model(own, vocab_size, drawn=mesh.draws_full, mesh=mesh)
        mesh.place(model)
        evaluator = create_evaluator(model, own, tokens_per_byte, mesh=mesh)
    model.set_train(False)
    mesh.compile(evaluator.program, lambda: sample_inputs(config))
    return model, evaluator


def sample_inputs(config: Config) -> tuple[Tensor, ...]:
    """Returns inputs to compile the program of evaluation by: this device's part of a batch, of zeros."""
    size = (config.data.batch_size // config.parallel.data_parallel, config.model.seq_length)
    tokens = np.zeros(size, np.int32)
    return Tensor(tokens), Tensor(tokens), Tensor(tokens.astype(np.float32))


def simulated(config: Config, vocab: int) -> tuple:
    """Returns (the program of evaluation, its inputs), to be compiled for simulated devices by
    `simulation.compile.compile_ranks(..., step="switchyard.training.evaluate_job:simulated")`."""
    from switchyard.distributed.mesh import CompiledMesh

    mesh = CompiledMesh(config)
    with shapes_only():
        model = create_model(config, vocab, drawn=False, mesh=mesh)
        mesh.place(model)
        evaluator = create_evaluator(model, config, 1.0, mesh=mesh)
    model.set_train(False)
    return evaluator.program, sample_inputs(config)
