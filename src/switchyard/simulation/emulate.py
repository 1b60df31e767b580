"""Proves a layout: the compiled graphs of all ranks, executed together, against one device.

`python -m switchyard.simulation.emulate --config config/NAME.yaml --devices 8` compiles the training step of every rank
for simulated Ascend devices, executes all of them in numpy, collectives included (see `interpreter`), trains the same
model on one CPU device with MindSpore's kernels, and compares losses, gradients and updated parameters by the rule of
`verdict`. It is for small sizes: lower the layers and the batch by overrides; the layout is the same.

Exit codes: 0 equal; 1 DIFFERENT, or graphs that cannot work together; 2 what cannot be compiled or executed here.

A router may be so undecided between two experts that rounding decides. Where loads of experts differ and the verdict is
DIFFERENT, the whole is repeated with other batches, at most DRAWS times: a fault stays, a tie does not.

ReLU has a kink: a hidden value that is 1e-8 on one side and -1e-8 on the other has a gradient on one side only. Where
losses agree and gradients do not, the whole is repeated with GELU, which has none: a fault of the layout stays.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from switchyard import cli
from switchyard import config as configuration
from switchyard.config import Config
from switchyard.data.tokenizer import expected_vocabulary
from switchyard.distributed.placement import ParallelDims, kept_slices, placement, shard_slices
from switchyard.errors import UserError
from switchyard.files import scratch
from switchyard.moe import metrics
from switchyard.simulation import compile as simulate
from switchyard.simulation.baseline import AFTER, BATCHES, BEFORE, RESULT, STEP
from switchyard.simulation.compile import CONTROLS, SUMS, Report
from switchyard.simulation.compile_worker import JOB
from switchyard.simulation.interpreter import EXCHANGES, Arrays, ClusterError, NotExecutable, run_cluster
from switchyard.simulation.verdict import TOLERANCE, Comparison, Judge
from switchyard.text_table import table
from switchyard.training.limits import require_trainable
from switchyard.training.micro_batches import call_inputs, forces_choices
from switchyard.trust import check_trusted_section

DRAWS = 3  # of batches, where choices of experts fell otherwise
SMOOTH = "With relu the losses were equal and gradients were not, as at a value near 0: compared with gelu instead."
HEAD = 2  # figures of a micro-batch before those of its layers, see training.loss


def draw_batches(config: Config, vocab: int, steps: int, noise_slices: int = 0, draw: int = 0) -> Arrays:
    """Draws random batches of all devices together, from train.seed + draw: [steps, A, B, S] each, A micro-batches, a
    part of them padding; of an encoder-decoder tokens [steps, A, B, S + T], the others [steps, A, B, T].

    `rates` [steps] are the peak learning rate; `noise` [steps, A, max(J, 1), N, D] of U(0, 1). Where choices are
    forced, `replay` [steps, A, M, N, K] has choices for every other token, and -1.
    """
    rng, count = np.random.default_rng(config.train.seed + draw), config.micro_batches
    shape = (steps, count, config.data.batch_size, config.target_length)
    tokens = rng.integers(0, vocab, (*shape[:3], config.token_length + 1)).astype(np.int32)
    valid = np.ones(shape, np.float32)
    valid[:, -1, -1, shape[3] // 2 :] = 0  # the last sequence is half padding
    noise = np.zeros((steps, count, 1, 1, 1), np.float32)
    if noise_slices:
        noise = rng.random((steps, count, noise_slices, config.rows, config.model.hidden_size), np.float32)
    rates = np.full(steps, config.schedule.learning_rate, np.float32)
    drawn = {"tokens": tokens[..., :-1], "labels": tokens[..., -shape[3] :], "valid": valid, "noise": noise}
    drawn["rates"] = rates
    if forces_choices(config):
        moe = config.moe
        order = rng.random((steps, count, len(config.moe_layers), config.rows, moe.expert_num)).argsort(-1)
        drawn["replay"] = np.where(np.arange(config.rows)[:, None] % 2, order[..., : moe.choices], -1).astype(np.int32)
    return drawn


def train_reference(config: Config, vocab: int, batches: Arrays) -> Arrays:
    """Trains on one CPU device in a process of its own: see `reference` for what comes back."""
    with scratch("reference") as folder:
        (folder / JOB).write_text(json.dumps({"config": config.model_dump(), "vocab": vocab}, allow_nan=False))
        np.savez(folder / BATCHES, **batches)
        source = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, "PYTHONPATH": simulate.with_source(source, os.environ.get("PYTHONPATH"))}
        done = simulate.run_child(
            [sys.executable, "-m", "switchyard.simulation.baseline", str(folder)],
            environment,
            simulate.TIMEOUT,
            "the reference",
        )
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip()]
            raise UserError(f"the single-device baseline failed: {lines[-1] if lines else 'it printed nothing'}")
        with np.load(folder / RESULT) as found:
            return dict(found)


def shard_of_rank(name: str, full: np.ndarray, local: tuple[int, ...], degrees: ParallelDims, rank: int) -> np.ndarray:
    """Returns the shard of a parameter that a rank holds, sharded further where ZeRO does.

    Raises:
        ClusterError: the compiler's local shape is another one than `placement` says.
    """
    axes = placement(name, full.shape, degrees)
    part = full[shard_slices(full.shape, axes, degrees, rank)]
    if part.shape != local:
        part = full[kept_slices(full.shape, axes, degrees, rank)]
    if part.shape != local:
        raise ClusterError(f"{name}: the compiler says {local}, the placement {part.shape} of {full.shape}")
    return part.copy()


def batch_of(batches: Arrays, step: int, degrees: ParallelDims, rank: int, noisy: bool) -> list[np.ndarray]:
    """Returns what a rank reads at a step: tokens, labels, valid [A, B, S], noise [A, max(J, 1), N, D], and where
    choices are forced replay [A, M, N, K]."""
    index, own = degrees.data_shard(rank), []
    for name in ("tokens", "labels", "valid"):
        own.append(np.split(batches[name][step], degrees.data_parallel, 1)[index])
    noise = batches["noise"][step]
    own.append(np.split(noise, degrees.data_parallel, 2)[index] if noisy else noise)
    if "replay" in batches:
        own.append(np.split(batches["replay"][step], degrees.data_parallel, 2)[index])
    return own


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
    degrees, graphs = ParallelDims.of(config.parallel), [report.graph for report in reports]
    scale = config.train.init_loss_scale if config.model.compute_dtype == "float16" else 1.0
    losses, norms, met, strayed = [], [], Counter(), 0
    marks = [BEFORE, *(STEP.format(step) for step in range(1, len(batches["rates"]))), AFTER]
    states = [{name.removeprefix(mark): a for name, a in reference.items() if name.startswith(mark)} for mark in marks]
    judge = Judge(config.optimizer, lambda name, full, shape, rank: shard_of_rank(name, full, shape, degrees, rank))
    shapes = [report.parameters.items() for report in reports]
    weights = [{name: np.zeros(shape, np.float32) for name, shape in own if name.startswith(SUMS)} for own in shapes]
    for step, rate in enumerate(batches["rates"]):
        for report, own in zip(reports, weights):
            own |= _first_tensors(report, states[step], degrees, float(rate), scale)
            if spoil is not None and step == 0:
                spoil(report.rank, own)
        counts = batches["valid"][step].sum((1, 2))
        shares = counts / counts.sum()  # of each micro-batch in the valid tokens, [A]
        outputs, met = run_step(config, batches, step, graphs, weights, exchanges, scale * shares)
        figures = figures_of(config, outputs)
        losses.append((float(reference["losses"][step]), float(shares @ figures[:, 1])))
        norms.append(farthest(float(reference["norms"][step]), [_flat(out)[-1] for out in outputs[-1]]))
        strayed += strayed_of(config, reference, step, figures, outputs)
        for report, own in zip(reports, weights):
            move_bias(config, own, figures, report.rank)
        states_of_ranks = [{name: array for name, array in own.items() if _is_state(name)} for own in weights]
        judge.judge(states_of_ranks, states[step], states[step + 1], float(rate))
    moved = {name: float(np.abs(end - states[0][name]).max()) for name, end in states[-1].items()}
    return judge.found(losses, norms, moved, met, strayed)


def run_step(config, batches, step: int, graphs, weights, exchanges, factors: np.ndarray) -> tuple[list[list], Counter]:
    """Calls the program of all ranks as often as a step does: (outputs of each rank in each call, collectives met)."""
    degrees, calls = ParallelDims.of(config.parallel), config.train.gradient_accumulation_steps
    noisy, met = batches["noise"].shape[-1] > 1, Counter()
    arrays = [batch_of(batches, step, degrees, rank, noisy) for rank in range(len(graphs))]
    outputs, each = [], len(factors) // calls
    for call in range(calls):
        part = slice(call * each, (call + 1) * each)
        controls = {"begins": np.float32(call == 0), "ends": np.float32(call == calls - 1)}
        for own in weights:
            own |= {name: value for name, value in controls.items() if name in own}
        inputs = [call_inputs(config, [array[part] for array in own], factors[part]) for own in arrays]
        made, found = run_cluster(graphs, inputs, weights, exchanges)
        outputs.append(made)
        met += found
    return outputs, met


def move_bias(config: Config, own: Arrays, figures: np.ndarray, rank: int) -> None:
    """Does what the host does behind a step: moves a rank's part of the bias of `sigmoid`; figures [A, W]."""
    moe, degrees = config.moe, ParallelDims.of(config.parallel)
    if moe.router != "sigmoid" or not config.moe_layers:
        return
    names = ["bias"] if moe.copies == 1 else [f"routers.{index}.bias" for index in range(moe.copies)]
    for layer, loads in zip(config.moe_layers, metrics.loads(figures[:, HEAD:].sum(0), moe.expert_num)):
        for last, load in zip(names, loads.reshape(moe.copies, -1)):
            name = f"layers.{layer}.feed_forward.router.{last}"
            if name in own:  # of a pipeline only the layers of the stage
                moved = metrics.bias_step(load, moe.router.options.topk_bias_update_rate)
                own[name] = own[name] + shard_of_rank(name, moved, own[name].shape, degrees, rank)


def _is_state(name: str) -> bool:
    """Returns whether one device has it too: not what the host sets, nor sums of gradients."""
    return name not in CONTROLS and not name.startswith(SUMS)


def _first_tensors(report: Report, before: Arrays, degrees: ParallelDims, rate: float, scale: float) -> Arrays:
    """Returns the parameters of a rank before a step: its shards of `before`, and what the host sets."""
    names, tensors = report.parameters, {}
    for name, shape in names.items():
        if _is_state(name):
            if name not in before:
                raise ClusterError(f"{name}: one device has no such parameter")
            tensors[name] = shard_of_rank(name, np.asarray(before[name]), shape, degrees, report.rank)
    by_host = dict.fromkeys(CONTROLS, np.float32(1)) | {"learning_rate": np.float32(rate)}
    by_host["unscale"] = np.float32(1 / scale)
    return tensors | {name: value for name, value in by_host.items() if name in names}


def figures_of(config: Config, outputs: Sequence[Sequence[tuple]]) -> np.ndarray:
    """Returns the figures of each micro-batch in all calls, equal on all ranks that have them: [A, W]."""
    width = HEAD + len(config.moe_layers) * metrics.width(config.moe.expert_num)
    rows = []
    for ranks in outputs:
        end = None if config.moe.record is None else width  # choices come behind the figures
        found = [np.array(flat[:-1][:end]).reshape(-1, width) for out in ranks if len(flat := _flat(out)) > 1]
        losses = [part[:, 1] for part in found]
        if not found or np.ptp(losses, axis=0).max() > TOLERANCE:
            raise ClusterError(f"loss: the ranks differ, {sorted({float(loss[0]) for loss in losses})}")
        rows.append(found[0])
    return np.concatenate(rows)


def farthest(one: float, norms: list[float]) -> tuple[float, float]:
    """Returns (one device's norm of the gradients, the rank's norm that is farthest from it)."""
    return one, max(norms, key=lambda norm: np.inf if np.isnan(norm) else abs(norm - one))


def strayed_of(config: Config, reference: Arrays, step: int, figures: np.ndarray, outputs) -> int:
    """Counts the choices of experts that fell otherwise than on one device, recorded or by loads; figures [A, W]."""
    loads = reference["loads"][step]  # [M, E]
    if not loads.size:
        return 0
    if config.moe.record is not None:
        rows = np.array([_flat(ranks[0])[figures.shape[1] : -1] for ranks in outputs])  # every rank has those of all
        found = metrics.recorded(rows, len(loads), config.moe.choices)  # [A, M, N, K]
        return int((found != reference["choices"][step]).sum())
    found = metrics.loads(figures[:, HEAD:].sum(0), loads.shape[1])
    return int(np.abs(found - loads).sum() / 2)


def _flat(value) -> list[float]:
    if isinstance(value, tuple):
        return [number for part in value for number in _flat(part)]
    return [float(number) for number in np.ravel(value)] if isinstance(value, np.ndarray | np.generic) else []


def prove(config: Config, devices: int, steps: int = 3, vocab: int | None = None) -> Comparison:
    """Compiles, executes, trains on one device and compares (UserError as in `compile.compile_step`).

    The comparison is that of GELU where ReLU's kink may be what sets the two apart, see above.
    """
    found = prove_once(config, devices, steps, vocab)
    if found.equal or not found.losses_agree or config.model.activation != "relu":
        return found
    smooth = config.model.model_copy(update={"activation": "gelu"})
    return replace(prove_once(config.model_copy(update={"model": smooth}), devices, steps, vocab), smooth=True)


def prove_once(config: Config, devices: int, steps: int, vocab: int | None) -> Comparison:
    """Does what `prove` does, with the activation that the configuration names."""
    if config.model.compute_dtype != "float32":  # rounding would be larger than what the rule allows
        raise UserError(
            f"model.compute_dtype: {config.model.compute_dtype}; the cluster emulation compares in float32, set float32"
        )
    require_trainable(config)
    vocab = vocab or expected_vocabulary(config)
    reports = simulate.compile_ranks(config, devices, range(devices), vocab)
    for draw in range(DRAWS):
        batches = draw_batches(config, vocab, steps, noise_slices(config, reports[0]), draw)
        found = compare(config, reports, batches, train_reference(config, vocab, batches))
        if found.equal or not found.strayed:
            break
    return found


def noise_slices(config: Config, report: Report) -> int:
    """Returns the shards J of noise that the step reads, as [J, N, D], of a pipeline as [A * N, J, D]; 0: none."""
    shape = report.graph.input_shapes[3]
    axis = 0 if config.parallel.pipeline_stage == 1 else 1
    return shape[axis] if shape[-1] > 1 else 0


def render(found: Comparison) -> str:
    """Renders losses, the parameters that differ most, what is explained, what is different, and the verdict."""
    steps = [[str(step), f"{one:.8f}", f"{cluster:.8f}"] for step, (one, cluster) in enumerate(found.losses, 1)]
    farthest = sorted(found.differences.items(), key=lambda item: -item[1][0])
    rows = []
    for name, (far, moved) in farthest:
        remark = f"explained ({found.explained[name]})" if name in found.explained else ""
        gradient = f"{found.gradients[name]:.2e}" if name in found.gradients else ""
        rows.append([name, f"{far:.2e}", f"{moved:.2e}", gradient, remark])
    heads = ["parameter", "largest difference", "moved by", "of its gradient", ""]
    count, strayed = sum(found.explained.values()), f"; {found.strayed} expert choices differ"
    explained = f"; {count} entries differ, as gradients near zero explain" if count else ""
    return "\n".join(
        [
            *table(["step", "loss of one device", "of the cluster"], steps),
            "",
            *table(heads, rows),
            "",
            *found.reasons,
            *([SMOOTH] if found.smooth else []),
            f"{sum(found.met.values())} collectives per step over all ranks; largest difference of losses and "
            f"parameters {found.largest:.2e}, allowed {TOLERANCE:g}{explained}{strayed if found.strayed else ''}: "
            f"{'equal' if found.equal else 'DIFFERENT'}",
        ]
    )


def main(arguments: list[str]) -> int:
    """Runs `python -m switchyard.simulation.emulate`; see its --help. Returns 1 where cluster and device differ."""
    parser = simulate.create_parser(
        "python -m switchyard.simulation.emulate",
        "Executes the compiled training steps of all ranks in numpy and compares them with one device.",
    )
    parser.add_argument("--steps", type=cli.whole, default=3, metavar="N", help="training steps (default 3)")
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.steps < 1:
        raise UserError(f"--steps: {chosen.steps}; at least 1")
    config = configuration.load(chosen.config, chosen.overrides, devices=chosen.devices)
    check_trusted_section(config.moe, consent=True, say=print)
    try:
        with cli.cleans_up():
            found = prove(config, chosen.devices, chosen.steps, chosen.vocab)
    except (NotExecutable, NotImplementedError) as error:
        raise UserError(f"cluster emulation: {error}; nothing was compared; use another configuration") from None
    except ClusterError as error:
        print(f"cluster emulation: {error}: DIFFERENT")
        return 1
    print(render(found))
    return 0 if found.equal else 1


if __name__ == "__main__":
    sys.exit(cli.run(main))
