"""Command lines as a user calls them: one line and an exit code for each mistake, one JSON object from eval.py."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from oracles.tiny_run import run_config, write_text

from switchyard import cli
from switchyard.cli import cleans_up, run
from switchyard.commands import announce, infer_main, train_main
from switchyard.config import build, load
from switchyard.errors import Interrupted, UserError
from switchyard.file_errors import FileError
from switchyard.files import unfinished

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "config" / "quickstart.yaml")


def _call(script: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)


MISTAKES = [
    ("train.py", ["--config", "missing.yaml"], "config file 'missing.yaml': No such file or directory"),
    (
        "train.py",
        ["--config", QUICKSTART, "moe.expert_nun=8"],
        "moe.expert_nun: unknown key; did you mean 'expert_num'?",
    ),
    (
        "train.py",
        ["--config", QUICKSTART, "moe.router=top_k", "moe.num_experts_chosen=65"],
        "moe.num_experts_chosen: 65",
    ),
    ("train.py", ["--config", QUICKSTART, "model.num_heads=5"], "model.num_heads: 5; must divide model.hidden_size"),
    ("train.py", ["--config", QUICKSTART, "train.steps=many"], "train.steps: 'many'"),
    ("train.py", ["--config", QUICKSTART, "steps"], "override 'steps': write section.key=value"),
    ("train.py", ["--config", QUICKSTART, "--steps=3"], "unrecognized arguments: --steps=3; see train.py --help"),
    ("train.py", [], "the following arguments are required: --config; see train.py --help"),
    (
        "train.py",
        ["--config", QUICKSTART, "parallel.model_parallel=2"],
        "parallel.model_parallel: 2; model_parallel * pipeline_stage (2 * 1) must divide",
    ),
    ("train.py", ["--config", QUICKSTART, "data.path=nowhere.txt"], "nowhere.txt"),
    ("train.py", ["--config", QUICKSTART, "model.compute_dtype=bfloat16", "context.device_target=CPU"], "bfloat16"),
    ("eval.py", ["--checkpoint", "nowhere"], "checkpoint 'nowhere': does not exist; give a run folder"),
    ("eval.py", ["--checkpoint", "."], "checkpoint '.': contains no checkpoint; train first"),
]


@pytest.mark.parametrize("script, arguments, text", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(script, arguments, text, tmp_path):
    done = _call(script, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert text in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_is_quick_and_does_not_import_mindspore(script, tmp_path):
    code = (
        "import sys; from switchyard import cli, commands\n"
        f"try: cli.{script[:-3]}_main(['--help'])\n"
        "finally: print('mindspore' in sys.modules)"
    )
    before = os.times()
    done = _call(script, "--help", folder=tmp_path)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 3  # seconds of CPU, whatever else the machine does; about one
    assert done.returncode == 0 and "section.key=value" in done.stdout
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("False\n")


def test_print_config_shows_the_resolved_whole(tmp_path):
    """Overrides may stand anywhere; what is printed is a configuration itself."""
    done = _call(
        "train.py", "moe.expert_num=16", "--config", QUICKSTART, "--print-config", "train.steps=7", folder=tmp_path
    )
    assert done.returncode == 0 and not done.stderr
    shown = tmp_path / "shown.yaml"
    shown.write_text(done.stdout)
    config = load(shown)
    assert config.moe.expert_num == 16 and config.train.steps == 7 and config.to_yaml() == done.stdout
    assert set(yaml.safe_load(done.stdout)) == set(type(config).model_fields)


@pytest.mark.long
def test_train_then_eval_prints_one_json_object(tmp_path):
    """And a checkpoint that was cut is one line of eval.py, which names the one before."""
    write_text(tmp_path)
    config = run_config(tmp_path, moe={"expert_num": 4}, train={"steps": 4, "checkpoint_every": 2})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert _call("train.py", "--config", "config.yaml", folder=tmp_path).returncode == 0
    run = tmp_path / "runs" / "tiny"
    done = _call("eval.py", "--json", "data.batch_size=8", "--checkpoint", "runs/tiny", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and "device: CPU" in done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["loss", "loss_ci95", "perplexity", "bits_per_byte", "tokens", "layers"]
    assert found["loss"] == pytest.approx(json.loads((run / "result.json").read_text())["validation_loss"], abs=1e-5)
    assert list(found["layers"][0]) == ["layer", "load", "importance", "dropped", "entropy", "max_violation", "z"]
    weights = run / "checkpoints" / "step-00000004" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    done = _call("eval.py", "--checkpoint", "runs/tiny", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert "weights.safetensors" in done.stderr and "use the previous checkpoint" in done.stderr
    done = _call("eval.py", "--checkpoint", "runs/tiny/checkpoints/step-00000002", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("loss ") and "MaxVio" in done.stdout


def _raise(error):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError("a: 1; b"), 2, "error: a: 1; b\n"),
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (Interrupted("saved"), 75, "interrupted: saved\n"),
        (BrokenPipeError(), 141, ""),
        (KeyboardInterrupt(), 130, "interrupted: there was nothing to save\n"),
        (
            MemoryError("Unable to allocate 16. EiB"),
            2,
            "error: memory: Unable to allocate 16. EiB; lower data.batch_size",
        ),
        (
            RuntimeError("Allocate memory failed\n- C++ Call Stack: MallocForOutputs"),
            2,
            "error: memory: allocate memory failed; lower data.batch_size",
        ),
        (FileError("'a': No space left on device", passing=True), 74, "error: 'a': No space left on device\n"),
        (
            UnicodeEncodeError("ascii", "a/tëxt", 3, 4, "ordinal not in range(128)"),
            2,
            "error: '\\xeb' cannot be part of a file name where the locale is ascii; set PYTHONUTF8=1\n",
        ),
        (PermissionError(13, "Permission denied", "runs"), 2, "error: 'runs': Permission denied\n"),
    ],
)
def test_exit_codes(error, code, text, capsys, monkeypatch):
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)  # the stdout of the tests is read to the end
    assert cli.run(_raise(error), []) == code
    said = capsys.readouterr().err
    assert said == text or (text.startswith("error: memory") and said.startswith(text) and said.count("\n") == 1)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError):
        cli.run(_raise(RuntimeError("a defect")), [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=--"],
        ["--config", "a.yaml", "--resume=--"],
        ["--config"],
        ["--config", "--"],
        ["--"],
        ["-=--"],
        ["--=--"],
        [""],
        ["--config", ""],
        ["--config", "a\0b"],
        ["--config", "\udcff.yaml"],
        ["--config", "n" * 5000],
        ["--config", QUICKSTART, "x" * 100_000],
        ["--config", QUICKSTART, "--print-config=yes"],
        ["--con\nfig", "a"],
    ],
)
def test_odd_arguments_are_one_line(arguments, capsys):
    assert cli.run(train_main, arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 700


@pytest.mark.parametrize("flag", ["--seed=--", "--max-new-tokens=--", "--max-new-tokens=9" + "9" * 30, "--top-p=nan"])
def test_odd_numbers_of_infer_are_one_line(flag, capsys):
    assert cli.run(infer_main, ["--model", "out", "--prompt", "a", flag]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: argument {flag.split('=')[0]}: ") and said.count("\n") == 1


@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX"}, {"LANG": "C"}])
def test_an_accented_path_needs_no_encoding_of_the_terminal(setting, tmp_path):
    """Escapes stand for what the terminal cannot show; the path itself is the right one."""
    config = tmp_path / "My Prójects (1)" / "é.yaml"
    config.parent.mkdir()
    config.write_text("data: {path: tëxt.txt}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHONIO"))}
    code = (
        "import sys; from switchyard import cli, commands\n"
        "for path in sys.argv[1:]: cli.run(commands.train_main, ['--config', path, '--print-config'])\n"
        "print(sys.argv[1])"
    )
    command = [sys.executable, "-c", code, config, tmp_path / "ñone.yaml"]
    done = subprocess.run(command, capture_output=True, env=kept | setting, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.count(b"\n") == 1 and b"Traceback" not in done.stderr
    assert b"No such file or directory" in done.stderr
    assert yaml.safe_load(done.stdout.rsplit(b"\n", 2)[0])["data"]["path"] == "tëxt.txt"


def test_keys_without_effect_are_announced_once_a_job(capsys, monkeypatch):
    config = build({}, ["moe.capacity_factor=2"])
    announce(config, ())
    assert capsys.readouterr().err.startswith("note: keys without effect here: moe.capacity_factor 2.0 (")
    for name, value in (("MS_ROLE", "MS_WORKER"), ("MS_WORKER_NUM", "2"), ("RANK_ID", "1")):
        monkeypatch.setenv(name, value)
    announce(config, ())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_removes_what_is_unfinished(tmp_path, number, usual_hangup):
    """SIGTERM and a closed terminal end a command as Ctrl-C does; handlers are put back."""
    before = signal.getsignal(number)

    def main(_arguments):
        with cleans_up(), unfinished(tmp_path / "out") as folder:
            (folder / "weights").write_text("x")
            os.kill(os.getpid(), number)
            time.sleep(5)

    assert run(main, []) == 130 and list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with cleans_up():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
