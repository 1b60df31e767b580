"""Writes the report of one or several runs: one HTML file that needs no network and no other file.

from switchyard.report.page import write_report
write_report(["runs/quickstart"])
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import switchyard
from switchyard.config import Config
from switchyard.device import prepare_environment
from switchyard.errors import UserError
from switchyard.file_errors import writing
from switchyard.files import unfinished
from switchyard.json_text import to_json
from switchyard.report.colours import expert_colours
from switchyard.report.curves import curve_charts, heat_maps, idle_experts
from switchyard.report.records import EVALUATION, SAMPLE, TRAIN, Records, read_records

NAME, FILES = "report.html", "page_files"
TOKENS = 16384  # validation tokens or images that are sent through a model
MOST_INSPECTED = 4  # runs of a report whose experts are shown
MOST_SAMPLES = 12


def write_report(
    runs: Sequence[str | Path],
    out: str | Path | None = None,
    tokens: int = TOKENS,
    trust_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes the report of runs, be they at work or at their end, and returns its path.

    What is missing of a run, such as its checkpoint or its data, is named in the section that needs it.

    Args:
        runs: run folders.
        out: the file; None is RUN/report.html, of several runs report.html in the current folder.
        tokens: validation tokens, or images, that are sent through each model to see what its experts do; 0 inspects
            none and needs no MindSpore.
        trust_code: whether a router in a file of somebody's own, which a checkpoint names, may be imported.
        say: receives a line for each thing that is done or missing.

    Raises:
        UserError: no run, a run that is no folder, runs without a single record, a file that cannot be written.
    """
    if not runs:
        raise UserError("report: no run given; name one or more run folders such as runs/NAME")
    records = [read_records(run) for run in runs]
    if not any(one.lines.get(TRAIN) or one.lines.get(EVALUATION) or one.config for one in records):
        raise UserError(f"run '{records[0].path}': {records[0].missing[0]}; give a run folder such as runs/NAME")
    path = Path(out) if out is not None else (records[0].path / NAME if len(records) == 1 else Path(NAME))
    views = [_view(one, len(records), tokens, trust_code, say) for one in records]
    html = _render(records, views)
    with writing(path), unfinished(path.absolute()) as folder:
        (folder / NAME).write_text(html, encoding="utf-8", errors="replace")
        (folder / NAME).replace(path)
    return path


@dataclass
class View:
    """Holds what the page shows of one run.

    Attributes:
        data: what its script reads.
        shown: what the template reads, by name.
    """

    data: dict[str, Any]
    shown: dict[str, Any]


def _view(run: Records, count: int, tokens: int, trust_code: bool, say: Callable[[str], None]) -> View:
    """Returns what the page shows of a run."""
    experts = run.config.moe.expert_num if run.layers else 0
    heat = heat_maps(run)
    data: dict[str, Any] = {"name": run.name, "layers": list(run.layers), "experts": experts, "heat": heat}
    data |= {"colours": expert_colours(experts), "data": None}
    shown: dict[str, Any] = {"name": run.name, "colours": data["colours"], "has_heat": heat is not None}
    shown |= {"idle": idle_experts(run), "samples": _samples(run), "no_samples": _why_no_samples(run)}
    shown["no_heat"] = (
        "No layer is conditional." if run.config and not run.layers else "No step with loads was logged yet."
    )
    found, why_not = _inspected(run, count, tokens, trust_code, say)
    shown["why_not"] = why_not
    if found is not None:
        _show_inspection(found, data, shown)
    return View(data, shown)


def _inspected(run: Records, count: int, tokens: int, trust_code: bool, say: Callable[[str], None]):
    """Returns (the inspection, ""), or (None, why there is none)."""
    if not run.config:
        return None, "The configuration is missing, so the model cannot be built."
    if not run.layers:
        return None, "No layer is conditional: there are no experts to look at."
    if not tokens:
        return None, "The model was not inspected (--no-inspect)."
    if count > MOST_INSPECTED:
        command = f"python -m switchyard.report {run.path}"
        return None, f"Experts are shown in reports of at most {MOST_INSPECTED} runs; of this one: {command}"
    prepare_environment()  # before MindSpore is imported
    try:
        from switchyard.report.inspection import inspect

        return inspect(run.path, tokens, trust_code, say), ""
    except (UserError, ImportError) as error:
        say(f"note: run '{run.path}': what the experts do is not shown: {error}")
        return None, f"What the experts do is not shown: {error}"


def _show_inspection(found, data: dict[str, Any], shown: dict[str, Any]) -> None:
    """Adds what an inspection gives to what the script and the template read."""
    from switchyard.report.experts import confidence_chart, drawn_flows, expert_data, path_rows
    from switchyard.report.inspection import mean_loss

    data["data"] = expert_data(found)
    flow, note = drawn_flows(found)
    what = "images" if found.images is not None else "validation tokens"
    number, counting = len(found.losses) // found.rows, found.counting
    if found.images is not None:
        counting = counting.replace("token", "row")
    shown |= {
        "has_text": found.images is None,
        "has_pairs": bool(data["data"]["coactivation"]),
        "flow": flow,
        "flow_note": note,
        "paths": path_rows(found),
        "confidence": confidence_chart(found),
        "inspected": f"{number:,} {what} through the checkpoint of step {found.step}, mean loss "
        f"{mean_loss(found):.3f} nats; {counting}.",
    }


def _samples(run: Records) -> list[dict[str, Any]]:
    lines = [line for line in run.kind(SAMPLE) if isinstance(line.get("text"), str)]
    if len(lines) > MOST_SAMPLES:  # evenly, with the last
        lines = [lines[(index + 1) * len(lines) // MOST_SAMPLES - 1] for index in range(MOST_SAMPLES)]
    return [{"step": line["step"], "prompt": str(line.get("prompt", "")), "text": line["text"]} for line in lines]


def _why_no_samples(run: Records) -> str:
    if run.config and run.config.model.type != "decoder":
        return "Only a decoder samples text."
    if run.config and not run.config.train.sample_every:
        return "None: train.sample_every is 0."
    return "None was sampled so far."


def _render(records: Sequence[Records], views: Sequence[View]) -> str:
    """Returns the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("switchyard.report", FILES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    files = Path(__file__).parent / FILES
    charts = curve_charts(records)
    drawn = [*charts, *(view.shown["confidence"] for view in views if view.shown.get("confidence"))]
    for number, chart in enumerate(drawn):
        chart.number = number
    data = {"runs": [view.data for view in views], "charts": [chart.data for chart in drawn]}
    several = len(records) > 1
    return environment.get_template("report.html.jinja").render(
        version=switchyard.__version__,
        title=" · ".join(run.name for run in records) if len(records) <= MOST_INSPECTED else f"{len(records)} runs",
        subtitle=_subtitle(records),
        css=Markup((files / "report.css").read_text(encoding="utf-8")),
        js=Markup((files / "report.js").read_text(encoding="utf-8")),
        data=Markup(_embedded(data)),
        charts=charts,
        runs=[view.shown for view in views],
        missing=[f"{run.name}: {line}" for run in records for line in run.missing],
        tiles=[] if several else _tiles(records[0]),
        comparison=_comparison(records) if several else None,
        differences=_differences(records) if several else [],
        sections=[] if several else _sections(records[0].config),
        no_configuration="The runs have the same configuration but for their names." if several else "Missing.",
    )


def _embedded(tree: Any) -> str:
    """Returns JSON that may stand in a script element: no tag can begin or end in it."""
    text = to_json(tree, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _subtitle(records: Sequence[Records]) -> str:
    if len(records) > 1:
        return f"Comparison of {len(records)} runs"
    run, config = records[0], records[0].config
    if config is None:
        return str(run.path)
    model = f"{config.model.type}, {config.model.num_layers} layers of width {config.model.hidden_size}"
    if run.layers:
        chosen = f", {config.moe.num_experts_chosen} chosen" if config.moe.num_experts_chosen else ""
        model += f"; {len(run.layers)} conditional, {config.moe.expert_num} experts{chosen}, router {config.moe.router}"
    return f"{model}; {_state(run)}"


def _state(run: Records) -> str:
    """Says how far a run has come."""
    steps = max((line["step"] for lines in run.lines.values() for line in lines), default=0)
    if run.result and run.config and run.result.get("steps") == run.config.train.steps:
        return f"finished after {run.config.train.steps:,} steps"
    return f"at step {steps:,} of {run.config.train.steps:,}" if run.config else f"at step {steps:,}"


FIGURES = (  # name, key of the last evaluation or of result.json, format
    ("validation loss, nats", "loss", "{:.4f}"),
    ("accuracy", "accuracy", "{:.2%}"),
    ("bits per byte", "bits_per_byte", "{:.3f}"),
    ("perplexity", "perplexity", "{:.2f}"),
)


def _figures(run: Records) -> dict[str, str]:
    """Returns the figures at the end of a run, by name."""
    last = run.kind(EVALUATION)[-1] if run.kind(EVALUATION) else {}
    found = {name: form.format(last[key]) for name, key, form in FIGURES if isinstance(last.get(key), float)}
    result = run.result or {}
    _, speed = run.series(TRAIN, "tokens_per_second")
    rate = result.get("tokens_per_second") or (float(speed.mean()) if len(speed) else None)
    unit = run.config.unit if run.config else "tokens"
    if isinstance(result.get("parameters"), int):
        found["parameters"] = _millions(result["parameters"])
    if rate:
        found[f"{unit} per second"] = f"{rate:,.0f}"
    if isinstance(result.get("seconds"), (int, float)):
        found["training time"] = _duration(result["seconds"])
    dropped = last.get("layers") or []
    if dropped and all(isinstance(layer.get("max_violation"), float) for layer in dropped):
        found["largest MaxVio"] = f"{max(layer['max_violation'] for layer in dropped):.2f}"
    return found


def _tiles(run: Records) -> list[tuple[str, str]]:
    return list(_figures(run).items())


def _comparison(records: Sequence[Records]) -> dict[str, Any]:
    """Returns the final table: a row for each run."""
    figures = [_figures(run) for run in records]
    names = list(dict.fromkeys(name for found in figures for name in found))
    rows = [[run.name, _state(run), *(found.get(name, "–") for name in names)] for run, found in zip(records, figures)]
    return {"heads": ["run", "state", *names], "rows": rows}


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:,}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _flat(config: Config) -> dict[str, Any]:
    tree = config.model_dump()
    return {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}


def _differences(records: Sequence[Records]) -> list[tuple[str, list[str]]]:
    """Returns (key, value of each run) of the keys in which the configurations differ, names left out."""
    trees = [_flat(run.config) if run.config else {} for run in records]
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in ("train.name", "train.output_dir"))
    rows = [(key, [tree.get(key) for tree in trees]) for key in keys]
    return [
        (key, [_word(value) for value in values]) for key, values in rows if any(one != values[0] for one in values)
    ]


def _sections(config: Config | None) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """Returns (section, [(key, value, whether it is not the default)])."""
    if config is None:
        return []
    usual = type(config)().model_dump()
    return [
        (section, [(key, _word(value), value != usual[section].get(key)) for key, value in keys.items()])
        for section, keys in config.model_dump().items()
    ]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value, default=str)
