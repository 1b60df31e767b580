"""Which mesh a job runs on, and what is refused before anything is compiled."""

import pytest

from switchyard.config import build
from switchyard.errors import UserError
from switchyard.training.limits import (
    check_mesh,
    refusals,
    refuse,
    require_trainable,
    why_not_compiled,
    with_defaults,
)

EXPERTS = {"expert_num": 4}
STAGES = {"pipeline_stage": 2, "micro_batch_num": 2}
UNTIED = {"tie_word_embeddings": False}
NO_EVALUATION = {"eval_every": 0}


@pytest.mark.parametrize(
    ("tree", "target", "says"),
    [
        ({}, "Ascend", None),
        ({"moe": EXPERTS | {"router": "top_k"}}, "GPU", None),
        ({}, "CPU", "for Ascend and GPU only"),
        ({"moe": EXPERTS | {"router": "expert_choice"}, "model": {"type": "vision"}}, "GPU", "model.type: vision"),
        ({"moe": EXPERTS | {"router": "tree"}}, "Ascend", "moe.router: tree; overrides `construct`"),
        ({"moe": {"router": "tree"}}, "Ascend", None),  # one expert: no router is asked
        ({"context": {"mode": "pynative"}}, "Ascend", "context.mode"),
        ({"moe": EXPERTS | {"dispatch": "dropless"}}, "GPU", "moe.dispatch: dropless; the compiler shards it for"),
        (
            {"train": {"spike_factor": 2.0, "on_bad_loss": "skip"}},
            "Ascend",
            "train.spike_factor: 2.0; with train.on_bad",
        ),
        ({"train": {"spike_factor": 2.0, "on_bad_loss": "rewind"}}, "Ascend", None),
        ({"moe": EXPERTS | {"dispatch": "dropless"}}, "Ascend", None),
        ({"moe": {"dispatch": "dropless"}}, "GPU", None),  # one expert
        ({"moe": EXPERTS | {"record": "a"}, "parallel": {"data_parallel": 2}}, "Ascend", None),
    ],
)
def test_the_compiler_shards_what_it_can(tree, target, says):
    why = why_not_compiled(build(tree), target)
    assert why is None if says is None else says in why


@pytest.mark.parametrize(
    ("moe", "train"),
    [
        ({"router_freeze_step": 0}, {}),
        ({"router_warmup_steps": 1}, {}),
        ({"granularity": "slice"}, {}),
        ({"router": "top_k", "copies": 2}, {}),
        ({"replay": "choices.safetensors"}, {}),
        ({"record": "choices.safetensors"}, {}),
        ({"granularity": "slice", "shared_expert_num": 1}, {}),
        ({}, {"gradient_accumulation_steps": 2}),
    ],
)
def test_what_a_cluster_no_longer_refuses(moe, train):
    """Also with ZeRO."""
    parallel = {"data_parallel": 2, "expert_parallel": 2, "optimizer_shard": 1}
    config = build({"moe": EXPERTS | moe, "train": train, "parallel": parallel})
    for target in ("Ascend", "GPU"):
        assert check_mesh(config, 2, target) is None
        require_trainable(config, target)


def test_gpus_shard_the_optimizer_unless_told():
    usual, told = build({"parallel": {"data_parallel": 2}}), build({"parallel": {"optimizer_shard": 0}})
    assert with_defaults(usual, "GPU").parallel.optimizer_shard == 1
    assert with_defaults(usual, "Ascend").parallel.optimizer_shard == 0
    assert with_defaults(told, "GPU").parallel.optimizer_shard == 0
    assert with_defaults(build({}), "GPU").parallel.optimizer_shard == 0


@pytest.mark.parametrize("beside", [{"data_parallel": 2}, {"model_parallel": 2}])
def test_a_gpu_is_a_whole_stage(beside):
    config = build({"model": UNTIED, "parallel": STAGES | beside})
    refuse(refusals(config, "Ascend"))
    refuse(refusals(build({"model": UNTIED, "parallel": STAGES}), "GPU"))
    refuse(refusals(build({"parallel": beside}), "GPU"))
    with pytest.raises(UserError, match=r"^parallel\.pipeline_stage: 2; on GPU a stage is one device.*lazy_inline"):
        refuse(refusals(config, "GPU"))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {}}, "model.tie_word_embeddings: True; False with parallel.pipeline_stage (2)"),
        (
            {"parallel": {"data_parallel": 2, "optimizer_shard": 3}},
            "parallel.optimizer_shard: 3; 0 or 1 with parallel.pipeline_stage (2)",
        ),
        (
            {"moe": EXPERTS | {"router_warmup_steps": 3}},
            "moe.router_warmup_steps: 3; 0 with parallel.pipeline_stage (2)",
        ),
        ({"moe": EXPERTS | {"record": "a"}}, "moe.record: a; null with parallel.pipeline_stage (2)"),
        ({"moe": EXPERTS | {"replay": "a"}}, "moe.replay: a; null with parallel.pipeline_stage (2)"),
        ({"train": {"eval_every": 500}}, "train.eval_every: 500; 0 with parallel.pipeline_stage (2)"),
    ],
)
def test_what_does_not_go_with_stages_is_refused_in_one_line(tree, message):
    tree = {"model": UNTIED, "train": NO_EVALUATION} | tree
    with pytest.raises(UserError) as caught:
        require_trainable(build(tree | {"parallel": STAGES | tree.get("parallel", {})}))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_stages_accumulate_and_freeze():
    moe, train = EXPERTS | {"router_freeze_step": 3}, NO_EVALUATION | {"gradient_accumulation_steps": 2}
    config = build({"model": UNTIED, "moe": moe, "train": train, "parallel": STAGES})
    require_trainable(config)
    assert not list(refusals(config, "GPU"))
