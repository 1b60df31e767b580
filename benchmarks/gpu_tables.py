"""Writes what docs/gpu.md and docs/distributed.md say of GPUs, from what benchmarks/gpus.py has measured.

python benchmarks/gpu_tables.py            # writes it between its marks
python benchmarks/gpu_tables.py --check    # exit code 1 if the pages and the results differ
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path

from gpus import COMPARED, LAYOUTS, MODEL, TREE, WEAK

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpus.json"
SECOND = HERE / "results" / "gpus_h200.json"  # other GPUs and a later version
DOCS = HERE.parent / "docs"
STOPPED = re.compile(r"'(\S+)' (?:is not the same on|differs between) ranks ([\d, ]+?) (?:as|and) .*? step (\d+)")
UNIFORM = math.log(256)  # nats: the loss of a model that gives every byte the same probability


def page_of(text: str, page: str) -> str:
    """The page with `text` between its marks."""
    begin, end = "<!-- gpus -->", "<!-- end -->"
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n{text}\n{end}{after}"


def findings(found: dict) -> str:
    """What was found besides the layouts, as Markdown."""
    text = []
    if "same" in found:
        apart = ", ".join(f"{kind} {part['largest_relative']:.1e}" for kind, part in found["same"].items())
        text.append(f"- One GPU against a CPU, largest relative difference of {COMPARED} losses: {apart}.")
    for row in found.get("resume", {}).values():
        text.append(
            f"- Resumed half way, {row['what']}: after {COMPARED} steps losses are within {row['loss_apart']:.1e} and "
            f"weights within {row['weights_apart']:.1e} of one GPU without a stop."
        )
    if kill := found.get("kill"):
        text.append(
            f"- A killed worker: the job ended {kill['seconds']} s later with exit code {kill['code']}, "
            f"named the rank and left {kill['left']} processes."
        )
    text += [f"- Asynchronous kernel launches, {row['what']}: {ended(row)}." for row in found.get("guard", {}).values()]
    if half := found.get("float16"):
        skipped = sum(point[3] for point in half["curve"])
        text.append(
            f"- float16, `config/moe_1b_gpu.yaml` at {half['parameters']:,} parameters, one GPU, "
            f"{half['curve'][-1][0]} steps of the default corpus: loss {half['curve'][0][1]:.2f} to "
            f"{half['curve'][-1][1]:.2f}, validation "
            f"{half['validation_loss']:.3f}; {half['tokens_per_second']:,.0f} tokens/s; of the {len(half['curve'])} "
            f"logged steps {skipped} were skipped by the loss scale, which ended at {half['curve'][-1][2]:g}."
        )
        text += ["", "![loss of the float16 run](images/gpu_float16.png)"]
    return "\n".join(text)


def ended(row: dict) -> str:
    """Returns how a job with the replica check ended: in good order, or the tensor that differed and when."""
    if row["code"] == 0:
        return row["end"]
    tensor, ranks, step = STOPPED.search(row["said"]).groups()
    kept = f"`{row['newest'][-1]}` stays the newest checkpoint"
    return f"the replica check stopped the job after step {step}, because `{tensor}` differed on rank {ranks}; {kept}"


def measured(found: dict) -> str:
    """The cards, the layouts and how each is asked for, as Markdown."""
    second = json.loads(SECOND.read_text(encoding="utf-8"))
    asked = [
        f"{NAMES.get(name, name)} `{' '.join(f'{key}={value}' for key, value in LAYOUTS[name].items())}`"
        for name in found["layouts"]
        if name in LAYOUTS
    ]
    return "\n".join(
        [
            f"GPUs and driver: {'; '.join(sorted(set(found['gpus'])))}. Version 0.1.",
            "",
            *layout_table(found["layouts"]),
            "",
            EXPLAINED,
            "",
            f"The same jobs on two {second['gpus'][0]}, with version 0.2:",
            "",
            *layout_table(second["layouts"]),
            "",
            *weak_table(second["weak"]),
            "",
            f"Keys: {'; '.join(asked)}.",
        ]
    )


def layout_table(found: dict) -> list[str]:
    """One row a layout."""
    lines = [
        "| Layout | losses apart | weights apart | ms a step | tokens/s | efficiency | exchanges of a device a step |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in found.items():
        if not row.get("tokens_per_second"):
            lines.append(f"| {name} | - | - | - | - | - | {row['said']} |")
            continue
        sent = sent_by(row)
        same = " = planned" if sent and row["exchanges"] == row["planned"] else ""
        apart = [f"{row[key]:.1e}" if key in row else "" for key in ("loss_apart", "weights_apart")]
        share = f"{row['efficiency']:.0%}" if "efficiency" in row else ""
        speeds = f"{row['step_ms']:.1f} | {row['tokens_per_second']:,.0f} | {share}"
        lines.append(f"| {NAMES.get(name, name)} | {apart[0]} | {apart[1]} | {speeds} | {sent}{same} |")
    return lines


def weak_table(found: dict) -> list[str]:
    """What is left of twice the speed where the batch grows with the GPUs."""
    lines = [
        "`config/moe_1b_gpu.yaml` in float16 with 8 sequences of 1,024 tokens a GPU and a vocabulary of 8,192, on two "
        "NVIDIA H200 of another host:",
        "",
        "| Layout | ms a step | tokens/s | efficiency | exchanges of a device a step |",
        "|---|---:|---:|---:|---|",
    ]
    for name, row in found.items():
        rate, tokens, alone = row["tokens_per_second"], 8 * 1024 * WEAK[name][0], name == "one GPU"
        share = "" if alone else f"{row['efficiency']:.0%}"
        lines.append(f"| {name} | {1e3 * tokens / rate:.1f} | {rate:,.0f} | {share} | {sent_by(row)} |")
    return lines


def sent_by(row: dict) -> str:
    """What a device sends a step: number, kind and bytes."""
    return ", ".join(f"{n} {kind} {size:,}" for kind, (n, size) in sorted(row.get("exchanges", {}).items()))


def draw(half: dict, path: Path) -> None:
    """Draws the loss of the float16 run, beside that of a uniform guess."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    axes.plot(
        [point[0] for point in half["curve"]], [point[1] for point in half["curve"]], label="training", linewidth=1
    )
    last, validation = half["curve"][-1][0], half["validation_loss"]
    axes.plot([last], [validation], "o", color="C1", label=f"validation: {validation:.3f}")
    axes.axhline(UNIFORM, color="0.5", linestyle=":", label=f"uniform guess of a byte: ln 256 = {UNIFORM:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats / byte)", title="float16, one GPU", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


EXPLAINED = (
    f"float32, {MODEL['num_layers']} layers of width {MODEL['hidden_size']}, every second with 8 experts, "
    f"{TREE['data']['batch_size'] * MODEL['seq_length']:,} tokens a step in every layout. Apart: the largest absolute "
    f"difference from one GPU, of the losses of the first {COMPARED} steps and of the weights after them. Efficiency: "
    'tokens/s over twice those of one GPU. Exchanges: number, kind and bytes, from the compiled graph; "= planned" '
    "where the planner gives the same."
)
NAMES = {"dp 2, not waiting": "dp 2, asynchronous", "dp 2, ZeRO 1, blocking": "dp 2, ZeRO 1, synchronous"}
PAGES = {"gpu.md": findings, "distributed.md": measured}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the pages are up to date")
    args = parser.parse_args()
    found, old = json.loads(RESULTS.read_text(encoding="utf-8")), False
    for name, part in PAGES.items():
        page = (DOCS / name).read_text(encoding="utf-8")
        renewed = page_of(part(found), page)
        old = old or renewed != page
        if not args.check:
            (DOCS / name).write_text(renewed, encoding="utf-8")
    if "float16" in found and not args.check:
        draw(found["float16"], DOCS / "images" / "gpu_float16.png")
    return int(args.check and old)


if __name__ == "__main__":
    sys.exit(main())
