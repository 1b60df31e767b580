"""What grows with what? The conditional layer over experts, rows and choices; memory and compile time of a train step.

    python benchmarks/scaling.py [--short] [--parts experts rows choices width memory compile] [--rounds 10]
        [--json FILE]

experts, rows, choices: forward and backward of the layer as moe_layer.py has it, width 256, of 2,048 rows, 8 experts
and k = 1 where the part does not change them; the active FLOPs of a row are the same for every number of experts.
width: 4,096 rows of width 512.
Floors: the layer's own expert products; `traffic`, which copies as many bytes as the experts' weights are read forward,
read backward and written as gradients. Where torch is installed, the three ways of torch_peers.
memory: the most that the process holds in a step, less what it held before the model was made, against parameters,
gradients, moments and kept activations as the planner counts them; what the compiler left behind is in it. Linux only.
compile: CPU seconds of the first step less those of a later one, by layers and by experts.
Both once more for a second start, which takes the compiled step from context.compile_cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from timing import print_table, ratios
from workers import alternate, has_torch, record, serve, summary

WIDTH = 256
PARTS = {
    "experts": [(2048, WIDTH, experts, 1) for experts in (2, 8, 32, 128)],
    "rows": [(rows, WIDTH, 8, 1) for rows in (256, 1024, 4096, 16384)],
    "choices": [(2048, WIDTH, 8, choices) for choices in (1, 2, 4)],
    "width": [(4096, 2 * WIDTH, 8, 1)],
}
OURS = ("conditional layer", "expert matrix products", "traffic")
WAYS = ("sort_mm", "grouped_mm", "gather_bmm")
MEMORY = (("small", 4, 128, 8, 12, 64), ("large", 6, 384, 8, 4, 256))  # layers, width, experts, batch, length
COMPILE = ((2, 8), (4, 8), (8, 8), (4, 2), (4, 32), (4, 128))  # layers, experts
VOCABULARY = 65


def contender(name: str):
    """Returns what a contender of the name "N,D,E,K NAME" runs."""
    shape, _, kind = name.partition(" ")
    if kind == "traffic":
        _, width, experts, _ = map(int, shape.split(","))
        source = np.ones(experts * 2 * width * 4 * width, np.float32)
        target = np.empty_like(source)
        half = len(source) // 2

        def copy():  # 3 passes over the weights: a copy reads one and writes one
            np.copyto(target, source)
            np.copyto(target[:half], source[:half])

        return copy
    if kind.startswith("torch "):
        from torch_peers import layer_call

        return layer_call(*map(int, shape.split(",")), kind.removeprefix("torch "))
    import moe_layer

    return moe_layer.contender(name)


def measure_layers(part: str, shapes: list, rounds: int) -> list[dict]:
    """Returns the rows of one part, every contender a process of its own, in turn."""
    peers, rows = tuple(f"torch {way}" for way in WAYS) if has_torch() else (), []
    for numbers in shapes:
        shape = ",".join(map(str, numbers))
        seconds = alternate(__file__, [f"{shape} {name}" for name in (*OURS, *peers)], rounds, 3)
        seconds = {name.split(" ", 1)[1]: found for name, found in seconds.items()}
        print_table(f"{part}: rows, width, experts, choices {shape}", ratios(seconds, OURS[0]), OURS[0])
        rows += summary(seconds, part=part, shape=shape)
    return rows


def trained(layers: int, width: int, experts: int, batch: int, length: int, cache: str | None = None) -> dict:
    """Returns the bytes and seconds of three train steps in this process; `cache` keeps the compiled step."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    from switchyard.config import build
    from switchyard.planner.costs import costs
    from switchyard.training.compile_cache import compile_cache
    from switchyard.training.step import create_step

    ms.set_context(mode=ms.GRAPH_MODE)
    model = {"num_layers": layers, "hidden_size": width, "num_heads": 4, "seq_length": length, "norm": "layernorm"}
    moe = {"expert_num": experts, "layers": "all"}
    sections = {"model": model, "moe": moe, "data": {"batch_size": batch}, "context": {"compile_cache": cache}}
    config = build(sections)
    (ms.Tensor(np.ones((64, 64), np.float32)) @ ms.Tensor(np.ones((64, 64), np.float32))).asnumpy()
    before = status("VmRSS")
    step = create_step(config, VOCABULARY)
    step.initialise()
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, batch, length)).astype(np.int32)
    valid, noise = np.ones(tokens.shape, np.float32), np.zeros((1, 1, 1, 1), np.float32)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        with nullcontext() if seconds else compile_cache(config, step.shapes, lambda line: None):
            step(tokens, tokens, valid, noise, 1e-3)
        seconds.append(time.process_time() - start)
    planned = costs(config, VOCABULARY)
    parts = {name: getattr(planned, name) for name in ("weights", "gradients", "optimizer", "activations")}
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts anew: without the compiler's
    step(tokens, tokens, valid, noise, 1e-3)
    held = {"peak": status("VmHWM") - before}
    return {**held, "planned": sum(parts.values()), **parts, "compile": seconds[0] - min(seconds[1:])}


def status(name: str) -> int:
    """Returns bytes of this process: VmRSS, what it holds, or VmHWM, the most that it held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def apart(*numbers: int, cache: str | None = None) -> dict:
    """Returns what `trained` finds in a fresh process."""
    given = ["--train", *map(str, numbers), *(["--cache", cache] if cache else [])]
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True, check=True)
    from switchyard.config.reader import parse_json

    return parse_json(done.stdout.splitlines()[-1])


def twice(*numbers: int) -> tuple[dict, dict]:
    """Returns what `trained` finds without a cache, and at the second start with one."""
    with tempfile.TemporaryDirectory() as cache:
        apart(*numbers, cache=cache)
        return apart(*numbers), apart(*numbers, cache=cache)


def measure_memory(shapes) -> list[dict]:
    """Returns a row a size, and prints it."""
    rows = []
    for size, *numbers in shapes:
        found, again = twice(*numbers)
        peaks = f"{found['peak'] / 1e6:,.0f} MB, second start {again['peak'] / 1e6:,.0f} MB"
        print(f"memory of {size}: {peaks}, needed {found['planned'] / 1e6:,.0f} MB", flush=True)
        rows.append({"part": "memory", "size": size, **found, "second_peak": again["peak"]})
    return rows


def measure_compile(shapes) -> list[dict]:
    """Returns a row a size, and prints it."""
    rows = []
    for layers, experts in shapes:
        first, second = (found["compile"] for found in twice(layers, 64, experts, 4, 32))
        print(f"compile, {layers} layers, {experts} experts: {first:.1f}, then {second:.1f} CPU seconds", flush=True)
        rows.append({"part": "compile", "layers": layers, "experts": experts, "seconds": first, "second": second})
    return rows


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="two numbers of experts and of layers, 5 rounds: a minute")
    parser.add_argument("--parts", nargs="+", default=[*PARTS, "memory", "compile"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--train", type=int, nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return serve(contender(args.work), least=True)
    if args.train:
        from switchyard.json_text import to_json

        return print(to_json(trained(*args.train, cache=args.cache)))
    rows, parts = [], ("experts", "compile") if args.short else args.parts
    for part in parts:
        if part in PARTS:
            rows += measure_layers(part, PARTS[part][: 2 if args.short else None], 5 if args.short else args.rounds)
    if "memory" in parts:
        rows += measure_memory(MEMORY)
    if "compile" in parts:
        rows += measure_compile(COMPILE[: 2 if args.short else None])
    if args.json:
        record(args.json, "what grows with what, on CPU", "python benchmarks/scaling.py", rows)


if __name__ == "__main__":
    main()
