"""How fast is a training step? Ours against PyTorch's, where torch is installed, and the conditional against the dense.

    python benchmarks/train_step.py [--rounds 20] [--steps 5] [--json FILE]

The model is nanoGPT's CPU recipe (4 layers, 4 heads, width 128, block 64, batch 12; LayerNorm, GELU, learned positions,
tied head; AdamW, clip 1.0). Every contender is a process of its own, stopped by a signal while it is not its turn, for
idle thread pools spin: a round gives each of them `--steps` steps, in turn.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time

import numpy as np
from timing import print_table, ratios

MODEL = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "seq_length": 64}
NANO_GPT = {"norm": "layernorm", "position": "learned", "activation": "gelu"}
BATCH, VOCABULARY, RATE = 12, 65, 1e-3
CONTENDERS = {
    "switchyard dense": {"model": {**MODEL, **NANO_GPT}},
    "switchyard dense, rmsnorm + relu": {"model": {**MODEL, "position": "learned"}},
    "switchyard switch, 8 experts": {"model": {**MODEL, **NANO_GPT}, "moe": {"expert_num": 8}},
}


def batch():
    """(tokens, labels) [B, S] int32."""
    random = np.random.default_rng(0)
    return random.integers(0, VOCABULARY, (2, BATCH, MODEL["seq_length"]), dtype=np.int64).astype(np.int32)


def mindspore_step(sections: dict):
    """A function that runs one step of ours and waits for it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from switchyard.config import build
    from switchyard.models import create_model
    from switchyard.training.step import TrainStep

    ms.set_context(mode=ms.GRAPH_MODE)
    config = build({**sections, "data": {"batch_size": BATCH}})
    step = TrainStep(create_model(config, VOCABULARY), config)
    tokens, labels = batch()
    valid, noise = np.ones((1, *tokens.shape), np.float32), np.zeros((1, 1, 1, 1), np.float32)
    return lambda: step(tokens[None], labels[None], valid, noise, RATE)["loss"]


def torch_step():
    """A function that runs one step of the same model in eager PyTorch with the fused optimizer."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    width, heads = MODEL["hidden_size"], MODEL["num_heads"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x):
            rows, length, _ = x.shape
            parts = self.qkv(self.norm1(x)).view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
            return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(MODEL["seq_length"], width)
            self.blocks = nn.Sequential(*[Block() for _ in range(MODEL["num_layers"])])
            self.norm = nn.LayerNorm(width)

        def forward(self, tokens):
            x = self.blocks(self.tokens(tokens) + self.places.weight)
            return self.norm(x) @ self.tokens.weight.T

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    tokens, labels = (torch.from_numpy(part.astype(np.int64)) for part in batch())

    def step():
        loss = functional.cross_entropy(model(tokens).view(-1, VOCABULARY), labels.view(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def work(name: str) -> None:
    """The contender's process: for each number read, that many steps; answers with their seconds."""
    step = torch_step() if name == "torch dense" else mindspore_step(CONTENDERS[name])
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - start, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    names = list(CONTENDERS)
    if importlib.util.find_spec("torch"):
        names.insert(0, "torch dense")
    else:
        print("torch is not installed: pip install torch, to compare with it")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([sys.executable, __file__, "--work", name], **pipes) for name in names}
    for worker in workers.values():
        while worker.stdout.readline().strip() != "ready":
            if worker.poll() is not None:
                sys.exit("a contender ended before its first step")
        worker.send_signal(signal.SIGSTOP)
    seconds = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            worker.send_signal(signal.SIGCONT)
            print(args.steps, file=worker.stdin, flush=True)
            seconds[name].append(float(worker.stdout.readline()) / args.steps)
            worker.send_signal(signal.SIGSTOP)
    for worker in workers.values():
        worker.send_signal(signal.SIGCONT)
        worker.stdin.close()
        worker.wait()
    figures = ratios(seconds, names[0])
    print_table("one training step, 768 tokens", figures, names[0])
    if args.json:
        from switchyard.json_text import to_json

        with open(args.json, "w", encoding="utf-8") as file:
            file.write(to_json(figures, indent=1))


if __name__ == "__main__":
    main()
