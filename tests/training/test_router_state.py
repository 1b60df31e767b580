"""Runs whose routers have a state or read noise: checkpoints keep the state, resumed runs repeat the losses."""

import numpy as np
import pytest
from oracles.tiny_run import losses_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.data import load_data
from switchyard.training.loop import train

ROUTERS = {
    "sigmoid": {"router": "sigmoid", "num_experts_chosen": 2, "topk_bias_update_rate": 0.01, "aux_loss_factor": 0.0},
    "noisy": {"router": "noisy_top_k", "num_experts_chosen": 2, "losses": {"importance": 0.1, "load": 0.1}},
    "lots": {"router": "gshard", "num_experts_chosen": 2, "second_expert": "sampling", "drop_order": "random"},
}


def test_a_hash_table_is_balanced_by_the_training_text_and_saved(tmp_path, pynative):
    write_text(tmp_path)
    moe = {"router": "hash", "expert_num": 4}
    config = run_config(tmp_path, moe=moe, context={"mode": "pynative"}, train={"steps": 1})
    train(config)
    table = checkpoint.read(tmp_path / "runs" / "tiny").weights["layers.0.feed_forward.router.table"]
    counts = load_data(config).token_counts()
    loads = np.bincount(table, counts, 4)
    assert loads.max() / loads.mean() < 1.1
    longer = run_config(tmp_path, moe=moe, context={"mode": "pynative"}, train={"steps": 2})
    train(longer, resume=True)
    kept = checkpoint.read(tmp_path / "runs" / "tiny").weights["layers.0.feed_forward.router.table"]
    np.testing.assert_array_equal(kept, table)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_resumed_run_repeats_the_uninterrupted_one(name, tmp_path, pynative):
    write_text(tmp_path)
    moe, mode = {"expert_num": 4, "capacity_factor": 1.0} | ROUTERS[name], {"mode": "pynative"}
    train(run_config(tmp_path, moe=moe, context=mode, train={"steps": 4}))
    train(
        run_config(tmp_path, moe=moe, context=mode, train={"steps": 2, "name": "halves"}, schedule={"total_steps": 4})
    )
    train(
        run_config(tmp_path, moe=moe, context=mode, train={"steps": 4, "name": "halves"}, schedule={"total_steps": 4}),
        resume=True,
    )
    assert losses_of(tmp_path / "runs" / "halves") == losses_of(tmp_path / "runs" / "tiny")
    whole, halves = (checkpoint.read(tmp_path / "runs" / run).weights for run in ("tiny", "halves"))
    for weight, value in whole.items():
        np.testing.assert_array_equal(halves[weight], value, err_msg=weight)
    if name == "sigmoid":
        bias = whole["layers.0.feed_forward.router.bias"]
        assert set(np.round(np.abs(bias) / 0.01).astype(int)) <= {0, 1, 2, 3, 4} and np.abs(bias).max() > 0
