"""The command line of switchyard.interop.huggingface."""

import subprocess
import sys

from oracles.hf_models import FIXTURES, bits_of

from switchyard import cli
from switchyard.interop.huggingface.command import main

WITHOUT = """
import sys
from switchyard import cli
from switchyard.interop.huggingface.command import main

for arguments in (["import", "--model", sys.argv[1], "--out", "run"], ["export", "--model", "run", "--out", "back"]):
    assert cli.run(main, arguments) == 0
print(sorted({"mindspore", "torch", "transformers", "safetensors"} & sys.modules.keys()))
"""


def test_import_and_export_need_neither_mindspore_nor_torch(tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(FIXTURES / "mixtral")]
    found = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert found.stdout.splitlines() == [
        "model: mixtral, 8,400 parameters",
        "run: 'run', to evaluate, export, or start a training from",
        "checkpoint: run/checkpoints/step-00000000",
        "model: mixtral, 41 tensors, 0.0 MB",
        "model: 'back', for AutoModelForCausalLM.from_pretrained",
        "[]",
    ]
    assert bits_of(tmp_path / "back") == bits_of(FIXTURES / "mixtral")


def test_list_names_the_families_and_what_becomes_of_each_tensor(capsys):
    assert cli.run(main, ["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["llama", "LlamaForCausalLM", "dense"]
    assert lines[4].split() == ["mixtral", "MixtralForCausalLM", "MoE"]
    assert cli.run(main, ["list", "--model", str(FIXTURES / "mixtral")]) == 0
    lines = capsys.readouterr().out.splitlines()
    experts = "model.layers.0.block_sparse_moe.experts."
    assert (
        f"layers.0.feed_forward.experts.w_in [4, 16, 12] <- {experts}0.w3.weight ... {experts}3.w3.weight [12, 16], "
        "transposed"
    ) in lines


def test_mistakes_are_one_line(capsys, tmp_path):
    assert cli.run(main, ["import", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert cli.run(main, ["export", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert cli.run(main, ["export", "--model", str(tmp_path), "--out", "x", "--shard-gb", "0"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("error: --model: ") and "does not exist" in first
    assert second.startswith("error: checkpoint ") and third == "error: --shard-gb: 0; must be above 0"
