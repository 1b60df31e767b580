"""Says how a step calls its program: how often, with which inputs, and how these are sharded. No MindSpore in here.

Legend: A micro-batches, B batch, S sequence, N = B * S tokens, D width, M conditional layers, K choices of a token, J
noise slices.
"""

from collections.abc import Iterator

import numpy as np

from switchyard.config import Config


def calls_of(config: Config) -> int:
    """Returns how often a step calls its program; a pipeline works on several micro-batches in each call."""
    return config.train.gradient_accumulation_steps


def forces_choices(config: Config) -> bool:
    """Returns whether steps are handed choices of experts: from a record, or while routers warm up."""
    return bool(config.moe_layers) and (config.moe.replay is not None or config.moe.router_warmup_steps > 0)


def input_shards(config: Config) -> tuple:
    """Returns how the arguments of a step's program are sharded, by axis.

    The noise is, even the [1, 1, 1] of each device where nobody reads it: the compiler wants the argument with most
    axes to be sharded.
    """
    data = config.parallel.data_parallel
    noise = (1, data, 1) if config.parallel.pipeline_stage == 1 else (data, 1, 1)
    replay = ((1, data, 1),) if forces_choices(config) else ()
    return ((data, 1), (data, 1), (data, 1), noise, (1, 1), *replay)


def inputs_of_calls(config: Config, arrays: list[np.ndarray], weights: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yields `call_inputs` of each call of a step, from the arrays [A, ..] and weights [A] of all its micro-batches."""
    each = len(weights) // calls_of(config)
    for start in range(0, len(weights), each):
        part = slice(start, start + each)
        yield call_inputs(config, [array[part] for array in arrays], weights[part])


def call_inputs(config: Config, arrays: list[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    """Returns the inputs of one call of a step's program.

    Args:
        config: stages of the pipeline.
        arrays: tokens, labels, valid [A, B, S], noise [A, max(J, 1), N, D], and where choices are forced replay
            [A, M, N, K]; A is 1 without a pipeline.
        weights: of the losses, [A].
    """
    weights = np.asarray(weights, np.float32)
    if config.parallel.pipeline_stage == 1:
        parts = [np.ascontiguousarray(array[0]) for array in arrays]
        return [*parts[:4], weights.reshape(1, 1), *parts[4:]]
    tokens, labels, valid, noise = arrays
    parts = (tokens, labels, valid, noise.transpose(0, 2, 1, 3))  # noise [A, N, J, D]
    joined = [np.ascontiguousarray(part).reshape(-1, *part.shape[2:]) for part in parts]  # [A * X, ..]
    return [*joined, np.diag(weights)]
