"""Lists which router trains with which dispatch, degrees and devices: `python -m switchyard.report.support`.

Every cell is an answer of the program itself: a configuration of the combination is built, a network of it is created,
and `training.limits` is asked, as train.py asks it. No rule stands here.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import yaml

from switchyard.cli import Parser, run
from switchyard.config import Config, build
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.moe.routing import known_routers
from switchyard.training.limits import check_mesh, of_sizes, refuse

TARGETS = ("Ascend", "GPU", "CPU")
DISPATCHES = ("capacity", "dropless", "dropless_static")
DATA, STAGES = {"data_parallel": 2}, {"pipeline_stage": 2, "micro_batch_num": 2}
DEGREES = {  # heading -> keys of `parallel`
    "data": DATA,
    "expert": DATA | {"expert_parallel": 2},
    "tensor": {"model_parallel": 2},
    "sequence": {"model_parallel": 2, "sequence_parallel": True},
    "ZeRO 1": DATA | {"optimizer_shard": 1},
    "ZeRO 3": DATA | {"optimizer_shard": 3},
    "recompute": DATA | {"recompute": True},
    "stages": STAGES,
    "stages, data": STAGES | DATA,
}
COMPILED, EXPLICIT = "compiler", "explicit"
SIZES = {"hidden_size": 16, "num_layers": 2, "intermediate_size": 32}
IMAGES = {"model": SIZES | {"type": "vision"}}
NETWORKS = {  # those in which a router may stand, in the order in which they are tried
    "text": {"model": SIZES | {"num_heads": 2, "seq_length": 4, "tie_word_embeddings": False}},
    "images": IMAGES | {"moe": {"granularity": "region"}, "vision": {"regions": 2}},
    "images of tasks": IMAGES | {"moe": {"granularity": "task"}, "vision": {"tasks": ["identity", "parity"]}},
}
ROUTERS = {  # keys of `moe` where the defaults below do not fit the router
    "gshard": {"num_experts_chosen": 2},
    "prototype": {"num_experts_chosen": 2},
    "mixture_of_depths": {"expert_num": 1, "capacity_factor": 0.5},
    "multi_gate": {"router": {"name": "multi_gate", "task_num": 2}},
    "task": {"router": {"name": "task", "task_num": 2}, "num_experts_chosen": 2},
    "two_level": {"router": {"name": "two_level", "n_group": 2}},
}
MOE = {"expert_num": 4, "layers": "all", "losses": {}, "aux_loss_factor": 0.0, "z_loss_factor": 0.0}
KEYS = (  # further keys, as they are written on a command line
    "model.compute_dtype=bfloat16",
    "model.compute_dtype=float16",
    "model.dropout=0.1",
    "model.tie_word_embeddings=true",
    "moe.copies=2",
    "moe.granularity=slice moe.slice_length=2",
    "moe.granularity=slice moe.slice_length=2 moe.shared_expert_num=1",
    "moe.groups=1",
    "moe.record=choices.safetensors",
    "moe.replay=choices.safetensors",
    "moe.router_warmup_steps=3",
    "moe.router_freeze_step=3",
    "moe.shared_expert_num=1",
    "train.gradient_accumulation_steps=2",
    "train.eval_every=10",
    "train.lora={}",
    "train.freeze=[embedding.*]",
    'train.distill={"teacher":"runs/teacher"}',
    "train.spike_factor=3 train.on_bad_loss=skip",
    "context.mode=pynative",
)
TRIED = ("data", "stages")  # degrees that they are tried with
VOCABULARY = 16


class Row(NamedTuple):
    """Describes routers that are answered alike.

    Attributes:
        network: in which they stand.
        routers: their names.
        dispatches: values of moe.dispatch that are answered alike.
        answers: COMPILED, EXPLICIT or a reason, for each of DEGREES.
    """

    network: str
    routers: tuple[str, ...]
    dispatches: tuple[str, ...]
    answers: tuple[str, ...]


def configuration(router: str, dispatch: str, network: str, parallel: dict | None = None, keys: str = "") -> Config:
    """Returns a small configuration of a combination (UserError: a rule between its fields does not hold)."""
    tree = NETWORKS[network]
    moe = MOE | {"router": router} | ROUTERS.get(router, {}) | tree.get("moe", {}) | {"dispatch": dispatch}
    shared = {"moe": moe, "parallel": parallel or {}, "data": {"batch_size": 8}, "train": {"eval_every": 0}}
    tree = tree | shared
    for key, value in (word.split("=") for word in keys.split()):
        section, name = key.split(".")
        tree[section] = tree.get(section, {}) | {name: yaml.safe_load(value)}
    return build(tree)


@cache
def why_not_created(router: str, dispatch: str, network: str) -> str | None:
    """Says why no network of one device has this router and dispatch, in one line; None: there is one."""
    try:
        create_model(configuration(router, dispatch, network), VOCABULARY)
    except UserError as error:
        return str(error)
    return None


def network_of(router: str) -> str | None:
    """Returns the first network in which a router may stand; None where there is none."""
    return next((name for name in NETWORKS if not why_not_created(router, "capacity", name)), None)


def answer(router: str, dispatch: str, network: str, parallel: dict, target: str, keys: str = "") -> str:
    """Returns COMPILED, EXPLICIT, or the line with which the program refuses a combination."""
    if refused := why_not_created(router, dispatch, network):
        return refused
    try:
        config = configuration(router, dispatch, network, parallel, keys)
        reason = check_mesh(config, config.devices, target)
        refuse(of_sizes(config, target))
    except UserError as error:
        return str(error)
    return EXPLICIT if reason else COMPILED


@cache
def rows(target: str) -> tuple[Row, ...]:
    """Returns the answers for devices of a kind: routers that are answered alike together, and dispatches likewise."""
    alike, found = {}, []
    for router in known_routers():
        if network := network_of(router):
            alike.setdefault((network, tuple(_answers(router, network, target))), []).append(router)
    for (network, answers), routers in sorted(alike.items(), key=lambda item: list(NETWORKS).index(item[0][0])):
        for cells in dict.fromkeys(answers):
            dispatches = (name for name, own in zip(DISPATCHES, answers) if own == cells)
            found.append(Row(network, tuple(routers), tuple(dispatches), cells))
    return tuple(found)


def _answers(router: str, network: str, target: str) -> Iterator[tuple[str, ...]]:
    """Yields the answers for each dispatch, a refusal as its reason."""
    for dispatch in DISPATCHES:
        found = (answer(router, dispatch, network, cut, target) for cut in DEGREES.values())
        yield tuple(reason(line, router) if ": " in line else line for line in found)


def reason(refusal: str, router: str) -> str:
    """Returns what a refusal gives as its reason, without what differs between routers and sizes."""
    text = refusal.split("; ", 1)[1].replace(f"router {router!r}", "the router")
    return re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)$", "", text)


def render() -> str:
    """Returns the tables of all devices as Markdown, and below them the reasons by their numbers."""
    reasons: dict[str, int] = {}
    parts = [*(_table(target, reasons) for target in TARGETS), _table_of_keys(reasons)]
    alone = ", ".join(f"`{name}`" for name in known_routers() if network_of(name) is None)
    notes = [f"{number}. {text}" for text, number in reasons.items()]
    parts.append("\n".join(["Reasons, as the refusal has them: the value that is allowed, or the remedy.", "", *notes]))
    if alone:
        parts.append(f"No network that `train.py` builds gives these routers what they need: {alone}.")
    return "\n\n".join(parts)


def _table(target: str, reasons: dict[str, int]) -> str:
    """Returns the table of one kind of devices; adds the reasons that are new."""
    lines = [f"| {target}: network | `moe.router` | `moe.dispatch` | {' | '.join(DEGREES)} |"]
    lines.append("|" + " --- |" * (3 + len(DEGREES)))
    for row in rows(target):
        cells = (cell if cell in (COMPILED, EXPLICIT) else _number(cell, reasons) for cell in row.answers)
        names, dispatches = (", ".join(f"`{name}`" for name in part) for part in (row.routers, row.dispatches))
        lines.append(f"| {row.network} | {names} | {dispatches} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_of_keys(reasons: dict[str, int]) -> str:
    """Returns the table of further keys, with router switch and capacities; adds the reasons that are new."""
    columns = [(target, degree) for target in TARGETS for degree in TRIED]
    lines = [f"| Further key | {' | '.join(f'{target}: {degree}' for target, degree in columns)} |"]
    lines.append("|" + " --- |" * (1 + len(columns)))
    for keys in KEYS:
        found = (answer("switch", "capacity", "text", DEGREES[degree], target, keys) for target, degree in columns)
        cells = (line if line in (COMPILED, EXPLICIT) else _number(reason(line, "switch"), reasons) for line in found)
        lines.append(f"| `{keys}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(text: str, reasons: dict[str, int]) -> str:
    return f"no ({reasons.setdefault(text, len(reasons) + 1)})"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    description = "Prints which router trains with which dispatch, degrees and devices, as Markdown."
    Parser("python -m switchyard.report.support", description=description).parse_args(arguments)
    print(render())


if __name__ == "__main__":
    sys.exit(run(main))
