"""The generated text and the closing table of the quickstart, from the files that its steps left in the run folder.

    python -m switchyard.report.quickstart runs/NAME --seconds training=201 evaluation=12

reads `evaluation.json` (eval.py --json), `export/manifest.json` (export.py) and `generation.json` (infer.py --json).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from switchyard.cli import Parser, run
from switchyard.errors import UserError
from switchyard.files import read_regular
from switchyard.inference import manifest
from switchyard.report.page import NAME as REPORT
from switchyard.report.picture import picture
from switchyard.training.metrics import load_range

LONGEST = 1 << 30  # bytes of a file
EVALUATION, EXPORT, GENERATION = "evaluation.json", "export", "generation.json"


def rows(run: Path, seconds: dict[str, float]) -> list[tuple[str, str]]:
    """Returns (name, figure) of each line.

    Args:
        run: the run folder.
        seconds: of each step of the quickstart, in order.

    Raises:
        UserError: a file is missing or holds something else.
    """
    evaluation = _read(run / EVALUATION, ("loss", "loss_ci95", "bits_per_byte", "layers"))
    parity = manifest.read(run / EXPORT).parity
    generation = _read(run / GENERATION, ("tokens_per_second",))
    missed = f", {len(parity.not_reached)} experts not reached" if parity.not_reached else ""
    low, high = evaluation["loss_ci95"]
    total = sum(seconds.values())
    table = [
        ("time", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + f"; together {total:.0f} s"),
        ("validation loss", f"{evaluation['loss']:.4f} nats per token (95 %: {low:.4f} to {high:.4f})"),
        ("bits per byte", f"{evaluation['bits_per_byte']:.4f}"),
    ]
    for layer in evaluation["layers"]:
        least, most = load_range(np.array([layer["load"]], float))  # [1, E]
        table.append((f"expert load, layer {layer['layer']}", f"{least:.2f} to {most:.2f} of the mean"))
    figure = f"largest difference of a logit {parity.max_abs_difference:.1e} (bound {parity.bound:.0e}{missed})"
    table.append(("export parity", figure))
    table.append(("generation", f"{generation['tokens_per_second']:.0f} tokens/s"))
    return table


def text(table: list[tuple[str, str]]) -> str:
    """Returns the table as lines of text."""
    width = max(len(name) for name, _ in table)
    rule = "-" * (width + 2 + max(len(figure) for _, figure in table))
    return "\n".join([rule, *(f"{name:<{width}}  {figure}" for name, figure in table), rule])


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """Reads a JSON object that has `keys` (UserError)."""
    try:
        tree = json.loads(read_regular(path, LONGEST))
    except OSError as error:
        raise UserError(f"'{path}': {error.strerror}; run scripts/run_quickstart.sh to the end") from None
    except ValueError:
        tree = None
    missing = [key for key in keys if not isinstance(tree, dict) or key not in tree]
    if missing:
        raise UserError(f"'{path}': holds no '{missing[0]}'; run scripts/run_quickstart.sh to the end")
    return tree


def _seconds(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{word}': write step=seconds") from None


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = Parser(prog="python -m switchyard.report.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--seconds", nargs="*", type=_seconds, default=[], metavar="STEP=S", help="time of each step")
    options = parser.parse_args(arguments)
    table = text(rows(options.run, dict(options.seconds)))
    generation = _read(options.run / GENERATION, ("prompt", "text"))
    print(f"{generation['prompt']}{generation['text']}\n\n{table}\nloss and load: {picture(options.run)}")
    if (options.run / REPORT).exists():
        print(f"report: {options.run / REPORT}")


if __name__ == "__main__":
    sys.exit(run(main))
