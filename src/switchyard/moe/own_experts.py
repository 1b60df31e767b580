"""Experts of a user's own kind: what they are given, and how the configuration finds them.

Legend: E experts, S rows of an expert, D width, F hidden width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mindspore import Parameter, Tensor, nn

from switchyard.config import Config
from switchyard.moe.registry import classes_of
from switchyard.nn.initializers import InitialWeights


@dataclass(frozen=True)
class ExpertSetting:
    """Holds what experts are built from.

    expert_num: E. hidden_size: D. intermediate_size: F. activation: model.activation. std: initial standard deviation
    of the first matrices, of the last. dtype: of matrix products. random: draws initial weights.
    """

    expert_num: int
    hidden_size: int
    intermediate_size: int
    activation: str
    std: tuple[float, float]
    dtype: Any
    random: InitialWeights

    def normal(self, shape: tuple[int, ...], name: str, last: bool = False) -> Parameter:
        """Draws a Parameter of normal numbers, float32.

        Args:
            shape: of the parameter; [E, ...] where each expert has its own.
            name: unique within the experts. Expert parallelism shards stacked matrices that are named w_in [E, D, F],
                w_gate [E, D, F] and w_out [E, F, D].
            last: whether the parameter makes the output, whose standard deviation may differ.
        """
        return self.random.normal(self.std[int(last)], shape, name)


class Expert(nn.Cell):
    """Base of experts of one's own kind: all E experts of a layer in one Cell, rows [E, S, D] -> [E, S, D].

    A subclass defines `construct`. It may also define `blocks(rows [P, b, D], block_expert [P])`, without which
    dropless passes compute every expert on every row; `merged(rows [G, N, D], gates [G, E])`, which the router
    `merged` asks for; and `shard(mesh)`, which a compiled cluster asks for. See moe.experts.FeedForwardExperts for all
    three.

    Args:
        setting: sizes, type and initial weights.

    Examples:
        >>> import switchyard as sw
        >>> from mindspore import ops
        >>> class Scale(sw.Expert):
        ...     def __init__(self, setting):
        ...         super().__init__(setting)
        ...         self.scale = setting.normal((setting.expert_num, 1, setting.hidden_size), "scale")
        ...     def construct(self, rows):
        ...         return rows * self.scale
        >>> layer = sw.MoELayer(hidden_size=8, expert_num=4, experts=Scale)
        >>> layer(ops.ones((6, 8))).shape
        (6, 8)
    """

    def __init__(self, setting: ExpertSetting):
        super().__init__()
        self.expert_num = setting.expert_num

    def construct(self, rows: Tensor) -> Tensor:
        """Rows [E, S, D], those of expert e in slice e -> [E, S, D]."""
        raise NotImplementedError


EXPERTS = classes_of("moe.experts", Expert)


def own_experts(
    config: Config, std: tuple[float, float], random: InitialWeights, dtype
) -> Callable[[int, int], nn.Cell] | None:
    """Returns a function (experts E, hidden width F) -> experts of the class that moe.experts names; None without one.

    Raises:
        UserError: there is no such class.
    """
    if config.moe.experts is None:
        return None
    kind, model = EXPERTS.find(config.moe.experts), config.model
    setting = ExpertSetting(0, model.hidden_size, 0, model.activation, std, dtype, random)

    def make(experts: int, hidden: int) -> nn.Cell:
        return kind(replace(setting, expert_num=experts, intermediate_size=hidden))

    return make
