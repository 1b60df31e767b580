"""Gives a decoder low-rank adapters (LoRA, arXiv 2106.09685), as train.lora asks for."""

from mindspore import nn

from switchyard.config import Config
from switchyard.moe.experts import FeedForwardExperts
from switchyard.nn.layers import Linear
from switchyard.nn.low_rank import LowRank, adapter_key

# attribute of the adapter -> attribute of the weight that it stands beside
OF_LINEAR = {"lora": "weight"}
OF_EXPERTS = {"lora_in": "w_in", "lora_gate": "w_gate", "lora_out": "w_out"}


def add_adapters(model: nn.Cell, config: Config, drawn: bool = True) -> None:
    """Puts adapters beside the weights that train.lora names, with numbers that depend on train.seed alone.

    Args:
        model: a Decoder that no graph was compiled of.
        config: train.lora and train.seed are read.
        drawn: False: see LowRank.
    """
    lora, index = config.train.lora, 0
    for prefix, cell in list(model.cells_and_names()):
        for attribute, weight in places(prefix, cell, lora.targets).items():
            own = getattr(cell, weight)
            key, index = adapter_key(config.train.seed, index), index + 1
            adapter = LowRank(own.shape, lora.rank, lora.alpha / lora.rank, key, cell.dtype, drawn)
            setattr(cell, attribute, adapter)
            adapter.update_parameters_name(f"{prefix}.{attribute}.")  # a cell that joins late knows its parent alone


def places(prefix: str, cell: nn.Cell, targets: list[str]) -> dict[str, str]:
    """Returns adapter -> weight of the adapters that a cell gets; {}: it is no target."""
    if isinstance(cell, FeedForwardExperts) and "experts" in targets:
        return {adapter: weight for adapter, weight in OF_EXPERTS.items() if getattr(cell, weight) is not None}
    if isinstance(cell, Linear) and ".".join(prefix.split(".")[-2:]) in targets:
        return OF_LINEAR
    return {}
