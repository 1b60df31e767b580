"""What does routing cost? The conditional layer against its expert matrix products alone, and against a dense layer.

    python benchmarks/moe_layer.py [--shapes N,D,E,K ...] [--rounds 30] [--json FILE]

Forward and backward with respect to rows and weights, graph mode, one interleaved run. The floor is the two BatchMatMul
and the activation on the same slots; the dense layer has the same active FLOPs (hidden width K * F on N rows).
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from timing import interleave, print_table, ratios

from switchyard.config import build
from switchyard.json_text import to_json
from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.layer import MoELayer
from switchyard.moe.metrics import BALANCE, Z
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

SHAPES = ("2048,256,8,1", "2048,256,32,2", "4096,512,8,1")


class Gradients(nn.Cell):
    """What cell(rows) gives, and the gradients of its sum with respect to the rows and every parameter.

    The output is returned too: otherwise the compiler leaves out the last product of a cell whose gradient can do
    without it, and the floor would be five products of six.
    """

    def __init__(self, cell: nn.Cell):
        super().__init__()
        cell.set_train()
        self.value_and_gradient = ops.value_and_grad(cell, 0, ms.ParameterTuple(cell.trainable_params()))

    def construct(self, rows):
        return self.value_and_gradient(rows)


class Conditional(nn.Cell):
    """The layer's output and its losses, so that the router's gradient is complete."""

    def __init__(self, layer: MoELayer, rows: int):
        super().__init__()
        self.layer = layer
        self.valid = ms.Tensor(np.ones((1, rows), np.float32))
        self.noise = ms.Tensor(np.zeros((1, 1, 1), np.float32))

    def construct(self, rows):
        out, stats, _ = self.layer(rows, self.valid, self.noise)
        means = stats[0, : Z + 1] / self.valid.shape[1]  # balance and z-loss
        return out, means[BALANCE], means[Z]


def contenders(rows: int, width: int, experts: int, choices: int) -> dict:
    """Name -> function that runs one forward and backward pass."""
    random, hidden = np.random.default_rng(0), 4 * width
    router = "switch" if choices == 1 else "top_k"
    config = build(
        {
            "model": {"hidden_size": width, "seq_length": rows},
            "moe": {"router": router, "expert_num": experts, "num_experts_chosen": choices},
            "data": {"batch_size": 1},
        }
    )

    def draw(*shape):
        return ms.Tensor(random.standard_normal(shape).astype(np.float32))

    def feed_forward(count, size):
        return FeedForwardExperts(count, width, size, "relu", (0.02, 0.02), InitialWeights(0), ms.float32)

    slots = capacity(rows, experts, choices, config.moe.capacity_factor)
    layer = MoELayer(config, (0.02, 0.02), InitialWeights(0), ms.float32, NoiseSlices())
    cells = {
        "expert matrix products": (feed_forward(experts, hidden), (experts, slots, width)),
        "conditional layer": (Conditional(layer, rows), (1, rows, width)),
        "dense, same active FLOPs": (feed_forward(1, hidden * choices), (1, rows, width)),
    }
    runs = {}
    for name, (cell, shape) in cells.items():
        runs[name] = (Gradients(cell), draw(*shape))
    return {name: lambda run=run: run[0](run[1]) for name, run in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows N, width D, experts E, choices K")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    figures = {}
    for shape in args.shapes:
        rows, width, experts, choices = map(int, shape.split(","))
        seconds = interleave(contenders(rows, width, experts, choices), args.rounds, ms.runtime.synchronize)
        figures[shape] = ratios(seconds, "expert matrix products")
        title = f"rows {rows}, width {width}, hidden {4 * width}, experts {experts}, k {choices}, capacity 1.25"
        print_table(title, figures[shape], "expert matrix products")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(to_json(figures, indent=1))


if __name__ == "__main__":
    main()
