"""Makes a mixture of experts of a trained dense model (sparse upcycling, arXiv 2212.05055).

`python -m switchyard.interop.upcycle --from RUN --to CONFIG` writes a run folder: every expert is a copy of the dense
feed-forward, the router is new, all else is taken over. `train.py --init` starts from it, and `train.py --resume` goes
on with the moments of the dense model.

With finer experts, of width F / m, an expert is one of the m slices of the dense feed-forward along its hidden width.
The m slices of a copy stand beside each other and share one column of the router, so that top-k takes all of them
(virtual groups, arXiv 2410.07524, section 4); w_out is multiplied by m, because each gate is 1 / m of the copy's.

Legend: E experts, D width, F hidden width of the dense feed-forward, m slices of it.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from switchyard import cli
from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.store import Checkpoint
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.interop.new_run import check_new, fresh_optimizer, new_state, new_weights, write_run
from switchyard.interop.promise import why_not_equal
from switchyard.training.initial import check_fits, with_tokenizer

LAST = "w_out"  # [E, F, D], sliced along axis 1; the other matrices are [E, D, F], sliced along axis 2
MOMENTS = ("moment1", "moment2")
# what a state says of the steps so far
PLACE = ("step", "seconds", "data_index", "data_epoch", "data_window", "corpus", "tokens", "noise_rule", "train_seed")
KEEPS_SHARED = "w_out of shared experts begins at 0, so that they add nothing at first"


def upcycle(
    held: Checkpoint, config: Config, out: Path, noise: float = 0.0, moments: str = "copied"
) -> tuple[int, list[str]]:
    """Writes the run folder of an upcycled model.

    Args:
        held: a checkpoint of a dense decoder, with the optimizer's state where `moments` is "copied".
        config: of the sparse model.
        out: the folder to make.
        noise: standard deviation of what is added to each copy, as a share of that of the dense matrix.
        moments: "copied": Adam's moments and the step go on, the router's begin at 0; "fresh": training begins at step
            0.

    Returns:
        The number of parameters of the sparse model, and why its first loss is not that of the dense model: [] where it
        is.

    Raises:
        UserError: models that do not fit each other, by key.
    """
    check_new(out)
    slices = check_upcyclable(config, held.config, held.path)
    config = with_tokenizer(config, held, out)
    new, trained = new_weights(config, held)
    weights = taken_over(new, held.weights, config, slices, noise)
    optimizer, state = fresh_optimizer({name: weights[name] for name in trained}, config), new_state(held, config)
    if moments == "copied":
        optimizer |= copied_moments(optimizer, held, config, slices)
        state |= {name: held.state[name] for name in PLACE if name in held.state}
    write_run(out, config, held.tokenizer_json, weights, optimizer, state)
    return sum(value.size for value in weights.values()), why_not_equal(config, slices, noise)


def check_upcyclable(config: Config, old: Config, path: Path) -> int:
    """Returns the number m of slices that a dense feed-forward is divided into (UserError: models that do not fit)."""
    if old.model.type != "decoder" or old.moe_layers:
        what = f"'{path}' is not a dense decoder (model.type {old.model.type}, moe.expert_num {old.moe.expert_num})"
        raise UserError(f"--from: {what}; give the run of a dense decoder")
    if old.train.lora is not None:
        remedy = f"merge them first: python -m switchyard.checkpoint merge {path} --out DIR"
        raise UserError(f"--from: '{path}' holds adapters (train.lora); {remedy}")
    if not config.moe_layers:
        raise UserError(f"moe.expert_num: {config.moe.expert_num}; --to names a model with experts: set 2 or more")
    if config.moe.experts is not None:
        raise UserError(f"moe.experts: {config.moe.experts}; only feed-forward experts are copies of a feed-forward")
    if config.granularity != "token":
        raise UserError(f"moe.granularity: {config.granularity}; a dense feed-forward reads tokens: set it to 'token'")
    if config.train.lora is not None:
        raise UserError("train.lora: adapters are for `train.py --init`; leave it out of --to")
    check_fits(config, old, path, option="--from", sections=("model",))
    dense, width = old.dense_width, config.expert_width
    if dense % width:
        reason = f"must divide the hidden width of the dense feed-forward ({dense})"
        raise UserError(f"moe.moe_intermediate_size: {width}; {reason}")
    slices = dense // width
    if config.moe.expert_num % slices:
        reason = f"must be a multiple of the {slices} slices that the dense feed-forward is divided into"
        raise UserError(f"moe.expert_num: {config.moe.expert_num}; {reason}")
    return slices


def taken_over(
    new: dict[str, np.ndarray], dense: dict[str, np.ndarray], config: Config, slices: int, noise: float = 0.0
) -> dict[str, np.ndarray]:
    """Returns the weights of the sparse model: of the dense one where it has them, else as they are in `new`."""
    rng, found = np.random.default_rng(config.train.seed), {}
    for name, value in new.items():
        source = dense_name(name)
        if source is None and ".shared.w_out" in name:
            value = np.zeros_like(value)
        elif source is None and name.endswith(".router.weight") and slices > 1:
            value = np.repeat(value[:, ::slices], slices, axis=1)  # [D, E]: the slices of a copy share a column
        elif source is not None and ".experts." in name:
            value = copies(dense[source], name, len(value), slices)
            spread = noise * dense[source].std()
            value = (value + spread * rng.standard_normal(value.shape)).astype(np.float32) if noise else value
        elif source is not None:
            value = dense[source]
        found[name] = value
    return found


def dense_name(name: str) -> str | None:
    """Returns the name that a parameter of the sparse model has in the dense one; None where the dense has none."""
    if ".router." in name or ".shared." in name:
        return None
    return name.replace(".feed_forward.experts.", ".feed_forward.")


def copies(matrix: np.ndarray, name: str, experts: int, slices: int, scaled: bool = True) -> np.ndarray:
    """Returns E experts made of one dense matrix [1, D, F], or [1, F, D] for w_out: [E, D, F / m], or [E, F / m, D].

    `scaled`: whether w_out is multiplied by m, as a weight is and a moment is not.
    """
    last = name.endswith(LAST)
    parts = np.concatenate(np.split(matrix, slices, axis=1 if last else 2))  # [m, D, F / m]
    if last and scaled:
        parts = parts * np.float32(slices)
    return np.tile(parts, (experts // slices, 1, 1))  # [E, D, F / m]


def copied_moments(fresh: dict[str, np.ndarray], held: Checkpoint, config: Config, slices: int) -> dict[str, Any]:
    """Returns the optimizer's state of the sparse model as far as the dense model has it.

    Raises:
        UserError: a checkpoint without an optimizer's state.
    """
    if "correction1" not in held.optimizer:
        raise UserError(f"--moments: copied; '{held.path}' holds no moments of Adam: take --moments fresh")
    found = {}
    for name in fresh:
        moment, _, weight = name.partition(".")
        source = f"{moment}.{dense_name(weight)}" if moment in MOMENTS else name
        if source not in held.optimizer:
            continue
        value = held.optimizer[source]
        experts = moment in MOMENTS and ".experts." in weight
        found[name] = copies(value, name, config.moe.expert_num, slices, scaled=False) if experts else value
    return found


def main(arguments: list[str]) -> None:
    """Runs `python -m switchyard.interop.upcycle`; see its --help."""
    parser = cli.create_parser(
        "python -m switchyard.interop.upcycle",
        "Makes a mixture of experts of a trained dense model: every expert is a copy of its feed-forward.",
    )
    parser.add_argument("--from", dest="source", required=True, metavar="DENSE", help="a run folder, or one checkpoint")
    parser.add_argument("--to", required=True, metavar="CONFIG", help="the configuration of the sparse model")
    parser.add_argument("--out", metavar="DIR", help="the run folder to make (default: train.output_dir/train.name)")
    parser.add_argument(
        "--noise", type=cli.finite, default=0.0, metavar="S", help="noise of each copy, as a share of the weights' std"
    )
    parser.add_argument(
        "--moments",
        choices=("copied", "fresh"),
        default="copied",
        help="copied: --resume goes on from the step of the dense model; fresh: training begins at step 0",
    )
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.noise < 0:
        raise UserError(f"--noise: {chosen.noise:g}; at least 0")
    from switchyard.device import prepare_environment

    prepare_environment()
    config = configuration.load(chosen.to, chosen.overrides)
    out = Path(chosen.out) if chosen.out else Path(config.train.output_dir) / config.train.name
    held = checkpoint.read(chosen.source, with_optimizer=chosen.moments == "copied")
    with cli.cleans_up():
        size, reasons = upcycle(held, config, out, chosen.noise, chosen.moments)
    say(held, config, out, size, reasons)


def say(held: Checkpoint, config: Config, out: Path, size: int, reasons: list[str]) -> None:
    """Prints what was made, and whether its first loss is that of the dense model."""
    layers = ", ".join(map(str, config.moe_layers))
    before = sum(value.size for value in held.weights.values())
    print(f"upcycle: '{held.path}' ({before:,} parameters) -> '{out}' ({size:,} parameters)")
    print(f"upcycle: {config.moe.expert_num} experts of hidden width {config.expert_width} in layers {layers}")
    if config.moe.shared_expert_num:
        print(f"upcycle: {KEEPS_SHARED}")
    if not reasons:
        print("upcycle: the first loss equals that of the dense model (up to rounding)")
    for reason in reasons:
        print(f"upcycle: the first loss may differ from that of the dense model: {reason}")
    print(f"upcycle: train.py --init {out} trains it; so does --resume with train.name={out.name}", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
