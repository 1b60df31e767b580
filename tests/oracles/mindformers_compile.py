"""Compiles one rank's training step through MindFormers' Trainer, in an environment of simulated Ascend devices.

`python -m oracles.mindformers_compile OUT section.key=value ...` changes keys of config/mindformers/quickstart.yaml and
writes what the compiler made of it: OUT.
"""

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
YAML = ROOT / "config/mindformers/quickstart.yaml"
COMPILES = [
    "context.device_target=Ascend",
    "use_parallel=True",
    "only_save_strategy=True",
    "runner_config.sink_mode=True",
]


def main(out: str, *overrides: str) -> None:
    """Compiles, and writes collectives, their layers and the shapes of this rank's parameters."""
    from mindspore import nn

    from switchyard.distributed.compiled_graph import collectives, compiled_model, read_graph
    from switchyard.interop.mindformers.launch import train

    kept, compile_cell = [], nn.Cell.compile

    def keep(cell, *arguments, **keys):
        kept.append(cell)  # the network, joined with the data by MindSpore's Model
        return compile_cell(cell, *arguments, **keys)

    nn.Cell.compile = keep
    with contextlib.suppress(SystemExit):
        train(YAML, [*COMPILES, *overrides])
    graph = read_graph(compiled_model(kept[-1]))
    found = {
        "collectives": Counter(f"{one.kind} {one.direction} {one.group}" for one in collectives(graph)),
        "layers": [f"{one.kind} {one.direction} {one.layer}" for one in collectives(graph)],
        "parameters": {name: shape for name, shape, _ in graph.parameters.values()},
        "operators": Counter(node.kind for part in (graph, *graph.functions.values()) for node in part.nodes),
    }
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
