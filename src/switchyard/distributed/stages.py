"""Describes pipeline stages and what they exchange. No MindSpore in here.

Legend: A micro-batches.
"""

from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims, stages_of


def stages_of_layers(config: Config) -> list[int]:
    """Returns the stage that holds the parameters of each layer."""
    degrees, layers = ParallelDims.of(config.parallel), config.model.num_layers
    return [stages_of(f"layers.{index}", layers, degrees)[0] for index in range(layers)]


def stage_config(config: Config, stage: int) -> Config:
    """Returns the layers of one stage as a configuration without a pipeline."""
    own = [index for index, of in enumerate(stages_of_layers(config)) if of == stage]
    layers = [index - own[0] for index in config.moe_layers if index in own]
    windows = config.model.window_layers
    if windows != "all":
        windows = [index - own[0] for index in windows if index in own]
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_layers": len(own), "window_layers": windows}),
            "moe": config.moe.model_copy(update={"layers": layers}),
            "parallel": config.parallel.model_copy(update={"pipeline_stage": 1, "micro_batch_num": 1}),
        }
    )


def stage_exchanges(config: Config, stage: int) -> list[int]:
    """Returns what a stage exchanges with others for each micro-batch, forward in one direction and backward in the
    other: of each exchange the number of conditional layers whose statistics it carries, or -1 for rows between layers.
    """
    stages, of = config.parallel.pipeline_stage, stages_of_layers(config)
    layers = [sum(of[index] == one for index in config.moe_layers) for one in range(stages - 1)]  # to the last stage
    rows = [-1] * ((stage > 0) + (stage < stages - 1))
    return rows + [count for one, count in enumerate(layers) if count and stage in (one, stages - 1)]
