"""What does routing cost? The conditional layer against its expert matrix products alone, and against a dense layer.

    python benchmarks/moe_layer.py [--short] [--shapes N,D,E,K ...] [--rounds 30] [--json FILE]

Forward and backward with respect to rows and weights, graph mode, every contender a process of its own, in turn. The
floor is the two BatchMatMul and the activation on the same slots; the dense layer has the same active FLOPs (hidden
width K * F on N rows). Where torch is installed, the ways of torch_peers take part.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from timing import print_table, ratios
from workers import alternate, has_torch, record, serve, summary

from switchyard.config import build
from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.layer import MoELayer
from switchyard.moe.metrics import BALANCE, Z
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

SHAPES = ("2048,256,8,1", "2048,256,8,2", "2048,256,32,1", "4096,512,8,1")
OURS = ("expert matrix products", "conditional layer", "dropless layer", "dense, same active FLOPs")
WAYS = ("sort_mm", "grouped_mm", "gather_bmm")


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


def our_cell(name: str, rows: int, width: int, experts: int, choices: int):
    """Returns (a contender of ours, the shape of its rows)."""
    moe = {"router": "switch" if choices == 1 else "top_k", "expert_num": experts, "num_experts_chosen": choices}
    if name == "dropless layer":
        moe |= {"dispatch": "dropless"}
    config = build({"model": {"hidden_size": width, "seq_length": rows}, "moe": moe, "data": {"batch_size": 1}})
    if name.endswith("layer"):
        layer = MoELayer(config, (0.02, 0.02), InitialWeights(0), ms.float32, NoiseSlices())
        return Conditional(layer, rows), (1, rows, width)
    if name == "expert matrix products":
        slots = capacity(rows, experts, choices, config.moe.capacity_factor)
        return feed_forward(experts, width, 4 * width), (experts, slots, width)
    return feed_forward(1, width, 4 * width * choices), (1, rows, width)


def feed_forward(count: int, width: int, hidden: int) -> FeedForwardExperts:
    """Returns `count` networks of one hidden layer."""
    return FeedForwardExperts(count, width, hidden, "relu", (0.02, 0.02), InitialWeights(0), ms.float32)


def contender(name: str):
    """Returns what a contender of the name "SHAPE NAME" runs."""
    shape, name = name.split(" ", 1)
    rows, width, experts, choices = map(int, shape.split(","))
    if name.startswith("torch "):
        from torch_peers import layer_call

        return layer_call(rows, width, experts, choices, name.removeprefix("torch "))
    ms.set_context(mode=ms.GRAPH_MODE)
    cell, size = our_cell(name, rows, width, experts, choices)
    gradients = Gradients(cell)
    x = ms.Tensor(np.random.default_rng(0).standard_normal(size).astype(np.float32))
    return lambda: gradients(x)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the first shape, 5 rounds: a minute")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows N, width D, experts E, choices K")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return serve(contender(args.work))
    peers, found = tuple(f"torch {way}" for way in WAYS) if has_torch() else (), []
    for shape in args.shapes[:1] if args.short else args.shapes:
        names = [f"{shape} {name}" for name in (*OURS, *peers)]
        seconds = alternate(__file__, names, 5 if args.short else args.rounds, 2)
        seconds = {name.split(" ", 1)[1]: found for name, found in seconds.items()}
        print_table(f"rows, width, experts, choices {shape}; capacity 1.25", ratios(seconds, OURS[0]), OURS[0])
        found += summary(seconds, shape=shape)
    if args.json:
        record(args.json, "a conditional layer on CPU, forward and backward", "python benchmarks/moe_layer.py", found)


if __name__ == "__main__":
    main()
