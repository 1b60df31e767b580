"""Trains a run: finds where it starts, its folder, data and devices, and hands them to the Trainer."""

from pathlib import Path
from typing import Any

from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.layout import keep_groups
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config
from switchyard.data import Data, load_data
from switchyard.device import set_context, target_of
from switchyard.distributed.mesh import LocalMesh
from switchyard.distributed.meshes import create_mesh
from switchyard.distributed.processes import (
    init_process_group,
    is_first,
    is_scheduler,
    world_size,
)
from switchyard.errors import UserError
from switchyard.models.decoder import mask_documents
from switchyard.moe.routing.base import with_options
from switchyard.moe.routing.fixed import balance_tables
from switchyard.training.compile_cache import require_one_device
from switchyard.training.initial import first_state, read_initial, with_tokenizer
from switchyard.training.limits import check_mesh, with_defaults
from switchyard.training.lock import locked
from switchyard.training.loggers import check_loggers
from switchyard.training.resume import (
    INIT,
    agreed,
    changed_keys,
    check_corpus,
    find_start,
    finished,
    resumed,
    start_reading,
    with_own_tokenizer,
)
from switchyard.training.signals import StopSignals
from switchyard.training.step import TrainStep, create_step
from switchyard.training.trainer import Trainer
from switchyard.trust import check_trusted_section


def train(
    config: Config, resume: bool = False, init: str | Path | None = None, restarted: bool = False
) -> dict[str, Any]:
    """Trains a run from its beginning, or goes on from its newest valid checkpoint.

    Args:
        config: the whole configuration; the run folder is train.output_dir/train.name.
        resume: go on. The losses that follow are, bit for bit, those of an uninterrupted run.
        init: a run folder or a checkpoint whose weights and tokenizer a new run starts from; None: it draws weights.
        restarted: go on from the newest checkpoint where the run has one, else start as the other arguments say.

    Returns:
        The object that is written to result.json, see `Trainer._result`.

    Raises:
        UserError: a run of that name exists and `resume` is off, or none does and it is on; another process trains it;
            a key was changed that would change the model; bad or other data; weights of `init` that do not fit; a full
            disk; a loss, a gradient norm, a weight or a figure of the evaluation that is not finite.
        Interrupted: SIGINT, SIGTERM or SIGHUP came and the run was saved.

    Examples:
        >>> import switchyard as sw
        >>> found = sw.train(sw.load_config("config/quickstart.yaml", ["train.steps=100"]))  # doctest: +SKIP
        >>> found["validation_loss"] < 3  # doctest: +SKIP
        True
    """
    if init is not None and resume and not restarted:
        raise UserError(f"--init: '{init}'; --resume goes on from the weights of the run itself: leave one of them out")
    if is_scheduler() and world_size() == 1:
        return {}  # one worker meets nobody, and is at work in the run folder already
    check_trusted_section(config.moe, consent=True, say=print if is_first() else lambda line: None)  # the user's own
    if is_first():
        check_loggers(config.train.loggers)
    config, compiled = choose_mesh(config, world_size())
    require_one_device(config)
    run = Path(config.train.output_dir) / config.train.name
    with locked(run, config.train.name, wanted=is_first()) as existed:
        if restarted:
            resume, existed, init = True, True, None if checkpoint.listed(run) else init
        return train_locked(config, compiled, run, resume, existed, init)


def train_locked(
    config: Config, compiled: bool, run: Path, resume: bool, existed: bool, init: str | Path | None = None
) -> dict[str, Any]:
    """Does `train` in a run folder that no other job trains in.

    Args:
        config, compiled: see `choose_mesh`.
        run: the folder.
        resume: see `train`.
        existed: whether the folder was there before it was locked.
        init: see `train`.
    """
    loaded = find_start(run, config, resume, existed)
    config = with_own_tokenizer(loaded, config) if loaded else config
    changes = changed_keys(loaded.config, keep_groups(loaded.config, config)) if loaded else {}
    config = resumed(loaded.config, config) if loaded else config
    if loaded and (result := finished(run, config)):
        print(
            f"Run '{run}' already finished its {config.train.steps} steps; increase train.steps to continue.",
            flush=True,
        )
        return result
    set_context(config.context, config.train.seed, config.model.compute_dtype)
    with_options(config.moe)  # those of a router in the user's own file are known from here on
    processes = init_process_group(config)  # nothing was written before all have seen what is there
    if is_scheduler():
        return {}
    loaded = agreed(loaded, run, config, processes)
    source = None if init is None else read_initial(init, config)
    if source:
        config = with_tokenizer(config, source, run)
    start = loaded or source
    shards = config.parallel.data_parallel if processes.size > 1 else 1
    compared: list[str | None] = []
    data = load_data(
        config,
        start.tokenizer_json if start else None,
        processes.data_shard,
        shards,
        seen=lambda marks: compared.append(check_corpus(loaded, marks, config, processes)),
        taken_over=source is not None or (loaded is not None and INIT in loaded.state),
    )
    other_data = compared[0]
    if loaded:
        start_reading(loaded, data, changed=other_data is not None)
    consent = {"accept_changed": False}  # which is meant for one resumption only
    config = config.model_copy(update={"data": config.data.model_copy(update=consent)})
    mesh = create_mesh(config, processes, compiled)
    step = start_step(config, run, data, start, mesh)
    with StopSignals() as stop:
        state = loaded.state if loaded else first_state(source) if source else None
        trainer = Trainer(config, run, data, step, state, mesh, resume)
        trainer.note_changes(changes, other_data)
        return trainer.run_to_end(stop)


def start_step(config: Config, run: Path, data: Data, loaded: Checkpoint | None, mesh: LocalMesh) -> TrainStep:
    """Returns the step of a model that starts anew, or goes on from a checkpoint; the run folder is there from then on.

    Args:
        config: the whole configuration.
        run: the folder.
        data: its tokenizer and how often each token occurs.
        loaded: the checkpoint, if any; one without an optimizer's state gives its weights only.
        mesh: the devices.
    """
    step = create_step(config, data.tokenizer.vocab_size, mesh)
    mask_documents(step.model, getattr(data.tokenizer, "separator", None))
    if loaded is None:
        balance_tables(step.model, data.token_counts)
    if mesh.processes.is_first:
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(run / checkpoint.CONFIG, config.to_yaml())
        checkpoint.write_atomically(run / checkpoint.TOKENIZER, data.tokenizer.to_json())
    mesh.processes.barrier()
    mesh.speed_up(step.program, run)
    if loaded and loaded.optimizer:
        step.load(loaded.weights, loaded.optimizer)
    elif loaded:
        step.load_weights(loaded.weights)
    else:
        step.initialise()
    return step


def choose_mesh(config: Config, count: int) -> tuple[Config, bool]:
    """Chooses how `count` processes train: (the configuration with the target's defaults, whether the compiler shards
    the step).

    Raises:
        UserError: degrees that cannot be carried out.
    """
    target = target_of(config.context) if count > 1 else "CPU"
    reason = check_mesh(config, count, target)
    if reason is None:
        return with_defaults(config, target), True
    if target != "CPU" and is_first():
        print(f"parallel: the step uses explicit collectives, because of {reason}", flush=True)
    return config, False
