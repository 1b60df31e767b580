"""Proves a layout: the compiled graphs of all ranks, executed together, against one device.

`python -m switchyard.parallel.virtual --config config/NAME.yaml --devices 8` compiles the training step of every rank
for simulated Ascend devices, executes all of them in numpy, collectives included (see `interpreter`), trains the same
model on one CPU device with MindSpore's kernels, and compares losses and updated parameters. It is for small sizes:
lower the layers and the batch by overrides; the layout is the same.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from switchyard import cli
from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.files import scratch
from switchyard.parallel import simulate
from switchyard.parallel.interpreter import EXCHANGES, Arrays, ClusterError, run_cluster
from switchyard.parallel.placement import Degrees, optimizer_slices, placement, slice_of
from switchyard.parallel.reference import AFTER, BATCHES, BEFORE, RESULT
from switchyard.parallel.simulate import ACCUMULATED, Report
from switchyard.parallel.stages import factors
from switchyard.parallel.worker import JOB
from switchyard.trust import check_trusted

TOLERANCE = 1e-5  # absolute, of losses and of parameters
RATE, UNSCALE = "learning_rate", "unscale"  # parameters of the graph that the host sets


@dataclass(frozen=True)
class Comparison:
    """How far a cluster and one device are apart.

    Attributes:
        losses: of each step, (one device, first rank).
        differences: parameter or moment -> (largest absolute difference over all ranks, how far it moved).
        met: (kind, ranks) -> collectives of a step.
    """

    losses: list[tuple[float, float]]
    differences: dict[str, tuple[float, float]]
    met: Counter

    @property
    def largest(self) -> float:
        """Largest difference of losses and parameters; moments, which have other units, do not count."""
        apart = [abs(one - cluster) for one, cluster in self.losses]
        kept = [far for name, (far, _) in self.differences.items() if not name.startswith("moment")]
        return max(apart + kept, key=lambda value: np.inf if np.isnan(value) else value)

    @property
    def equal(self) -> bool:
        """Whether they agree to TOLERANCE."""
        return bool(self.largest <= TOLERANCE)


def draw_batches(config: Config, vocab: int, steps: int, noise_slices: int = 0) -> Arrays:
    """Random batches of all devices together, from train.seed: [steps, A, B, S] each of A micro-batches, a part of them
    padding.

    `rates` [steps] are the peak learning rate; `noise` [steps, A, max(J, 1), N, D] of U(0, 1).
    """
    random, count = np.random.default_rng(config.train.seed), config.micro_batches
    shape = (steps, count, config.data.batch_size, config.model.seq_length)
    tokens = random.integers(0, vocab, (*shape[:3], shape[3] + 1)).astype(np.int32)
    valid = np.ones(shape, np.float32)
    valid[:, -1, -1, shape[3] // 2 :] = 0  # the last sequence is half padding
    noise = np.zeros((steps, count, 1, 1, 1), np.float32)
    if noise_slices:
        noise = random.random((steps, count, noise_slices, config.rows, config.model.hidden_size), np.float32)
    rates = np.full(steps, config.schedule.learning_rate, np.float32)
    return {"tokens": tokens[..., :-1], "labels": tokens[..., 1:], "valid": valid, "noise": noise, "rates": rates}


def train_reference(config: Config, vocab: int, batches: Arrays, timeout: float = 600) -> Arrays:
    """Trains on one CPU device in a process of its own: see `reference` for what comes back."""
    with scratch("reference") as folder:
        (folder / JOB).write_text(json.dumps({"config": config.model_dump(), "vocab": vocab}))
        np.savez(folder / BATCHES, **batches)
        source = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": simulate.with_source(source, os.environ.get("PYTHONPATH"))}
        done = simulate.run_child(
            [sys.executable, "-m", "switchyard.parallel.reference", str(folder)], environment, timeout, "the reference"
        )
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            raise UserError(f"the reference on one device failed: {lines[-1] if lines else 'it printed nothing'}")
        with np.load(folder / RESULT) as found:
            return dict(found)


def held_by(name: str, whole: np.ndarray, local: tuple[int, ...], degrees: Degrees, rank: int) -> np.ndarray:
    """The slice of a parameter that a rank holds, cut further along axis 0 where ZeRO does.

    Raises:
        ClusterError: the compiler's local shape is another one than `placement` says.
    """
    cut = placement(name, whole.shape, degrees)
    part = whole[slice_of(whole.shape, cut, degrees, rank)]
    if part.shape != local and optimizer_slices(whole.shape, cut, degrees, rank) > 1:
        replicas = degrees.replicas(cut, rank)
        part = np.split(part, len(replicas))[replicas.index(rank)]
    if part.shape != local:
        raise ClusterError(f"{name}: the compiler says {local}, the placement {part.shape} of {whole.shape}")
    return part.copy()


def batch_of(batches: Arrays, step: int, degrees: Degrees, rank: int, noisy: bool) -> list[np.ndarray]:
    """What a rank reads at a step, its micro-batches one after the other: rows of tokens, labels, valid [A * B, S] and,
    where the model reads it, of noise [A * N, J, D]."""
    parts = [batches[name][step] for name in ("tokens", "labels", "valid")]  # [A, B, S]
    if noisy:
        parts.append(batches["noise"][step].transpose(0, 2, 1, 3))  # [A, N, J, D]
    index = degrees.data_slice(rank)
    own = [np.split(part, degrees.data_parallel, 1)[index] for part in parts]
    return [np.ascontiguousarray(part).reshape(-1, *part.shape[2:]) for part in own]


def shares_of(valid: np.ndarray) -> np.ndarray:
    """The share of each micro-batch in a step's valid tokens [A, B, S]: [A]."""
    counts = valid.sum((1, 2))
    return counts / counts.sum()


def compare(
    config: Config,
    reports: Sequence[Report],
    batches: Arrays,
    reference: Arrays,
    exchanges: Mapping[str, Callable] = EXCHANGES,
    spoil: Callable[[int, Arrays], None] | None = None,
) -> Comparison:
    """Executes the steps on all ranks and compares with one device.

    Args:
        config: degrees.
        reports: of all ranks, in order.
        batches, reference: of `draw_batches` and `train_reference`.
        exchanges: what collectives do; faults are injected here.
        spoil: (rank, its weights) -> changes them before the first step; faults are injected here too.

    Raises:
        ClusterError: graphs that cannot be executed together.
    """
    degrees, graphs = Degrees.of(config.parallel), [report.graph for report in reports]
    before = {name.removeprefix(BEFORE): array for name, array in reference.items() if name.startswith(BEFORE)}
    scale = config.train.init_loss_scale if config.model.compute_dtype == "float16" else 1.0
    before |= {RATE: np.float32(0), UNSCALE: np.float32(1 / scale)}
    weights = [_held_at_first(report, before, degrees) for report in reports]
    for rank, own in enumerate(weights):
        if spoil is not None:
            spoil(rank, own)
    noisy, losses, met = batches["noise"].shape[-1] > 1, [], Counter()
    weighted = len(graphs[0].input_shapes) > 3 + noisy  # by a factor of each micro-batch's loss
    for step, rate in enumerate(batches["rates"]):
        for own in weights:
            own[RATE] = np.float32(rate)
        inputs = [batch_of(batches, step, degrees, rank, noisy) for rank in range(len(graphs))]
        shares = shares_of(batches["valid"][step])
        if weighted:
            inputs = [[*parts, factors(config, scale * shares)] for parts in inputs]
        outputs, met = run_cluster(graphs, inputs, weights, exchanges)
        losses.append((float(reference["losses"][step]), loss_of(outputs, shares)))
    return Comparison(losses, _differences(weights, before, reference, degrees), met)


def _held_at_first(report: Report, before: Arrays, degrees: Degrees) -> Arrays:
    """What a rank holds before the first step: its slices of `before`, and empty sums of gradients."""
    shapes = report.parameters.items()
    empty = {name: np.zeros(shape, np.float32) for name, shape in shapes if name.startswith(ACCUMULATED)}
    rest = [(name, shape) for name, shape in shapes if name not in empty]
    return empty | {name: held_by(name, _whole(before, name), shape, degrees, report.rank) for name, shape in rest}


def _differences(weights: list[Arrays], before: Arrays, reference: Arrays, degrees: Degrees) -> dict:
    """Name -> (largest difference of any rank's slice from one device's, how far training has moved it)."""
    differences, names = {}, set().union(*weights) - {RATE, UNSCALE}
    for name in sorted(name for name in names if not name.startswith(ACCUMULATED)):
        end = reference[AFTER + name]
        far = 0.0
        for rank, own in enumerate(weights):
            if name in own:
                apart = np.abs(own[name] - held_by(name, end, own[name].shape, degrees, rank))
                far = max(far, float(apart.max()), key=lambda value: np.inf if np.isnan(value) else value)
        differences[name] = (far, float(np.abs(end - before[name]).max()))
    return differences


def _whole(arrays: Arrays, name: str) -> np.ndarray:
    if name not in arrays:
        raise ClusterError(f"{name}: one device has no such parameter")
    return np.asarray(arrays[name])


def loss_of(outputs: Sequence[tuple], shares: Sequence[float] = (1.0,)) -> float:
    """The cross-entropy in the outputs of the ranks: the second of each micro-batch's figures, which have these shares,
    equal on all ranks that have it. Last comes the norm of the gradients."""
    found = []
    for *figures, _ in map(_flat, outputs):
        width = len(figures) // len(shares)
        found += [sum(share * figures[micro * width + 1] for micro, share in enumerate(shares))] if figures else []
    if not found or max(found) - min(found) > TOLERANCE:
        raise ClusterError(f"loss: the ranks differ, {sorted(set(found))}")
    return found[0]


def _flat(value) -> list[float]:
    if isinstance(value, tuple):
        return [number for part in value for number in _flat(part)]
    return [float(number) for number in np.ravel(value)] if isinstance(value, np.ndarray | np.generic) else []


def prove(config: Config, devices: int, steps: int = 3, vocab: int | None = None) -> Comparison:
    """Compiles, executes, trains on one device and compares (UserError as in `simulate.compile_step`)."""
    if config.model.compute_dtype != "float32":  # AdamW makes a whole step of the rounding error of a tiny gradient
        raise UserError(f"model.compute_dtype: {config.model.compute_dtype}; a virtual cluster is compared in float32")
    vocab = vocab or simulate.vocabulary(config)
    reports = simulate.compile_ranks(config, devices, range(devices), vocab)
    batches = draw_batches(config, vocab, steps, noise_slices(reports[0]))
    return compare(config, reports, batches, train_reference(config, vocab, batches))


def noise_slices(report: Report) -> int:
    """Slices J of noise that the step reads: its fourth input is then [A * N, J, D]."""
    shapes = report.graph.input_shapes
    return shapes[3][1] if len(shapes) > 3 and len(shapes[3]) == 3 else 0


def render(found: Comparison) -> str:
    """Losses, the parameters that differ most, and the verdict."""
    steps = [[str(step), f"{one:.8f}", f"{cluster:.8f}"] for step, (one, cluster) in enumerate(found.losses, 1)]
    worst = sorted(found.differences.items(), key=lambda item: -item[1][0])
    rows = [[name, f"{far:.2e}", f"{moved:.2e}"] for name, (far, moved) in worst]
    verdict = "equal" if found.equal else "DIFFERENT"
    return "\n".join(
        [
            *simulate.table(["step", "loss of one device", "of the cluster"], steps),
            "",
            *simulate.table(["parameter", "largest difference", "moved by"], rows),
            "",
            f"{sum(found.met.values())} collectives a step over all ranks; largest difference of losses and "
            f"parameters {found.largest:.2e}, allowed {TOLERANCE:g}: {verdict}",
        ]
    )


def main(arguments: list[str]) -> int:
    """`python -m switchyard.parallel.virtual`: see its --help. Returns 1 where cluster and device differ."""
    parser = simulate.create_parser(
        "python -m switchyard.parallel.virtual",
        "Executes the compiled training steps of all ranks in numpy and compares them with one device.",
    )
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="training steps; 3 if not given")
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.steps < 1:
        raise UserError(f"--steps: {chosen.steps}; at least 1")
    config = configuration.load(chosen.config, chosen.overrides)
    check_trusted(config.moe.router, consent=True, say=print)
    try:
        with cli.cleans_up():
            found = prove(config, chosen.devices, chosen.steps, chosen.vocab)
    except ClusterError as error:
        print(f"virtual cluster: {error}")
        return 1
    print(render(found))
    return 0 if found.equal else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
