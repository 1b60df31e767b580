"""The routing page's tables and pictures are those of the results, and every experiment has both."""

import importlib
import json
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "benchmarks" / "experiments"
NAMES = ("importance_load", "causal_routers", "gate_gradient", "efficiency", "digits")


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("tables")


@pytest.fixture
def plots(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("plots")


def row(name, seeds=2, **more):
    """A row of results with every figure that any table shows."""
    figures = ("cv_importance", "cv_load", "max_over_mean", "step_ms", "parameters", "active_flops", "flops", "entropy")
    mean = dict.fromkeys((*figures, "unused", "dropped"), 0.5) | {"loss": 1.25, "max_violation": 2.0, "accuracy": 0.75}
    deviation = dict.fromkeys(mean, 0.0) | {"loss": 0.0125, "accuracy": 0.015}
    return {"name": name, "mean": mean, "deviation": deviation, "runs": [mean] * seeds} | more


def write(folder, name, rows):
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"title": name, "steps": 7, "seeds": 2, "rows": rows}))
    return path


def test_page_is_made_of_the_results(tables):
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.renew(page) == page, "run: python benchmarks/experiments/tables.py"


def test_every_experiment_has_a_table_a_picture_and_a_place(tables, plots):
    page = tables.PAGE.read_text(encoding="utf-8")
    assert set(tables.TABLES) == set(plots.PLOTS) == set(NAMES)
    for name in NAMES:
        assert page.count(f"<!-- table: {name} -->") == 1
        assert (EXPERIMENTS / f"{name}.py").exists()


def test_table_shows_means_and_deviations(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "results", lambda name: tmp_path / f"{name}.json")
    stage = row("cascade, threshold 0.5", seeds=1)
    del stage["mean"]["max_violation"]  # nothing is routed there
    stage["mean"]["us_per_image"] = 3.25
    write(tmp_path, "digits", [row("dense"), stage])
    before = "a\n<!-- table: digits -->\nold\n<!-- end -->\n<!-- table: efficiency -->\n<!-- end -->\n"
    lines = tables.renew(before).splitlines()
    assert lines[4] == "| dense | 75.0% ± 1.5% | 0 | 0 | 2.00 |  |"
    assert lines[5] == "| cascade, threshold 0.5 | 75.0% | 0 | 0 |  | 3.2 |"
    assert "7 steps, 2 seeds." in lines and "![digits](images/digits.png)" in lines
    assert "old" not in lines and lines[-2:] == ["<!-- table: efficiency -->", "<!-- end -->"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_drawn_of_results_alone(plots, tmp_path, name):
    rows = [row("dense, width 256"), row("switch, 4 experts", w_importance=0.1, w_load=0.2)]
    rows[0] |= {"w_importance": 0.0, "w_load": 0.0}
    stage = row("cascade, threshold 0.5", threshold=0.5)
    stage["mean"]["us_per_image"] = 3.0
    path = write(tmp_path, name, [*rows, stage] if name == "digits" else rows)
    plots.draw(path, tmp_path / "images" / "picture.png")
    assert (tmp_path / "images" / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def gpu_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS.parent))
    return importlib.import_module("gpu_tables")


def test_pages_on_gpus_are_made_of_the_results(gpu_tables):
    found = json.loads(gpu_tables.RESULTS.read_text(encoding="utf-8"))
    pages = {name: (gpu_tables.DOCS / name).read_text(encoding="utf-8") for name in gpu_tables.PAGES}
    for name, part in gpu_tables.PAGES.items():
        assert gpu_tables.page_of(part(found), pages[name]) == pages[name]
    rows, page = found["layouts"], pages["distributed.md"]
    assert all(f"| {gpu_tables.NAMES.get(name, name)} |" in page for name in rows) and "= planned" in page
    second = json.loads(gpu_tables.SECOND.read_text(encoding="utf-8"))["layouts"]
    assert all(f"{row['tokens_per_second']:,.0f}" in page for row in (*rows.values(), *second.values()))
    rows["one GPU"]["tokens_per_second"] *= 2
    assert gpu_tables.page_of(gpu_tables.measured(found), page) != page


def test_gpu_table_says_what_did_not_run(gpu_tables):
    row = {"code": 2, "said": "error: parallel.x: 2; 1", "tokens_per_second": 0.0}
    assert "| tp 2 | - | - | - | - | - | error: parallel.x: 2; 1 |" in gpu_tables.layout_table({"tp 2": row})


@pytest.mark.parametrize(
    "said",
    [
        "train.replica_check_every: 'head.weight' is not the same on ranks 1 as on 0 after step 21, and must be; ..",
        "train.replica_check_every: 'head.weight' differs between ranks 1 and ranks 0 after step 21, although ..",
    ],
    ids=["version 0.1", "version 0.2"],
)
def test_a_stopped_job_is_told_in_plain_words(gpu_tables, said):
    told = gpu_tables.ended({"code": 2, "said": said, "newest": ["step-00000020"]})
    assert told == (
        "the replica check stopped the job after step 21, because `head.weight` differed on rank 1; `step-00000020` "
        "stays the newest checkpoint"
    )
    assert gpu_tables.ended({"code": 0, "end": "80 steps ended well"}) == "80 steps ended well"
