"""What a rank of a simulated cluster does besides compiling: named to switchyard.simulation.compile by tests."""

from mindspore.communication import get_group_size, get_rank

from switchyard.checkpoint import store as checkpoint
from switchyard.distributed.mesh import CompiledMesh
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes
from switchyard.training.scores import eval_program
from switchyard.training.step import TrainStep, create_step, sample_inputs

OTHER, STEP = "again", 3  # the run that is written


def resumed_and_saved(config, vocab: int) -> tuple:
    """Goes on from the newest checkpoint of the run, writes this rank's shards into another; evaluation is compiled."""
    processes = Processes(get_rank(), get_group_size(), ParallelDims.of(config.parallel))
    run = f"{config.train.output_dir}/{config.train.name}"
    held = checkpoint.read(run, degrees=processes.degrees, rank=processes.rank)
    step = create_step(config, vocab, CompiledMesh(config, processes))
    step.load(held.weights, held.optimizer)
    weights = {parameter.name: parameter.asnumpy() for parameter in step.model.get_parameters()}
    state = {name: parameter.asnumpy() for name, parameter in step.optimizer_state().items()}
    other = f"{config.train.output_dir}/{OTHER}"
    checkpoint.save_shard(other, config, STEP, processes.rank, weights, state, step.shapes)
    if config.parallel.pipeline_stage > 1:
        return step.program, sample_inputs(step.config, step.model)
    return evaluation(step)


def scores(config, vocab: int) -> tuple:
    """Evaluation alone, with weights that whoever executes its graph brings along."""
    return evaluation(create_step(config, vocab, CompiledMesh(config)))


def evaluation(step: TrainStep) -> tuple:
    """(the program of evaluation, its inputs)."""
    program = eval_program(step.model, step.config, step.mesh)
    return program, sample_inputs(step.config, step.model)[:3]
