"""What an import and an export hold in memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracles.hf_models import FIXTURES, bits_of, config_of

from switchyard.checkpoint.tensors import Entry, write_file
from switchyard.interop.huggingface.families import FAMILIES

PEAK = """
import sys
from pathlib import Path
from switchyard.interop.huggingface import exporter, importer

def of(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(word))

def measured(work):
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark is now what is held
    before = of("VmRSS")
    work()
    print(of("VmHWM") - before)

source, run, out, dtype = sys.argv[1:]
importer.Model(source)  # imports, and what texts and headers take
measured(lambda: importer.import_model(source, run, say=lambda line: None))
measured(lambda: exporter.export_model(run, out, dtype=dtype, say=lambda line: None, largest=60_000_000))
"""
SIZES = {"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16}
SIZES |= {"num_key_value_heads": 16, "head_dim": 256, "num_local_experts": 12, "num_hidden_layers": 1}


def _write(folder: Path, dtype: str) -> int:
    """Writes a Mixtral in shards of about 60 MB; returns the bytes of its largest tensor."""
    folder.mkdir()
    tree = config_of(FIXTURES / "mixtral") | SIZES
    config, _ = FAMILIES["mixtral"].read(tree)
    model = FAMILIES["mixtral"].parameters(config, tree["vocab_size"])
    entries = {source.name: Entry(dtype, source.shape) for one in model for source in one.sources}
    shards, places = [{}], {}
    for name, entry in entries.items():
        if sum(one.bytes for one in shards[-1].values()) + entry.bytes > 60_000_000:
            shards.append({})
        shards[-1][name] = entry
    random = np.random.default_rng(0)

    def read(name, box):
        bits = random.integers(0, 1 << 15, [part.stop - part.start for part in box], np.uint16) & 0xBFFF  # finite
        return bits if dtype == "BF16" else (bits.astype(np.uint32) << 16).view(np.float32)

    for number, shard in enumerate(shards):
        write_file(folder / f"model-{number}.safetensors", shard, read)
        places |= dict.fromkeys(shard, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(tree))
    (folder / "tokenizer.json").write_text((FIXTURES / "mixtral" / "tokenizer.json").read_text())
    assert sum(entry.bytes for entry in entries.values()) > 200_000_000 and len(shards) > 3
    return max(entry.bytes for entry in entries.values())


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_two_of_the_largest_tensor_at_most(dtype, tmp_path):
    largest = _write(tmp_path / "model", dtype)
    word = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    paths = [str(tmp_path / name) for name in ("model", "run", "out")]
    command = [sys.executable, "-c", PEAK, *paths, word]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks = list(map(int, found.stdout.split()))
    there, back = (peak / 1e6 for peak in peaks)
    print(f"{dtype}: largest tensor {largest / 1e6:.1f} MB, import {there:.1f}, export {back:.1f}")
    assert 0.5 * largest < max(peaks) <= 2 * largest  # the measure sees what is held
    assert bits_of(tmp_path / "out") == bits_of(tmp_path / "model")
