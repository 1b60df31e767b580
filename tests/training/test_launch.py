"""One list of refusals: what train.py refuses is refused before anything starts, planned or compiled."""

import subprocess
import sys

import pytest

from switchyard import cli
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.simulation import compile as simulate
from switchyard.training import launch
from switchyard.training.limits import check_mesh, require_trainable

EXPERTS = {"expert_num": 4}
UNTIED = {"tie_word_embeddings": False}
STAGES = {"pipeline_stage": 2, "micro_batch_num": 2}
QUIET_STAGES = {"model": UNTIED, "parallel": STAGES, "train": {"eval_every": 0}}
CUT = {"data_parallel": 2, "expert_parallel": 2}
REFUSED = [
    ({"moe": EXPERTS | {"replay": "a"}, "parallel": CUT}, "Ascend", None),
    ({"moe": EXPERTS | {"replay": "a"}} | QUIET_STAGES, "GPU", "moe.replay: a; null with parallel.pipeline_stage"),
    ({"moe": EXPERTS | {"router_warmup_steps": 2}} | QUIET_STAGES, "Ascend", "moe.router_warmup_steps: 2; 0 with"),
    ({"moe": EXPERTS | {"groups": 1}, "data": {"batch_size": 4}, "parallel": {}}, "GPU", None),
    ({"model": UNTIED, "parallel": STAGES}, "Ascend", "train.eval_every: 500; 0 with parallel.pipeline_stage (2)"),
    ({"model": UNTIED, "parallel": STAGES, "train": {"eval_every": 0}}, "Ascend", None),
    ({"parallel": STAGES, "train": {"eval_every": 0}}, "Ascend", "model.tie_word_embeddings: True; False with"),
    ({"moe": EXPERTS | {"dispatch": "dropless"}, "parallel": CUT}, "Ascend", None),
    (
        {"model": {"compute_dtype": "bfloat16"}, "parallel": {"data_parallel": 2}},
        "GPU",
        "model.compute_dtype: bfloat16",
    ),
    (
        {"train": {"gradient_accumulation_steps": 2}, "parallel": {"data_parallel": 2, "optimizer_shard": 1}},
        "Ascend",
        None,
    ),
]


@pytest.mark.parametrize(("tree", "target", "says"), REFUSED)
def test_training_and_planning_refuse_the_same(tree, target, says):
    config = build(tree)
    if says is None:
        assert check_mesh(config, config.devices, target) is None or config.devices == 1
        require_trainable(config, target)
        return
    for asked in (lambda: check_mesh(config, config.devices, target), lambda: require_trainable(config, target)):
        with pytest.raises(UserError) as caught:
            asked()
        assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_processes_do_with_collectives_of_their_own_what_the_compiler_does_not_shard():
    """A router that is not sharded trains with data and expert parallelism, and is not planned or compiled."""
    config = build({"moe": EXPERTS | {"dispatch": "dropless"}, "parallel": CUT})
    says = "moe.dispatch: dropless; the compiler shards it for Ascend"
    assert check_mesh(config, 2, "GPU") == says
    with pytest.raises(UserError, match=f"^{says}$"):
        require_trainable(config, "GPU")
    config = build({"moe": EXPERTS | {"router": "tree"}, "parallel": CUT})
    assert "moe.router: tree; overrides `construct`" in check_mesh(config, 2, "Ascend")
    with pytest.raises(
        UserError, match=r"^moe\.router: tree; overrides `construct`, which a compiled cluster does not call"
    ):
        require_trainable(config, "Ascend")
    with pytest.raises(UserError, match=r"^parallel\.model_parallel: 2; .* \(moe\.router: tree; overrides `construct`"):
        check_mesh(build({"moe": EXPERTS | {"router": "tree"}, "parallel": {"model_parallel": 2}}), 2, "GPU")


def write(tmp_path, text):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return str(path)


def test_simulation_refuses_before_it_compiles(tmp_path, capsys):
    text = "moe: {expert_num: 4, record: a}\nparallel: {pipeline_stage: 2, micro_batch_num: 2}\n"
    text += "model: {tie_word_embeddings: false}\ntrain: {eval_every: 0}\n"
    assert cli.run(simulate.main, ["--config", write(tmp_path, text), "--devices", "2"]) == 2
    assert "error: moe.record: a; null with parallel.pipeline_stage (2)" in capsys.readouterr().err


def test_the_command_is_silent_or_one_line(tmp_path, capsys):
    path = write(tmp_path, "data: {batch_size: 8}\ntrain: {gradient_accumulation_steps: 4}\n")
    arguments = ["--config", path, "--devices", "2", "--target"]
    assert cli.run(launch.main, [*arguments, "Ascend", "parallel.data_parallel=2", "--resume"]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.run(launch.main, [*arguments, "GPU"]) == 0  # by default the batch is shared out
    assert capsys.readouterr() == ("", "")
    for wrong, says in (
        (
            ["CPU", "parallel.data_parallel=1"],
            "error: parallel.data_parallel: 1; the degrees need 1 processes, 2 processes run",
        ),
        (["CPU", "parallel.model_parallel=2"], "error: parallel.model_parallel: 2; training in processes shards"),
        (["TPU"], "error: argument --target: invalid choice"),
    ):
        assert cli.run(launch.main, [*arguments, *wrong]) == 2
        assert capsys.readouterr().err.startswith(says)


def test_no_mindspore_is_imported_for_shipped_routers():
    code = "import sys; import switchyard.training.launch; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_gpus_shard_the_optimizer_whether_they_accumulate_or_not(monkeypatch, capsys):
    from switchyard.training import loop

    monkeypatch.setattr(loop, "target_of", lambda context: "GPU")
    for count in (1, 2):
        tree = {"train": {"gradient_accumulation_steps": count}, "parallel": {"data_parallel": 2}}
        config, compiled = loop.choose_mesh(build(tree | {"data": {"batch_size": 4}}), 2)
        assert compiled and config.parallel.optimizer_shard == 1
        assert capsys.readouterr().out == ""
