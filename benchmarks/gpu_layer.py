"""Times the conditional layer and the dense feed-forward on one GPU, float16, forward and backward.

    python benchmarks/gpu_layer.py [--rows 16384] [--width 1024] [--hidden 4096] [--short] [--json FILE] [E,K ...]

Prints a line for each: the dense feed-forward, the two batched products of the experts alone on as many slots (the
floor), and the layer with E experts of which K are chosen, as the decoder calls it: rows and result in float32, the
products in float16, capacity factor 1.25. --short: a window of calls for each in place of five.
"""

import argparse
import statistics
import time

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from moe_cells import Conditional, Gradients
from workers import record

from switchyard.config import build
from switchyard.device import set_context
from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.layer import MoELayer
from switchyard.nn.fused import fused_operators
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices
from switchyard.profile.measure import resident

WINDOW, WINDOWS = 20, 5  # calls that are timed together, and how often


def layer(config, rows: int) -> nn.Cell:
    """Returns the conditional layer of a configuration for rows [N, D]."""
    fused = fused_operators(config, "GPU")
    return Conditional(MoELayer(config, (0.02, 0.02), InitialWeights(0), ms.float16, NoiseSlices(), fused=fused), rows)


def experts(config, count: int) -> nn.Cell:
    """Returns `count` feed-forward networks."""
    width, hidden, fused = config.model.hidden_size, config.model.intermediate_size, fused_operators(config, "GPU")
    std, half = (0.02, 0.02), count > 1
    return FeedForwardExperts(
        count, width, hidden, "relu", std, InitialWeights(0), ms.float16, fused=fused, half_rows=half
    )


def milliseconds(cell: nn.Cell, rows: np.ndarray, count: int) -> tuple[float, float]:
    """Returns (median, least) ms of a forward and backward pass, by rows and weights, over `count` windows."""
    call, rows, windows = Gradients(cell), resident(Tensor(rows)), []
    for _ in range(4):
        call(rows)
    ms.runtime.synchronize()
    for _ in range(count):
        start = time.perf_counter()
        for _ in range(WINDOW):
            call(rows)
        ms.runtime.synchronize()
        windows.append((time.perf_counter() - start) / WINDOW * 1e3)
    return statistics.median(windows), min(windows)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--short", action="store_true", help="one window of calls each")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("shapes", nargs="*", default=["8,1", "8,2", "32,2"], metavar="E,K")
    args = parser.parse_args()
    found = []

    def measure(name: str, cell: nn.Cell, shape: tuple[int, ...]) -> None:
        rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        median, least = milliseconds(cell, rows, 1 if args.short else WINDOWS)
        print(f"{name:40} {median:8.3f} ms (least {least:.3f})", flush=True)
        found.append({"work": name, "median_ms": median, "min_ms": least})

    for number, shape in enumerate(args.shapes):
        count, chosen = map(int, shape.split(","))
        router = {"name": "switch"} if chosen == 1 else {"name": "top_k"}
        moe = {"router": router, "expert_num": count, "num_experts_chosen": chosen}
        model = {"hidden_size": args.width, "seq_length": args.rows, "compute_dtype": "float16"}
        model |= {"intermediate_size": args.hidden, "num_heads": 16}
        config = build({"model": model, "moe": moe, "data": {"batch_size": 1}})
        if number == 0:
            set_context(config.context, 0, "float16")
            measure("dense feed-forward", experts(config, 1), (1, args.rows, args.width))
        slots = capacity(args.rows, count, chosen, config.moe.capacity_factor)
        measure(f"E {count} k {chosen}: expert products alone", experts(config, count), (count, slots, args.width))
        measure(f"E {count} k {chosen}: layer", layer(config, args.rows), (args.rows, args.width))
    if args.json:
        question = f"one GPU, float16, {args.rows} rows of {args.width}, hidden width {args.hidden}"
        record(args.json, question, "python benchmarks/gpu_layer.py", found)


if __name__ == "__main__":
    main()
