"""Tables and pictures of docs/routing.md, made of results/*.json: no figure there is typed.

python benchmarks/experiments/tables.py            # writes the tables between their marks, and docs/images
python benchmarks/experiments/tables.py --check    # exit code 1 if the page and the results differ
"""

import argparse
import json
import re
import sys
from pathlib import Path

from plots import draw

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "routing.md"
IMAGES = PAGE.parent / "images"
COLUMNS = {
    "loss": ("loss", "{:.3f}"),
    "step_ms": ("ms a step", "{:.0f}"),
    "cv_importance": ("CV(importance)", "{:.2f}"),
    "cv_load": ("CV(load)", "{:.2f}"),
    "max_over_mean": ("max / mean load", "{:.2f}"),
    "max_violation": ("MaxVio", "{:.2f}"),
    "dropped": ("dropped", "{:.1%}"),
    "entropy": ("entropy", "{:.2f}"),
    "unused": ("unused experts", "{:.1%}"),
    "parameters": ("parameters", "{:,.0f}"),
    "active_flops": ("active FLOPs a token", "{:,.0f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "flops": ("FLOPs an image", "{:,.0f}"),
    "us_per_image": ("µs an image", "{:.1f}"),
}
SPREAD = {"loss": "{:.3f}", "accuracy": "{:.1%}"}  # figures shown with their standard deviation over the seeds
TABLES = {
    "importance_load": ("loss", "cv_importance", "cv_load", "max_over_mean"),
    "causal_routers": ("loss", "step_ms", "max_violation", "dropped", "entropy", "unused"),
    "gate_gradient": ("loss", "max_violation", "entropy"),
    "efficiency": ("loss", "parameters", "active_flops", "step_ms"),
    "digits": ("accuracy", "flops", "parameters", "max_violation", "us_per_image"),
}


def results(name: str) -> Path:
    """Where an experiment leaves its figures."""
    return HERE / "results" / f"{name}.json"


def table(name: str) -> str:
    """The Markdown table of one experiment's results."""
    content = json.loads(results(name).read_text(encoding="utf-8"))
    keys = TABLES[name]
    lines = ["| setting | " + " | ".join(COLUMNS[key][0] for key in keys) + " |", "|---|" + "---:|" * len(keys)]
    for row in content["rows"]:
        cells = [_cell(row, key) for key in keys]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    lines.append(f"\n{content['steps']} steps, {content['seeds']} seed{'s' if content['seeds'] > 1 else ''}.")
    return "\n".join(lines)


def _cell(row: dict, key: str) -> str:
    if key not in row["mean"]:
        return ""
    text = COLUMNS[key][1].format(row["mean"][key])
    if key in SPREAD and len(row["runs"]) > 1:
        text += " ± " + SPREAD[key].format(row["deviation"][key])
    return text


def renew(page: str) -> str:
    """The page with every marked table made anew; a table without results stays as it is."""

    def replace(match: re.Match) -> str:
        name = match["name"]
        if not results(name).exists():
            return match[0]
        return f"<!-- table: {name} -->\n{table(name)}\n\n![{name}](images/{name}.png)\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>\w+) -->.*?<!-- end -->", replace, page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the page is up to date")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    renewed = renew(page)
    if args.check:
        return int(page != renewed)
    PAGE.write_text(renewed, encoding="utf-8")
    for name in filter(lambda name: results(name).exists(), TABLES):
        draw(results(name), IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
