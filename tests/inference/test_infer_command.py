"""export.py and infer.py as a user calls them, in processes of their own."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from oracles.tiny_export import save_run

from switchyard import commands
from switchyard.data.tokenizer import ByteTokenizer
from switchyard.distributed.processes import SINGLE
from switchyard.inference import generate, mindir, sharded

ROOT = Path(__file__).resolve().parents[2]
MODEL_CODE = ("models", "moe", "nn", "training", "checkpoint", "routing")


def call(script: str, *arguments, folder=None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder, timeout=300)


@pytest.mark.parametrize("script", ["export.py", "infer.py"])
def test_help_is_quick_and_does_not_import_mindspore(script):
    code = f"import sys; sys.argv = [{script!r}, '--help']; import runpy\n"
    code += f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
    code += "except SystemExit: print('mindspore' in sys.modules)"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.stdout.startswith("usage: ") and done.stdout.endswith("False\n")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 3  # seconds of CPU, whatever else the machine does; about half a second


def test_export_then_infer(tmp_path):
    """A checkpoint becomes text, in a folder that stays clean."""
    run, _ = save_run(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    done = call("export.py", "--checkpoint", run, "--out", "out", "export.max_length=24", folder=place)
    assert done.returncode == 0, done.stderr
    assert "parity: every expert reached" in done.stderr and done.stdout == ""
    done = call(
        "infer.py", "--model", "out", "--prompt", "jump", "--max-new-tokens", 99, "--temperature", 0, folder=place
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("jump") and done.stdout.endswith("\n") and len(done.stdout) == 25
    assert "note: stopped after 20 tokens at the model's max_length (24)" in done.stderr
    assert "prefill: 4 tokens" in done.stderr and "decode: 19 tokens" in done.stderr
    assert sorted(path.name for path in place.iterdir()) == ["out"]


def test_json_of_one_and_of_a_file(exported, tmp_path):
    options = ("--model", exported, "--max-new-tokens", 5, "--temperature", 0.9, "--top-k", 9, "--top-p", 0.9)
    done = call("infer.py", *options, "--prompt", "jump", "--json", "--seed", 7)
    assert done.returncode == 0, done.stderr
    one = json.loads(done.stdout)
    keys = ("prompt", "text", "tokens", "stopped", "prefill_seconds", "decode_seconds", "tokens_per_second")
    assert tuple(one) == keys and one["tokens"] == len(one["text"]) == 5 and one["prompt"] == "jump"
    (tmp_path / "prompts").write_text("jump\nover the gates\n")
    done = call("infer.py", *options, "--prompts-file", tmp_path / "prompts", "--json", "--seed", 7)
    both = json.loads(done.stdout)
    assert [each["prompt"] for each in both] == ["jump", "over the gates"] and both[0]["text"] == one["text"]


def test_no_model_code_is_imported(exported):
    """A process that generates has imported nothing that knows the model, its routing or its training."""
    arguments = ["--model", str(exported), "--prompt", "jump", "--max-new-tokens", "3"]
    code = f"""
import sys
from switchyard.cli import run
from switchyard.commands import infer_main
code = run(infer_main, {arguments!r})
print(code, sorted(name for name in sys.modules if name.startswith("switchyard")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "\n0 ['switchyard'" in done.stdout, done.stderr
    loaded = done.stdout.splitlines()[-1]
    assert "switchyard.inference.mindir" in loaded
    assert not [part for part in MODEL_CODE if f"switchyard.{part}'" in loaded or f"switchyard.{part}." in loaded]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "none", "--prompt", "a"), "error: --model: 'none' does not exist"),
        (("--model", ".", "--prompt", "a"), "error: --model: '.' holds no manifest.json"),
        (("--model", "OUT"), "error: --prompt: give one of --prompt TEXT, --prompts-file FILE, --chat and"),
        (("--model", "OUT", "--prompt", "a", "--prompts-file", "b"), "error: --prompt: give one of"),
        (("--model", "OUT", "--image", "x.npy"), "error: --image: 'x.npy'; cannot be read"),
        (("--model", "OUT", "--image", "y.npy"), "error: --model: 'OUT' is not a switchyard classifier"),
        (("--prompt", "a"), "error: the following arguments are required: --model"),
        (("--model", "OUT", "--prompt", ""), "error: prompt: empty"),
        (("--model", "OUT", "--prompt", "jump Ω"), "error: prompt: text: character 'Ω' (U+03A9)"),
        (("--model", "OUT", "--prompt", "1" * 30), "error: prompt: 30 tokens; the model holds 24"),
        (("--model", "OUT", "--prompt", "a", "--key-file", "key"), "error: --key-file: 'key'; "),
        (("--model", "OUT", "--prompt", "a", "--top-p", "2"), "error: --top-p: 2.0; above 0 and at most 1"),
        (("--model", "OUT", "--prompt", "a", "--top-k", "x"), "error: argument --top-k: invalid int value: 'x'"),
        (("--model", "OUT", "--prompt", "a", "--max-new-tokens", "-3"), "error: --max-new-tokens: -3; at least 1"),
    ],
)
def test_one_line_for_what_is_wrong(arguments, said, exported, tmp_path, monkeypatch, capfd):
    """In this process, for speed: the line on stderr, exit code 2, nothing on stdout, no traceback."""
    from switchyard.cli import run
    from switchyard.commands import infer_main

    (tmp_path / "key").write_bytes(b"a key of sixteen")
    np.save(tmp_path / "y.npy", np.zeros((4, 4), np.uint8))
    said = said.replace("OUT", str(exported))
    monkeypatch.chdir(tmp_path)
    code = run(infer_main, [str(exported) if argument == "OUT" else argument for argument in arguments])
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("device: ")]
    assert code == 2 and out == "" and len(lines) == 1 and lines[0].startswith(said), err


CONTINUED, APART = mindir.ExportedModel.between, mindir.ExportedSeq2Seq.between


@pytest.mark.parametrize(
    ("between", "asked", "printed"),
    [
        (CONTINUED, ["--prompt", "the cat "], "the cat sat on\n"),
        (APART, ["--prompt", "the cat "], "the cat \nsat on\n"),
        (CONTINUED, ["--prompts-file"], "the cat sat on\n" + "-" * 40 + "\n"),
        (APART, ["--prompts-file"], "the cat \nsat on\n" + "-" * 40 + "\n"),
    ],
)
def test_an_answer_continues_its_prompt_or_stands_on_a_line_of_its_own(between, asked, printed, tmp_path, monkeypatch):
    """The answer "sat on" arrives in two pieces. A decoder continues the prompt, an encoder-decoder fills its gaps."""
    (tmp_path / "prompts").write_text("the cat ")
    asked = asked if len(asked) == 2 else [*asked, str(tmp_path / "prompts")]

    def answer(model, prompts, count, sampling, on_text):
        for piece in ("sat", " on"):
            on_text(piece)
        found = generate.Generated(prompts[0], "sat on", 6, generate.ENDED)
        return [found], generate.Timing(0.1, 0.1, 0.1, 8, 6, 5)

    model = SimpleNamespace(between=between, tokenizer=ByteTokenizer(), max_length=99)
    monkeypatch.setattr(sharded, "open_export", lambda *arguments: (model, SINGLE))
    monkeypatch.setattr(generate, "generate", answer)
    out = io.StringIO()
    commands._infer(commands._infer_parser().parse_args(["--model", "OUT", *asked]), out)
    assert out.getvalue() == printed
