"""Runs `python -m switchyard.profile`: where the time of a training step goes.

Every part of the step is compiled for itself and timed, forward and backward, in turn with the whole step and with the
part's floor: the same matrix products alone, or a copy of as many bytes as the part must move. Shares are those of all
parts together, which take longer than the step: within it, results are still near when the next operator reads them.
On a GPU or Ascend, where starting a graph may cost more than a part, a part takes what its copies add to a graph.
"""

import sys
from pathlib import Path

from switchyard import cli
from switchyard import config as configuration
from switchyard.data.tokenizer import expected_vocabulary
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.json_text import to_json
from switchyard.text_table import table

MOST_APART = 2.0  # all parts over the whole step, beyond which the host's calls are what is measured
HEADS = ("part", "times", "forward ms", "backward ms", "share", "floor ms", "/ floor")


def main(arguments: list[str]) -> None:
    """Prints the table, and writes the picture and the JSON that the arguments ask for."""
    parser = cli.create_parser("python -m switchyard.profile", (__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, or the name of one in config/")
    parser.add_argument("--vocab", type=cli.whole, metavar="V", help="entries of the vocabulary (default: data's)")
    parser.add_argument("--rounds", type=cli.whole, default=20, metavar="N", help="how often each part is timed")
    parser.add_argument("--picture", metavar="FILE.png", help="also draw the table")
    parser.add_argument("--json", metavar="FILE", help="also write the table's numbers")
    chosen = parser.parse_intermixed_args(arguments)
    for name in ("vocab", "rounds"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            raise UserError(f"--{name}: {getattr(chosen, name)}; at least 1")
    config = configuration.load(chosen.config, chosen.overrides)
    vocabulary = chosen.vocab or expected_vocabulary(config)
    from switchyard.device import set_context

    target = set_context(config.context, config.train.seed, config.model.compute_dtype)
    from switchyard.profile.measure import measure

    rows, step = measure(config, vocabulary, chosen.rounds)
    print("\n".join(render(rows, step)))
    if chosen.json:
        with writing(chosen.json):
            Path(chosen.json).write_text(to_json(as_json(rows, step, target), indent=1), encoding="utf-8")
    if chosen.picture:
        from switchyard.profile.picture import draw

        draw(rows, step, f"{Path(chosen.config).stem} on {target}", Path(chosen.picture))


def render(rows: list, step: float) -> list[str]:
    """Returns the lines of the table: milliseconds, shares of all parts, and times the floor."""
    total = sum(row.total for row in rows)
    lines = [line_of(row, total) for row in rows]
    said = [f"all parts: {1e3 * total:.2f} ms; whole step: {1e3 * step:.2f} ms (medians)"]
    if total > MOST_APART * step:
        said.append(
            f"The parts take {total / step:.1f} times the step: starting each costs more than the work of many."
        )
        said.append("So shares say little here; read the kernels of the whole step with a profiler of the device.")
    return [*table(HEADS, lines), "", *said]


def line_of(row, total: float) -> tuple[str, ...]:
    """Returns the cells of a part."""
    passes = (f"{1e3 * row.forward:.2f}", f"{1e3 * row.backward:.2f}")
    floor = ("", "") if not row.floor else (f"{1e3 * row.floor:.2f}", f"{row.total / row.floor:.2f}")
    return (row.name, str(row.times), *passes, f"{row.total / total:.1%}", *floor)


def as_json(rows: list, step: float, target: str) -> dict:
    """Returns the numbers of the table, in milliseconds."""
    found = [
        {
            "part": row.name,
            "times": row.times,
            "forward_ms": 1e3 * row.forward,
            "backward_ms": 1e3 * row.backward,
            "floor_ms": None if row.floor is None else 1e3 * row.floor,
        }
        for row in rows
    ]
    return {"device": target, "step_ms": 1e3 * step, "parts": found}


if __name__ == "__main__":
    sys.exit(cli.run(main))
