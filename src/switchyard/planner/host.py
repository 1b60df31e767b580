"""Computes what a step costs the host of a device: the bytes of its inputs, and the time to draw the noise.

No MindSpore in here. Device memory and collectives stand in `costs`.

Legend: A micro-batches, J noise slices, B sequences and N rows of a micro-batch on one data shard, S sequence, D width.
"""

from dataclasses import dataclass

from switchyard.config import Config
from switchyard.planner.sizes import FLOAT

DRAW_RATE = 1.2e9  # bytes of noise per second; draw_noise on one core of an Intel Xeon, 390 MB in 0.33 s


@dataclass(frozen=True)
class HostCosts:
    """Holds the bytes that the process of one device makes for a step.

    Attributes:
        batch: tokens and labels (int32), and valid (float32).
        noise: random numbers of dropout, jitter, random priority and routers that draw.
        choices: forced choices of a replay or of a warm-up.
    """

    batch: int
    noise: int
    choices: int

    @property
    def total(self) -> int:
        """Returns the bytes of all inputs."""
        return self.batch + self.noise + self.choices

    def seconds(self, rate: float = DRAW_RATE) -> float:
        """Returns the seconds to draw the noise at a rate in bytes per second."""
        return self.noise / rate


def host_costs(config: Config) -> HostCosts:
    """Returns what the process of one device makes for a step: the inputs of its data shard, in all micro-batches.

    Shards of the other degrees make the same inputs: the processes of a tensor-parallel group, and of all stages of a
    pipeline, each hold them.
    """
    moe, micro = config.moe, config.micro_batches
    sequences = micro * config.data.batch_size // config.parallel.data_parallel  # A * B
    rows = micro * config.rows // config.parallel.data_parallel  # A * N
    forced = bool(config.moe_layers and (moe.replay or moe.router_warmup_steps))
    return HostCosts(
        batch=FLOAT * sequences * (config.token_length + 2 * config.target_length),
        noise=FLOAT * noise_slices(config) * rows * config.model.hidden_size,
        choices=FLOAT * forced * len(config.moe_layers) * rows * moe.choices,
    )


def noise_slices(config: Config) -> int:
    """Returns J, the tensors [N, D] of noise that a training pass reads; each stack reads its own rows of them."""
    return max(_slices_of_stack(stack, place, len(config.stacks)) for place, stack in enumerate(config.stacks))


def _slices_of_stack(config: Config, place: int, stacks: int) -> int:
    moe, layers = config.moe, len(config.moe_layers)
    attention, ends = (1, 1) if stacks == 1 else (1 + place, 2)  # dropouts of a layer, and at the ends of the stack
    dense = config.model.num_layers - layers
    dropout = (ends + attention * config.model.num_layers + dense) * (config.model.dropout > 0)
    dropout += layers * (config.dropout_of(True) > 0)
    layer = (moe.jitter > 0) + (moe.drop_order == "random") + moe.copies * _router_slices(config)
    passes = 2 if layers and moe.consistency_loss_factor else 1
    return (dropout + layers * layer) * passes


def _router_slices(config: Config) -> int:
    """Returns the slices of noise that one router of a conditional layer reads."""
    moe, options = config.moe, config.moe.router.options
    if moe.router == "noisy_top_k":  # two uniform numbers for each pair of the normal ones
        experts = moe.expert_num // moe.copies
        return -(-2 * -(-experts // 2) // config.model.hidden_size)
    draws = (getattr(options, "second_expert", None) == "sampling", getattr(options, "random_draw", None) == "step")
    return int(any(draws))
