"""What does a generated token cost, and a prompt? An exported model against PyTorch, a dense model and its floor.

    python benchmarks/decode_step.py [--short] [--sizes small large] [--batches 1 8] [--rounds 20] [--json FILE]

small is a Mixtral of 4 layers, width 128, large one of 6 layers, width 384; both have 8 experts of which a token visits
2, SwiGLU, rotary positions, a vocabulary of 65, float32. A decode step writes place 20 of caches of 256 places; a
prefill reads one prompt of 1,024 tokens. Ours are loaded and called as infer.py does it. The dense model has the same
active FLOPs; the floor hands tokens through a graph that takes the caches too. PyTorch: a plain loop with a static
cache, whose experts are fed in the ways of torch_decode, and Hugging Face's Mixtral. Contenders run in turn, each in a
process of its own; of 20 calls in a row the quickest counts.
"""

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
from timing import print_table, ratios
from workers import alternate, has_torch, record, serve, summary

SIZES = {
    "small": {"layers": 4, "width": 128, "heads": 4, "hidden": 512, "experts": 8, "choices": 2},
    "large": {"layers": 6, "width": 384, "heads": 6, "hidden": 1536, "experts": 8, "choices": 2},
}
VOCABULARY, PLACES, PLACE, PROMPT = 65, 256, 20, 1024
OURS = ("switchyard", "switchyard dense", "switchyard floor")
MIXTRAL = "torch mixtral"
COPIES = "torch plain gather_bmm"  # copies weights for each token: for a prefill 60 times as slow as the others
PLAIN = ("torch plain each", "torch plain grouped_mm", COPIES, "torch plain dense")


def our_config(size: str, dense: bool):
    """Returns the configuration of a size; of the dense model of the same active FLOPs."""
    from switchyard.config import build

    sizes = SIZES[size]
    moe = {"router": "top_k", "expert_num": sizes["experts"], "num_experts_chosen": sizes["choices"]}
    hidden = sizes["hidden"]
    if dense:
        moe, hidden = {"router": "switch", "expert_num": 1}, hidden * sizes["choices"]
    names = {"num_layers": sizes["layers"], "hidden_size": sizes["width"], "num_heads": sizes["heads"]}
    return build({"model": {**names, "activation": "swiglu", "intermediate_size": hidden}, "moe": moe}, [])


def our_call(size: str, kind: str, batch: int, length: int):
    """Returns a function: a decode step with caches of `length` places, or the prefill of `length` tokens."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    decoder, graphs = loaded(our_config(size, kind == "dense"), length, batch)
    if batch == 0:  # prefill
        prompt, lengths = ms.Tensor(random_tokens(1, length)), ms.Tensor(np.array([length], np.int32))
        return lambda: graphs["prefill"](prompt, lengths)[0].asnumpy()
    cache = (batch, decoder.kv_heads, length, decoder.head_size)
    caches = [ms.Tensor(np.zeros(cache, np.float32)) for _ in range(2 * len(decoder.layers))]
    graph = floor(caches) if kind == "floor" else graphs["decode"]
    ids, places = random_tokens(batch), np.full(batch, PLACE, np.int32)
    return lambda: graph(ms.Tensor(ids), ms.Tensor(places), *caches).asnumpy()


def random_tokens(*shape: int) -> np.ndarray:
    """Returns tokens of any kind, so that rows choose different experts, as those of the PyTorch models do."""
    return np.random.default_rng(0).integers(0, VOCABULARY, shape).astype(np.int32)


def loaded(config, length: int, batch: int):
    """Returns (the decoder, its graph of decoding `batch` rows and that of the prefill, as infer.py loads them)."""
    from switchyard.inference.export import inference_config, prefill_block, write_graphs
    from switchyard.inference.mindir import faster_for, load_graph
    from switchyard.models import create_model

    decoder = create_model(inference_config(config), VOCABULARY, length=length).set_train(False)
    with tempfile.TemporaryDirectory() as folder:
        names = write_graphs(decoder, Path(folder), length, prefill_block(config, length), None)
        chosen = faster_for(batch, config.moe.num_experts_chosen, config.moe.expert_num, tuple(names))
        graphs = {"decode": names[chosen], "prefill": names["prefill"]}
        return decoder, {name: load_graph(Path(folder) / file, None) for name, file in graphs.items()}


def floor(caches: list):
    """Returns a loaded graph that takes what a decode step takes, and adds positions to tokens."""
    import mindspore as ms
    from mindspore import nn

    from switchyard.files import plain_path
    from switchyard.inference.mindir import load_graph

    class HandOn(nn.Cell):
        def construct(self, tokens, position, *caches):
            return tokens + position

    ids = ms.Tensor(np.ones(caches[0].shape[0], np.int32))
    with tempfile.TemporaryDirectory() as folder:
        with plain_path(Path(folder)) as plain:
            ms.export(HandOn(), ids, ids, *caches, file_name=f"{plain}/floor", file_format="MINDIR")
        return load_graph(Path(folder) / "floor.mindir", None)


def contender(name: str):
    """Returns what a contender of the name "SIZE BATCH ..." runs; batch 0: the prefill."""
    size, batch, owner, *kind = name.split()
    batch, length = int(batch), PLACES if int(batch) else PROMPT
    if owner == "switchyard":
        return our_call(size, kind[0] if kind else "", batch, length)
    from torch_decode import hugging_face_call, plain_call

    given = (VOCABULARY, max(batch, 1), length, PLACE if batch else 0)
    if kind[0] == "mixtral":
        return hugging_face_call(SIZES[size], *given)
    sizes = SIZES[size]
    if kind[1] == "dense":
        return plain_call({**sizes, "experts": 1, "hidden": sizes["hidden"] * sizes["choices"]}, *given, "each")
    return plain_call(sizes, *given, kind[1])


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the small size, batch 1, 5 rounds: a minute")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 0], help="rows of a step; 0 is the prefill")
    parser.add_argument(
        "--peers", nargs="+", default=[*PLAIN, MIXTRAL], help="contenders of PyTorch, as the table names them"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", action="store_true", help="leave out our dense model and the floor")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return serve(contender(args.work), least=True)
    peers, rows = args.peers if has_torch() else [], []
    if MIXTRAL in peers and not has_torch("transformers"):
        peers.remove(MIXTRAL)
    for size in ["small"] if args.short else args.sizes:
        for batch in args.batches[:1] if args.short else args.batches:
            ours = OURS if batch else OURS[:2]
            against = [name for name in peers if batch or name != COPIES]
            names = [f"{size} {batch} {name}" for name in (*(ours[:1] if args.only else ours), *against)]
            seconds = alternate(__file__, names, 5 if args.short else args.rounds, 20 if batch else 1)
            seconds = {name.split(" ", 2)[2]: found for name, found in seconds.items()}
            title = f"decode step of {size}, batch {batch}" if batch else f"prefill of {size}, {PROMPT} tokens"
            print_table(title, ratios(seconds, OURS[0]), OURS[0])
            rows += summary(seconds, size=size, batch=batch)
    if args.json:
        record(args.json, "a decode step and a prefill on CPU", "python benchmarks/decode_step.py", rows)


if __name__ == "__main__":
    main()
