"""The quickstart from end to end, with a tiny model on a small text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = """
model: {num_layers: 2, hidden_size: 16, num_heads: 2, seq_length: 16}
moe: {router: switch, expert_num: 4, layers: [1]}
data: {path: TEXT, tokenizer: char, batch_size: 4}
schedule: {warmup_steps: 2}
train: {steps: 500, log_every: 2, eval_every: 4, eval_batches: 2, checkpoint_every: 0}
export: {max_length: 48}
"""


@pytest.mark.slow
def test_quickstart_from_end_to_end(tmp_path):
    """In a folder whose name has letters that MindSpore's export refuses."""
    tmp_path = tmp_path / "My Prójects (1)" / "a+b,c=d~"
    tmp_path.mkdir(parents=True)
    text, config, out = tmp_path / "text.txt", tmp_path / "tiny.yaml", tmp_path / "my_runs"
    text.write_text("def double(x):\n    return 2 * x\n\n" * 100)
    config.write_text(TINY.replace("TEXT", json.dumps(str(text), ensure_ascii=False)))
    (out / "quickstart").mkdir(parents=True)  # an earlier run, which must be left alone
    command = ["bash", ROOT / "scripts" / "run_quickstart.sh", "--config", config, "--out", out]
    command += ["--prompt", "def ", "--tokens", "12", "train.steps=8"]
    environment = os.environ | {"SWITCHYARD_VENV": sys.prefix}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = out / "quickstart-2"
    assert list((out / "quickstart").iterdir()) == []

    evaluation = json.loads((run / "evaluation.json").read_text())
    generation = json.loads((run / "generation.json").read_text())
    table = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert f"{evaluation['loss']:.4f} nats per token" in table["validation loss"]
    assert table["bits per byte"].strip() == f"{evaluation['bits_per_byte']:.4f}"
    assert re.match(r"set-up \d+ s, training \d+ s, ", table["time"].strip())
    assert [name for name in table if name.startswith("expert load")] == ["expert load, layer 1"]
    assert "export parity" in table
    assert table["generation"].strip() == f"{generation['tokens_per_second']:.0f} tokens/s"
    *_, picture, report = done.stdout.splitlines()
    assert report == picture.replace("loss and load: ", "report: ").replace("picture.png", "report.html")
    assert "a validation text by expert" in (run / "report.html").read_text(encoding="utf-8").lower()
    picture = Path(picture.removeprefix("loss and load: "))
    assert tmp_path.joinpath(picture).read_bytes().startswith(b"\x89PNG")
    assert picture.parent.name == "quickstart-2"
