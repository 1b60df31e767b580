"""benchmarks/prepare_corpus.py: it writes the text that it says, and sees the memory of all processes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("prepare_corpus")


def test_a_file_holds_the_text_that_is_counted(benchmark, tmp_path):
    """Lines of JSON, of which each is a document of made-up sentences; the same seed writes the same."""
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "000.jsonl.zst"
    size = benchmark.write_file((str(path), 50_000, 3))
    with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as file:
        texts = [json.loads(line)["text"] for line in file.read().splitlines()]
    assert sum(len(text.encode()) for text in texts) == size and 50_000 <= size < 60_000
    assert len(set(texts)) == len(texts) > 10 and all(text.endswith(". ") for text in texts)
    before = path.read_bytes()
    benchmark.write_file((str(path), 50_000, 3))
    assert path.read_bytes() == before


def test_memory_of_processes_that_a_command_starts_counts(benchmark, tmp_path):
    """The command itself holds little; the process that it starts holds 200 MB for a second."""
    child = "import time; held = bytearray(b'1') * 200_000_000; time.sleep(1.5)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    found = benchmark.watched(command, tmp_path / "log")
    assert found["processes"] == 2 and 200 < found["peak_mb_of_a_process"] < found["peak_mb"] < 400
    assert found["seconds"] > 1.5


def test_a_command_that_fails_ends_the_measurement(benchmark, tmp_path):
    with pytest.raises(RuntimeError, match="no such corpus"):
        benchmark.watched([sys.executable, "-c", "raise SystemExit('no such corpus')"], tmp_path / "log")


@pytest.mark.long
def test_the_short_form_measures_all(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "prepare_corpus.py", "--short", "--json", tmp_path / "found.json"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["text_gb"] > 0.04 and row["tokens"] > 40_000_000 and row["processes"] >= 3
    assert row["peak_mb"] < 1000 and row["read_peak_mb"] < 1000 and row["batches"] == 1000
