"""Fused operators and their composed twins in one graph, to compile for Ascend: named to simulate.compile_ranks."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from switchyard.config import Config
from switchyard.nn.activation import SwiGLU
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.layers import Attention, causal_mask, hidden_mask
from switchyard.nn.norm import RMSNorm

TWINS = ("RmsNorm", "Swiglu", "FlashAttentionScore")
BATCH, EPS = 2, 1e-3


def arguments(config: Config) -> dict[str, list[np.ndarray]]:
    """Of each twin its inputs and, last, the gradient of its result."""
    random, model = np.random.default_rng(3), config.model
    rows, width = BATCH * model.seq_length, model.hidden_size
    projection = width + 2 * model.n_kv_heads * (width // model.num_heads)

    def normal(*shape, dtype=np.float32):
        return random.normal(0, 1, shape).astype(dtype)

    half = np.float16
    return {
        "RmsNorm": [normal(rows, width), normal(width), normal(rows, width)],
        "Swiglu": [normal(2, rows, 6), normal(2, rows, 6), normal(2, rows, 6)],
        "FlashAttentionScore": [normal(rows, projection, dtype=half), normal(rows, width, dtype=half)],
    }


class Norm(nn.Cell):
    """RMSNorm whose gain is an input."""

    def __init__(self, width: int, fused: bool):
        super().__init__()
        self.norm = RMSNorm(width, EPS, fused)

    def construct(self, x, gain):
        return self.norm.normalise(x, gain)


class Mix(nn.Cell):
    """What lies between the two projections of attention."""

    def __init__(self, config: Config, fused: bool, dtype=ms.float16):
        super().__init__()
        length, names = config.model.seq_length, frozenset({"FlashAttentionScore"} if fused else ())
        mask = hidden_mask(length) if fused else causal_mask(length)
        self.attention = Attention(config.model, mask, 0.02, InitialWeights(0), dtype, names)

    def construct(self, qkv):
        return self.attention.mix_heads(qkv, BATCH)


def twins(config: Config, fused: bool) -> list[nn.Cell]:
    """The three, in order of TWINS."""
    return [Norm(config.model.hidden_size, fused), SwiGLU(fused), Mix(config, fused)]


class Probe(nn.Cell):
    """All twins, composed and fused: value and gradients of each, one after the other."""

    def __init__(self, config: Config):
        super().__init__()
        self.all = nn.CellList([*twins(config, False), *twins(config, True)])
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)
        self.sizes = [len(each) - 1 for each in arguments(config).values()] * 2

    def construct(self, *inputs):
        found, at = (), 0
        for index, cell in enumerate(self.all):
            size = self.sizes[index]
            given = inputs[at : at + size]
            found = (*found, cell(*given), *self.gradient(cell)(*given, inputs[at + size]))
            at = (at + size + 1) % len(inputs)
        return found


def probe(config: Config, vocab: int) -> tuple:
    """(network, inputs) for compile_ranks."""
    inputs = tuple(Tensor(array) for each in arguments(config).values() for array in each)
    return Probe(config), inputs
