"""What a conversion between layouts holds in memory."""

import subprocess
import sys

import pytest
from oracles.tiny_checkpoint import content_of, save_whole

PEAK = """
import sys
from pathlib import Path
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint import reshard as recut

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

source, out = map(Path, sys.argv[1:])
start = peak()
recut.convert(source, "{data_parallel: 4, expert_parallel: 2, model_parallel: 2}", out)
print(peak() - start)
recut.convert(out, "{}", out.with_name("back"))
print(peak() - start)
checkpoint.read(source)
print(peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_of_a_conversion_is_two_tensors_at_most(tmp_path):
    """Of 15 tensors of 8 MB each; mapped pages count. Reading them all shows that the measure can see it."""
    experts = {f"layers.{layer}.feed_forward.experts.w_in": (8, 256, 1024) for layer in (1, 3)}
    shapes = experts | {f"layers.{layer}.attention.qkv.weight": (1024, 2048) for layer in range(3)}
    path, *_ = save_whole(tmp_path, shapes=shapes)
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out")]
    cut, back, whole = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert cut <= back <= 2 * (8 << 20)
    assert whole > 15 * (8 << 20) * 0.9
    assert content_of(tmp_path / "back") == content_of(path)
