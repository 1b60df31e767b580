"""Compiles any rank's training step for a cluster that is not there.

`python -m switchyard.simulation.compile --config config/NAME.yaml --devices 64` prints the collectives by kind, group,
layer and bytes, and what the rank holds. The compile runs in a process of its own, see `fake_cann` for its environment.
"""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from switchyard import cli, json_text
from switchyard import config as configuration
from switchyard.config import Config
from switchyard.data.tokenizer import expected_vocabulary
from switchyard.distributed.compiled_graph import Collective, Graph, collectives, read_graph
from switchyard.distributed.placement import ParallelDims
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.files import scratch
from switchyard.simulation.compile_worker import JOB, TRAINING_STEP
from switchyard.simulation.fake_cann import simulation_environment
from switchyard.text_table import table
from switchyard.training.limits import require_trainable
from switchyard.trust import check_trusted_section

COLUMNS = ["collective", "direction", "where", "why", "ranks", "number", "bytes each"]
CONTROLS = ("learning_rate", "unscale", "routers_learn", "begins", "ends")  # parameters that the host sets
SUMS = ("accumulated.", "accu_grads.")  # of gradients: of several calls, of a pipeline's micro-batches
TIMEOUT = 3600.0  # seconds that a process may take: a large model on a busy machine takes many minutes
OPTIMIZER_STATE = ("moment1.", "moment2.", "correction", *SUMS, *CONTROLS)


@dataclass(frozen=True)
class Report:
    """Holds what the compiler made of the training step of one rank.

    Attributes:
        devices, rank: of the simulated cluster.
        blob: the final graph as MindIR.
        layouts: parameter -> (device matrix, tensor map, local shape) as the compiler says, moments included.
        build_seconds: making the network; seconds: compiling; megabytes: peak memory of the process.
    """

    devices: int
    rank: int
    blob: bytes
    layouts: dict[str, list]
    build_seconds: float
    seconds: float
    megabytes: float

    @cached_property
    def graph(self) -> Graph:
        """Returns the graph that `blob` holds."""
        return read_graph(self.blob)

    @cached_property
    def collectives(self) -> list[Collective]:
        """Returns the communication operators in order of execution."""
        return collectives(self.graph)

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Returns the local shape of every tensor that the rank keeps between steps: weights, moments, counters."""
        return {name: shape for name, shape, _ in self.graph.parameters.values()}

    @cached_property
    def operators(self) -> Counter:
        """Counts the operators of each kind in the graph."""
        return Counter(node.kind for part in (self.graph, *self.graph.functions.values()) for node in part.nodes)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Returns the bytes of weights, of optimizer state and of sums of gradients, if any, that the rank holds."""
        sizes = Counter({"weights": 0, "optimizer state": 0})
        for name, shape, dtype in self.graph.parameters.values():
            kind = "optimizer state" if name.startswith(OPTIMIZER_STATE) else "weights"
            kind = "gradients" if name.startswith(SUMS) else kind
            sizes[kind] += math.prod(shape) * dtype().itemsize
        return dict(sizes)

    def count(self, kind: str, direction: str | None = None, layer: str = "") -> int:
        """Counts the collectives of a kind, of one direction if given, in layers that begin so."""
        found = [one for one in self.collectives if one.kind == kind and one.layer.startswith(layer)]
        return sum(direction in (None, one.direction) for one in found)


def compile_step(config: Config | dict, devices: int, rank: int = 0, vocab: int | None = None) -> Report:
    """Compiles the training step of one rank for `devices` simulated Ascend devices.

    Args:
        config: a Config, or the tree that one is built of.
        devices: must be what the degrees of `parallel` ask for.
        rank: whose graph.
        vocab: entries of the vocabulary; None asks `data.tokenizer`.

    Raises:
        UserError: devices or rank that do not fit, a machine on which this does not work, a graph that the compiler
            refuses.
    """
    return compile_ranks(config, devices, [rank], vocab)[0]


def compile_ranks(
    config: Config | dict,
    devices: int,
    ranks: Sequence[int],
    vocab: int | None = None,
    step: str = TRAINING_STEP,
) -> list[Report]:
    """Compiles several ranks, at most two at a time, in one process that imports MindSpore once.

    `step`: `module:function` of (Config, vocab) that returns what to compile and its inputs, where it is not the
    training step.
    """
    config = configuration.build(config) if isinstance(config, dict) else config
    check_devices(config, devices, ranks)
    vocab = vocab or expected_vocabulary(config)
    environment = {**os.environ, **simulation_environment()}
    source = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = with_source(source, environment.get("PYTHONPATH"))
    with scratch("simulate") as folder:
        job = {"config": config.model_dump(), "vocab": vocab, "devices": devices, "ranks": list(ranks), "step": step}
        (folder / JOB).write_text(json.dumps(job | {"jobs": min(2, os.cpu_count() or 1)}, allow_nan=False))
        command = [sys.executable, "-m", "switchyard.simulation.compile_worker", str(folder)]
        done = run_child(command, environment, TIMEOUT, f"compile for {devices} devices")
        if done.returncode:
            raise UserError(_reason(folder, done))
        found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks]
        blobs = [(folder / f"rank{rank}.mindir").read_bytes() for rank in ranks]
        return [Report(devices, *parts, **more) for *parts, more in zip(ranks, blobs, found)]


def with_source(source: str, path: str | None) -> str:
    """Returns PYTHONPATH with the package's folder first, without empty entries, which mean the current folder."""
    return os.pathsep.join([source, *filter(None, (path or "").split(os.pathsep))])


def run_child(command: list[str], environment: dict, timeout: float, what: str) -> subprocess.CompletedProcess:
    """Runs a Python process to its end (UserError where it takes longer than `timeout` seconds), its prints kept."""
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its forks end with it
    )
    try:
        output, _ = child.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(child.pid, 9)
        child.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise UserError(
                f"{what}: not finished after {timeout:.0f} s; try fewer layers or a smaller batch"
            ) from None
        raise
    return subprocess.CompletedProcess(command, child.returncode, output)


def check_devices(config: Config, devices: int, ranks: Sequence[int]) -> None:
    """Refuses numbers of devices and ranks that the degrees do not have (UserError)."""
    degrees = ParallelDims.of(config.parallel)
    if config.devices != devices:
        raise UserError(
            f"--devices: {devices}; parallel.data_parallel * model_parallel * pipeline_stage is "
            f"{degrees.data_parallel} * {degrees.model_parallel} * {degrees.pipeline_stage} = {config.devices}: "
            "they must be equal"
        )
    for rank in ranks:
        degrees.coordinates(rank)  # refuses ranks that are not there


def _reason(folder: Path, done: subprocess.CompletedProcess) -> str:
    """Returns why a compile failed, in one line."""
    for path in sorted(folder.glob("rank*.error")):
        return f"rank {path.stem[4:]}: the step does not compile: {path.read_text()}"
    lines = [line for line in (done.stdout or "").splitlines() if line.strip()]
    return f"the compile ended with code {done.returncode}: {lines[-1] if lines else 'it printed nothing'}"


def render(report: Report, config: Config, brief: bool = False) -> str:
    """Renders the report as text: collectives, parameters, memory of the rank, cost of the compile.

    `brief`: collectives of layers that are alike in one row, without the parameters.
    """
    place = ParallelDims.of(config.parallel).coordinates(report.rank)
    text = [
        f"rank {report.rank} of {report.devices}: stage {place.stage}, outer data shard {place.outer}, "
        f"expert shard {place.expert}, model shard {place.model}",
        "",
        *table(COLUMNS, collective_rows(report, brief)),
        "",
    ]
    if not brief:
        rows = []
        for name, shape in sorted(report.parameters.items()):
            if not name.startswith(OPTIMIZER_STATE):
                rows.append([name, str(list(full_shape(report.layouts.get(name), shape))), str(list(shape))])
        text += [*table(["parameter", "full", "this rank's"], rows), ""]
    sizes = report.held_bytes
    sent = sum(one.bytes for one in report.collectives)
    text += [
        f"holds {sizes['weights']:,} bytes of weights and {sizes['optimizer state']:,} of optimizer state; "
        f"{len(report.collectives)} collectives of {sent:,} bytes per step",
        f"compiled in {report.seconds:.1f} s (network built in {report.build_seconds:.1f} s), "
        f"peak memory {report.megabytes:,.0f} MB, graph of {sum(report.operators.values()):,} nodes",
    ]
    return "\n".join(text)


def collective_rows(report: Report, brief: bool = False) -> list[list[str]]:
    """Returns equal collectives as one row, in order of first appearance; `brief`: whatever layer they are of."""
    alike = Counter()
    for one in report.collectives:
        layer = re.sub(r"^layers\.\d+", "layers.*", one.layer) if brief else one.layer
        alike[one.kind, one.direction, layer, one.cause, ranks_text(one.group, report.devices), one.bytes] += 1
    return [[*map(str, key[:5]), str(number), f"{key[5]:,}"] for key, number in alike.items()]


def full_shape(layout: list | None, local: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the full shape of a sharded parameter: (device matrix, tensor map, local shape) as the compiler says."""
    if layout is None:
        return tuple(local)
    matrix, axes, shard = layout
    full = []
    for axis, length in zip(axes, shard):
        for part in axis if isinstance(axis, list | tuple) else [axis]:
            length *= 1 if part < 0 else matrix[len(matrix) - 1 - part]
        full.append(length)
    return tuple(full)


def ranks_text(group: tuple[int, ...], devices: int) -> str:
    """Renders ranks in few characters: all, 0..7, or 0,8,..,56."""
    if len(group) == devices:
        return f"all {devices}"
    steps = {second - first for first, second in itertools.pairwise(group)}
    if len(group) > 2 and len(steps) == 1:
        step = steps.pop()
        return f"{group[0]}..{group[-1]}" if step == 1 else f"{group[0]},{group[1]},..,{group[-1]}"
    return ",".join(map(str, group)) or "-"


def to_json(report: Report) -> dict:
    """Returns the fields of a report except the graph."""
    names = ("devices", "rank", "held_bytes", "build_seconds", "seconds", "megabytes")
    return {name: getattr(report, name) for name in names} | {
        "collectives": [asdict(one) for one in report.collectives],
        "parameters": {name: list(shape) for name, shape in report.parameters.items()},
        "operators": dict(report.operators),
    }


def create_parser(prog: str, description: str) -> cli.Parser:
    """Returns the parser of the arguments that simulation and cluster emulation share."""
    parser = cli.create_parser(prog, description)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see config/")
    parser.add_argument(
        "--devices", required=True, type=cli.whole, metavar="N", help="devices of the simulated cluster"
    )
    parser.add_argument(
        "--vocab", type=cli.whole, metavar="V", help="size of the vocabulary (default: that of the tokenizer)"
    )
    return parser


def main(arguments: list[str]) -> None:
    """Runs `python -m switchyard.simulation.compile`; see its --help."""
    parser = create_parser(
        "python -m switchyard.simulation.compile",
        "Compiles the training step of one rank for N Ascend devices; no device is needed.",
    )
    parser.add_argument(
        "--rank", type=cli.whole, default=0, metavar="R", help="rank whose graph is compiled (default 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the report to this file, as JSON")
    parser.add_argument("--brief", action="store_true", help="print equal layers as one row, without parameters")
    chosen = parser.parse_intermixed_args(arguments)
    config = configuration.load(chosen.config, chosen.overrides, devices=chosen.devices)
    check_trusted_section(config.moe, consent=True, say=print)
    require_trainable(config)
    with cli.cleans_up():
        report = compile_step(config, chosen.devices, chosen.rank, chosen.vocab)
    print(render(report, config, chosen.brief))
    if chosen.json:
        with writing(chosen.json):
            Path(chosen.json).write_text(json_text.to_json(to_json(report), indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.run(main))
