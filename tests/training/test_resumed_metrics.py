"""One line of a kind for a step in metrics.jsonl after any kill and resume; an evaluation that fails is no result."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from oracles.tiny_run import metrics_of, run_config, untimed, write_text

from switchyard import cli
from switchyard.checkpoint import store as checkpoint
from switchyard.commands import eval_main
from switchyard.errors import UserError
from switchyard.training import evaluate, trainer
from switchyard.training.evaluate import Evaluator
from switchyard.training.loop import train
from switchyard.training.metrics import MetricsLog

PYNATIVE = {"mode": "pynative"}


def _lines(run) -> list[dict]:
    """All lines; NaN and Infinity are no JSON."""

    def refuse(word):
        raise AssertionError(word)

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _doubled(run) -> list:
    keys = Counter((line["kind"], line["step"], line.get("whole")) for line in _lines(run))
    return [key for key, count in keys.items() if count > 1]


class _Killed(Exception):
    pass


def _killing(monkeypatch, owner, name: str, call: int):
    """The `call`-th call of a method dies before it has done anything."""
    original, calls = getattr(owner, name), Counter()

    def method(*arguments, **more):
        calls[name] += 1
        if calls[name] == call:
            raise _Killed
        return original(*arguments, **more)

    monkeypatch.setattr(owner, name, method)


# eval_batches 2 is a part of the validation set, 0 all of it
@pytest.mark.parametrize(
    "eval_batches, owner, name, call",
    [
        (0, trainer.Trainer, "_result", 1),  # behind the last evaluation, before result.json
        (2, trainer.Trainer, "_mark_best", 1),  # behind the evaluation of step 2 and its checkpoint
        (0, trainer.Trainer, "_mark_best", 2),
        (2, trainer.Trainer, "_save", 2),  # behind the evaluation of step 4
    ],
)
def test_a_killed_run_is_resumed_without_doubled_lines(
    eval_batches, owner, name, call, tmp_path, pynative, monkeypatch
):
    """The lines and the best checkpoint are those of a run that was left alone."""
    write_text(tmp_path)
    keys = {"steps": 6, "checkpoint_every": 2, "eval_every": 2, "eval_batches": eval_batches}
    whole, killed = (
        run_config(tmp_path, train=keys | {"name": name}, context=PYNATIVE) for name in ("whole", "killed")
    )
    train(whole)
    with monkeypatch.context() as patch:
        _killing(patch, owner, name, call)
        with pytest.raises(_Killed):
            train(killed)
    for _ in range(2):
        (tmp_path / "runs" / "killed" / "result.json").unlink(missing_ok=True)
        train(killed, resume=True)
        runs = [tmp_path / "runs" / run for run in ("whole", "killed")]
        assert not _doubled(runs[1])
        wanted, found = ([untimed(line) for line in _lines(run)] for run in runs)
        assert found == wanted
        best = [checkpoint.best(run) for run in runs]
        assert best[0][1] == best[1][1] and best[0][0].name == best[1][0].name


def test_an_evaluation_that_differs_takes_the_place_of_the_first(tmp_path):
    """As where moe.eval_capacity_factor was changed; doubled lines of an older version become one."""
    first = {"kind": "evaluation", "step": 2, "whole": True, "loss": 1.0}
    part = first | {"whole": False, "loss": 3.0}
    steps = [{"kind": "train", "step": step, "loss": 9.0} for step in (1, 2)]
    lines = [*steps, first, first, part, steps[1], {"kind": "train", "step": 3, "loss": 9.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '[1]\n{"step": "x", "kind": "train"}\n{"kind": "tr')
    log = MetricsLog(tmp_path, 2)
    assert _lines(tmp_path) == [*steps, first, part]
    log.write(first)
    assert _lines(tmp_path) == [*steps, first, part]
    log.write(first | {"loss": 2.0})
    log.write({"kind": "train", "step": 3, "loss": 8.0})
    log.close()
    assert _lines(tmp_path) == [*steps, part, first | {"loss": 2.0}, {"kind": "train", "step": 3, "loss": 8.0}]
    assert log.evaluated(2, True) == 2.0 and log.evaluated(2, False) == 3.0


@pytest.fixture
def broken(monkeypatch):
    """Every evaluation comes to NaN."""
    original = Evaluator.__call__

    def call(self, batches, on_batch=lambda index: None):
        return replace(original(self, batches, on_batch), loss=math.nan)

    monkeypatch.setattr(Evaluator, "__call__", call)


def test_a_run_whose_evaluation_is_not_finite_has_no_result(tmp_path, pynative, broken, monkeypatch):
    write_text(tmp_path)
    config = run_config(tmp_path, train={"steps": 2, "eval_every": 1, "eval_batches": 1}, context=PYNATIVE)
    run = tmp_path / "runs" / "tiny"
    for resume in (False, True):
        with pytest.raises(UserError, match=r"^evaluation: loss is nan for step 2 of '.*tiny'; reduce schedule"):
            train(config, resume=resume)
        assert not (run / "result.json").exists() and not _doubled(run) and checkpoint.best(run) is None
        assert [line["loss"] for line in metrics_of(run, "evaluation")] == [None] * 3
    (run / "result.json").write_text('{"steps": 2, "validation_loss": NaN}')  # of an older version
    with pytest.raises(UserError, match="loss is nan"):
        train(config, resume=True)


def test_eval_refuses_figures_and_weights_that_are_not_finite(tmp_path, pynative, monkeypatch, capfd):
    """Exit code 2, one line, and nothing on stdout that a reader of JSON could take for figures."""
    write_text(tmp_path)
    train(run_config(tmp_path, train={"steps": 1}, context=PYNATIVE))
    run = tmp_path / "runs" / "tiny"
    held = checkpoint.read(run)
    huge = held.weights | {"norm.gain": np.full_like(held.weights["norm.gain"], 3e38)}
    checkpoint.save(run, held.config, held.tokenizer_json, huge, held.optimizer, held.state | {"step": 2})
    monkeypatch.setattr(evaluate, "set_context", lambda *arguments: None)
    capfd.readouterr()
    assert cli.run(eval_main, ["--checkpoint", str(run), "--json"]) == 2
    out, err = capfd.readouterr()
    assert "{" not in out and err.splitlines()[-1].startswith("error: evaluation: loss is ") and "step-00000002" in err
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "first_not_finite", lambda arrays: None)
        bad = huge | {"norm.gain": np.full_like(huge["norm.gain"], np.nan)}
        checkpoint.save(run, held.config, held.tokenizer_json, bad, held.optimizer, held.state | {"step": 3})
    assert cli.run(eval_main, ["--checkpoint", str(run)]) == 2
    assert capfd.readouterr().err.count("numbers that are not finite; use the previous checkpoint") == 1


def test_a_run_that_ends_with_weights_that_are_not_finite_is_refused(tmp_path, pynative, monkeypatch):
    """A finite gradient can be applied to an infinite weight: the last step has no step behind it to see that."""
    write_text(tmp_path)
    config = run_config(tmp_path, train={"steps": 2, "checkpoint_every": 1}, context=PYNATIVE)
    original = trainer.Trainer._advance

    def spoilt(self):
        original(self)
        if self.done == 2:
            parameter = next(iter(self.model.get_parameters()))
            parameter.set_data(parameter * np.inf)

    monkeypatch.setattr(trainer.Trainer, "_advance", spoilt)
    with pytest.raises(
        UserError, match=r"checkpoint of step 2: '.*' holds numbers .* was not written; '.*step-00000001'"
    ):
        train(config)
    assert checkpoint.read(tmp_path / "runs" / "tiny").step == 1
    assert not (tmp_path / "runs" / "tiny" / "result.json").exists()
