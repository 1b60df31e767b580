"""How fast is a training step? Ours against PyTorch's, where torch is installed, and the conditional against the dense.

    python benchmarks/train_step.py [--short] [--rounds 20] [--steps 5] [--json FILE] [--sizes small large]

small is nanoGPT's CPU recipe (4 layers, 4 heads, width 128, block 64, batch 12), large has 6 layers, 6 heads, width
384, block 256, batch 4; both LayerNorm, GELU, learned positions, tied head; AdamW, clip 1.0; conditional: every layer
with 8 experts, k = 1. PyTorch runs eagerly and compiled, its conditional layer in the ways of torch_peers.
"""

import argparse
import os

import numpy as np
from timing import print_table, ratios
from workers import alternate, has_torch, record, serve, summary

KIND = {"norm": "layernorm", "position": "learned", "activation": "gelu"}
SIZES = {
    "small": ({"num_layers": 4, "hidden_size": 128, "num_heads": 4, "seq_length": 64}, 12),
    "large": ({"num_layers": 6, "hidden_size": 384, "num_heads": 6, "seq_length": 256}, 4),
}
VOCABULARY, RATE, EXPERTS = 65, 1e-3, 8
OURS = ("switchyard dense", "switchyard moe")
PEERS = (
    "torch dense eager",
    "torch dense compiled",
    "torch moe sort_mm",
    "torch moe grouped_mm",
    "torch moe gather_bmm",
)


def batch(size: str):
    """Returns (tokens, labels) [B, S] int32."""
    sizes, count = SIZES[size]
    return np.random.default_rng(0).integers(0, VOCABULARY, (2, count, sizes["seq_length"])).astype(np.int32)


def our_step(size: str, conditional: bool):
    """Returns a function that runs one step of ours and waits for it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from switchyard.config import build
    from switchyard.training.step import create_step

    ms.set_context(mode=ms.GRAPH_MODE)
    sizes, count = SIZES[size]
    moe = {"expert_num": EXPERTS if conditional else 1}
    step = create_step(build({"model": {**sizes, **KIND}, "moe": moe, "data": {"batch_size": count}}), VOCABULARY)
    step.initialise()
    tokens, labels = batch(size)
    valid, noise = np.ones((1, *tokens.shape), np.float32), np.zeros((1, 1, 1, 1), np.float32)
    return lambda: step(tokens[None], labels[None], valid, noise, RATE)["loss"]


def contender(name: str):
    """Returns what a contender of the name "SIZE ..." runs."""
    size, owner, kind, *way = name.split()
    if owner == "switchyard":
        return our_step(size, kind == "moe")
    from torch_peers import train_call

    way = way[0]
    experts = EXPERTS if kind == "moe" else 1
    return train_call(SIZES[size][0], VOCABULARY, experts, way, batch(size), RATE, way == "compiled")


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the small size, 5 rounds: a minute")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return serve(contender(args.work))
    peers, rows = PEERS if has_torch() else (), []
    for size in ["small"] if args.short else args.sizes:
        names = [f"{size} {name}" for name in (*OURS, *peers)]
        seconds = alternate(__file__, names, 5 if args.short else args.rounds, args.steps)
        print_table(f"one training step, {size}", ratios(seconds, names[0]), names[0])
        rows += summary(seconds, size=size)
    if args.json:
        record(args.json, "a training step on CPU", "python benchmarks/train_step.py", rows)


if __name__ == "__main__":
    main()
