"""Makes the tables of docs/reliability.md from the figures of the campaigns, for scripts/renew_docs.py."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLUMNS = {  # name of a campaign -> heading of a column -> key of a row
    "kills": {
        "killed during": "phase",
        "processes": "processes",
        "kills": "kills",
        "with something half written": "half_written",
        "unusable folders": "unusable",
        "torn lines of metrics": "torn",
        "doubled lines": "doubled",
        "runs compared": "runs",
        "of those, with other figures": "differing",
    },
    "long_run": {
        "steps": "steps",
        "processes": "processes",
        "corpora": "corpora",
        "ranks killed": "kills",
        "ranks stopped": "stops",
        "full disks": "full_disks",
        "NaN batches": "nan_batches",
        "restarts": "restarts",
        "checkpoints lost": "lost_checkpoints",
        "losses compared": "losses",
        "losses that differ": "losses_differing",
        "weights and moments that differ": "tensors_differing",
        "validation loss": "validation_loss",
        "of the undisturbed run": "validation_loss_undisturbed",
    },
    "altered_files": {
        "altered": "folder",
        "change": "kind",
        "changes": "changes",
        "refused by name": "refused",
        "same content, accepted": "same_content",
        "altered and accepted": "accepted",
        "refused without the name": "unnamed",
        "tracebacks": "tracebacks",
    },
    "inputs": {
        "input": "input",
        "generated": "calls",
        "accepted": "accepted",
        "refused in one line": "refused",
        "tracebacks": "tracebacks",
        "other endings": "unclear",
        "files overwritten": "overwritten",
    },
    "faults": {"fault": "fault", "rule": "rule", "tries": "tries", "rule kept": "kept"},
}
UPRIGHT = ("long_run",)  # one row, whose columns stand below each other


def render() -> str:
    """Returns all tables, each after the command that has made it."""
    return "\n\n".join(part for name in COLUMNS for part in parts(name))


def parts(name: str) -> list[str]:
    """Returns heading, origin and table of a campaign; a campaign without figures says so."""
    heading, path = f"### {name}", RESULTS / f"reliability_{name}.json"
    if not path.exists():
        return [heading, f"`benchmarks/reliability/{name}.py` has not been run in full."]
    found = json.loads(path.read_text(encoding="utf-8"))
    versions = f"MindSpore {found['versions']['mindspore']}, Python {found['versions']['python']}"
    origin = f"`{found['command']}` (needs: minutes to hours), {found['machine']}, {versions}, commit "
    origin = f"{found['question']} {origin}{found['commit']}, {found['date']}. {found.get('note', '')}".rstrip()
    return [heading, origin, table(name, found["rows"])]


def table(name: str, rows: list[dict]) -> str:
    """Returns the rows of a campaign as a table of Markdown, numbers in a row `all` below."""
    columns = COLUMNS[name]
    if name in UPRIGHT:
        lines = [("figure", "value"), ("---", "---"), *((title, shown(rows[0][key])) for title, key in columns.items())]
    else:
        cells = [[shown(row[key]) for key in columns.values()] for row in rows]
        sums = [sum(row[key] for row in rows) if _counts(rows, key) else "" for key in columns.values()]
        last = [["**all**", *map(shown, sums[1:])]]
        lines = [list(columns), ["---"] * len(columns), *cells, *last]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _counts(rows: list[dict], key: str) -> bool:
    return key != "processes" and all(isinstance(row[key], int) for row in rows)


def shown(value: object) -> str:
    """Returns a value as a cell shows it."""
    if isinstance(value, float):
        return f"{value:.6f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    print(render())
