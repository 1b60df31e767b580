"""What the training step that is cut over devices refuses, before anything is compiled."""

import pytest

from switchyard.config import build
from switchyard.errors import UserError
from switchyard.training.parallel_step import parallel_step

TWO_STAGES = {"pipeline_stage": 2, "micro_batch_num": 2}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"moe": {"router_warmup_steps": 3}}, "moe.router_warmup_steps: 3; leave it at its default"),
        ({"moe": {"router_freeze_step": 0}}, "moe.router_freeze_step: 0; leave it at its default"),
        (
            {"train": {"gradient_accumulation_steps": 2}, "parallel": {"data_parallel": 2, "optimizer_shard": 1}},
            "train.gradient_accumulation_steps: 2; 1 with parallel.optimizer_shard (1)",
        ),
        ({"moe": {"expert_num": 4, "router": "top_k", "copies": 2}}, "moe.copies: 2; 1 where parallel degrees"),
        ({"parallel": TWO_STAGES}, "model.tie_word_embeddings: True; False with parallel.pipeline_stage (2)"),
        (
            {"parallel": TWO_STAGES | {"data_parallel": 2, "optimizer_shard": 3}},
            "parallel.optimizer_shard: 3; 0 or 1 with parallel.pipeline_stage (2)",
        ),
        (
            {"parallel": TWO_STAGES, "train": {"gradient_accumulation_steps": 2}},
            "train.gradient_accumulation_steps: 2; 1 with parallel.pipeline_stage (2): raise",
        ),
    ],
)
def test_what_is_not_cut_is_refused_in_one_line(tree, message):
    with pytest.raises(UserError) as caught:
        parallel_step(build(tree), 17)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
