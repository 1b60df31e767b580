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

import numpy as np
from timing import print_table, ratios
from workers import alternate, has_torch, record, serve, summary

SHAPES = ("2048,256,8,1", "2048,256,8,2", "2048,256,32,1", "4096,512,8,1")
OURS = ("expert matrix products", "conditional layer", "dropless layer", "dense, same active FLOPs")
WAYS = ("sort_mm", "grouped_mm", "gather_bmm")


def contender(name: str):
    """Returns what a contender of the name "SHAPE NAME" runs."""
    shape, name = name.split(" ", 1)
    rows, width, experts, choices = map(int, shape.split(","))
    if name.startswith("torch "):
        from torch_peers import layer_call

        return layer_call(rows, width, experts, choices, name.removeprefix("torch "))
    import mindspore as ms  # here: the interpreter of PyTorch may have none
    from moe_cells import Gradients, our_cell

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
