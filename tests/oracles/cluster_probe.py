"""What a rank of a simulated cluster does besides compiling: named to switchyard.simulation.compile by tests."""

from mindspore.communication import get_group_size, get_rank
from switchyard.training.cluster import ClusterStep
from switchyard.training.parallel_eval import ParallelEvalStep, evaluation_config, parallel_scores
from switchyard.training.parallel_step import batch_slices

from switchyard.checkpoint import store as checkpoint
from switchyard.distributed.placement import Degrees
from switchyard.distributed.processes import Processes

OTHER, STEP = "again", 3  # the run that is written


def resumed_and_saved(config, vocab: int) -> tuple:
    """Goes on from the newest checkpoint of the run, writes this rank's slices into another; evaluation is compiled."""
    processes = Processes(get_rank(), get_group_size(), Degrees.of(config.parallel))
    run = f"{config.train.output_dir}/{config.train.name}"
    held = checkpoint.read(run, degrees=processes.degrees, rank=processes.rank)
    step = ClusterStep(config, vocab, processes)
    step.load(held.weights, held.optimizer)
    weights = {parameter.name: parameter.asnumpy() for parameter in step.model.get_parameters()}
    state = {name: parameter.asnumpy() for name, parameter in step.optimizer_state().items()}
    other = f"{config.train.output_dir}/{OTHER}"
    checkpoint.save_slice(other, config, STEP, processes.rank, weights, state, step.shapes)
    if config.parallel.pipeline_stage > 1:
        return step.step, batch_slices(config, vocab, step.model.noise_slices)
    scores = ParallelEvalStep(config, vocab, step.model, processes)
    return scores.graph, batch_slices(scores.config, vocab)[:3]


def scores(config, vocab: int) -> tuple:
    """Evaluation alone, with weights that whoever executes its graph brings along."""
    return parallel_scores(evaluation_config(config), vocab), batch_slices(config, vocab)[:3]
