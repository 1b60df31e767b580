"""Trains a configuration with every combination of some values.

    python -m switchyard.sweep --config quickstart --over moe.expert_num=2,8,32 train.seed=1,2,3

trains nine runs, one after the other, prints one table and writes one report. A key with one value, such as
train.steps=500, is the same for all runs. A sweep that was interrupted goes on with the same command: finished runs are
kept, a run in training resumes.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from switchyard.cli import Parser, create_parser, run, whole
from switchyard.errors import UserError
from switchyard.sweep.plan import Run, check_same, parse_axes, plan
from switchyard.sweep.results import summary, write_csv
from switchyard.sweep.runner import Runner, last_line, steps_of

REPORT = "report.html"
INSPECTED = 4  # runs of a report at most, for which it shows what experts do


def main(arguments: list[str]) -> int | None:
    """Plans, trains and compares the runs, see the module.

    Raises:
        UserError: bad arguments or a configuration that is refused, before the first run starts; runs that have failed,
            after the last has ended.
        Interrupted: a signal came; the runs in training are saved.
    """
    chosen = _parser().parse_intermixed_args(arguments)
    if not 1 <= chosen.jobs <= 64:
        raise UserError(f"--jobs: {chosen.jobs}; from 1 to 64")
    axes = parse_axes(chosen.over)
    runs = plan(chosen.config, axes, chosen.overrides, chosen.out)
    for one in runs:
        check_same(one)
    if chosen.dry_run:
        print("\n".join(str(one.folder) for one in runs))
        return None
    failed = _train(chosen.config, chosen.jobs, runs)
    _conclude(runs, axes, report=not chosen.no_report)
    if failed:
        names = ", ".join(failed)
        raise UserError(f"sweep: {len(failed)} of {len(runs)} runs failed ({names}); the same command tries them again")
    return None


def _parser() -> Parser:
    """Returns the parser of the command line."""
    parser = create_parser(
        "python -m switchyard.sweep", "Trains a configuration with every combination of some values."
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, or the name of one in config/")
    parser.add_argument(
        "--over",
        required=True,
        nargs="+",
        action="extend",
        metavar="section.key=VALUE,VALUE",
        help="the keys that vary; every combination is trained",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder of the runs (default: train.output_dir/NAME-sweep)")
    parser.add_argument("--jobs", type=whole, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="check and print the run folders, and end")
    parser.add_argument("--no-report", action="store_true", help="print the table and write no report.html")
    return parser


def _train(path: str, jobs: int, runs: Sequence[Run]) -> dict[str, str]:
    """Trains the runs behind a progress bar, which stands on a terminal only; returns what failed."""
    total = sum(one.config.train.steps for one in runs)
    with tqdm(total=total, unit="step", disable=None, initial=sum(map(steps_of, runs))) as bar:

        def say(text: str) -> None:
            tqdm.write(text, file=sys.stderr)

        return Runner(path, jobs, say, lambda steps: bar.update(steps - bar.n)).train(runs)


def _conclude(runs: Sequence[Run], axes: Sequence, report: bool) -> None:
    """Prints the table, and writes results.csv and the report."""
    out = runs[0].folder.parent
    print("\n".join(summary(runs, axes)))
    print(f"figures: {write_csv(runs, axes, out)}")
    folders = [one.folder for one in runs if (one.folder / "metrics.jsonl").is_file()]
    if report and folders:
        _report(folders, out / REPORT)


def _report(folders: Sequence[Path], path: Path) -> None:
    """Writes the report of the runs in a process of its own; a report that fails is one line, and the table stays."""
    command = [sys.executable, "-m", "switchyard.report", *map(str, folders), "--out", str(path)]
    if len(folders) > INSPECTED:
        command.append("--no-inspect")
    log = path.with_suffix(".log")
    with open(log, "wb") as file:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        print(f"report: not written: {last_line(log)} (log: {log})", file=sys.stderr)
        return
    log.unlink()
    print(f"report: {path}")


if __name__ == "__main__":
    sys.exit(run(main))
