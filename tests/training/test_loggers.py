"""Loggers: each tracker gets the figures of a run, from packages that stand in here; a failure ends no training."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from oracles.tiny_run import metrics_of, run_config, write_text

from switchyard.errors import UserError
from switchyard.training import loggers
from switchyard.training.loggers import check_loggers, open_loggers
from switchyard.training.loop import train

STEP = {"loss": 1.5, "step": 3}


class Recorded(list):
    """(name, positional and named arguments) of every call of a package that stands in."""

    def take(self, name, result=None):
        def call(*arguments, **named):
            self.append((name, arguments, named))
            return result

        return call

    def of(self, name):
        return [(arguments, named) for one, arguments, named in self if one == name]


def stand_in(monkeypatch, name: str, **members) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def calls(monkeypatch) -> Recorded:
    """The three packages, as far as they are called; none of them is imported in truth."""
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "SWANLAB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.setenv(variable, "1")
    calls = Recorded()
    run = SimpleNamespace(**{name: calls.take(f"wandb.{name}") for name in ("define_metric", "log", "finish")})
    stand_in(
        monkeypatch,
        "wandb",
        Settings=dict,
        Histogram=lambda values: ("histogram", *values),
        init=calls.take("init", run),
    )
    created = SimpleNamespace(info=SimpleNamespace(run_id="run-1"))
    client = SimpleNamespace(
        get_experiment_by_name=calls.take("mlflow.get", None),
        create_experiment=calls.take("mlflow.create_experiment", "7"),
        create_run=calls.take("mlflow.create_run", created),
        **{name: calls.take(f"mlflow.{name}") for name in ("update_run", "log_batch", "set_terminated")},
    )
    entities = SimpleNamespace(Metric=lambda *parts: ("metric", *parts), Param=lambda *parts: ("param", *parts))
    stand_in(
        monkeypatch, "mlflow", entities=entities, MlflowClient=lambda **named: calls.take("client", client)(**named)
    )
    functions = {name: calls.take(f"swanlab.{name}") for name in ("init", "log", "finish")}
    stand_in(monkeypatch, "swanlab", **functions)
    return calls


def opened(folder, *names, done=0, said=None):
    """The loggers of a run in `folder`, in the order of the names."""
    config = run_config(train={"name": "mine", "loggers": list(names)})
    folder.mkdir(exist_ok=True)
    return open_loggers(config, folder, done, (said if said is not None else []).append)


def test_wandb_gets_figures_with_their_step_as_the_axis(tmp_path, calls):
    (logger,) = opened(tmp_path / "run", "wandb")
    logger.log(3, {"train/loss": 1.5}, {"train/load": np.array([1.0, 2.0])})
    logger.close(completed=False)
    ((_, init),) = calls.of("init")
    assert (init["project"], init["name"], init["resume"]) == ("switchyard", "mine", "allow")
    assert init["id"] == logger.id and init["config"]["train"]["name"] == "mine"
    assert calls.of("wandb.log") == [(({"step": 3, "train/loss": 1.5, "train/load": ("histogram", 1.0, 2.0)},), {})]
    assert calls.of("wandb.define_metric")[1] == (("*",), {"step_metric": "step"})
    assert calls.of("wandb.finish") == [((), {"exit_code": 1})]


def test_mlflow_gets_parameters_once_and_metrics_by_step(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(loggers, "BATCH", 30)
    (logger,) = opened(tmp_path / "run", "mlflow")
    parameters = [one for _, named in calls.of("mlflow.log_batch") for one in named["params"]]
    assert ("param", "train.name", "mine") in parameters
    assert len(parameters) == len(set(parameters)) == sum(map(len, run_config().model_dump().values()))
    assert all(len(named["params"]) <= 30 for _, named in calls.of("mlflow.log_batch"))
    assert calls.of("client")[0][1]["tracking_uri"] == (tmp_path / "mlruns").as_uri()
    logger.log(3, {"train/loss": 1.5}, {"train/load": np.ones(2)})
    ((identifier, metrics), _) = calls.of("mlflow.log_batch")[-1]
    assert identifier == "run-1" and [(one[1], one[2], one[4]) for one in metrics] == [("train/loss", 1.5, 3)]
    logger.close()
    assert calls.of("mlflow.set_terminated") == [(("run-1", "FINISHED"), {})]


def test_swanlab_gets_figures(tmp_path, calls, monkeypatch):
    (logger,) = opened(tmp_path / "run", "swanlab")
    logger.log(3, {"train/loss": 1.5}, {})
    logger.close()
    ((_, init),) = calls.of("swanlab.init")
    assert (init["name"], init["id"], init["resume"]) == ("mine", logger.id, "allow")
    assert calls.of("swanlab.log") == [(({"train/loss": 1.5},), {"step": 3})]
    assert calls.of("swanlab.finish") == [((), {"state": "success"})]
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    opened(tmp_path / "other", "swanlab")
    assert "id" not in calls.of("swanlab.init")[1][1]  # refused outside the cloud


@pytest.mark.parametrize("name", loggers.TRACKERS)
def test_a_resumed_run_goes_on_under_its_identifier(name, tmp_path, calls):
    (first,) = opened(tmp_path / "run", name)
    assert json.loads((tmp_path / "run" / "loggers.json").read_text()) == {name: first.id}
    (second,) = opened(tmp_path / "run", name, done=5)
    assert second.id == first.id
    assert len(calls.of("mlflow.create_run")) == (name == "mlflow")
    if name != "mlflow":  # whose stand-in has one identifier
        assert opened(tmp_path / "anew", name)[0].id != first.id


@pytest.mark.parametrize("text", ["", "[1]", '{"wandb": 3}', "\xff"])
def test_identifiers_that_cannot_be_read_begin_a_new_run(text, tmp_path, calls):
    (tmp_path / "loggers.json").write_text(text, encoding="latin-1")
    (logger,) = opened(tmp_path, "wandb", done=5)
    assert len(logger.id) == 8


def test_tensorboard_is_the_default_and_a_list_without_it_writes_no_events(tmp_path, calls):
    assert run_config().train.loggers == ["tensorboard"]
    (logger,) = opened(tmp_path / "run", "tensorboard")
    logger.close()
    assert list((tmp_path / "run").glob("events*"))
    for logger in opened(tmp_path / "other", "wandb", "wandb"):
        logger.close()
    assert len(calls.of("init")) == 1 and not list((tmp_path / "other").glob("events*"))
    assert opened(tmp_path / "none") == []


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("swanlab", "swanlab")])
def test_what_is_not_installed_is_said_before_anything_is_written(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    write_text(tmp_path)
    line = rf"^train\.loggers: {name}; needs the package {package}; pip install {package}$"
    with pytest.raises(UserError, match=line):
        train(run_config(tmp_path, train={"loggers": ["tensorboard", name]}))
    assert not (tmp_path / "runs").exists()
    check_loggers(["tensorboard"])


def test_a_name_that_no_logger_has_is_refused():
    with pytest.raises(UserError, match=r"^train\.loggers: .*'tensorboard', 'wandb', 'mlflow' or 'swanlab'"):
        run_config(train={"loggers": ["tensorbord"]})


def test_a_tracker_that_does_not_start_is_one_warning_with_a_remedy(tmp_path, calls, monkeypatch):
    def refuse(**_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    said = []
    (logger,) = opened(tmp_path / "run", "wandb", said=said)
    logger.log(1, {}, {})
    logger.flush()
    logger.close()
    assert said == [
        "warning: train.loggers: wandb is switched off; training goes on: ConnectionError: no route to host; "
        "run `wandb login`, or set WANDB_MODE=offline"
    ]
    assert not (tmp_path / "run" / "loggers.json").exists()


def test_a_tracker_that_fails_in_the_middle_ends_no_training(tmp_path, pynative, calls, monkeypatch, capsys):
    """Two of three trackers go on, and so does the run; the third gets nothing more."""
    got = []

    def fail_at_second(figures, step):
        got.append(step)
        if len(got) == 2:
            raise TimeoutError("30 s")

    monkeypatch.setattr(sys.modules["swanlab"], "log", fail_at_second)
    write_text(tmp_path)
    names = ["tensorboard", "wandb", "mlflow", "swanlab"]
    train(run_config(tmp_path, train={"steps": 3, "loggers": names}, context={"mode": "pynative"}))
    out = capsys.readouterr().out
    assert out.count("warning: train.loggers: ") == 1
    assert "warning: train.loggers: swanlab is switched off; training goes on: TimeoutError: 30 s\n" in out
    assert got == [1, 2]
    lines = metrics_of(tmp_path / "runs" / "tiny")
    sent = [arguments[0] for arguments, _ in calls.of("wandb.log") if "train/loss" in arguments[0]]
    assert [one["step"] for one in sent] == [line["step"] for line in lines] == [1, 2, 3]
    assert [one["train/loss"] for one in sent] == [line["loss"] for line in lines]
    assert len(calls.of("wandb.finish")) == len(calls.of("mlflow.set_terminated")) == 1
