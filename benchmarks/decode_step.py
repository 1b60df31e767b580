"""What does a generated token cost? One decode step of an exported model against its floor and a dense model.

    python benchmarks/decode_step.py [--batches 1 8] [--length 256] [--rounds 200] [--json FILE] [section.key=value ...]

The model is a Mixtral in small: 4 layers, width 128, 8 experts of which each token visits 2, SwiGLU, unless overrides
say otherwise. The dense model has the same active FLOPs (hidden width K * F), the floor is a graph that only hands the
caches on. All are exported, loaded and called as infer.py does it, with caches of --length places, interleaved.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # MindSpore's kernels have a pool of their own
os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import nn
from timing import interleave, print_table, ratios

from switchyard.config import Config, build
from switchyard.files import plain_path
from switchyard.inference.export import inference_config, prefill_block, write_graphs
from switchyard.inference.mindir import load_graph
from switchyard.json_text import to_json
from switchyard.models import create_model

SMALL = {
    "model": {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "activation": "swiglu"},
    "moe": {"router": "top_k", "expert_num": 8, "num_experts_chosen": 2},
}
VOCABULARY = 65


class HandOn(nn.Cell):
    """The floor: takes what a decode step takes, gives caches back."""

    def construct(self, tokens, position, keys, values):
        return tokens + position, keys, values


def exported(config: Config, length: int):
    """(decode graph as infer.py loads it, shape of a cache but the batch: L, J, h)."""
    decoder = create_model(inference_config(config), VOCABULARY, length=length).set_train(False)
    with tempfile.TemporaryDirectory() as folder:
        names = write_graphs(decoder, Path(folder), length, prefill_block(config, length), None)
        graph = load_graph(Path(folder) / names["decode"], None)
    return graph, (len(decoder.layers), decoder.kv_heads, decoder.head_size)


def floor(cache: ms.Tensor, ids: ms.Tensor):
    """The floor as a loaded graph."""
    with tempfile.TemporaryDirectory() as folder:
        with plain_path(Path(folder)) as plain:
            ms.export(HandOn(), ids, ids, cache, cache, file_name=f"{plain}/floor", file_format="MINDIR")
        return load_graph(Path(folder) / "floor.mindir", None)


def step(graph, batch: int, cache: ms.Tensor):
    """A function that makes one step and reads its result, as generation does."""
    held = [cache, cache]
    ids, places = np.ones(batch, np.int32), np.full(batch, 20, np.int32)

    def run():
        logits, held[0], held[1] = graph(ms.Tensor(ids), ms.Tensor(places), *held)
        return logits.asnumpy()

    return run


def main() -> None:
    """Prints one table a batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json")
    chosen = parser.parse_intermixed_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    config = build(SMALL, chosen.overrides)
    wide = {"intermediate_size": config.moe.num_experts_chosen * config.expert_width}
    dense = config.model_copy(
        update={
            "model": config.model.model_copy(update=wide),
            "moe": config.moe.model_copy(update={"router": "switch", "expert_num": 1, "num_experts_chosen": 1}),
        }
    )
    conditional, (layers, heads, size) = exported(config, chosen.length)
    dense, _ = exported(dense, chosen.length)
    found = {}
    for batch in chosen.batches:
        cache = ms.Tensor(np.zeros((layers, batch, heads, chosen.length, size), np.float32))
        graphs = {
            "dense": dense,
            "conditional": conditional,
            "floor": floor(cache, ms.Tensor(np.ones(batch, np.int32))),
        }
        seconds = interleave({name: step(graph, batch, cache) for name, graph in graphs.items()}, chosen.rounds)
        rows = ratios(seconds, "dense")
        print_table(f"decode step, batch {batch}, caches of {chosen.length}", rows, "dense")
        rates = {name: batch / min(times) for name, times in seconds.items()}
        print("best tokens/s: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items() if name != "floor"))
        found[batch] = {name: min(times) for name, times in seconds.items()}
    if chosen.json:
        Path(chosen.json).write_text(to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
