"""Finds the layouts that fit N devices, the costs of each, and why the others do not fit.

`python -m switchyard.planner --config config/NAME.yaml --devices 64 --memory 64GB` tries every combination of
the degrees, prints what the configuration's own layout costs a device, then the feasible combinations, best first.

Rank: seconds of a micro-batch = FLOPs of a device / --tflops + bytes that leave it / --bandwidth, the lowest first;
equal ones by memory. Of a pipeline it is the slowest stage's, times (A + stages - 1) / A for A micro-batches: stages
wait for the first rows and for the last gradients. Nothing is said to overlap, nor products to be slow where shards are
thin: it is an order, not a forecast.
"""

import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from switchyard import cli, json_text
from switchyard import config as configuration
from switchyard.config import Config
from switchyard.config.sections import LARGEST
from switchyard.data.tokenizer import expected_vocabulary
from switchyard.errors import UserError, shortened
from switchyard.file_errors import writing
from switchyard.planner.costs import Costs, heaviest, stage_costs
from switchyard.planner.host import HostCosts, host_costs
from switchyard.planner.load import Load, read_load
from switchyard.planner.own_layout import SHORT, describe, giga, render_own
from switchyard.planner.reliability import DAY, Assumptions, day_of, render_day
from switchyard.text_table import table
from switchyard.training.limits import require_trainable, with_defaults

KINDS = ("AlltoAll", "AllReduce", "AllGather", "ReduceScatter", "Send")
UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
HEADS = ["dp", "ep", "tp", "pp", "zero", "seq", "recompute", "memory", *KINDS, "sent", "TFLOP", "dropped", "seconds"]
HEADS += ["host", "draw"]


@dataclass(frozen=True)
class Speed:
    """Holds the speed of a device for the ranking: FLOPs of products per second, and bytes sent per second."""

    flops: float = 100e12
    bandwidth: float = 25e9


@dataclass(frozen=True)
class Candidate:
    """Holds one combination of degrees.

    Attributes:
        parallel: its keys of the section `parallel`.
        costs, dropped, seconds, host: None where it cannot be sharded so.
        refusal: why it is not feasible, one line; None where it is.
    """

    parallel: dict
    costs: Costs | None = None
    dropped: float | None = None
    seconds: float | None = None
    refusal: str | None = None
    host: HostCosts | None = None


def plan(config: Config, devices: int, memory: float, vocab: int, load: Load, speed: Speed) -> list[Candidate]:
    """Returns every combination of degrees for a number of devices: the feasible ones first, best first, then the
    others.

    Args:
        config: of the model; its own degrees play no part.
        devices: N, the product of data_parallel, model_parallel and pipeline_stage.
        memory: bytes of a device.
        vocab: entries of the vocabulary.
        load: how choices fall on experts.
        speed: for the ranking.
    """
    found, drops, target = [], {}, target_of(config)
    for parallel in combinations(config, devices):
        own = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
        try:
            configuration.check(own)
            require_trainable(own, target)
            stages = stage_costs(own, vocab)
        except UserError as error:
            found.append(Candidate(parallel, refusal=str(error)))
            continue
        if own.groups not in drops:
            drops[own.groups] = load.dropped(own)
        cost, micro = heaviest(stages), own.micro_batches
        seconds = step_seconds(stages, micro, speed) / micro  # of a micro-batch, see the rule at the top
        over = None if cost.memory <= memory else f"memory: more than the {memory / 1e9:g} GB of a device"
        found.append(Candidate(parallel, cost, drops[own.groups], seconds, over, host_costs(own)))
    known = (one for one in found if one.costs)
    known = sorted(known, key=lambda one: (one.refusal is not None, one.seconds, one.costs.memory))
    return known + [one for one in found if not one.costs]


def step_seconds(stages: list[Costs], micro: int, speed: Speed) -> float:
    """Returns the seconds of a step of `micro` micro-batches, see the rule at the top."""
    slowest = max(one.flops / speed.flops + one.sent / speed.bandwidth for one in stages)
    return slowest * (micro + len(stages) - 1) / micro


def target_of(config: Config) -> str:
    """Returns the devices that are planned for: GPU where the configuration says so, else Ascend."""
    return "GPU" if config.context.device_target == "GPU" else "Ascend"


def combinations(config: Config, devices: int) -> Iterator[dict]:
    """Yields degrees whose product is `devices`; ZeRO, recompute, sequence parallelism where they change anything."""
    for stages, tensor in itertools.product(divisors(devices), repeat=2):
        if devices % (stages * tensor):
            continue
        data = devices // (stages * tensor)
        experts = divisors(data) if config.moe_layers else [1]
        sequence = [False, True] if tensor > 1 else [False]
        zero = [0, 1, 3] if data > 1 else [0]
        for expert, sharded, level, recompute in itertools.product(experts, sequence, zero, [False, True]):
            yield {
                "data_parallel": data,
                "expert_parallel": expert,
                "model_parallel": tensor,
                "pipeline_stage": stages,
                "micro_batch_num": stages,
                "optimizer_shard": level,
                "sequence_parallel": sharded,
                "recompute": recompute,
            }


def divisors(number: int) -> list[int]:
    """Returns all divisors of a number, ascending."""
    return [one for one in range(1, number + 1) if number % one == 0]


def read_size(text: str, option: str = "--memory") -> float:
    """Parses `64GB`, `40GiB` or a number of bytes (UserError: neither; names the option)."""
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if parts is None or parts[2].upper() not in UNITS:
        raise UserError(f"{option}: {shortened(text)}; a number and MB, GB, TB, MiB, GiB or TiB, such as 64GB")
    return float(parts[1]) * UNITS[parts[2].upper()]


def render(found: list[Candidate], top: int) -> list[str]:
    """Renders the feasible combinations as a table, and why the others are not feasible, the most frequent reason
    first.
    """
    feasible = [one for one in found if one.refusal is None]
    unit = "per device and step; for a pipeline, the stage with the most memory; host: inputs, draw: seconds of noise"
    lines = [f"{len(feasible)} of {len(found)} combinations are feasible; GB, {unit}:", ""]
    lines += table(HEADS, [_row(one) for one in feasible[:top]])
    if len(feasible) > top:
        lines.append(f"... and {len(feasible) - top} more (--top)")
    return lines + _reasons([one for one in found if one.refusal is not None])


def _reasons(refused):
    """Renders why combinations are not feasible: one line for each key and reason."""
    alike: dict[tuple[str, str], list[Candidate]] = {}
    for one in refused:
        key, rest = one.refusal.split(": ", 1)
        alike.setdefault((key, rest.split("; ", 1)[-1]), []).append(one)
    lines = ["", "not feasible:"] if alike else []
    for (key, reason), group in sorted(alike.items(), key=lambda item: -len(item[1])):
        values = dict.fromkeys(one.refusal.split(": ", 1)[1].split("; ", 1)[0] for one in group)
        least = min((one for one in group if one.costs), key=lambda one: one.costs.memory, default=None)
        if least is None:
            lines.append(f"  {len(group):4} x {key}: {', '.join(values)}; {reason}")
        else:
            near = f"{giga(least.costs.memory)} GB, with {describe(least.parallel)}"
            lines.append(f"  {len(group):4} x {key}: {reason}; the smallest needs {near}")
    return lines


def _row(one):
    parallel, cost = one.parallel, one.costs
    flags = ["yes" if parallel[name] else "-" for name in ("sequence_parallel", "recompute")]
    degrees = [str(parallel[name]) for name in (*SHORT, "optimizer_shard")]
    sizes = [giga(size) for size in (cost.memory, *map(cost.exchanged, KINDS), cost.sent)]
    rest = [f"{cost.flops / 1e12:.2f}", f"{one.dropped:.2%}", f"{one.seconds:.3f}"]
    return [*degrees, *flags, *sizes, *rest, giga(one.host.total), f"{one.host.seconds():.2f}"]


def to_json(found: list[Candidate]) -> list[dict]:
    """Returns all known figures of each combination."""
    names = ("weights", "gradients", "optimizer", "gathered", "activations", "memory", "flops", "sent")
    trees = []
    for one in found:
        tree = {**one.parallel, "refusal": one.refusal, "dropped": one.dropped, "seconds": one.seconds, "costs": None}
        tree["host"] = one.host and vars(one.host)
        if one.costs:
            exchanges = [vars(exchange) for exchange in one.costs.exchanges]
            tree["costs"] = {name: getattr(one.costs, name) for name in names} | {"exchanges": exchanges}
        trees.append(tree)
    return trees


def create_parser() -> cli.Parser:
    """Returns the parser of the command line."""
    parser = cli.create_parser("python -m switchyard.planner", (__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see config/")
    parser.add_argument("--devices", required=True, type=cli.whole, metavar="N", help="devices of the cluster")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="memory of one device, such as 64GB")
    parser.add_argument(
        "--vocab", type=cli.whole, metavar="V", help="size of the vocabulary (default: that of the tokenizer)"
    )
    parser.add_argument(
        "--tokens-per-expert", metavar="FILE", help="JSON of E numbers or one list a layer, or a file of moe.record"
    )
    parser.add_argument(
        "--tflops", type=cli.finite, default=100.0, help="10^12 FLOPs per second of a device, for the ranking"
    )
    parser.add_argument("--bandwidth", type=cli.finite, default=25.0, help="GB sent per second, for the ranking")
    parser.add_argument(
        "--failures-per-day",
        type=cli.finite,
        metavar="F",
        help="of the whole job: also says what the configuration's own layout reads, writes and loses each day",
    )
    parser.add_argument(
        "--disk", default="20GB", metavar="SIZE", help="bytes a second of the run folder's disk, for all processes"
    )
    parser.add_argument(
        "--restart-seconds", type=cli.finite, default=900.0, metavar="S", help="to notice a failure, start and compile"
    )
    parser.add_argument(
        "--top", type=cli.whole, default=10, metavar="K", help="combinations to print; all are in --json"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all combinations to this file")
    return parser


def require_shipped(config: configuration.Config) -> None:
    """Refuses what is not counted: classes of a user's own, and training of a part or by a teacher (UserError)."""
    for key, name in (("moe.experts", config.moe.experts), ("moe.dispatcher", config.moe.dispatcher)):
        if name is not None:
            raise UserError(
                f"{key}: {shortened(name)}; the planner knows only shipped ones: leave it out for an estimate"
            )
    for key in ("train.lora", "train.freeze", "train.distill"):
        if value := config.value(key):
            reason = "the planner counts one model whose every parameter is trained: leave it out for an estimate"
            raise UserError(f"{key}: {shortened(value)}; {reason}")


def assumptions(chosen) -> Assumptions | None:
    """Returns what the command line assumes of failures; None where it says nothing (UserError: impossible values)."""
    if chosen.failures_per_day is None:
        return None
    disk = read_size(chosen.disk, "--disk")
    for option, value, fits in (
        ("--failures-per-day", chosen.failures_per_day, 0 <= chosen.failures_per_day <= 10**4),
        ("--disk", chosen.disk, disk > 0),
        ("--restart-seconds", chosen.restart_seconds, 0 <= chosen.restart_seconds <= DAY),
    ):
        if not fits:
            raise UserError(f"{option}: {value}; must be positive, failures at most 10000, a restart at most a day")
    return Assumptions(chosen.failures_per_day, disk, chosen.restart_seconds)


def print_own(config: Config, vocab: int, load: Load, speed: Speed, assumed: Assumptions | None) -> None:
    """Prints what the configuration's own layout costs, and what a day of it reads, writes and loses."""
    require_trainable(config, target_of(config))
    stages = stage_costs(config, vocab)
    lines = render_own(config, heaviest(stages), load.dropped(config))
    if assumed is not None:
        step = step_seconds(stages, config.micro_batches, speed)
        lines += ["", *render_day(day_of(config, heaviest(stages), vocab, step, assumed), assumed)]
    print("\n".join([*lines, ""]))


def main(arguments: list[str]) -> None:
    """Runs `python -m switchyard.planner`; see its --help."""
    chosen = create_parser().parse_intermixed_args(arguments)
    for name in ("devices", "tflops", "bandwidth"):
        if getattr(chosen, name) <= 0:
            raise UserError(f"--{name}: {getattr(chosen, name)}; must be above 0")
    for name, most in (("devices", 10**6), ("vocab", LARGEST), ("top", LARGEST)):  # combinations are tried one by one
        number = getattr(chosen, name)
        if number is not None and not 1 <= number <= most:
            raise UserError(f"--{name}: {number}; from 1 to {most}")
    config, memory = configuration.load(chosen.config, chosen.overrides), read_size(chosen.memory)
    require_shipped(config)
    vocab = chosen.vocab or expected_vocabulary(config)
    load = read_load(chosen.tokens_per_expert, config) if chosen.tokens_per_expert else Load()
    speed, assumed = Speed(chosen.tflops * 1e12, chosen.bandwidth * 1e9), assumptions(chosen)
    if config.devices == chosen.devices:
        print_own(with_defaults(config, target_of(config)), vocab, load, speed, assumed)
    elif assumed is not None:
        raise UserError(
            f"--failures-per-day: {assumed.failures:g}; is said of the configuration's own degrees, which need "
            f"{config.devices} devices, not {chosen.devices}: give --devices {config.devices}, or parallel.* keys"
        )
    found = plan(config, chosen.devices, memory, vocab, load, speed)
    print("\n".join(render(found, chosen.top)))
    print(f"\nranked by seconds = TFLOP / {chosen.tflops:g} + GB sent / {chosen.bandwidth:g}, then by memory")
    if chosen.json:
        with writing(chosen.json):
            Path(chosen.json).write_text(json_text.to_json(to_json(found), indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(cli.run(main))
