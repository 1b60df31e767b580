"""The figures of a sweep: one row for each run as CSV, and one table with the mean and the spread over seeds."""

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from switchyard.errors import shortened
from switchyard.file_errors import writing
from switchyard.sweep.plan import SEED, Axis, Run, result_of
from switchyard.text_table import table

CSV = "results.csv"
# figure of result.json -> (head of the column, format)
COLUMNS = {
    "validation_loss": ("validation loss", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "accuracy": ("accuracy", "{:.4f}"),
    "load_max": ("max load / mean", "{:.2f}"),
    "tokens_per_second": ("{unit}/s", "{:,.0f}"),
}
FIGURES = (*COLUMNS, "load_min", "parameters", "steps", "seconds", "best_checkpoint")


def summary(runs: Sequence[Run], axes: Sequence[Axis]) -> list[str]:
    """Returns the lines of the table: a row for each combination of the values other than seeds.

    A figure of several seeds is the mean, and behind ± the standard deviation (of a sample: n - 1). The row of the
    lowest validation loss is marked with *.
    """
    keys = [axis.key for axis in axes if axis.key != SEED and len(axis.values) > 1]
    groups: dict[tuple[str, ...], list[dict]] = {}
    for run in runs:
        groups.setdefault(tuple(run.values[key] for key in keys), [])
        if result := result_of(run):
            groups[tuple(run.values[key] for key in keys)].append(result)
    shown = [name for name in COLUMNS if any(_numbers(results, name) for results in groups.values())]
    best = min(groups, key=lambda one: _mean(groups[one], "validation_loss"))
    unit = runs[0].config.unit
    heads = [*keys, "runs", *(COLUMNS[name][0].format(unit=unit) for name in shown), ""]
    rows = []
    for values, results in groups.items():
        mark = "*" if len(groups) > 1 and values == best and results else ""
        figures = [_figure(_numbers(results, name), COLUMNS[name][1]) for name in shown]
        rows.append([*map(shortened, values), str(len(results)), *figures, mark])
    return table(heads, rows)


def _numbers(results: Sequence[dict], name: str) -> list[float]:
    return [result[name] for result in results if isinstance(result.get(name), int | float)]


def _mean(results: Sequence[dict], name: str) -> float:
    numbers = _numbers(results, name)
    return statistics.fmean(numbers) if numbers else float("inf")


def _figure(numbers: Sequence[float], form: str) -> str:
    """Returns mean and standard deviation as text; "-" where there is no number."""
    if not numbers:
        return "-"
    mean = form.format(statistics.fmean(numbers))
    return mean if len(numbers) == 1 else f"{mean} ± {form.format(statistics.stdev(numbers))}"


def write_csv(runs: Sequence[Run], axes: Sequence[Axis], out: Path) -> Path:
    """Writes a row for each run, with the values of the axes and the figures of result.json; returns the path.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *(axis.key for axis in axes), *FIGURES])
    for run in runs:
        result = result_of(run) or {}
        writer.writerow([run.name, *run.values.values(), *(result.get(name, "") for name in FIGURES)])
    path = out / CSV
    with writing(path):
        path.write_text(text.getvalue(), encoding="utf-8")
    return path
