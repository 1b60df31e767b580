"""Tables of measured results, from results typed by hand."""

import importlib
import json
from pathlib import Path

import pytest

HEAD = {"machine": "2 cores, X", "versions": {"python": "3"}, "date": "2026-11-29", "commit": "abc"}


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The module, which reads its results from an empty folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    module = importlib.import_module("measured_tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({**HEAD, "rows": rows}))


def test_decode_is_compared_with_the_fastest_loop(tables, tmp_path):
    """8 rows in 4 ms are 2,000 tokens/s; of two loops the one of 2 ms counts, the dense one does not."""
    least = {"switchyard": 4.0, "torch plain each": 5.0, "torch plain grouped_mm": 2.0, "torch plain dense": 1.0}
    least["torch mixtral"] = 8.0
    rows = [{"size": "small", "batch": 8, "contender": name, "min_ms": ms} for name, ms in least.items()]
    write(tmp_path, "decode_step", [*rows, {"size": "small", "batch": 0, "contender": "switchyard", "min_ms": 512.0}])
    text = tables.render("decode").splitlines()
    assert text[2] == "| small: decode, batch 8 | 2,000 tokens/s | 4,000 tokens/s | 0.50 | 1,000 tokens/s | 2.00 |"
    assert text[3] == "| small: prefill of 1,024 tokens | 2,000 tokens/s |  |  |  |  |"
    assert text[-1].startswith("2 cores, X; python 3; 2026-11-29, commit abc.")


def test_another_processor_has_tables_of_its_own(tables, tmp_path):
    least = {"switchyard dense": 30.0, "switchyard moe": 50.0}
    for name, slower in (("train_step", 1), ("train_step_amd", 2)):
        rows = [{"size": "small", "contender": f"small {key}", "min_ms": slower * ms} for key, ms in least.items()]
        write(tmp_path, name, rows)
    assert tables.render("step").splitlines()[2].startswith("| small, dense | 30.0 |")
    assert tables.render("step_amd").splitlines()[2].startswith("| small, dense | 60.0 |")


def test_layers_memory_and_compile_time(tables, tmp_path):
    """A shape that two parts measure has one row, with the smaller time."""
    layer = {"conditional layer": 3.0, "expert matrix products": 2.0, "traffic": 1.0, "torch sort_mm": 6.0}
    rows = [{"part": "rows", "shape": "2048,256,8,1", "contender": n, "min_ms": ms} for n, ms in layer.items()]
    rows.append({"part": "experts", "shape": "2048,256,8,1", "contender": "conditional layer", "min_ms": 4.0})
    rows.append({"part": "memory", "size": "small", "peak": 120e6, "second_peak": 110e6, "planned": 100e6})
    rows.append({"part": "compile", "layers": 4, "experts": 8, "seconds": 6.0, "second": 0.9})
    write(tmp_path, "scaling", rows)
    assert tables.render("layers").splitlines()[2:-2] == ["| 2,048 | 256 | 8 | 1 | 3.0 | 6.0 | 0.50 | 2.0 | 1.0 |"]
    assert tables.render("memory").splitlines()[2] == "| small | 120 | 110 | 100 | 1.20 | 1.10 |"
    assert tables.render("compile", "zh").splitlines()[2] == "| 4 | 8 | 6.0 | 1.50 | 0.9 |"


def test_a_step_is_compared_with_the_fastest_peer_of_its_kind(tables, tmp_path):
    """Of two dense peers the one of 20 ms counts; without a peer of a kind the columns stay empty."""
    least = {"switchyard dense": 30.0, "switchyard moe": 50.0, "torch dense eager": 25.0, "torch dense compiled": 20.0}
    rows = [{"size": "small", "contender": f"small {name}", "min_ms": ms} for name, ms in least.items()]
    write(tmp_path, "train_step", rows)
    dense, moe = tables.render("step").splitlines()[2:4]
    assert dense == "| small, dense | 30.0 | 20.0 | 1.50 | compiled |"
    assert moe == "| small, 8 experts | 50.0 |  |  |  |"


def test_a_corpus_that_was_prepared_has_a_row(tables, tmp_path):
    row = {"tokenizer": "byte", "text_gb": 20.0, "tokens": 20_010_000, "seconds": 90.0, "mb_per_second": 222.22}
    row |= {"peak_mb": 900.4, "peak_mb_of_a_process": 400.0, "read_peak_mb": 70.0}
    write(tmp_path, "prepare_corpus", [row])
    text = tables.render("corpus").splitlines()
    assert text[2] == "| byte | 20.0 | 20,010,000 | 1.5 | 222.2 | 900 | 400 | 70 |"
    assert text[-1].startswith("2 cores, X; python 3; 2026-11-29, commit abc. Measured once")


def test_a_curve_has_its_losses_after_steps_and_seconds(tables, tmp_path):
    """100 tokens at 1,000 tokens/s are a step of 100 ms; step 2,000 lies half way from 3.0 to 2.0."""
    row = {"name": "dense", "tokens_of_step": 100, "tokens_per_second": 1000.0, "curve": [[1000, 20, 3], [3000, 70, 2]]}
    row |= {"seconds": 72.0, "steps_to_dense": 2500.4, "seconds_to_dense": 60.0}
    write(tmp_path, "speed_to_quality_cpu", [row, row | {"name": "32 experts by hash", "steps_to_dense": None}])
    text = tables.render("quality_cpu").splitlines()
    assert text[0].startswith("| Model | A step | Trained | Loss after 2,000 steps | 3,000 | 4,500 | after 60 s |")
    assert text[2] == "| dense | 100.0 ms | 72 s | 2.500 | 2.000 |  | 2.200 |  | 2,500 steps, 60 s |"
    assert tables.render("quality_cpu", "zh").splitlines()[3].startswith("| 32 个专家，按哈希 | 100.0 ms |")
    assert text[3].endswith("|  |")
